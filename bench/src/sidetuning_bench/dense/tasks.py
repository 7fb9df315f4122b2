"""The twelve tasks of iTaskonomy: what each one's network gives, its loss (the paper's), and how it is measured.

Every task is measured twice: by its own measure (an error in its own units, mIoU, F1), and by a score in 0 … 1 that makes tasks
comparable. The score of mIoU and F1 is the measure itself; that of an error is f / (f + error), f being the error of the best constant
guess: 1 is perfect, 0.5 is no better than that guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.errors import UnknownNameError
from sidetuning.registry import unknown
from sidetuning_bench.dense.targets import target, units
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.domains import DEPTHS, DOMAINS, INVALID, domain_of
from sidetuning_bench.sequence import Score

ORDER = (
    "curvature", "segment_semantic", "reshading", "keypoints3d", "keypoints2d", "edge_texture", "edge_occlusion",
    "depth_zbuffer", "depth_euclidean", "normal", "class_object", "rgb",
)  # fmt: skip
IGNORED = -100  # label of pixels that nothing is known of


@dataclass(frozen=True)
class DenseTask:
    """One of the tasks; a subclass per kind of output.

    Attributes:
        domain: of Taskonomy.
        outputs: channels of the output, or classes.
        measure: what `value` gives.
    """

    domain: str
    outputs: int
    measure: str

    @property
    def head(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the head."""
        return "pixels", {"channels": self.outputs, "hidden": 48}

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        """What the loader gives as y, from raw tensors and masks (b, h, w)."""
        raise NotImplementedError

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The training loss."""
        raise NotImplementedError

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        """Sums over a batch from which `value` is computed; those of several batches are added."""
        raise NotImplementedError

    def value(self, tally: Tensor) -> float:
        """The task's own measure."""
        raise NotImplementedError

    def score(self, tally: Tensor, constant: float) -> Score:
        """Score and value; `constant` is the value of the best constant guess."""
        value = self.value(tally)
        return Score(value, value)

    def constant(self, y: Tensor) -> Tensor:
        """The best output for labels y that does not depend on the picture: (1, c, 1, 1), or (1, c) where it is no map."""
        raise NotImplementedError

    def picture(self, output: Tensor) -> Tensor:
        """An output or labels as an image for people, uint8 (b, 3, h, w)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Regression(DenseTask):
    """A map of numbers: masked L1, for curvature the square (the paper's losses): mean(w error) / mean(w)."""

    squared: bool = False

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        """Raw numbers with the mask as one more channel, (b, c + 1, h, w) int32."""
        weight = mask if domain_of(self.domain).geometric else torch.ones_like(mask)
        if self.domain in DEPTHS:  # the mask may be of another domain, or missing
            weight = weight & (raw[:, 0].int() < INVALID)
        return torch.cat([raw.int(), weight[:, None].int()], 1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        error = output - target(self.domain, y[:, :-1])
        error = error.square() if self.squared else error.abs()
        return (error.mean(1, keepdim=True) * y[:, -1:]).sum() / y[:, -1:].sum().clamp(min=1)

    def tally(self, output: Tensor, y: Tensor) -> Tensor:
        truth, guess = (units(self.domain, t) for t in (target(self.domain, y[:, :-1]), output))
        if self.domain == "normal":  # degrees
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
        """The median of valid pixels, per channel; for squares the mean."""
        values = target(self.domain, y[:, :-1]).movedim(1, 0).flatten(1)[:, (y[:, -1] > 0).flatten()]
        if not values.shape[1]:
            return torch.zeros(1, self.outputs, 1, 1)
        return (values.mean(1) if self.squared else values.median(1).values).view(1, -1, 1, 1)

    def picture(self, output: Tensor) -> Tensor:
        if output.shape[1] == self.outputs + 1:  # labels
            output = target(self.domain, output[:, :-1])
        shown = (output + 1) / 2
        if self.domain.startswith("depth"):
            metres = units(self.domain, output).clamp(0.25, 64)
            shown = torch.log2(metres / 0.25) / 8  # a quarter of a metre to 64 metres, each doubling alike
        if self.outputs == 2:  # curvatures: red and green around grey
            shown = torch.cat([shown, torch.full_like(shown[:, :1], 0.5)], 1)
        elif self.outputs == 1:
            shown = shown.expand(-1, 3, -1, -1)
        return (255 * shown).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Segmentation(DenseTask):
    """A class per pixel: cross-entropy, without pixels of class 0 (uncertain); mean IoU of classes that occur."""

    def labels(self, raw: Tensor, mask: Tensor) -> Tensor:
        """(b, h, w) int64. The sky is a class in Doom, so only class 0 is left out, not what has no depth."""
        return raw.long().masked_fill(raw == 0, IGNORED)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        total = F.cross_entropy(output, y, ignore_index=IGNORED, reduction="sum")
        return total / (y != IGNORED).sum().clamp(min=1)  # 0 where nothing is known, as of one frame alone

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
    """Scores of categories in the whole image: soft cross-entropy; F1 of what is present.

    Present is what has at least half the score of the strongest category, in truth and in prediction alike.
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
        """So many of the most frequent categories as bring the highest F1."""
        present = y >= y.amax(1, keepdim=True) / 2
        order = present.sum(0).argsort(descending=True, stable=True)
        sets = [torch.where(order.argsort() <= k, 0.0, -1e4)[None] for k in range(len(order))]
        return max(sets, key=lambda guess: self.value(self.tally(guess.expand(len(y), -1), y)))


def dense_task(name: str, frames: Taskonomy, classes: Sequence[str] = ()) -> DenseTask:
    """One of the twelve tasks, by its domain's name.

    Args:
        name: of the domain; "curvature" is short for principal_curvature.
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
    measure = {
        "curvature": "rms error", "normal": "mean angle, °", "depth_zbuffer": "mean error, m", "depth_euclidean": "mean error, m"
    }  # fmt: skip
    return Regression(domain, DOMAINS[domain].channels, measure.get(name, "mean error"), squared=name == "curvature")


PALETTE = torch.tensor(
    [(0, 0, 0), (120, 85, 50), (200, 200, 210), (110, 130, 150), (135, 206, 250), (40, 160, 60), (220, 40, 40), (250, 210, 40),
     (180, 60, 220), (40, 120, 40), (255, 150, 60), (255, 120, 180), (0, 140, 140), (140, 0, 70), (90, 90, 0), (0, 60, 160),
     (160, 120, 255), (240, 240, 160)], dtype=torch.uint8,
)  # fmt: skip
