"""Loaders over data sets that are read by the batch: a subset, relabelled, or texts of similar lengths together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler


class Rows(Protocol):
    """A data set that gives a whole batch of `(x, features, y)` at once."""

    def __len__(self) -> int: ...
    def __getitems__(self, rows: list[int], /) -> tuple[Any, Any, Tensor]: ...


def loader_over(
    cached: Rows,
    *,
    batch_size: int = 128,
    shuffle: bool = True,
    indices: Sequence[int] | Tensor | None = None,
    relabel: Callable[[Tensor], Tensor] | None = None,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[Any]:
    """Make a loader of `(x, features, y)` batches, each read in one go.

    Args:
        cached: what `cache_features` returned, or another data set that gives batches of `(x, features, y)`.
        batch_size: samples per batch; the last one may be smaller.
        shuffle: whether to draw a new order in every pass.
        indices: use only these samples.
        relabel: applied to the labels of a batch.
        num_workers: processes that read ahead.
        drop_last: leave a smaller last batch out, unless it is the only one.
    """
    rows: Any = range(len(cached)) if indices is None else torch.as_tensor(indices).tolist()
    sampler = RandomSampler(rows) if shuffle else SequentialSampler(rows)
    batches = BatchSampler(sampler, batch_size, drop_last=drop_last and len(rows) >= batch_size)
    read = partial(_read, cached, relabel)
    return DataLoader(rows, batch_sampler=batches, collate_fn=read, num_workers=num_workers)


def _read(cached: Rows, relabel: Callable[[Tensor], Tensor] | None, rows: list[int]) -> tuple[Any, Any, Tensor]:
    x, features, y = cached.__getitems__(rows)
    return x, features, y if relabel is None else relabel(y)


def token_loader(
    texts: Rows, lengths: NDArray[np.int64], batch_size: int = 16, shuffle: bool = True
) -> DataLoader[Any]:
    """Make a loader of `(inputs, features, labels)` batches with texts of similar lengths; see `ByLength`."""
    rows: Any = range(len(texts))
    return DataLoader(
        rows, batch_sampler=ByLength(lengths, batch_size, shuffle), collate_fn=partial(_read, texts, None)
    )


class ByLength(Sampler[list[int]]):
    """Batches of texts of similar lengths, and so with little padding; every pass mixes them otherwise.

    Args:
        lengths: tokens of each text.
        batch_size: texts per batch; a smaller batch comes last.
        shuffle: False gives them from the shortest to the longest.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, shuffle: bool = True) -> None:
        self.lengths, self.batch_size, self.shuffle = lengths, batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        n, size = len(self.lengths), self.batch_size
        order = torch.randperm(n).numpy() if self.shuffle else np.arange(n)
        # Shuffled, texts are sorted within random pools of 50 batches.
        pool = 50 * size if self.shuffle else n
        batches: list[list[int]] = []
        for start in range(0, n, pool):
            rows = order[start : start + pool]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [rows[i : i + size].tolist() for i in range(0, len(rows), size)]
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        # The smaller one last: accelerate, where it splits batches over processes, drops it on the way.
        yield from sorted(batches, key=lambda batch: len(batch) < size)
