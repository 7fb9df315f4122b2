"""Learning in closed form: ridge regression on what enters a head's last linear layer. No gradient is computed.

One pass over a loader gives sums, and the weights follow from the sums alone. Processes add their sums, so that they
learn what one process does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sidetuning.artifacts import tensors_sha256
from sidetuning.beside import base_text
from sidetuning.branch import Branch
from sidetuning.errors import TaskError
from sidetuning.launch import default_accelerator
from sidetuning.problems import Classes, Labels
from sidetuning.sums import EXACT, Sums, check_views, collect, last_linear
from sidetuning.training import in_evaluation, trainable
from sidetuning.units import measured

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sidetuning.tuner import SideTuner

# Strengths that are tried, as multiples of the features' mean sum of squares around their means.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-10, 5))
# The strength among them that is tried first of many features.
FIRST = 7
# Vectors that estimate a trace where the features are many (Hutchinson 1990).
PROBES = 64
# A solution that leaves less of the rows' degrees of freedom fits them all, and its residual is rounding.
LEFT = 0.02


@dataclass(frozen=True)
class SolveResult:
    """What a solution in closed form is.

    Attributes:
        rows: rows that counted.
        strength: the ridge strength, as a multiple of the features' mean sum of squares.
        error: mean square error that is expected of rows that were not seen (generalised cross-validation); of numbers
            in the targets' units.
        seconds: time of all of it.
    """

    rows: int
    strength: float
    error: float
    seconds: float


@torch.no_grad()
def solve(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    *,
    strength: float | None = None,
    views: int = 1,
    keep_statistics: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> SolveResult:
    """Set the last linear layer of a task's head to the ridge regression of the targets on what enters the layer.

    W = (XᵀX + λI)⁻¹ XᵀY on centred features X and targets Y: one number a class or label, 1 where it is right; λ by
    generalised cross-validation (Golub, Heath and Wahba 1979). Scores of classes and labels are scaled to logits, as
    linear discriminant analysis does from the same sums. The side and the rest of the head stay as they are; `fit` may
    go on from here, and with `add_task(init="zero")` starts exactly here.

    Args:
        model: the model.
        task: a task of the problem "classes", "tokens", "labels" or "numbers".
        loader: as in `fit`; cached features spare the base pass.
        strength: λ as a multiple of the features' mean sum of squares; by default chosen.
        views: a batch has this many views of each sample, such as an image and its mirror image: all first views, then
            all second ones. What enters the layer is averaged over them, as `predict(mirror=True)` averages answers.
        keep_statistics: keep the sums with the task, of double precision in every product, so that `update` adds
            samples and `forget` takes some out. They need d²/2 numbers of 8 bytes for d features; they are saved beside
            the task, in `statistics.safetensors`, and are not published by `push`.
        accelerator: as in `fit`; processes add their sums.
        progress: show a bar.

    Raises:
        TaskError: the task may not be trained, its head does not end in a linear layer, or its problem is another.
        DataError: targets that the problem does not take, no rows, or labels that are partly ignored.
        TrainingError: features that are not finite.
    """
    started = time.monotonic()
    branch, accelerator = ready(model, task, loader, strength, views, accelerator)
    layer = last_linear(branch, task)
    # As `fit` does, which may go on from here: in the units of the targets, if they are numbers.
    with in_evaluation(branch), measured(branch, model, task, loader, branch.problem, 0, accelerator) as batches:
        exact = keep_statistics
        sums = collect(model, branch, task, layer, batches, accelerator, progress, views=views, exact=exact)
        chosen, error = settle(branch, layer, sums, strength)
    branch.beside.pop("statistics", None)
    if keep_statistics:
        keep(model, branch, sums, strength, views)
    return SolveResult(int(sums.count), chosen, error, time.monotonic() - started)


@torch.no_grad()
def sums_of(model: SideTuner, task: str, loader: Iterable[Any], strength: float | None) -> Sums:
    """The sums that `solve` takes of a task whose targets have no units; arguments are those of `solve`."""
    branch, accelerator = ready(model, task, loader, strength, 1, None)
    with in_evaluation(branch):
        return collect(model, branch, task, last_linear(branch, task), loader, accelerator, progress=False)


def ready(
    model: SideTuner, task: str, loader: Iterable[Any], strength: float | None, views: int, given: Accelerator | None
) -> tuple[Branch, Accelerator]:
    """The branch of a task that may be solved, and the accelerator; errors are those of `solve`."""
    branch = trainable(model, task, loader)
    if strength is not None and not (isinstance(strength, (int, float)) and math.isfinite(strength) and strength > 0):
        raise TaskError(f"strength must be a positive number, not {strength!r}")
    check_views(views)
    accelerator = default_accelerator() if given is None else given
    model.to(accelerator.device)
    return branch, accelerator


def keep(model: SideTuner, branch: Branch, sums: Sums, strength: float | None, views: int) -> None:
    """Keep sums beside a task, with the weights that were solved from them: of others they are not believed."""
    text = {"weights": tensors_sha256(branch), "strength": strength, "views": views}
    branch.beside["statistics"] = sums.kept({**text, **base_text(model.base.identity())})


class _Ridge:
    """Ridge regression for any strength, from the sums around the means of so many rows."""

    def __init__(self, xx: Tensor, xy: Tensor, rows: int) -> None:
        self.xx, self.xy, self.rows = xx, xy, rows
        self.spectrum = None
        # As many directions as the rows can have around their mean.
        self.rank = min(len(xx), rows - 1)
        generator = torch.Generator().manual_seed(0)
        # One decomposition gives all strengths; of many features it takes longer than the few that are needed.
        if len(xx) <= EXACT:
            values, vectors = torch.linalg.eigh(xx)
            self.spectrum = values[len(xx) - self.rank :].clamp(min=0), vectors[:, len(xx) - self.rank :]
        elif rows <= EXACT:
            # All that the rows span (Halko, Martinsson and Tropp 2011).
            some = torch.randn(len(xx), self.rank, generator=generator, dtype=torch.float64).to(xx)
            span = torch.linalg.qr(xx @ some).Q
            values, vectors = torch.linalg.eigh(span.T @ xx @ span)
            self.spectrum = values.clamp(min=0), span @ vectors
        else:
            signs = torch.randint(0, 2, (len(xx), PROBES), generator=generator)
            self.probes = (2.0 * signs - 1).to(xx)

    def solution(self, strength: float) -> tuple[Tensor, float] | None:
        """The weights (d, k), and the share of the rows' degrees of freedom that is left to judge them by.

        None where the strength is lost in the rounding of the sums.
        """
        if self.spectrum is not None:
            values, vectors = self.spectrum
            weight = vectors @ ((vectors.T @ self.xy) / (values + strength).unsqueeze(1))
            # The mean takes one.
            left = self.rows - 1 - self.rank + float((strength / (values + strength)).sum())
            return weight, left / self.rows
        ridged = self.xx.clone()
        ridged.diagonal().add_(strength)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        if int(failed):
            return None
        both = torch.cholesky_solve(torch.cat([self.xy, self.probes], 1), factor)
        weight, inverse = both.split([self.xy.shape[1], PROBES], 1)
        trace = len(self.xx) - strength * float((self.probes * inverse).sum()) / PROBES
        return weight, (self.rows - 1 - trace) / self.rows


def settle(branch: Branch, layer: nn.Linear, sums: Sums, strength: float | None) -> tuple[float, float]:
    """Write the solution of the sums into the layer; the strength that was taken, and the error that is expected."""
    mean, middle, xx, xy, yy = sums.centred()
    rows = float(sums.count)
    unit = float(xx.diagonal().mean()) or 1.0
    ridge = _Ridge(xx, xy, int(rows))

    def judged(multiple: float) -> _Solution | None:
        solution = ridge.solution(multiple * unit)
        if solution is None:
            return None
        weight, left = solution
        return _Solution(multiple, weight, left, (weight * xy).sum(0), (weight * (xx @ weight)).sum(0), yy, rows)

    best = _least(judged, exact=ridge.spectrum is not None) if strength is None else judged(strength)
    if best is None:
        raise TaskError(f"strength {strength} is lost in rounding with {len(xx)} features; give a larger one, or none")
    weight, bias = best.weight, middle - mean @ best.weight
    if isinstance(branch.problem, (Classes, Labels)):
        slope, shift = best.logits(middle, alone=isinstance(branch.problem, Labels))
        weight, bias = weight * slope, bias * slope + shift
    layer.weight.copy_(weight.T)
    layer.bias.copy_(bias)
    scale = 1.0 if branch.units is None else branch.units[1].double()
    return best.multiple, float((best.errors * scale**2).mean())


def _least(judged: Callable[[float], _Solution | None], exact: bool) -> _Solution | None:
    """The solution with the least error, which has one valley."""
    tried: dict[int, _Solution | None] = {}

    def error(i: int) -> tuple[float, int]:
        if i not in tried:
            tried[i] = judged(STRENGTHS[i])
        solution = tried[i]
        # Of those that nothing can be told of, the larger.
        return math.inf if solution is None else float(solution.errors.mean()), -i

    if exact:
        # Every third strength finds it, the two beside it its bottom.
        lowest = min(range(1, len(STRENGTHS), 3), key=error)
        lowest = min((i for i in (lowest, lowest - 1, lowest + 1) if i < len(STRENGTHS)), key=error)
    else:
        # Each takes a second of thousands of features: up or down from the usual one.
        lowest, before = FIRST, -1
        while lowest != before:
            before = lowest
            lowest = min((i for i in (before, before - 1, before + 1) if 0 <= i < len(STRENGTHS)), key=error)
    return tried[lowest]


@dataclass(frozen=True)
class _Solution:
    """A solution for one strength, with sums over rows of what it predicts, around the means.

    Attributes:
        multiple: the strength.
        weight: (d, k).
        left: share of the rows' degrees of freedom that the solution leaves.
        agreement, size, target: sums of prediction x target, of prediction² and of target², each (k).
        rows: number of rows.
    """

    multiple: float
    weight: Tensor
    left: float
    agreement: Tensor
    size: Tensor
    target: Tensor
    rows: float

    @property
    def growth(self) -> float:
        """How much larger the error of a row is where it was not seen, on average."""
        return 1 / max(self.left, LEFT)

    @property
    def errors(self) -> Tensor:
        """The mean square error (k) that is expected of rows that were not seen; infinite where nothing tells it."""
        if self.left < LEFT:
            return torch.full_like(self.target, math.inf)
        return (self.target - 2 * self.agreement + self.size).clamp(min=0) / self.rows * self.growth**2

    def logits(self, share: Tensor, *, alone: bool) -> tuple[Tensor, Tensor]:
        """Slope and shift (k or 1) that make scores logits: those of two normal distributions of one variance.

        Args:
            share: the share of rows with each label (k).
            alone: labels stand alone; classes share one slope, so that the highest score stays the highest.
        """
        grown = self.growth
        target, agreement, size = (total / self.rows for total in (self.target, self.agreement, self.size))
        # Of rows that were not seen, as leaving each out would give: prediction = target - growth x residual.
        unseen = target - grown * (target - agreement)
        spread = target - 2 * grown * (target - agreement) + grown**2 * (target - 2 * agreement + size)
        # How far the score's mean is higher where the label is right, and the variance around both means.
        distance = (unseen / target.clamp(min=1e-12)).clamp(min=1e-6)
        within = (spread - target * distance.square()).clamp(min=1e-12)
        # Of n rows without a mistake nobody can tell odds above n + 1 (Laplace's rule of succession).
        most = math.log(self.rows + 1) + math.log(max(2, len(share)))
        if not alone:
            # Two scores of k that sum to one differ with 2 k / (k - 1) times the variance of one.
            slope = distance.sum() / within.sum() * (1 - 1 / len(share))
            return slope.clamp(0.1, most).reshape(1), torch.zeros_like(share[:1])
        slope, odds = (distance / within).clamp(max=2 * most), (share / (1 - share)).clamp(1e-6, 1e6).log()
        # The score's mean over all rows is the share of the label.
        return slope, odds - slope * (share + distance * (0.5 - share))
