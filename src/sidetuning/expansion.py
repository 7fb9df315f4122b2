"""A fixed random expansion of what the base saw: wide features that are drawn from a seed and stored nowhere."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sidetuning.base import Base, Features, Input
from sidetuning.errors import TaskError
from sidetuning.inputs import entry
from sidetuning.sides.fit import masked_mean


class Expansion:
    """Random features of the base's taps, averaged over places: r = mean over places of relu(P z), P of -1 and 1.

    z is a tap, or the code of a base without taps, of mean 0 and variance 1 in each sample: no data is needed. ReLU
    before the mean keeps which channels go together at a place (after Rahimi and Recht, NeurIPS 2007, and Coates and
    Ng 2011); of pooled taps, nothing would be left of it. Each tap gives an equal share of the features.

    Args:
        base: with the taps that are read.
        width: number of features.
        grid: maps are averaged to at most this many rows first, and to as many columns as keep their shape.
        seed: seed of P. It is the same on every platform and in every version: raw bits of a counter-based generator.

    Attributes:
        key: equal for expansions that give equal features.

    Shape: taps (b, c, h, w), (b, t, c) or (b, c) -> (b, width).
    """

    def __init__(self, base: Base, width: int, grid: int, seed: int) -> None:
        self.taps = tuple(base.tap_shapes)
        shapes = list(base.tap_shapes.values()) or [base.output_shape]
        if width < len(shapes) or grid < 1 or not 0 <= seed < 2**64:
            raise TaskError(
                f"a random expansion has a feature at least for each of its {len(shapes)} taps, a grid of 1 or "
                f"more, and a seed of 0 to 2**64 - 1, not width={width}, grid={grid} and seed={seed}"
            )
        self.width = width
        channels = [shape[0] if len(shape) == 3 else shape[-1] for shape in shapes]
        shares = [width * (i + 1) // len(shapes) - width * i // len(shapes) for i in range(len(shapes))]
        self.key = (self.taps, tuple(channels), tuple(shares), grid, seed)

    def __call__(self, inputs: Input, features: Features) -> Tensor:
        """The features (b, width) of prepared `inputs` and what the base made of them."""
        _, channels, shares, grid, seed = self.key
        read = [features.taps[name] for name in self.taps] or [features.out]
        mask = entry(inputs, "attention_mask")
        parts = []
        for i, (tap, c, share) in enumerate(zip(read, channels, shares, strict=True)):
            matrix = signs(seed, i, c, share).to(tap)
            # (b, places, c)
            places = _places(tap, grid)
            masked = mask if tap.ndim == 3 and mask is not None and mask.shape == tap.shape[:2] else None
            projected = (_standard(places, masked) @ matrix).relu_()
            parts.append(masked_mean(projected, masked) / math.sqrt(c))
        return torch.cat(parts, 1)


def _places(tap: Tensor, grid: int) -> Tensor:
    if tap.ndim == 4:
        h, w = tap.shape[2:]
        if h > grid:
            tap = F.adaptive_avg_pool2d(tap, (grid, max(1, round(w * grid / h))))
        return tap.flatten(2).transpose(1, 2)
    return tap.unsqueeze(1) if tap.ndim == 2 else tap


def _standard(places: Tensor, mask: Tensor | None) -> Tensor:
    """Mean 0 and variance 1 over the places and channels (b, places, c) of each sample; padding does not count."""
    if mask is None:
        return F.layer_norm(places, places.shape[1:])
    mean = masked_mean(places, mask).mean(1)[:, None, None]
    variance = masked_mean((places - mean).square(), mask).mean(1)[:, None, None]
    return (places - mean) * (variance + 1e-5).rsqrt()


def signs(seed: int, stream: int, rows: int, columns: int) -> Tensor:
    """A matrix of -1 and 1: bits of Philox (Salmon et al., SC 2011), the lowest first. Tasks share its memory."""
    return torch.from_numpy(_signs(seed, stream, rows, columns))


# An array, since a tensor that is made while a graph is traced is of that graph.
@functools.lru_cache(maxsize=64)
def _signs(seed: int, stream: int, rows: int, columns: int) -> NDArray[np.float32]:
    raw = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(-(-rows * columns // 64))
    bits = np.unpackbits(raw.astype("<u8").view(np.uint8), bitorder="little", count=rows * columns)
    return bits.reshape(rows, columns).astype(np.float32) * 2 - 1
