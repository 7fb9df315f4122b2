"""Several processes learn what one would: they share the rows of each batch, and add up what they find.

Losses are weighted by what counts in each share, so short batches, class weights and ignored targets change nothing;
gradients are added before the step, and batch norms see the whole batch. There is no wrapper around the network, so
parameters that a batch does not use stop nothing.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sidetuning.content import content_sha256
from sidetuning.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

# Batches whose rows the first process tells the others at a time.
DRAWN = 64
# What gives each process other rows: accelerate's and torch's.
SPLITTING = {"DataLoaderShard", "DataLoaderDispatcher", "BatchSamplerShard", "IterableDatasetShard"}
SPLITTING |= {"DistributedSampler"}
# Settings of a loader that its share has too.
KEPT = ["num_workers", "collate_fn", "pin_memory", "worker_init_fn", "generator"]
KEPT += ["multiprocessing_context", "timeout", "prefetch_factor"]


class Shares:
    """A loader's batches, each process with its share of the rows of each; iterates over (batch, whether it counts).

    A batch with fewer rows than there are processes leaves some of them one row that does not count. Subclasses of
    torch's loader, and loaders that are not over a data set with an index, give each process the whole batch, which
    gives the same means.

    Raises:
        DataError: a loader that is split over the processes already, or gives them other batches.
    """

    def __init__(self, loader: Iterable[Any], accelerator: Accelerator) -> None:
        self.loader, self.counting = loader, deque[bool]()
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        if self.processes > 1 and (split := _splitting(loader)):
            raise DataError(f"processes share the rows of each batch: give a loader that is not split by a {split}")
        # A subclass may make other batches of the same rows.
        rows: Any = loader if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset) else None
        if self.processes > 1 and rows is not None and rows.batch_sampler is not None:
            given: dict[str, Any] = {name: getattr(rows, name) for name in KEPT}
            self.loader = DataLoader(rows.dataset, batch_sampler=self, **given)  # type: ignore[arg-type]
            self.batches = rows.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        """Rows of this process, as a batch sampler gives them. The first process draws the order for all."""
        batches = iter(self.batches) if self.process == 0 else iter(())
        while True:
            # Some at a time: a sampler may have no end.
            drawn = [[list(rows) for rows in islice(batches, DRAWN)]]
            dist.broadcast_object_list(drawn)
            if not drawn[0]:
                return
            for rows in drawn[0]:
                mine = rows[self.process :: self.processes]
                self.counting.append(bool(mine))
                yield mine or rows[:1]

    def __len__(self) -> int:
        return len(self.batches)

    def read(self) -> Iterator[tuple[Any, bool]]:
        """The batches of one pass."""
        self.counting.clear()
        shared = getattr(self.loader, "batch_sampler", None) is self
        for batch in self.loader if shared or self.processes == 1 else self._same():
            # Of batches that all processes read, one of them counts.
            yield batch, self.counting.popleft() if shared else self.process == 0

    def _same(self) -> Iterator[Any]:
        """Batches that all processes read whole, of which the first is compared."""
        batches, hashes = iter(self.loader), [""] * self.processes
        first = list(islice(batches, 1))
        dist.all_gather_object(hashes, content_sha256(first))
        if len(set(hashes)) > 1:
            raise DataError("the processes read other batches: give each the same ones, which are not split or drawn")
        return chain(first, batches)


def _splitting(loader: Any) -> str | None:
    """The class of a loader, or of what it reads from, that gives each process other rows."""
    parts, inner = [loader], ("batch_sampler", "sampler", "dataset")
    for _ in range(3):
        parts += [getattr(part, name) for part in parts for name in inner if getattr(part, name, None) is not None]
    kinds = [kind.__name__ for part in parts for kind in type(part).__mro__]
    return next((kind for kind in kinds if kind in SPLITTING), None)


def weighted(loss: Tensor, weight: Tensor, accelerator: Accelerator) -> tuple[Tensor, float]:
    """This process's part of the mean over all, to go backward from, and the mean itself."""
    if accelerator.num_processes == 1:
        return loss, float(loss.detach())
    weight = weight.to(loss.dtype)
    if not float(weight):
        # Nothing weighs nothing, even where its mean is no number.
        loss = torch.where(torch.isfinite(loss), loss, 0.0)
    both = accelerator.reduce(torch.stack([(loss.detach() * weight), weight]), "sum")
    return loss * weight / both[1].clamp(min=torch.finfo(loss.dtype).tiny), float(both[0] / both[1].clamp(min=1e-30))


def rows_of_all(given: tuple[Any, Tensor], counts: Tensor, metric: Any) -> list[tuple[Any, ...]]:
    """Outputs and targets of the rows that count, of each process; of this one for metrics that join by themselves."""
    rows = counts.reshape(len(counts), -1).any(1)
    own = given if bool(rows.all()) else tuple(part[rows] for part in given)
    if not dist.is_initialized():
        return [own] if bool(rows.any()) else []
    if any(kind.__module__.startswith("torchmetrics") for kind in type(metric).__mro__):
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [part.cpu() for part in own])
    return [tuple(part.to(counts.device) for part in found) for found in parts if len(found[1])]


def largest(number: int, accelerator: Accelerator) -> int:
    """The largest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    found = torch.tensor(number, device=accelerator.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@torch.no_grad()
def add_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes; a parameter that none of them used keeps none."""
    if accelerator.num_processes == 1 or not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    flat = [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().double() for p in parameters]
    total = accelerator.reduce(torch.cat([*flat, used.double()]), "sum")
    *parts, counts = total.split([*(p.numel() for p in parameters), len(used)])
    for p, part, count in zip(parameters, parts, counts.tolist(), strict=True):
        p.grad = part.view_as(p).to(p.dtype) if count else None


@contextlib.contextmanager
def whole_batch_norms(module: nn.Module, accelerator: Accelerator, counting: list[bool]) -> Iterator[None]:
    """Let batch norms see the batch of all processes; `counting[0]` says whether this one's rows count."""
    kinds, several = nn.modules.batchnorm._BatchNorm, accelerator.num_processes > 1
    norms = [m for m in module.modules() if several and isinstance(m, kinds) and "forward" not in vars(m)]
    for norm in norms:
        norm.forward = _Whole(norm, counting)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


class _Whole:
    """The forward pass of a batch norm over the rows of all processes."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, counting: list[bool]) -> None:
        self.norm, self.counting = norm, counting

    def __call__(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not norm.training:
            return type(norm).forward(norm, x)
        rows = x.transpose(0, 1).flatten(1).double()
        if not self.counting[0]:
            rows = rows[:, :0]
        own = torch.stack([rows.new_full((len(rows),), rows.shape[1]), rows.sum(1), rows.square().sum(1)])
        count, total, squares = _Sum.apply(own).unbind()
        if float(count[0].detach()) <= 1:
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        mean = total / count
        variance = squares / count - mean.square()
        if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                seen: Any = norm.num_batches_tracked
                seen.add_(1)
                share = norm.momentum if norm.momentum is not None else 1 / float(seen)
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
                unbiased = variance * count / (count - 1)
                norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)
        shape = (1, -1, *[1] * (x.ndim - 2))
        out = (x - mean.view(shape)) / (variance.view(shape) + norm.eps).sqrt()
        if norm.weight is not None:
            out = out * norm.weight.view(shape) + norm.bias.view(shape)
        return out.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
