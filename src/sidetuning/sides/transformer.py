"""A small transformer encoder on images, token ids or sequences."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base
from sidetuning.errors import ShapeError
from sidetuning.sides.embed import Embed
from sidetuning.sides.fit import FitMap, FitTokens


class Transformer(nn.Module):
    """Pre-norm encoder layers over patches or tokens; padding is masked out.

    Args:
        base: gives the input and output shapes.
        width: channels of the tokens; a multiple of `heads`.
        layers: number of layers.
        heads: attention heads per layer.

    Shape: images (b, c, h, w), ids (b, t) or sequences (b, t, c) -> the base's output shape.
    """

    def __init__(self, base: Base, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"the transformer side's width {width} is not a multiple of its {heads} heads")
        self.embed = Embed(base, width)
        self.layers = nn.ModuleList(encoder_layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        if self.embed.grid is None and base.kind == "map":
            raise ShapeError("the transformer side makes maps from images only")
        self.fit = FitMap(base, width) if self.embed.grid else FitTokens(base, width)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Only the ids (or images) and the mask are used; the rest is what transformers' tokenizers add."""
        # (b, t, width)
        x = self.embed(input_ids)
        padding = None if attention_mask is None else attention_mask == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        x = self.norm(x)
        if self.embed.grid is not None:
            return self.fit(x.transpose(1, 2).unflatten(2, self.embed.grid))
        return self.fit(x, attention_mask)


def encoder_layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """One pre-norm layer without dropout, batch first."""
    return nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, _gelu, batch_first=True, norm_first=True)


def _gelu(x: Tensor) -> Tensor:
    # Not `F.gelu` itself: torch would take another path, with other rounding, where no gradient is needed.
    return F.gelu(x)
