"""A ladder over the base's taps (Sung et al., NeurIPS 2022): one small block per tap, gated, down-projected."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ShapeError
from sidetuning.inputs import entry
from sidetuning.sides import Side
from sidetuning.sides.fit import FitMap, FitTokens, resize
from sidetuning.sides.generic import attend, encoder_layer


class Ladder(Side):
    """A small block per tap, from the input's end to the output's: ladder side-tuning (Sung et al., 2022).

    h_i = block_i(g_i down_i(tap_i) + (1 - g_i) h_(i-1)), g_i = sigmoid(gate_i); then to the base's shape.
    It never sees the input, only the taps, in the order in which the base was told to keep them, and sends no gradient
    into the base. Blocks are residual 3x3 convolutions on maps, encoder layers on sequences, linear layers on vectors,
    and on sequences without heads.

    Args:
        base: a base with taps, all maps, all sequences or all vectors.
        width: channels of the ladder, to which every tap is projected down.
        heads: attention heads, on sequences; with 0 a token sees itself alone, and what the base made of the others.
        causal: a token attends to itself and to earlier ones alone; by default where the base does so.
    """

    def __init__(self, base: Base, width: int = 32, heads: int = 4, causal: bool | None = None) -> None:
        super().__init__()
        self.causal = base.causal if causal is None else causal
        if not base.tap_shapes:
            raise ShapeError(
                "the ladder side climbs over taps and this base has none: name some, load_base(…, taps=[…])"
            )
        dimensions = {len(shape) for shape in base.tap_shapes.values()}
        if len(dimensions) > 1 or (dimensions == {1} and base.kind != "vector"):
            raise ShapeError(f"the ladder's taps must be all maps, all sequences or all vectors, not {base.tap_shapes}")
        self.taps = tuple(base.tap_shapes)
        self.dimension = dimensions.pop()
        channels = [shape[0] if len(shape) == 3 else shape[-1] for shape in base.tap_shapes.values()]
        if self.dimension == 3:
            self.down = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
            self.blocks = nn.ModuleList(_MapBlock(width) for _ in channels)
            self.fit: nn.Module = FitMap(base, width)
        else:
            self.down = nn.ModuleList(nn.Linear(c, width) for c in channels)
            sequence = self.dimension == 2
            self.tokenwise = sequence and heads == 0
            if sequence and heads and width % heads:
                raise ShapeError(f"the ladder's width {width} is not a multiple of its {heads} heads")
            self.blocks = nn.ModuleList(
                encoder_layer(width, heads) if sequence and heads else _VectorBlock(width) for _ in channels
            )
            if sequence and base.kind == "map":
                raise ShapeError("a ladder over sequences cannot make a map")
            self.fit = FitTokens(base, width) if sequence else nn.Linear(width, base.width)
        self.gates = nn.Parameter(torch.zeros(len(channels)))

    def forward(self, inputs: Input, features: Features) -> Tensor:
        h: Tensor | None = None
        mask = entry(inputs, "attention_mask")
        length = mask.shape[1] if mask is not None else features.out.shape[1] if features.out.ndim == 3 else None
        for name, down, block, gate in zip(self.taps, self.down, self.blocks, self.gates.sigmoid(), strict=True):
            if self.dimension == 2 and length is not None and features.taps[name].shape[1] != length:
                raise ShapeError(
                    f"the tap '{name}' has {features.taps[name].shape[1]} tokens and the text {length}: the network "
                    "pads its texts inside; give texts of a length that it does not pad, or other taps"
                )
            rung = down(features.taps[name])
            if h is not None:
                h = resize(h, rung.shape[-2:]) if self.dimension == 3 else h
                rung = gate * rung + (1 - gate) * h
            looks = self.dimension == 2 and not self.tokenwise
            h = attend(block, rung, mask, self.causal) if looks else block(rung)
        return self.fit(h, mask) if self.dimension == 2 else self.fit(h)


class _MapBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2 if width % 2 == 0 else 1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).relu())


class _VectorBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x).relu())
