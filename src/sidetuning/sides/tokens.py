"""Small sides for texts that read the base's own token embeddings (a tap), and so need no table of their own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input, entry
from sidetuning.errors import ShapeError
from sidetuning.sides import Side
from sidetuning.sides.fit import FitTokens
from sidetuning.sides.transformer import encoder_layer


class TokenSide(Side):
    """What the two share: the first tap, projected to a width, and the way to the base's shape.

    Shape: taps (b, t, c) and a mask (b, t) -> as the base's output. What stands at padding never matters.
    """

    def __init__(self, base: Base, width: int) -> None:
        super().__init__()
        sequences = [name for name, shape in base.tap_shapes.items() if len(shape) == 2]
        if not sequences or base.kind == "map":
            raise ShapeError(
                "this side reads token embeddings: name them as a tap, such as load_base('hf:…', taps=['embeddings'])"
            )
        self.taps = (sequences[0],)
        self.down = nn.Linear(base.tap_shapes[sequences[0]][-1], width)
        self.norm = nn.LayerNorm(width)
        self.fit = FitTokens(base, width)

    def body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(b, t, width) -> the same."""
        raise NotImplementedError

    def forward(self, inputs: Input, features: Features) -> Tensor:
        mask = entry(inputs, "attention_mask")
        return self.fit(self.norm(self.body(self.down(features.taps[self.taps[0]]), mask)), mask)


class Slim(TokenSide):
    """A slim transformer: the base's shape at a fraction of its width.

    Args:
        base: a base whose first tap is its embeddings.
        width: of the tokens; a multiple of `heads`.
        layers: how many.
        heads: attention heads per layer.
    """

    def __init__(self, base: Base, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        if width % heads:
            raise ShapeError(f"the slim side's width {width} is not a multiple of its {heads} heads")
        super().__init__(base, width)
        self.layers = nn.ModuleList(encoder_layer(width, heads) for _ in range(layers))

    def body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        padding = None if mask is None else mask == 0
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x


class Convolutional(TokenSide):
    """Residual convolutions over the tokens, each looking twice as far as the one before.

    Args:
        base: a base whose first tap is its embeddings.
        width: of the tokens.
        layers: how many; with 5 wide kernels, 4 of them see 61 tokens.
        kernel: width of the kernels, odd.
    """

    def __init__(self, base: Base, width: int = 96, layers: int = 4, kernel: int = 5) -> None:
        super().__init__(base, width)
        if kernel % 2 == 0:
            raise ShapeError(f"a kernel of {kernel} tokens has no middle; make it odd")
        self.layers = nn.ModuleList(Dilated(width, 2**i, kernel) for i in range(layers))

    def body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Dilated(nn.Module):
    """A residual convolution over tokens (b, t, width), `dilation` apart; padding counts as 0."""

    def __init__(self, width: int, dilation: int, kernel: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=(kernel // 2) * dilation, dilation=dilation)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = F.gelu(self.norm(x))
        if mask is not None:
            h = h * mask.to(x.dtype).unsqueeze(-1)
        return x + self.conv(h.transpose(1, 2)).transpose(1, 2)
