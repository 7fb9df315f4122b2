"""Regression in the targets' own units: their centre and scale, measured on the labels before the first step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sidetuning.branch import Branch
from sidetuning.errors import DataError
from sidetuning.heads import IN_UNITS, InUnits
from sidetuning.objective import TaskModel, unpack
from sidetuning.problems import Numbers, Problem
from sidetuning.seeding import seed_loader, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

# Samples whose labels are read, from batches that are spread evenly over a pass; the number of those where a batch's
# size is not known, or batches come one by one; and numbers of each sample and channel.
SAMPLES, BATCHES, VALUES = 1024, 64, 4096


@contextlib.contextmanager
def measured(
    branch: Branch,
    model: TaskModel,
    task: str,
    loader: Iterable[Any],
    problem: Problem | None,
    seed: int,
    accelerator: Accelerator,
) -> Iterator[Iterable[Any]]:
    """Let a task answer in the units of its targets, if it is to learn numbers for the first time in this block.

    That is so where the problem is "numbers" or "pixels" and the head, "linear" or "pixels", has no units, is not
    frozen, and its weights are as built: other weights may answer in units already, as may a head of the user's own.
    The units are taken back where nothing was learned in the block.

    Yields:
        The loader to train with: what was read of an iterator, which cannot be read again, is put back.

    Raises:
        DataError: targets that the problem does not take, or that float32 does not tell apart.
    """
    head = branch.head
    fresh = isinstance(head, InUnits) and head.fresh
    learns = not branch.passes and any(p.requires_grad for p in head.parameters())
    if not (fresh and learns and branch.config.head[0] in IN_UNITS and isinstance(problem, Numbers)):
        yield loader
        return
    # What is read here moves no running statistics.
    branch.eval()
    with seeded(seed):
        seed_loader(loader, seed)
        batches, loader = some(loader)
        units = units_of(read(model, task, batches, problem, accelerator.device))
    if accelerator.num_processes > 1:
        # One result, whatever each process read of a loader that is not over a data set with an index.
        both = [units]
        dist.broadcast_object_list(both)
        units = both[0]
    assert isinstance(head, InUnits)
    problem.units = head.units = units.to(accelerator.device)
    versions = [p._version for p in branch.parameters()]
    try:
        yield loader
    finally:
        if versions == [p._version for p in branch.parameters()]:
            head.units = None


def some(loader: Iterable[Any]) -> tuple[Iterator[Any], Iterable[Any]]:
    """Batches spread evenly over a pass of a loader, or its first ones, and the loader to read in its place."""
    # A subclass may make other batches of the same rows.
    rows: Any = loader if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset) else None
    batched = rows is not None and rows.batch_sampler is not None
    sampler = loader if rows is None else rows.batch_sampler if batched else rows.sampler
    once = iter(sampler) is sampler
    if rows is not None and not once:
        drawn = list(itertools.islice(sampler, _length(rows)))
        size = len(drawn[0]) if drawn and isinstance(drawn[0], (list, tuple)) else SAMPLES // BATCHES
        picked = _spread(drawn, -(-SAMPLES // max(1, size)))
        how: dict[str, Any] = {"batch_sampler": picked} if batched else {"sampler": picked, "batch_size": None}
        names = ("collate_fn", "num_workers", "worker_init_fn", "multiprocessing_context")
        return iter(DataLoader(rows.dataset, **how, **{name: getattr(rows, name) for name in names})), loader
    if isinstance(loader, Sequence):
        return iter(_spread(loader, BATCHES)), loader
    if not once:
        return itertools.islice(loader, BATCHES), loader
    batches = iter(loader)
    # They are held until they are trained on.
    first = list(itertools.islice(batches, BATCHES // 4))
    return iter(first), itertools.chain(first, batches)


def _length(loader: DataLoader[Any]) -> int:
    """Batches of a pass, or as many as are looked at of a sampler without an end."""
    try:
        return len(loader)
    except TypeError:
        return BATCHES


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(items))
    return [items[k * len(items) // count] for k in range(count)]


@torch.no_grad()
def read(
    model: TaskModel, task: str, batches: Iterator[Any], problem: Numbers, device: torch.device
) -> NDArray[np.float64]:
    """The targets of batches by channel (channels, n), ignored ones as NaN; of large maps some pixels."""
    from accelerate.utils import send_to_device

    shape: tuple[int, ...] | None = None
    rows, samples = [], 0
    for batch in batches:
        if shape is None:
            x, features, y = unpack(send_to_device(batch, device))
            output = model(x, task, features=features)
            problem.prepare(output, y)
            shape = tuple(output.shape)
        y = unpack(batch)[2].cpu()
        # An output without memory, of this batch's rows and pixels: only the shape is looked at.
        like = torch.empty((), dtype=torch.float64).expand(
            len(y), shape[1], *(y.shape[2 - len(shape) :] if shape[2:] else ())
        )
        values = problem.prepare(like, y)[1].transpose(0, 1).flatten(1)
        rows.append(_few(values, VALUES * len(y)))
        samples += len(y)
        if samples >= SAMPLES:
            break
    return torch.cat(rows, 1).numpy() if rows else np.empty((1, 0))


def _few(values: Tensor, count: int) -> Tensor:
    if values.shape[1] <= count:
        return values
    return values[:, torch.linspace(0, values.shape[1] - 1, count).long()]


def units_of(targets: NDArray[np.float64]) -> Tensor:
    """Centre and scale of targets (channels, n) -> (2, channels), from those that are finite.

    The centre is the median. The scale is a robust standard deviation: the middle 90 % over what a normal distribution
    has there, 3.29; the standard deviation where at least 90 % are equal; 1 where all are, or none is left.

    Raises:
        DataError: float32 does not tell the targets of a channel apart.
    """
    rows = []
    for channel in targets:
        values = channel[np.isfinite(channel)]
        low, centre, high = np.quantile(values, (0.05, 0.5, 0.95)) if len(values) else (0.0, 0.0, 0.0)
        scale = (high - low) / 3.29 or (values.std() if len(values) else 0.0)
        if 0 < scale < 1e-6 * abs(centre):
            raise DataError(
                f"the targets lie within about {scale:g} of {centre:.10g}, and numbers of this size are told apart by "
                f"steps of {np.spacing(np.float32(abs(centre))):g} in float32: subtract {centre:.10g} from them"
            )
        rows.append((centre, scale or 1.0))
    return torch.tensor(rows, dtype=torch.float32).T.contiguous()
