"""Base features computed once per image, ever: a memory-mapped cache on disk.

Layout: `<root>/<key>/` with one flat file per field (`x`, `out`, `tap.<name>`, `y`), `done/<chunk>` markers while it is
being written and `meta.json`, which alone makes a cache valid, written last. A killed writer goes on at the
first chunk without a marker; several processes write disjoint chunks of the same files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, default_collate

from sidetuning.base import Base, Features
from sidetuning.errors import CacheError, DataError, ShapeError
from sidetuning.files import write_json
from sidetuning.identity import function_name

FORMAT_VERSION = 1
CHUNK = 1000  # samples between two markers, and the unit of work of a process
Augment = Callable[[Tensor, torch.Generator], Tensor]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Field:
    """One stored tensor: shape of a row (a sample, or a token) and numpy type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class CachedFeatures(Dataset[tuple[Tensor, Features, Tensor]]):
    """A finished cache as a data set of `(x, features, y)`.

    Attributes:
        folder: where it lies.
        views: augmented views per sample; which one an index gives is drawn from torch's generator, or `view`.
        view: the view to give, or None for a random one.
        seconds: that writing it took, with all calls that were interrupted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            if meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {meta['format_version']}, this library reads {FORMAT_VERSION}")
            self.samples, self.views = int(meta["samples"]), int(meta["views"])
            self.seconds = float(meta.get("seconds", 0.0))
            self.fields = {name: Field(tuple(f["shape"]), f["dtype"]) for name, f in meta["fields"].items()}
        except FileNotFoundError as error:
            raise CacheError(
                f"{folder} is no finished cache: meta.json is missing; run cache_features again"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{folder}/meta.json cannot be read ({error}); delete {folder} and run cache_features again"
            raise CacheError(message) from error
        self.view: int | None = None if self.views > 1 else 0
        self._arrays = {name: self._open(name, f) for name, f in self.fields.items()}

    def _open(self, name: str, f: Field) -> Array:
        file = self.folder / name
        rows = self.samples if name == "y" else self.samples * self.views
        if not file.exists() or file.stat().st_size != rows * f.bytes:
            raise CacheError(
                f"{file} is missing or has the wrong size; delete {self.folder} and run cache_features again"
            )
        return np.memmap(file, f.dtype, "r", shape=(rows, *f.shape))

    def __len__(self) -> int:
        return self.samples

    @property
    def labels(self) -> Tensor:
        """All y, (n, …)."""
        return torch.from_numpy(np.array(self._arrays["y"]))

    def __getitem__(self, index: int) -> tuple[Tensor, Features, Tensor]:
        x, features, y = self.__getitems__([index])
        return x[0], Features(features.out[0], {k: v[0] for k, v in features.taps.items()}), y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Features, Tensor]:
        """A whole batch at once; what torch's loader asks for where it can."""
        rows = np.asarray(indices)
        if self.view is None:
            picks = torch.randint(self.views, (len(rows),)).numpy() * self.samples + rows
        else:
            picks = self.view * self.samples + rows
        taps = {name[4:]: self._read(name, picks) for name in self.fields if name.startswith("tap.")}
        return self._read("x", picks), Features(self._read("out", picks), taps), self._read("y", rows)

    def _read(self, name: str, rows: Array) -> Tensor:
        tensor = torch.from_numpy(self._arrays[name][rows])
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
    """Run the base once over a data set and keep its features; a finished cache of the same key is only opened.

    Args:
        base: the base; its fingerprint, normalisation and taps are part of the key.
        dataset: map-style, of `(x, y)`, x one tensor.
        path: folder of caches; this one gets a subfolder named by its key.
        identity: names the data. By default a hash of its content: `dataset.fingerprint` where it has one, all tensors
            of a `TensorDataset`, else 256 samples spread over it and its length.
        views: how many augmented views to keep of each sample.
        augment: makes a view of a batch, `augment(x, generator)`; view 0 is left as it is.
        seed: of the augmentation.
        dtype: "float32", or "float16" for half the size.
        batch_size: of the base passes.
        progress: print the size before writing, and show a bar.

    Raises:
        CacheError: the disk is full or read-only; what was written stays and the next call goes on from it.
        DataError: the data set is empty.
    """
    if views > 1 and augment is None:
        raise CacheError(f"{views} views of each sample need augment=, a function of a batch and a generator")
    if dtype not in ("float32", "float16"):
        raise CacheError(f"features are kept as float32 or float16, not {dtype}")
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise DataError("the data set is empty; there is nothing to keep features of")
    key = cache_key(base, identity or data_identity(dataset), views, augment, seed, dtype)
    folder = Path(path) / key
    if not (folder / "meta.json").exists():
        with disk_errors(path):
            _write(base, dataset, folder, views, augment, seed, dtype, batch_size, progress)
    return CachedFeatures(folder)


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """A full or read-only disk is said in a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"the disk of {path} is full; free some space and run again: it goes on from there"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise CacheError(f"{path} cannot be written to ({error.strerror}); give another folder") from error
        raise


def cache_bytes(base: Base, dataset: Dataset[Any], views: int = 1, dtype: str = "float32") -> int:
    """How large a cache will be, in bytes."""
    fields = _fields(base, dataset, dtype)
    n = len(dataset)  # type: ignore[arg-type]
    return sum(f.bytes * n * (1 if name == "y" else views) for name, f in fields.items())


class Rows(Protocol):
    """A data set that is read by the batch: `cached[rows]` in one go, (x, features, y)."""

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
) -> DataLoader[tuple[Tensor, Features, Tensor]]:
    """A loader of `(x, features, y)` batches, each read in one go.

    Args:
        cached: what `cache_features` returned, or another data set that gives batches of `(x, features, y)`.
        batch_size: samples per batch; the last one may be smaller.
        drop_last: leave a smaller last one out, unless it is the only one.
        shuffle: whether to draw a new order in every pass.
        indices: use only these samples.
        relabel: applied to the labels of a batch.
        num_workers: processes that read ahead.
    """
    chosen = _Subset(cached, None if indices is None else torch.as_tensor(indices), relabel)
    sampler = RandomSampler(chosen) if shuffle else SequentialSampler(chosen)
    batches = BatchSampler(sampler, batch_size, drop_last=drop_last and len(chosen) >= batch_size)
    return DataLoader(chosen, batch_sampler=batches, collate_fn=_as_is, num_workers=num_workers)


@dataclass
class _Subset(Dataset[Any]):
    cached: Rows
    indices: Tensor | None
    relabel: Callable[[Tensor], Tensor] | None

    def __len__(self) -> int:
        return len(self.cached) if self.indices is None else len(self.indices)

    def __getitems__(self, rows: list[int]) -> tuple[Any, Any, Tensor]:
        x, features, y = self.cached.__getitems__(rows if self.indices is None else self.indices[rows].tolist())
        return x, features, y if self.relabel is None else self.relabel(y)


def _as_is(batch: Any) -> Any:
    return batch


def data_identity(dataset: Dataset[Any]) -> str:
    """A hash of a data set's content; see `cache_features` for how much of it is read."""
    own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)  # `datasets` has the latter
    if own is not None:
        return str(own() if callable(own) else own)
    n = len(dataset)  # type: ignore[arg-type]
    digest = hashlib.sha256(f"{n}".encode())
    tensors = getattr(dataset, "tensors", None)
    if tensors is None:
        rows = sorted({round(i * (n - 1) / 255) for i in range(256)}) if n > 256 else range(n)
        tensors = [torch.as_tensor(value) for i in rows for value in dataset[i]]
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(
    base: Base, identity: str, views: int, augment: Augment | None, seed: int, dtype: str, taps: Mapping[str, Any] | None = None
) -> str:  # fmt: skip
    """Names a cache by all that its content depends on; `taps` are those stored, with their shapes, by default all."""
    how = "none" if augment is None or views == 1 else f"{augment.__module__}.{function_name(augment)} {seed}"
    known = base.identity()
    parts = [known.digest(base.tap_shapes if taps is None else dict(taps)), identity, views, how, dtype]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _fields(base: Base, dataset: Dataset[Any], dtype: str) -> dict[str, Field]:
    x, y = dataset[0]
    if not isinstance(x, Tensor):
        raise ShapeError(f"cache_features keeps inputs that are one tensor, not a {type(x).__name__}")
    features = base(x.unsqueeze(0).to(base.device))
    label = torch.as_tensor(y)
    fields = {"x": _of(x), "out": Field(tuple(features.out.shape[1:]), dtype)}
    fields.update({f"tap.{name}": Field(tuple(tap.shape[1:]), dtype) for name, tap in features.taps.items()})
    return {**fields, "y": _of(label)}


def _of(tensor: Tensor) -> Field:
    return Field(tuple(tensor.shape), str(tensor.numpy().dtype))


def _write(
    base: Base,
    dataset: Dataset[Any],
    folder: Path,
    views: int,
    augment: Augment | None,
    seed: int,
    dtype: str,
    batch_size: int,
    progress: bool,
) -> None:
    from accelerate import PartialState
    from tqdm import tqdm

    state = PartialState()
    fields = _fields(base, dataset, dtype)
    n = len(dataset)  # type: ignore[arg-type]
    (folder / "done").mkdir(parents=True, exist_ok=True)
    chunks = [(view, start) for view in range(views) for start in range(0, n, CHUNK)]
    share = chunks[state.process_index :: state.num_processes]
    mine = [c for c in share if not (folder / "done" / f"{c[0]}-{c[1]}").exists()]
    size = cache_bytes(base, dataset, views, dtype)
    show = progress and state.is_main_process
    if show:
        tqdm.write(f"caching the base's features of {n:,} samples x {views} views: {size / 1e6:,.0f} MB in {folder}")
    handles = {name: allocate(folder / name, f, n * (1 if name == "y" else views)) for name, f in fields.items()}
    fast = base.folded()
    try:
        bar = tqdm(
            total=len(share) * CHUNK,
            initial=(len(share) - len(mine)) * CHUNK,
            unit="img",
            disable=not show,
            leave=False,
        )
        for view, start in mine:
            started = time.perf_counter()
            rows = range(start, min(start + CHUNK, n))
            generator = torch.Generator().manual_seed(seed * 1_000_003 + view * n + start)
            for first in range(rows.start, rows.stop, batch_size):
                batch = range(first, min(first + batch_size, rows.stop))
                x, y = _fetch(dataset, batch)
                if view > 0 and augment is not None:
                    x = augment(x, generator)
                features = fast(x.to(base.device))
                values = {"x": x, "out": features.out, **{f"tap.{k}": v for k, v in features.taps.items()}}
                for name, value in values.items():
                    put(handles[name], fields[name], value, view * n + first)
                if view == 0:
                    put(handles["y"], fields["y"], y, first)
                bar.update(len(batch))
            for handle in handles.values():
                os.fsync(handle)
            (folder / "done" / f"{view}-{start}").write_text(f"{time.perf_counter() - started:.3f}")
        bar.close()
    finally:
        for handle in handles.values():
            os.close(handle)
    state.wait_for_everyone()
    markers = [folder / "done" / f"{view}-{start}" for view, start in chunks]
    if all(marker.exists() for marker in markers):
        seconds = sum(float(marker.read_text() or 0) for marker in markers)
        about = {name: {"shape": list(f.shape), "dtype": f.dtype} for name, f in fields.items()}
        write_json(
            folder / "meta.json",
            {"format_version": FORMAT_VERSION, "samples": n, "views": views, "fields": about, "seconds": seconds},
        )
    else:
        raise CacheError(f"{folder} is still being written by another process; run again when that one has ended")
    state.wait_for_everyone()


def _fetch(dataset: Dataset[Any], rows: range) -> tuple[Tensor, Tensor]:
    many: Any = getattr(dataset, "__getitems__", None)
    pairs = many(list(rows)) if many else [dataset[i] for i in rows]
    x, y = default_collate(pairs)
    return x, y


def allocate(file: Path, f: Field, rows: int) -> int:
    """Reserve the whole file now: a full disk is found before hours of work, and never while writing a mapped page."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, max(1, rows * f.bytes))
        os.truncate(handle, rows * f.bytes)
    except OSError:
        os.close(handle)
        raise
    return handle


def put(handle: int, f: Field, value: Tensor, row: int) -> None:
    """Write rows from `row` on."""
    with np.errstate(over="ignore"):  # told below
        array = np.ascontiguousarray(value.detach().float().cpu().numpy().astype(f.dtype, copy=False))
    if array.shape[1:] != f.shape:
        raise ShapeError(f"sample {row} has the shape {array.shape[1:]}, the first one has {f.shape}")
    if not np.isfinite(array).all():
        raise CacheError(
            f"sample {row} has features that {f.dtype} cannot hold (NaN, infinite, or beyond its range); check the base and its "
            "input, or cache with dtype='float32'"
        )
    data, offset = array.tobytes(), row * f.bytes
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
