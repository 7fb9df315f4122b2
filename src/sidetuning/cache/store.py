"""The folder that a cache is, written in chunks by one process or several.

Layout: `<root>/<key>/` with one flat file per field (`x`, `out`, `tap.<name>`, `y`), one row after another; `done/`
with a marker per finished chunk; and `meta.json`, which alone makes a cache valid and is written last. A killed writer
resumes at the first chunk without a marker; several processes write disjoint chunks of the same files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from sidetuning.base import Base
from sidetuning.errors import CacheError, ShapeError
from sidetuning.files import write_json

FORMAT_VERSION = 1
T = TypeVar("T")
# Stores values of a field from a row on: put(name, values, row).
Put = Callable[[str, Tensor, int], None]
# Computes and stores one view of a range of samples: work(view, samples, put) yields the size of each finished batch.
Work = Callable[[int, range, Put], Iterator[int]]


@dataclass(frozen=True)
class Store:
    """A cache on disk, with one row per sample or per token.

    Attributes:
        fields: type and shape of a row of each field.
        samples, rows: their numbers, of one view.
        views: number of views of each sample; labels `y` are stored once.
        seconds: time that writing took, over all calls; chunks that were interrupted do not count.
    """

    folder: Path
    fields: Mapping[str, np.dtype[Any]]
    samples: int
    rows: int
    views: int = 1
    seconds: float = 0.0

    @staticmethod
    def open(folder: Path, rows: int | None = None) -> Store:
        """Read what a finished cache of `rows` rows, or of one per sample, holds; CacheError where that is not so."""
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format_version {meta['format_version']}, this library reads {FORMAT_VERSION}")
            fields = {name: np.dtype((field["dtype"], tuple(field["shape"]))) for name, field in meta["fields"].items()}
            samples, views = int(meta["samples"]), int(meta.get("views", 1))
            store = Store(folder, fields, samples, rows or samples, views, float(meta.get("seconds", 0)))
        except FileNotFoundError as error:
            raise CacheError(f"{folder} is no finished cache: meta.json is missing; cache again") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{folder}/meta.json cannot be read ({error}); delete {folder} and cache again") from error
        for name in fields:
            file = folder / name
            if not file.exists() or file.stat().st_size != store.size(name):
                raise CacheError(f"{file} is missing or has the wrong size; delete {folder} and cache again")
        return store

    def size(self, *names: str) -> int:
        """Bytes of the files of some fields, by default of all."""
        views = {name: 1 if name == "y" else self.views for name in names or self.fields}
        return sum(self.fields[name].itemsize * self.rows * count for name, count in views.items())

    def write(self, work: Work, chunk: int, progress: bool) -> None:
        """Do the work that no earlier call has finished, in chunks of `chunk` samples; several processes share it."""
        from accelerate import PartialState
        from tqdm import tqdm

        state, done = PartialState(), self.folder / "done"
        chunks = [(view, start) for view in range(self.views) for start in range(0, self.samples, chunk)]
        share = chunks[state.process_index :: state.num_processes]
        show = progress and state.is_main_process
        if show:
            what = f"{self.samples:,} samples x {self.views} views: {self.size() / 1e6:,.0f} MB in {self.folder}"
            tqdm.write(f"caching the base's features of {what}")
        with ExitStack() as stack:
            files = self._reserve(stack)
            bar = stack.enter_context(tqdm(total=len(share) * chunk, unit="sample", disable=not show, leave=False))
            for view, start in share:
                marker, samples = done / f"{view}-{start}", range(start, min(start + chunk, self.samples))
                if marker.exists():
                    bar.update(len(samples))
                    continue
                started = time.perf_counter()
                for count in work(view, samples, partial(self._put, files)):
                    bar.update(count)
                with disk_errors(self.folder):
                    for file in files.values():
                        file.flush()
                        os.fsync(file.fileno())
                    marker.write_text(f"{time.perf_counter() - started:.3f}")
        state.wait_for_everyone()
        markers = [done / f"{view}-{start}" for view, start in chunks]
        if not all(marker.exists() for marker in markers):
            raise CacheError(f"{self.folder} is being written by another process; run again when that one has ended")
        fields = {name: {"shape": list(field.shape), "dtype": str(field.base)} for name, field in self.fields.items()}
        seconds = sum(float(marker.read_text() or 0) for marker in markers)
        about = {"format_version": FORMAT_VERSION, "samples": self.samples, "views": self.views, "fields": fields}
        write_json(self.folder / "meta.json", {**about, "seconds": seconds})
        state.wait_for_everyone()

    def _reserve(self, stack: ExitStack) -> dict[str, BinaryIO]:
        """Open all files at their full size: a full disk is found before hours of work."""
        files: dict[str, BinaryIO] = {}
        with disk_errors(self.folder):
            (self.folder / "done").mkdir(parents=True, exist_ok=True)
            for name in self.fields:
                handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
                files[name] = stack.enter_context(os.fdopen(handle, "r+b"))
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, max(1, self.size(name)))
                os.truncate(handle, self.size(name))
        return files

    def _put(self, files: Mapping[str, BinaryIO], name: str, value: Tensor, row: int) -> None:
        field = self.fields[name]
        given = name in ("x", "y")
        # NumPy has no bfloat16. What float16 cannot hold becomes infinite, and is refused below.
        value = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        with np.errstate(over="ignore"):
            found = value.cpu().numpy()
            array = np.ascontiguousarray(found.astype(field.base, copy=False))
        if given and found.dtype != field.base:
            raise ShapeError(
                f"'{name}' of sample {row} is {found.dtype}, that of the first one {field.base}; give one type, also "
                "after augmentation"
            )
        if array.shape[1:] != field.shape:
            raise ShapeError(f"sample {row} has the shape {array.shape[1:]}, the first one has {field.shape}")
        # Targets may be NaN where a loss ignores them.
        if not given and not np.isfinite(array).all():
            raise CacheError(
                f"sample {row} has features that {field.base} cannot hold (NaN, infinite, or beyond its range); "
                "check the base and its input, or cache with dtype='float32'"
            )
        with disk_errors(self.folder):
            files[name].seek(row * field.itemsize)
            files[name].write(array.tobytes())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a CacheError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"the disk of {folder} is full; free some space and run again: it resumes there"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise CacheError(f"{folder} cannot be written to ({error.strerror}); give another folder") from error
        raise


def fields_of(out: T, taps: Mapping[str, T]) -> dict[str, T]:
    """What belongs to the output and the taps, by the names of their fields."""
    return {"out": out, **{f"tap.{name}": tap for name, tap in taps.items()}}


def folder_of(
    root: str | Path, base: Base, taps: Mapping[str, tuple[int, ...]], content: Sequence[Any], before: Sequence[Any]
) -> Path:
    """The folder of a cache, named by all that its rows depend on: the base, its stored taps, and `content`.

    `before` is the content as version 0.1.0 named it.

    A folder that version 0.1.0 named is taken where there is no newer one, but not for a base that is channels last:
    those names did not tell it from one that is not.
    """
    identity = base.identity()
    norm = [None if t is None else t.flatten().tolist() for t in (base.mean, base.std)]
    # Taps that have not the layout of the network's output.
    usual = "nhwc" if base.select.channels_last else "nchw"
    other = {tap: base.layouts[tap] for tap in taps if base.layouts.get(tap, usual) != usual}
    newer = [identity.digest(), base.structure(), taps, *content, *([other] if other else [])]
    older = [identity.sha256, norm, identity.preparation["output"], identity.output_shape, taps, *before]
    folder, old = (Path(root) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] for key in (newer, older))
    return old if old.exists() and not folder.exists() and not other and usual == "nchw" else folder
