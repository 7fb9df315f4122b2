"""Base features of texts, computed once: a cache on disk of real tokens, without padding.

As `cache`, but for bases whose input is a mapping of token ids of different lengths. Layout: `<root>/<key>/` with one flat file per
field (`out`, `tap.<name>`), all tokens of all texts one after another, `done/<chunk>` markers and `meta.json`, written last.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from sidetuning.base import Base, Features
from sidetuning.cache import Field, allocate, cache_key, disk_errors, put
from sidetuning.errors import CacheError, ShapeError
from sidetuning.files import write_json
from sidetuning.sides.top import EMBEDDINGS

FORMAT_VERSION = 1
CHUNK = 512  # texts between two markers


class Texts(Protocol):
    """Texts as token ids, such as `data.squad.Windows`."""

    def __len__(self) -> int: ...

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        ...

    def batch(self, rows: Sequence[int], /) -> dict[str, Tensor]:
        """Texts padded to the longest of them: the base's input, with "attention_mask"."""
        ...

    def fingerprint(self) -> str:
        """Of all tokens."""
        ...


class CachedTokens(Dataset[Any]):
    """Batches of `(inputs, features, labels)`, padded to the longest text of the batch; features of padding are 0.

    Attributes:
        texts: the texts.
        labels: of each, (n, …).
        taps: names of those that are stored.
        seconds: that writing it took, over all calls; without what was begun and interrupted.
    """

    def __init__(self, base: Base, texts: Texts, labels: Tensor, folder: Path) -> None:
        self.texts, self.labels, self.folder = texts, labels, folder
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["format_version"] != FORMAT_VERSION or meta["samples"] != len(texts):
                raise ValueError("another version or number of texts")
            fields = {name: Field(tuple(f["shape"]), f["dtype"]) for name, f in meta["fields"].items()}
            self.seconds = float(meta.get("seconds", 0.0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{folder}/meta.json cannot be read ({error}); delete {folder} and cache again") from error
        self._starts = np.concatenate([[0], np.cumsum(texts.lengths())])
        self._fields = fields
        for name, f in fields.items():
            file = folder / name
            if not file.exists() or file.stat().st_size != int(self._starts[-1]) * f.bytes:
                raise CacheError(f"{file} is missing or has the wrong size; delete {folder} and cache again")
        self.taps = [name[4:] for name in fields if name.startswith("tap.")]
        self._embeddings = _embeddings(base)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Features, Tensor]:
        inputs = self.texts.batch(rows)
        longest = inputs["attention_mask"].shape[1]
        taps = {name: self._read(f"tap.{name}", rows, longest) for name in self.taps}
        if self._embeddings is not None:
            taps = {EMBEDDINGS: embed(self._embeddings, inputs), **taps}
        return inputs, Features(self._read("out", rows, longest), taps), self.labels[list(rows)]

    def _read(self, name: str, rows: Sequence[int], longest: int) -> Tensor:
        f = self._fields[name]
        size = int(np.prod(f.shape))
        out = torch.zeros(len(rows), longest, *f.shape)
        for k, row in enumerate(rows):
            first, last = int(self._starts[row]), int(self._starts[row + 1])
            # read, not mapped: the pages of a map would count as this process's memory
            part = np.fromfile(self.folder / name, f.dtype, (last - first) * size, offset=first * f.bytes)
            out[k, : last - first] = torch.from_numpy(part.astype(np.float32)).view(-1, *f.shape)
        return out


@torch.no_grad()
def embed(layer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The embeddings of tokens, before the first layer; 0 where there is padding."""
    device = next(layer.parameters()).device
    given = {k: inputs[k].to(device) for k in ("input_ids", "token_type_ids") if k in inputs}
    vectors: Tensor = layer(**given)
    return vectors.to(inputs["attention_mask"].device) * inputs["attention_mask"].unsqueeze(-1)


def _embeddings(base: Base) -> nn.Module | None:
    """The base's layer of that name, where it is one of its taps."""
    return (
        base.net.get_submodule(EMBEDDINGS)
        if EMBEDDINGS in base.tap_shapes and isinstance(base.net, nn.Module)
        else None
    )


def token_cache_bytes(base: Base, texts: Texts, dtype: str = "float16") -> int:
    """How large a cache will be, in bytes."""
    return sum(f.bytes for f in _fields(base, dtype).values()) * int(texts.lengths().sum())


def cache_tokens(
    base: Base, texts: Texts, labels: Tensor, path: str | Path, *, dtype: str = "float16", batch_size: int = 16, progress: bool = True
) -> CachedTokens:  # fmt: skip
    """Run the base once over texts and keep its features; a finished cache of the same key is only opened.

    Args:
        base: a base whose output, and taps, are sequences.
        texts: what it reads.
        labels: of each text; not part of the cache.
        path: folder of caches; this one gets a subfolder named by its key.
        dtype: "float16", or "float32" for twice the size.
        batch_size: of the base passes.
        progress: print the size before writing, and show a bar.

    Raises:
        ShapeError: outputs that are no sequences.
        CacheError: the disk is full or read-only; what was written stays and the next call goes on from it.
    """
    if base.kind != "sequence":
        raise ShapeError(
            f"cache_tokens keeps features of tokens, and this base returns a {base.kind}; use cache_features"
        )
    stored = {name: shape for name, shape in base.tap_shapes.items() if name != EMBEDDINGS}
    folder = Path(path) / cache_key(base, texts.fingerprint(), 1, None, 0, f"tokens {dtype}", stored)
    if not (folder / "meta.json").exists():
        with disk_errors(path):
            _write(base, texts, folder, dtype, batch_size, progress)
    return CachedTokens(base, texts, labels, folder)


def _fields(base: Base, dtype: str) -> dict[str, Field]:
    taps = {f"tap.{name}": shape for name, shape in base.tap_shapes.items() if name != EMBEDDINGS}
    if any(len(shape) != 2 for shape in taps.values()):
        raise ShapeError(f"cache_tokens keeps taps that are sequences, not {base.tap_shapes}")
    return {name: Field(tuple(shape[1:]), dtype) for name, shape in {"out": base.output_shape, **taps}.items()}


def _write(base: Base, texts: Texts, folder: Path, dtype: str, batch_size: int, progress: bool) -> None:
    from tqdm import tqdm

    fields, lengths = _fields(base, dtype), texts.lengths()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    (folder / "done").mkdir(parents=True, exist_ok=True)
    if progress:
        size = token_cache_bytes(base, texts, dtype)
        tqdm.write(f"caching the base's features of {len(lengths):,} texts: {size / 1e6:,.0f} MB in {folder}")
    handles = {name: allocate(folder / name, f, int(starts[-1])) for name, f in fields.items()}
    try:
        with tqdm(total=len(lengths), unit="text", disable=not progress, leave=False) as bar:
            for first in range(0, len(lengths), CHUNK):
                chunk = np.arange(first, min(first + CHUNK, len(lengths)))
                marker = folder / "done" / str(first)
                if not marker.exists():
                    started = time.perf_counter()
                    for rows in np.array_split(chunk[np.argsort(lengths[chunk])], -(-len(chunk) // batch_size)):
                        _keep(base, texts, rows.tolist(), handles, fields, starts)
                    for handle in handles.values():
                        os.fsync(handle)
                    marker.write_text(f"{time.perf_counter() - started:.3f}")
                bar.update(len(chunk))
    finally:
        for handle in handles.values():
            os.close(handle)
    about = {name: {"shape": list(f.shape), "dtype": f.dtype} for name, f in fields.items()}
    seconds = sum(float(marker.read_text() or 0) for marker in (folder / "done").iterdir())
    write_json(
        folder / "meta.json",
        {"format_version": FORMAT_VERSION, "samples": len(lengths), "fields": about, "seconds": seconds},
    )


def _keep(base: Base, texts: Texts, rows: list[int], handles: Any, fields: Any, starts: NDArray[Any]) -> None:
    """Run the base on some texts of similar length and write their real tokens."""
    inputs = {k: v.to(base.device) for k, v in texts.batch(rows).items()}
    features = base(inputs)
    for name, handle in handles.items():
        value = features.out if name == "out" else features.taps[name[4:]]
        for k, row in enumerate(rows):
            put(handle, fields[name], value[k, : int(starts[row + 1] - starts[row])], int(starts[row]))


class ByLength(Sampler[list[int]]):
    """Batches of texts of similar lengths, in random order: little padding, and still another mixture in every pass. A smaller batch is the last.

    Args:
        lengths: of the texts.
        batch_size: texts per batch.
        shuffle: False gives them from the shortest to the longest.
    """

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, shuffle: bool = True) -> None:
        self.lengths, self.batch_size, self.shuffle = lengths, batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        n, size = len(self.lengths), self.batch_size
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")
            yield from (order[i : i + size].tolist() for i in range(0, n, size))
            return
        order = torch.randperm(n).numpy()
        pools = [order[i : i + 50 * size] for i in range(0, n, 50 * size)]
        batches = []
        for pool in pools:
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + size].tolist() for i in range(0, len(pool), size)]
        mixed = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        # The smaller one last: accelerate, where it splits batches over processes, drops it on the way.
        yield from sorted(mixed, key=lambda batch: len(batch) < size)


def token_loader(data: Any, lengths: NDArray[np.int64], batch_size: int = 16, shuffle: bool = True) -> DataLoader[Any]:
    """A loader of `(inputs, features or None, labels)` with batches of similar lengths, from a data set with `__getitems__`."""
    return DataLoader(data, batch_sampler=ByLength(lengths, batch_size, shuffle), collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    return batch
