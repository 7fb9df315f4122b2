"""A side that fuses inner maps of the base: brought to one width and size, added, refined by a residual block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ShapeError
from sidetuning.sides import Side
from sidetuning.sides.fit import BatchNorm, FitMap


class Fusion(Side):
    """The taps of a base that gives maps, summed: a side of few parameters.

    h = relu(sum_i BN(conv_i(tap_i))), h = relu(h + BN(conv(h))), then to the base's output shape.
    A tap that is larger than the smallest one is reduced by a strided 3x3 convolution, the others are mixed by a 1x1.
    The base has done the work of seeing already, so this learns more per parameter than a side that reads the image.

    Args:
        base: with taps that are maps.
        width: channels inside.
        shift: augmentation of training: each sample's maps are moved by up to so many cells of the largest map, in both
            directions, all maps by the same part of the image (rounded towards none); zeros come in.

    Shape: taps (b, c_i, h_i, w_i) -> the base's output shape.

    Raises:
        ShapeError: the base has no taps, or taps that are not maps.
    """

    def __init__(self, base: Base, width: int = 48, shift: int = 0) -> None:
        super().__init__()
        shapes = base.tap_shapes
        if not shapes or any(len(shape) != 3 for shape in shapes.values()):
            raise ShapeError(
                f"the fusion side reads maps inside the base, and its taps are {shapes or 'none'}: "
                "name some, load_base(…, taps=[…])"
            )
        largest = max(shape[1] for shape in shapes.values())
        if not 0 <= shift <= largest:
            raise ShapeError(f"maps of {largest} rows cannot be moved by {shift} cells; give 0 to {largest}")
        self.shift = shift
        self.size: tuple[int, int] = min((shape[1], shape[2]) for shape in shapes.values())
        self.taps = tuple(shapes)
        self.reduce = nn.ModuleList(self._reduce(shape, width) for shape in shapes.values())
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = BatchNorm(width)
        self.fit = FitMap(base, width)

    def _reduce(self, shape: tuple[int, ...], width: int) -> nn.Module:
        channels, stride = shape[0], max(1, round(shape[1] / self.size[0]))
        kernel, padding = (3, 1) if stride > 1 else (1, 0)
        conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
        return nn.Sequential(conv, BatchNorm(width))

    def forward(self, inputs: Input, features: Features) -> Tensor:
        maps = [features.taps[name] for name in self.taps]
        if self.training and self.shift:
            maps = random_shift(maps, self.shift)
        total: Tensor | None = None
        for reduce, tap in zip(self.reduce, maps, strict=True):
            part = reduce(tap.contiguous(memory_format=torch.channels_last))
            if part.shape[-2:] != self.size:
                part = F.adaptive_avg_pool2d(part, self.size)
            total = part if total is None else total + part
        assert total is not None
        h = total.relu()
        return self.fit((h + self.norm(self.conv(h))).relu())


def random_shift(maps: Sequence[Tensor], cells: int) -> list[Tensor]:
    """Move the maps of each sample together, by up to `cells` cells of the largest one; zeros come in at the edge.

    Draws from torch's generator. Shape: each (b, c_i, h_i, w_i) -> the same.
    """
    largest, b = max(m.shape[-2] for m in maps), len(maps[0])
    moves = torch.randint(-cells, cells + 1, (2, b))
    sample = torch.arange(b)[:, None, None]
    moved = []
    for m in maps:
        h, w = m.shape[-2:]
        pad = cells * h // largest
        down, right = (moves * h / largest).trunc().long() + pad
        # (b, h', w', c): whole channels are copied at once.
        padded = F.pad(m, (pad,) * 4).permute(0, 2, 3, 1)
        rows, columns = down[:, None] + torch.arange(h), right[:, None] + torch.arange(w)
        moved.append(padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))
    return moved
