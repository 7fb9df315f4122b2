"""Sides for any input: a perceptron and a small transformer, on images, token ids, sequences or vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ShapeError
from sidetuning.inputs import entry, image_of
from sidetuning.reach import modules_of
from sidetuning.sides import Side
from sidetuning.sides.fit import FitMap, FitTokens


def mlp(base: Base, hidden: int = 64, vocabulary: int | None = None) -> nn.Module:
    """A perceptron of one hidden layer, on the flattened input or on each token of a sequence.

    Args:
        base: gives the input and output shapes.
        hidden: width of the hidden layer.
        vocabulary: how many token ids there are, where the base's network does not tell.
    """
    x = image_of(base.example)
    if x is None or not x.is_floating_point() or (x.ndim == 3 and base.kind != "map"):
        return TokenMLP(base, hidden, vocabulary)
    if vocabulary is not None:
        raise ShapeError(f"the base reads numbers {tuple(x.shape)} and no token ids; leave vocabulary= out")
    return FlatMLP(math.prod(x.shape[1:]), hidden, base.output_shape)


class FlatMLP(nn.Module):
    """Shape: (b, …), flattened -> (b, *shape)."""

    def __init__(self, inputs: int, hidden: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inputs, self.shape = inputs, shape
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, math.prod(shape)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.inputs:
            raise ShapeError(f"the mlp side was built for inputs of {self.inputs} numbers, not {x.shape[1]}")
        return self.net(x).unflatten(1, self.shape)


class TokenMLP(Side):
    """Shape: ids (b, t) or a sequence (b, t, c) -> (b, t, d), or (b, d) where the base returns vectors."""

    def __init__(self, base: Base, hidden: int, vocabulary: int | None = None) -> None:
        super().__init__()
        self.embed = Embed(base, hidden, vocabulary)
        self.net = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        self.fit = FitTokens(base, hidden)

    def forward(self, inputs: Input, features: Features) -> Tensor:
        return self.fit(self.net(self.embed(inputs)), entry(inputs, "attention_mask"))


class Transformer(Side):
    """Pre-norm encoder layers over patches or tokens; padding is masked out.

    Args:
        base: gives the input and output shapes.
        width: channels of the tokens; a multiple of `heads`.
        layers: number of layers.
        heads: attention heads per layer.
        vocabulary: how many token ids there are, where the base's network does not tell.
        causal: a token attends to itself and to earlier ones alone; by default where the base does so.

    Shape: images (b, c, h, w), ids (b, t) or sequences (b, t, c) -> the base's output shape.
    """

    def __init__(
        self,
        base: Base,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        vocabulary: int | None = None,
        causal: bool | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ShapeError(f"the transformer side's width {width} is not a multiple of its {heads} heads")
        self.embed = Embed(base, width, vocabulary)
        self.layers = nn.ModuleList(encoder_layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.causal = base.causal if causal is None else causal
        if self.embed.grid is None and base.kind == "map":
            raise ShapeError("the transformer side makes maps from images only")
        self.fit = FitMap(base, width) if self.embed.grid else FitTokens(base, width)

    def forward(self, inputs: Input, features: Features) -> Tensor:
        mask = entry(inputs, "attention_mask")
        # (b, t, width)
        x = self.embed(inputs)
        for layer in self.layers:
            x = attend(layer, x, mask, self.causal)
        x = self.norm(x)
        if self.embed.grid is not None:
            return self.fit(x.transpose(1, 2).unflatten(2, self.embed.grid))
        return self.fit(x, mask)


def encoder_layer(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """One pre-norm layer without dropout, batch first."""
    return nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, _gelu, batch_first=True, norm_first=True)


def attend(layer: nn.Module, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Run an encoder layer on tokens x (b, t, c): none sees padding, nor, where that is asked, a later token."""
    padding = None if mask is None else mask == 0
    if not causal:
        out: Tensor = layer(x, src_key_padding_mask=padding)
        return out
    b, t = x.shape[:2]
    itself = torch.eye(t, dtype=torch.bool, device=x.device)
    hidden = torch.ones_like(itself).triu(1).expand(b, t, t)
    if padding is not None:
        # Padding before a text sees itself: a row of nothing would be NaN.
        hidden = (hidden | padding.unsqueeze(1)) & ~itself
    assert isinstance(layer, nn.TransformerEncoderLayer)
    heads = layer.self_attn.num_heads
    # (b heads, t, t)
    out = layer(x, src_mask=hidden.repeat_interleave(heads, 0))
    return out


def _gelu(x: Tensor) -> Tensor:
    # Not `F.gelu` itself: torch would take another path, with other rounding, where no gradient is needed.
    return F.gelu(x)


class Embed(nn.Module):
    """Tokens of one width, with sinusoidal positions.

    Images are cut into patches (about 8 x 8 of them), ids looked up in a small table as large as the base's
    vocabulary, sequences and vectors projected.

    Attributes:
        grid: (rows, columns) of the patches, or None where the input is no image.

    Shape: (b, t) ids, (b, c, h, w) images, (b, t, c) sequences or (b, c) vectors -> (b, t, width).
    """

    def __init__(self, base: Base, width: int, vocabulary: int | None = None) -> None:
        super().__init__()
        x = _read(base.example)
        self.grid: tuple[int, int] | None = None
        if not x.is_floating_point() and x.ndim == 2:
            self.layer: nn.Module = nn.Embedding(vocabulary or _vocabulary(base), width)
        elif vocabulary is not None:
            raise ShapeError(f"the base reads {tuple(x.shape)} and no token ids; leave vocabulary= out")
        elif x.ndim == 4:
            patch = max(1, min(x.shape[-2:]) // 8)
            self.layer = nn.Conv2d(x.shape[1], width, patch, stride=patch)
            self.grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        else:
            self.layer = nn.Linear(x.shape[-1], width)

    def forward(self, inputs: Input) -> Tensor:
        tokens: Tensor = self.layer(_read(inputs))
        if self.grid is not None:
            if tokens.shape[2:] != self.grid:
                raise ShapeError(
                    f"the side was built for images of {self.grid} patches, not {tuple(tokens.shape[2:])}; for another "
                    "size build the model on base.with_example(x)"
                )
            tokens = tokens.flatten(2).transpose(1, 2)
        elif tokens.ndim == 2:
            tokens = tokens.unsqueeze(1)
        places, mask = _positions(tokens), entry(inputs, "attention_mask")
        if mask is not None and mask.ndim == 2 and mask.shape == tokens.shape[:2]:
            # Counted from the first token that is none of the padding. (b, t, width)
            first = (mask != 0).int().argmax(1, keepdim=True)
            places = places[(torch.arange(tokens.shape[1], device=tokens.device) - first).clamp(min=0)]
        return tokens + places


def _read(inputs: Input) -> Tensor:
    """The one tensor that these sides read: the input itself, its image, or its token ids."""
    x = image_of(inputs)
    x = entry(inputs, "input_ids") if x is None else x
    if not isinstance(x, Tensor):
        raise ShapeError("this side needs a tensor input, or a mapping with input_ids or pixel_values")
    return x


def _positions(tokens: Tensor) -> Tensor:
    """Sinusoidal positions (t, width) of tokens (b, t, width): Vaswani et al. (2017), section 3.5."""
    length, width = tokens.shape[1:]
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=tokens.device) * (-math.log(10_000) / half))
    angles = torch.arange(length, device=tokens.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].to(tokens.dtype)


def _vocabulary(base: Base) -> int:
    """How many token ids there are: the rows of the base's largest embedding table, or what its configuration says.

    Raises:
        ShapeError: a base that has neither.
    """
    parts = [part for net in modules_of(base.net) for part in net.modules()]
    tables = [part.num_embeddings for part in parts if isinstance(part, nn.Embedding)]
    told = getattr(getattr(base.net, "config", None), "vocab_size", None)
    if not tables and not isinstance(told, int):
        raise ShapeError("the base does not tell how many token ids it knows: give side_options={'vocabulary': 30000}")
    return max(tables, default=told or 0)
