"""Learning in closed form: ridge regression on what enters a head's last linear layer. No gradient is computed.

One pass over a loader gives sums, and the weights follow from the sums alone. Processes add their sums, so that they
learn what one process does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sidetuning.branch import Branch
from sidetuning.errors import DataError, TaskError, TrainingError
from sidetuning.heads import InUnits
from sidetuning.launch import default_accelerator
from sidetuning.objective import unpack
from sidetuning.problems import Classes, Labels
from sidetuning.processes import Shares
from sidetuning.training import in_evaluation, trainable
from sidetuning.units import measured

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sidetuning.tuner import SideTuner

# Strengths that are tried, as multiples of the features' mean sum of squares around their means.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-10, 5))
# Features up to which one decomposition is faster than a few solutions.
EXACT = 1024
# Vectors that estimate a trace where the features are many (Hutchinson 1990).
PROBES = 64


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


@dataclass
class Sums:
    """Sums over rows of features x (d) and targets y (k), in double precision.

    Attributes:
        count: number of rows, as a tensor of one number.
        x, y: sums of x (d) and of y (k).
        xx, xy: sums of x xᵀ (d, d) and of x yᵀ (d, k).
        yy: sums of the squares of y (k).
    """

    count: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, d: int, k: int, device: torch.device) -> Sums:
        """Sums over nothing."""
        shapes = ((), (d,), (k,), (d, d), (d, k), (k,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def tensors(self) -> Iterator[Tensor]:
        """All sums, in the order of the attributes."""
        return (getattr(self, field.name) for field in fields(self))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (n, d) with targets y (n, k)."""
        x, y = x.double() if len(self.x) <= EXACT else x, y.double()
        # Of many features products in their own type are twice as fast; their sums over all batches are not cut.
        self.xx += x.T @ x
        x = x.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y, and the sums xx, xy and yy around them."""
        mean, middle = self.x / self.count, self.y / self.count
        xx = self.xx - torch.outer(self.x, mean)
        return mean, middle, (xx + xx.T) / 2, self.xy - torch.outer(self.x, middle), self.yy - self.y * middle


@torch.no_grad()
def solve(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    *,
    strength: float | None = None,
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
        accelerator: as in `fit`; processes add their sums.
        progress: show a bar.

    Raises:
        TaskError: the task may not be trained, its head does not end in a linear layer, or its problem is another.
        DataError: targets that the problem does not take, no rows, or labels that are partly ignored.
        TrainingError: features that are not finite.
    """
    started = time.monotonic()
    branch = trainable(model, task, loader)
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        raise TaskError(f"strength must be a positive number, not {strength}")
    if accelerator is None:
        accelerator = default_accelerator()
    model.to(accelerator.device)
    layer = last_linear(branch, task)
    # As `fit` does, which may go on from here: in the units of the targets, if they are numbers.
    with in_evaluation(branch), measured(branch, model, task, loader, branch.problem, 0, accelerator) as batches:
        sums = collect(model, task, layer, batches, accelerator, progress)
        chosen, error = settle(branch, layer, sums, strength)
    return SolveResult(int(sums.count), chosen, error, time.monotonic() - started)


def last_linear(branch: Branch, task: str) -> nn.Linear:
    """The linear layer that a head ends in; that it does is checked with the first batch."""
    linear = [module for module in branch.head.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].bias is None:
        raise TaskError(f"the head of task '{task}' ends in no linear layer with a bias; use fit, or head=NUMBER")
    return linear[-1]


def collect(
    model: SideTuner, task: str, layer: nn.Linear, loader: Iterable[Any], accelerator: Accelerator, progress: bool
) -> Sums:
    """The sums of all processes over a loader."""
    from accelerate.utils import send_to_device
    from tqdm import tqdm

    sums = Sums.zeros(layer.in_features, layer.out_features, accelerator.device)
    branch = model[task]
    problem = branch.problem
    off = not (progress and accelerator.is_main_process)
    for batch, counting in tqdm(Shares(loader, accelerator).read(), task, disable=off, leave=False):
        x, features, target = unpack(send_to_device(batch, accelerator.device))
        with _Seen(layer) as seen:
            output = model(x, task, features=features)
        codes, counts = problem.codes(output, target)
        ends = layer(seen.inputs[-1]) if seen.inputs else None
        if ends is not None and isinstance(branch.head, InUnits):
            ends = branch.head.in_units(ends)
        if ends is None or not torch.equal(ends.nan_to_num(), output.nan_to_num()):
            raise TaskError(f"the head of task '{task}' does not end in its last linear layer; use fit")
        rows = seen.inputs[-1].reshape(-1, layer.in_features)[counts.flatten()]
        if counting:
            sums.add(rows, codes)
    for total in sums.tensors():
        total.copy_(accelerator.reduce(total, "sum"))
    if not float(sums.count):
        raise DataError("the loader gave no rows that count: its data set is empty, or all targets are ignored")
    if not all(bool(total.isfinite().all()) for total in sums.tensors()):
        raise TrainingError("features or targets are not finite; look for NaN in the inputs and labels")
    return sums


class _Seen:
    """What enters a module in this thread while the block runs; other threads may serve the same task."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.thread = module, threading.get_ident()
        self.inputs: list[Tensor] = []

    def __enter__(self) -> _Seen:
        self._hook = self.module.register_forward_pre_hook(self._take)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _take(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == self.thread:
            self.inputs.append(args[0].detach())


class _Ridge:
    """Ridge regression for any strength, from sums around the means."""

    def __init__(self, xx: Tensor, xy: Tensor) -> None:
        self.xx, self.xy = xx, xy
        # One decomposition gives all strengths; of many features it takes longer than the few that are needed.
        self.spectrum = torch.linalg.eigh(xx) if len(xx) <= EXACT else None
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (len(xx), PROBES), generator=generator)
        self.probes = (2.0 * signs - 1).to(xx)

    def solution(self, strength: float) -> tuple[Tensor, float]:
        """The weights (d, k), and the trace of the matrix that makes predictions of targets."""
        if self.spectrum is not None:
            values, vectors = self.spectrum
            values = values.clamp(min=0)
            weight = vectors @ ((vectors.T @ self.xy) / (values + strength).unsqueeze(1))
            return weight, float((values / (values + strength)).sum())
        ridged = self.xx.clone()
        ridged.diagonal().add_(strength)
        factor = torch.linalg.cholesky(ridged)
        both = torch.cholesky_solve(torch.cat([self.xy, self.probes], 1), factor)
        weight, inverse = both.split([self.xy.shape[1], PROBES], 1)
        return weight, len(self.xx) - strength * float((self.probes * inverse).sum()) / PROBES


def settle(branch: Branch, layer: nn.Linear, sums: Sums, strength: float | None) -> tuple[float, float]:
    """Write the solution of the sums into the layer; the strength that was taken, and the error that is expected."""
    mean, middle, xx, xy, yy = sums.centred()
    rows = float(sums.count)
    unit = float(xx.diagonal().mean()) or 1.0
    ridge = _Ridge(xx, xy)

    def judged(multiple: float) -> _Solution:
        weight, trace = ridge.solution(multiple * unit)
        return _Solution(multiple, weight, trace, (weight * xy).sum(0), (weight * (xx @ weight)).sum(0), yy, rows)

    if strength is not None:
        best = judged(strength)
    else:
        # The error has one valley: every third strength finds it, the two beside it its bottom.
        tried = {i: judged(STRENGTHS[i]) for i in range(1, len(STRENGTHS), 3)}
        lowest = min(tried, key=lambda i: float(tried[i].errors.mean()))
        tried |= {i: judged(STRENGTHS[i]) for i in (lowest - 1, lowest + 1)}
        best = min(tried.values(), key=lambda solution: float(solution.errors.mean()))
    weight, bias = best.weight, middle - mean @ best.weight
    if isinstance(branch.problem, (Classes, Labels)):
        slope, shift = best.logits(middle, alone=isinstance(branch.problem, Labels))
        weight, bias = weight * slope, bias * slope + shift
    layer.weight.copy_(weight.T)
    layer.bias.copy_(bias)
    scale = 1.0 if branch.units is None else branch.units[1].double()
    return best.multiple, float((best.errors * scale**2).mean())


@dataclass(frozen=True)
class _Solution:
    """A solution for one strength, with sums over rows of what it predicts, around the means.

    Attributes:
        multiple: the strength.
        weight: (d, k).
        trace: of the matrix that makes predictions of targets.
        agreement, size, target: sums of prediction x target, of prediction² and of target², each (k).
        rows: number of rows.
    """

    multiple: float
    weight: Tensor
    trace: float
    agreement: Tensor
    size: Tensor
    target: Tensor
    rows: float

    @property
    def growth(self) -> float:
        """How much larger the error of a row is where it was not seen, on average; the mean takes a share too."""
        return 1 / max(1 - (self.trace + 1) / self.rows, 1e-3)

    @property
    def errors(self) -> Tensor:
        """The mean square error (k) that is expected of rows that were not seen."""
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
