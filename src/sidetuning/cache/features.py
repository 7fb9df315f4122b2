"""A cache of inputs, features and labels of fixed size, such as those of images, with augmented views of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from sidetuning.base import Base, Features
from sidetuning.cache.store import Put, Store, fields_of, folder_of
from sidetuning.content import function_name, tensor_bytes
from sidetuning.errors import CacheError, DataError, ShapeError

# Samples between two markers. Augmentation is seeded once for each chunk.
CHUNK = 1000
Augment = Callable[[Tensor, torch.Generator], Tensor]


class CachedFeatures(Dataset[tuple[Tensor, Features, Tensor]]):
    """A finished cache as a data set of `(x, features, y)`.

    Attributes:
        folder, fields, samples, views, seconds: as of `Store`.
        view: the view that an index gives; None draws one from torch's generator.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._store = store = Store.open(self.folder)
        if lacking := {"x", "out", "y"} - store.fields.keys():
            raise CacheError(f"{folder}/meta.json names no field {min(lacking)}; delete {folder} and cache again")
        self.fields, self.samples, self.views, self.seconds = store.fields, store.samples, store.views, store.seconds
        self.view: int | None = None if self.views > 1 else 0

    def __len__(self) -> int:
        return self.samples

    @property
    def labels(self) -> Tensor:
        """All y, (n, …)."""
        return self._read("y", np.arange(self.samples))

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Features, Tensor]:
        if isinstance(index, slice):
            return self.__getitems__(range(self.samples)[index])
        x, features, y = self.__getitems__([index])
        return x[0], Features(features.out[0], {name: tap[0] for name, tap in features.taps.items()}), y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Features, Tensor]:
        """A whole batch at once; what torch's loader asks for where it can."""
        samples = np.arange(self.samples)[np.asarray(indices)]
        view = torch.randint(self.views, (len(samples),)).numpy() if self.view is None else self.view
        rows = view * self.samples + samples
        taps = {name[4:]: self._read(name, rows) for name in self.fields if name.startswith("tap.")}
        return self._read("x", rows), Features(self._read("out", rows), taps), self._read("y", samples)

    def _read(self, name: str, rows: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(self._store.read(name, rows))
        return tensor.float() if tensor.dtype == torch.float16 else tensor


def cache_features(
    base: Base,
    dataset: Dataset[Any],
    path: str | Path,
    *,
    identity: str | None = None,
    views: int = 1,
    augment: Augment | None = None,
    seed: int = 0,
    dtype: str = "float32",
    batch_size: int = 250,
    progress: bool = True,
) -> CachedFeatures:
    """Run the base once over a data set and keep its features; a finished cache of the same content is only opened.

    Args:
        base: the base.
        dataset: map-style data set of `(x, y)`, x one tensor.
        path: folder of caches; this one gets a subfolder.
        identity: name of the data. By default a hash of its content: `dataset.fingerprint` where it has one, all
            tensors of a `TensorDataset`, else 256 samples spread over it and its length.
        views: number of augmented views to keep of each sample.
        augment: makes a view of a batch, `augment(x, generator)`; view 0 is left as it is.
        seed: seed of the augmentation.
        dtype: "float32", or "float16" for half the size; "float64" of a base in float64.
        batch_size: samples per base pass.
        progress: whether to print the size before writing, and to show a bar.

    Raises:
        CacheError: the disk is full or read-only; what was written stays and the next call resumes there.
        DataError: the data set is empty.
    """
    if views > 1 and augment is None:
        raise CacheError(f"{views} views of each sample need augment=, a function of a batch and a generator")
    if views < 2 and augment is not None:
        raise CacheError("augment= makes all views but the first; give views=2 or more, or leave augment= out")
    known = ("float64",) if base.like.dtype == torch.float64 else ("float32", "float16")
    if dtype not in known:
        raise CacheError(f"features of this base are kept as {' or '.join(known)}, not {dtype}; give dtype=")
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise DataError("the data set is empty; there is nothing to keep features of")
    how = older = "none"
    if augment is not None and views > 1:
        where = getattr(augment, "__module__", "")
        how, older = (
            f"{where}.{function_name(augment)} {seed}",
            f"{where}.{getattr(augment, '__qualname__', '')} {seed}",
        )
    data = identity or data_identity(dataset)
    folder = folder_of(path, base, base.tap_shapes, [data, views, how, dtype], [data, views, older, dtype])
    if (folder / "meta.json").exists():
        return CachedFeatures(folder)
    store = _store(base, dataset, folder, views, dtype)
    store.write(partial(_fill, base.folded(), dataset, augment, seed, batch_size), CHUNK, progress)
    return CachedFeatures(folder)


def _fill(
    base: Base, dataset: Any, augment: Augment | None, seed: int, size: int, view: int, samples: range, put: Put
) -> Iterator[int]:
    """Store a view of some samples, batch by batch."""
    n, many = len(dataset), getattr(dataset, "__getitems__", None)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + view * n + samples.start)
    for first in range(samples.start, samples.stop, size):
        batch = range(first, min(first + size, samples.stop))
        pairs = many(list(batch)) if many else [dataset[i] for i in batch]
        x, y = default_collate([(x, _target(y)) for x, y in pairs])
        if view > 0 and augment is not None:
            x = augment(x, generator)
        features = base(x.to(base.device))
        for name, value in {"x": x, **fields_of(features.out, features.taps)}.items():
            put(name, value, view * n + first)
        if view == 0:
            put("y", y, first)
        yield len(batch)


def cache_bytes(base: Base, dataset: Dataset[Any], views: int = 1, dtype: str = "float32") -> int:
    """Size that a cache will have, in bytes.

    Args:
        base, dataset, views, dtype: as of `cache_features`.
    """
    return _store(base, dataset, Path(), views, dtype).size()


def data_identity(dataset: Dataset[Any]) -> str:
    """A hash of a data set's content; see `cache_features` for how much of it is read."""
    # Data sets of the library `datasets` have `_fingerprint`.
    own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    n = len(dataset)  # type: ignore[arg-type]
    digest = hashlib.sha256(f"{n}".encode())
    # A data set that does something with its tensors is not told by them.
    plain = isinstance(dataset, TensorDataset) and type(dataset).__getitem__ is TensorDataset.__getitem__
    tensors: Any = dataset.tensors if plain else None  # type: ignore[attr-defined]
    if tensors is None:
        _first_of(dataset)
        rows = sorted({round(i * (n - 1) / 255) for i in range(256)}) if n > 256 else range(n)
        tensors = [torch.as_tensor(value) for i in rows for value in dataset[i]]
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor_bytes(tensor).numpy().data)
    return digest.hexdigest()


def _first_of(dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """The first sample, which tells what all are."""
    sample = dataset[0]
    if isinstance(sample, Mapping):
        raise ShapeError(
            f"cache_features takes samples (x, y), and the first is a mapping ({', '.join(map(str, sample))}); "
            "wrap the data set in one that gives (image, label)"
        )
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise ShapeError(f"cache_features takes samples (x, y), and the first is a {type(sample).__name__}")
    if not isinstance(sample[0], Tensor):
        raise ShapeError(
            f"cache_features keeps inputs that are one tensor, not a {type(sample[0]).__name__}; images need a "
            "transform to a tensor, and texts go to sidetuning.cache.cache_tokens or st.auto"
        )
    try:
        # Of the type that a batch of them has.
        target: Tensor = default_collate([_target(sample[1])])[0]
        return sample[0], torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"cache_features keeps targets that are numbers, not a {type(sample[1]).__name__}; give class numbers"
        ) from error


def _target(y: Any) -> Any:
    """A target as `default_collate` makes one tensor of several: lists are one tensor each."""
    return torch.as_tensor(y) if isinstance(y, (list, tuple)) else y


def _store(base: Base, dataset: Dataset[Any], folder: Path, views: int, dtype: str) -> Store:
    """The cache that a data set will have; its first sample sets the shapes."""
    x, y = _first_of(dataset)
    features = base(x.unsqueeze(0).to(base.device))
    given = {"x": x, "y": y}
    fields = {name: np.dtype((value.numpy().dtype, tuple(value.shape))) for name, value in given.items()}
    for name, value in fields_of(features.out, features.taps).items():
        fields[name] = np.dtype((dtype, tuple(value.shape[1:])))
    n = len(dataset)  # type: ignore[arg-type]
    return Store(folder, fields, n, n, views)


def loader_over(
    cached: Any,
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
        indices: use only the samples of these numbers.
        relabel: applied to the labels of a batch.
        num_workers: processes that read ahead.
        drop_last: leave a smaller last batch out, unless it is the only one.

    Raises:
        DataError: indices that are none, a mask, or beyond the data.
    """
    rows: Any = range(len(cached)) if indices is None else _numbers(indices, len(cached))
    sampler = RandomSampler(rows) if shuffle else SequentialSampler(rows)
    batches = BatchSampler(sampler, batch_size, drop_last=drop_last and len(rows) >= batch_size)
    read = partial(_read, cached, relabel)
    loader: Any = DataLoader(rows, batch_sampler=batches, collate_fn=read, num_workers=num_workers)
    # What a run that is resumed compares; of candidates that take turns without a turn.
    loader.gives = partial(_read, getattr(cached, "cached", cached), relabel)
    return loader  # type: ignore[no-any-return]


def _numbers(indices: Sequence[int] | Tensor, samples: int) -> list[int]:
    """Numbers of rows, checked."""
    given = torch.as_tensor(indices)
    if given.dtype == torch.bool:
        raise DataError("indices= are numbers of samples, not a mask; give mask.nonzero()[:, 0]")
    if not len(given) or given.min() < -samples or given.max() >= samples:
        raise DataError(f"indices= are numbers from 0 to {samples - 1}, one at least; check those that you give")
    return given.tolist()


def _read(cached: Any, relabel: Callable[[Tensor], Tensor] | None, rows: list[int]) -> tuple[Any, Any, Tensor]:
    x, features, y = cached.__getitems__(rows)
    return x, features, y if relabel is None else relabel(y)
