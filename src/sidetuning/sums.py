"""Sums over what enters the last linear layer of a head and over the targets: all that a closed form needs to know."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.beside import Beside
from sidetuning.branch import Branch
from sidetuning.errors import ArtifactError, DataError, TaskError, TrainingError
from sidetuning.heads import InUnits
from sidetuning.objective import unpack
from sidetuning.processes import Shares
from sidetuning.seeding import seed_loader, seeded
from sidetuning.training import record_size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sidetuning.tuner import SideTuner

# Features up to which one decomposition is faster than a few solutions.
EXACT = 1024


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

    def add(self, x: Tensor, y: Tensor, exact: bool = True) -> None:
        """Add rows x (n, d) with targets y (n, k); `exact`: products are of double precision too."""
        x, y = x.double() if exact else x.to(torch.promote_types(x.dtype, torch.float32)), y.double()
        # Of many features products of single precision are twice as fast; their sums over all batches are not cut.
        with torch.autocast(x.device.type, enabled=False):
            self.xx += x.T @ x
        x = x.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xy += x.T @ y
        self.yy += y.square().sum(0)

    def plus(self, other: Sums, sign: int = 1) -> Sums:
        """The sums over the rows of both, or with `sign` -1 over those that are not among the other's."""
        return Sums(*(a + sign * b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def wider(self, more: int) -> Sums:
        """The same rows with `more` targets that are 0 in all of them."""
        return Sums(
            self.count, self.x, F.pad(self.y, (0, more)), self.xx, F.pad(self.xy, (0, more)), F.pad(self.yy, (0, more))
        )

    def kept(self, text: dict[str, Any]) -> Beside:
        """What a file holds of the sums, half of the symmetric xx among it."""
        d = len(self.x)
        rows, columns = torch.tril_indices(d, d)
        tensors = {field.name: getattr(self, field.name).cpu() for field in fields(self)}
        return Beside(text, {**tensors, "xx": tensors["xx"][rows, columns]})

    @classmethod
    def read(cls, beside: Beside, d: int, k: int, device: torch.device) -> Sums:
        """What `kept` was given of d features and k targets; ArtifactError where the sums are others."""
        zeros = cls.zeros(d, k, torch.device("cpu"))
        rows, columns = torch.tril_indices(d, d)
        given = dict(beside.tensors)
        half = given.pop("xx", torch.zeros(0))
        shapes = {field.name: getattr(zeros, field.name).shape for field in fields(cls) if field.name != "xx"}
        fits = {name: tensor.shape for name, tensor in given.items()} == shapes and half.shape == rows.shape
        if not fits or any(tensor.dtype != torch.float64 for tensor in beside.tensors.values()):
            raise ArtifactError(f"the statistics are not those of {d} features and {k} targets; solve the task again")
        zeros.xx[rows, columns] = half
        zeros.xx[columns, rows] = half
        return cls(**{**given, "xx": zeros.xx}).to(device)

    def to(self, device: torch.device) -> Sums:
        """The sums on a device."""
        return Sums(*(total.to(device) for total in self.tensors()))

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Means of x and y, and the sums xx, xy and yy around them."""
        mean, middle = self.x / self.count, self.y / self.count
        xx = self.xx - torch.outer(self.x, mean)
        return mean, middle, (xx + xx.T) / 2, self.xy - torch.outer(self.x, middle), self.yy - self.y * middle


def last_linear(branch: Branch, task: str) -> nn.Linear:
    """The linear layer that a head ends in; that it does is checked with the first batch."""
    linear = [module for module in branch.head.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].bias is None:
        raise TaskError(f"the head of task '{task}' ends in no linear layer with a bias; use fit, or head=NUMBER")
    if not (linear[-1].weight.requires_grad and linear[-1].bias.requires_grad):
        raise TaskError(f"the last layer of task '{task}' is frozen; head.requires_grad_(True) thaws it")
    return linear[-1]


def collect(
    model: SideTuner,
    branch: Branch,
    task: str,
    layer: nn.Linear,
    loader: Iterable[Any],
    accelerator: Accelerator,
    progress: bool,
    *,
    views: int = 1,
    exact: bool = False,
    sums: Sums | None = None,
    further: bool = False,
) -> Sums:
    """The sums of all processes over a loader, and those in `sums`.

    Other arguments are those of `solve`; `exact` is that of `Sums.add`. Images that are `further` ones of a task that
    was solved are of the size that it knows.
    """
    from accelerate.utils import send_to_device
    from tqdm import tqdm

    first = accelerator.is_main_process
    start = (
        sums if sums is not None and first else Sums.zeros(layer.in_features, layer.out_features, accelerator.device)
    )
    sums, before = start.plus(start, 0), float(0.0 if sums is None else sums.count)
    problem = branch.problem
    off = not (progress and accelerator.is_main_process)
    # In the same order at every call: rounding may decide between two strengths.
    with seeded(0):
        seed_loader(loader, 0)
        for batch, counting in tqdm(Shares(loader, accelerator).read(), task, disable=off, leave=False):
            x, features, target = unpack(send_to_device(batch, accelerator.device))
            known_size = branch.transform
            record_size(branch, model.base, x)
            if further and branch.transform is not known_size:
                raise DataError(f"task '{task}' was solved on images of another size; resize these")
            inputs = model.base.prepare(x)
            known = model.base.features(inputs, features)
            with _Seen(layer) as seen:
                output = branch(inputs, known, model.lateral_outputs(branch, inputs, known))
            codes, counts = problem.codes(output, target)
            ends = layer(seen.inputs[-1]) if seen.inputs else None
            if ends is not None and isinstance(branch.head, InUnits):
                ends = branch.head.in_units(ends)
            if ends is None or not torch.equal(ends.nan_to_num(), output.nan_to_num()):
                raise TaskError(f"the head of task '{task}' does not end in its last linear layer; use fit")
            rows = seen.inputs[-1].reshape(-1, layer.in_features)[counts.flatten()]
            if views > 1:
                rows, codes = averaged(rows, views), averaged(codes, views, equal=True)
            if counting:
                sums.add(rows, codes, exact or len(sums.x) <= EXACT)
    for total in sums.tensors():
        total.copy_(accelerator.reduce(total, "sum"))
    if float(sums.count) == before:
        raise DataError("the loader gave no rows that count: its data set is empty, or all targets are ignored")
    if not all(bool(total.isfinite().all()) for total in sums.tensors()):
        raise TrainingError("features or targets are not finite; look for NaN in the inputs and labels")
    return sums


def check_views(views: Any) -> None:
    """Raise TaskError unless `views` is a whole number from 1 on."""
    if not isinstance(views, int) or views < 1:
        raise TaskError(f"views must be a whole number, 1 or more, not {views!r}")


def averaged(rows: Tensor, views: int, equal: bool = False) -> Tensor:
    """The mean over the views of each sample, which follow one another -> (n / views, …)."""
    if len(rows) % views:
        raise DataError(f"a batch has {len(rows)} rows that count, which are not {views} views of each sample")
    each = rows.view(views, -1, *rows.shape[1:])
    if equal and not bool((each == each[:1]).all()):
        raise DataError("views of one sample have different targets; give all samples' first views, then their second")
    return each[0] if equal else each.mean(0)


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
