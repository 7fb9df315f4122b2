"""The twelve tasks of iTaskonomy: what each one's network gives, its loss (the paper's), and how it is measured.

Every task is measured twice: by its own measure (an error in its own units, mIoU, F1), and by a score in 0 … 1 that
makes tasks comparable. The score of mIoU and F1 is the measure itself. The score of an error is f / (f + error), where
f is the error of the best constant guess: 1 is perfect, 0.5 is no better than that guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.errors import UnknownNameError
from sidetuning.problems import along
from sidetuning.registry import unknown
from sidetuning.units import units_of
from sidetuning_bench.dense.targets import target, units
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.domains import DEPTHS, DOMAINS, INVALID, domain_of
from sidetuning_bench.sequence import Score

FIRST_HALF = ("curvature", "segment_semantic", "reshading", "keypoints3d", "keypoints2d", "edge_texture")
ORDER = (*FIRST_HALF, "edge_occlusion", "depth_zbuffer", "depth_euclidean", "normal", "class_object", "rgb")
MEASURES = {"curvature": "rms error", "normal": "mean angle, °"}
MEASURES |= {"depth_zbuffer": "mean error, m", "depth_euclidean": "mean error, m"}
# Label of pixels that nothing is known of.
IGNORED = -100
# Colours of classes, RGB.
COLOURS = (
    "000000 785532 c8c8d2 6e8296 87cefa 28a03c dc2828 fad228 b43cdc 287828 ff963c ff78b4 008c8c 8c0046 5a5a00 003ca0 "
    "a078ff f0f0a0"
)
PALETTE = torch.tensor([list(bytes.fromhex(colour)) for colour in COLOURS.split()], dtype=torch.uint8)


@dataclass(frozen=True)
class DenseTask:
    """One of the tasks; a subclass per kind of output.

    Attributes:
        domain: name of the domain of Taskonomy.
        outputs: number of channels of the output, or of classes.
        measure: name of what `value` gives.
    """

    domain: str
    outputs: int
    measure: str

    @property
    def head(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the head."""
        return "pixels", {"channels": self.outputs, "hidden": 48}

    def measured(self, frames: Taskonomy) -> DenseTask:
        """The task in the units of the training labels, of which some are read; others than numbers have none."""
        return self

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        """What the loader gives as y, from raw tensors and masks (b, h, w)."""
        raise NotImplementedError

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The training loss."""
        raise NotImplementedError

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        """Sums over a batch, from which `value` is computed; sums of several batches are added."""
        raise NotImplementedError

    def value(self, tally: Tensor) -> float:
        """The task's own measure."""
        raise NotImplementedError

    def score(self, tally: Tensor, constant: float) -> Score:
        """Score and value; `constant` is the value of the best constant guess."""
        value = self.value(tally)
        return Score(value, value)

    def constant(self, y: Tensor) -> Tensor:
        """The best output that is the same for all pictures, given y: (1, c, 1, 1), or (1, c) where it is no map."""
        raise NotImplementedError

    def picture(self, output: Tensor) -> Tensor:
        """An output or labels as an image for people, uint8 (b, 3, h, w)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Regression(DenseTask):
    """A map of numbers; the loss is mean(w |error|) / mean(w), for curvature with the square (the paper's losses).

    Attributes:
        squared: the loss is of squares.
        units: centres and scales of the channels, in the range of `target`: what the decoder returns is centre + scale
            times its last layer, and errors count in units of the scale. None is the original's: the whole range is 1.
    """

    squared: bool = False
    units: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def head(self) -> tuple[str, dict[str, Any]]:
        name, options = super().head
        named = {} if self.units is None else dict(zip(("centre", "scale"), map(list, self.units), strict=True))
        return name, {**options, **named}

    def measured(self, frames: Taskonomy) -> Regression:
        rows = spread(len(frames))
        y = self.labels(frames.tensors(self.domain, rows=rows), frames.tensors("mask", rows=rows))
        values = torch.where(y[:, -1:] > 0, target(self.domain, y[:, :-1]), torch.nan)
        centre, scale = units_of(values.transpose(0, 1).flatten(1).double().numpy()).tolist()
        return replace(self, units=(tuple(centre), tuple(scale)))

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        """Raw numbers with the mask as one more channel, (b, c + 1, h, w) int32."""
        weight = mask if domain_of(self.domain).geometric else torch.ones_like(mask)
        if self.domain in DEPTHS:
            # The mask may be of another domain, or missing.
            weight = weight & (raw[:, 0].int() < INVALID)
        return torch.cat([raw.int(), weight[:, None].int()], 1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        error = output - target(self.domain, y[:, :-1])
        if self.units is not None:
            error = error / along(torch.tensor(self.units[1], device=error.device), error)
        error = error.square() if self.squared else error.abs()
        return (error.mean(1, keepdim=True) * y[:, -1:]).sum() / y[:, -1:].sum().clamp(min=1)

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        truth, guess = (units(self.domain, t) for t in (target(self.domain, y[:, :-1]), output))
        if self.domain == "normal":
            # Degrees.
            error = torch.rad2deg(torch.acos((truth * guess).sum(1, keepdim=True).clamp(-1, 1)))
        else:
            error = truth - guess
            error = (error.square() if self.squared else error.abs()).mean(1, keepdim=True)
        return torch.stack([(error * y[:, -1:]).sum(dtype=torch.float64), y[:, -1:].sum(dtype=torch.float64)])

    def value(self, tally: Tensor) -> float:
        mean = float(tally[0] / tally[1].clamp(min=1))
        return mean**0.5 if self.squared else mean

    def score(self, tally: Tensor, constant: float) -> Score:
        value = self.value(tally)
        return Score(constant / (constant + value) if constant + value > 0 else 1.0, value)

    def constant(self, y: Tensor) -> Tensor:
        """The median of valid pixels per channel; the mean where the error is squared."""
        values = target(self.domain, y[:, :-1]).movedim(1, 0).flatten(1)[:, (y[:, -1] > 0).flatten()]
        if not values.shape[1]:
            return torch.zeros(1, self.outputs, 1, 1)
        return (values.mean(1) if self.squared else values.median(1).values).view(1, -1, 1, 1)

    def picture(self, output: Tensor) -> Tensor:
        if output.shape[1] == self.outputs + 1:
            # Labels.
            output = target(self.domain, output[:, :-1])
        shown = (output + 1) / 2
        if self.domain.startswith("depth"):
            # A quarter of a metre to 64 metres; every doubling is the same step.
            metres = units(self.domain, output).clamp(0.25, 64)
            shown = torch.log2(metres / 0.25) / 8
        if self.outputs == 2:
            # Curvatures: red and green around grey.
            shown = torch.cat([shown, torch.full_like(shown[:, :1], 0.5)], 1)
        elif self.outputs == 1:
            shown = shown.expand(-1, 3, -1, -1)
        return (255 * shown).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Segmentation(DenseTask):
    """A class per pixel, without pixels of class 0 (uncertain): cross-entropy, and mean IoU of classes that occur."""

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        """Classes (b, h, w) int64. The sky is a class in Doom: only class 0 is ignored, not pixels without depth."""
        return raw.long().masked_fill(raw == 0, IGNORED)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        # 0 where nothing is known, which may happen in a batch of one frame.
        total = F.cross_entropy(output, y, ignore_index=IGNORED, reduction="sum")
        return total / (y != IGNORED).sum().clamp(min=1)

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        known = y != IGNORED
        pairs = y[known] * self.outputs + output.argmax(1)[known]
        return torch.bincount(pairs, minlength=self.outputs**2).view(self.outputs, self.outputs).double()

    def value(self, tally: Tensor) -> float:
        both = tally.diag()
        either = tally.sum(0) + tally.sum(1) - both
        occurs = tally.sum(1) > 0
        return float((both / either.clamp(min=1))[occurs].mean()) if occurs.any() else 0.0

    def constant(self, y: Tensor) -> Tensor:
        """The class that most pixels have."""
        counts = torch.bincount(y[y != IGNORED], minlength=self.outputs)
        return F.one_hot(counts.argmax(), self.outputs).float().view(1, -1, 1, 1)

    def picture(self, output: Tensor) -> Tensor:
        ids = (output if output.ndim == 3 else output.argmax(1)).clamp(min=0)
        return PALETTE[ids % len(PALETTE)].movedim(-1, 1)


@dataclass(frozen=True)
class Categories(DenseTask):
    """Scores of categories in the whole image: soft cross-entropy, and F1 of the categories that are present.

    A category is present where it has at least half the score of the strongest one, in truth and in prediction alike.
    """

    @property
    def head(self) -> tuple[str, dict[str, Any]]:
        return "linear", {"outputs": self.outputs}

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        return target(self.domain, raw)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y)

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        guess, truth = (p >= p.amax(1, keepdim=True) / 2 for p in (output.softmax(1), y))
        return torch.stack([(guess & truth).sum(), (guess & ~truth).sum(), (~guess & truth).sum()]).double()

    def value(self, tally: Tensor) -> float:
        return float(2 * tally[0] / (2 * tally[0] + tally[1] + tally[2]).clamp(min=1))

    def constant(self, y: Tensor) -> Tensor:
        """The most frequent categories, as many as bring the highest F1."""
        present = y >= y.amax(1, keepdim=True) / 2
        order = present.sum(0).argsort(descending=True, stable=True)
        sets = [torch.where(order.argsort() <= k, 0.0, -1e4)[None] for k in range(len(order))]
        return max(sets, key=lambda guess: self.value(self.tally(guess.expand(len(y), -1), y)))


def spread(count: int, some: int = 500) -> list[int]:
    """Rows spread evenly over so many, `some` of them at most."""
    return sorted({k * count // some for k in range(some)})


def dense_task(name: str, frames: Taskonomy, classes: Sequence[str] = ()) -> DenseTask:
    """One of the twelve tasks, by its domain's name.

    Args:
        name: name of the domain; "curvature" is short for principal_curvature.
        frames: a data set with that domain, for the number of classes.
        classes: names of the classes of segment_semantic.

    Raises:
        UnknownNameError: no such task.
    """
    if name not in ORDER:
        raise UnknownNameError(unknown("task", name, ORDER, verb="one of the twelve"))
    domain = domain_of(name).name
    if name == "segment_semantic":
        return Segmentation(domain, len(classes), "mean IoU")
    if name == "class_object":
        return Categories(domain, frames.shapes[domain][-1], "F1")
    measure = MEASURES.get(name, "mean error")
    return Regression(domain, DOMAINS[domain].channels, measure, squared=name == "curvature")
