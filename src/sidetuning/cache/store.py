"""The folder that a cache is, written in chunks by one process or several.

Layout: `<root>/<key>/` with one flat file per field (`x`, `out`, `tap.<name>`, `y`), one row after another, and beside
each `sum.<field>` with a checksum per row, which every read compares; `probe.json`, which tells what the base computes;
`done/` with a marker per finished chunk; and `meta.json`, which alone makes a cache valid and is written last. A killed
writer resumes at the first chunk without a marker, or whose rows are not those that were written; several processes
write disjoint chunks of the same files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetuning.base import Base
from sidetuning.errors import ArtifactError, CacheError, ShapeError, SideTuningError
from sidetuning.files import check_json, check_signed, read_json, signed, write_json, write_text
from sidetuning.identity import Identity
from sidetuning.launch import processes
from sidetuning.probe import same_summary
from sidetuning.terminal import plain

# Version 1 had no checksums.
FORMAT_VERSION = 2
# Numbers alone: NumPy takes the bytes of an object for addresses. The sizes of the files bound the shapes.
TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
TYPES |= {"float16", "float32", "float64", "complex64", "complex128"}
FIELD = {"shape": [int], "dtype": TYPES}
SCHEMA = {"format_version": int, "samples": int, "views?": int, "fields": dict, "seconds?": float}
# What the base of a cache makes of fixed inputs.
PROBE = "probe.json"
MARKER = {"seconds": float, "rows": dict}
SUM = np.dtype(np.uint64)
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
        summed: whether there is a checksum of each row.
    """

    folder: Path
    fields: Mapping[str, np.dtype[Any]]
    samples: int
    rows: int
    views: int = 1
    seconds: float = 0.0
    summed: bool = True

    @staticmethod
    def open(folder: Path, rows: int | None = None) -> Store:
        """Read what a finished cache of `rows` rows, or of one per sample, holds; CacheError where that is not so."""
        file, mend = folder / "meta.json", f"delete {folder} and cache again"
        try:
            meta = read_json(file, SCHEMA, mend)
            if not 1 <= meta["format_version"] <= FORMAT_VERSION:
                raise CacheError(
                    f"{file} has format_version {meta['format_version']}, this library reads 1 to {FORMAT_VERSION}; "
                    f"{mend}"
                )
            meta = check_signed(meta, str(file), mend, needed=meta["format_version"] > 1)
            fields = {name: _field(check_json(field, str(file), FIELD, mend)) for name, field in meta["fields"].items()}
        except FileNotFoundError as error:
            raise CacheError(f"{folder} is no finished cache: meta.json is missing; cache again") from error
        except ArtifactError as error:
            raise CacheError(str(error)) from error
        except (ValueError, OverflowError) as error:
            raise CacheError(f"{file} has a shape of no array ({error}); {mend}") from error
        samples, views, seconds = meta["samples"], meta.get("views") or 1, float(meta.get("seconds") or 0)
        store = Store(folder, fields, samples, rows or samples, views, seconds, meta["format_version"] > 1)
        if min(samples, views) < 1 or "out" not in fields:
            raise CacheError(f"{file} has no valid sizes; {mend}")
        for name, size in store.files().items():
            if not re.fullmatch(r"[\w. -]+", name) or not (folder / name).is_file():
                raise CacheError(f"{folder / name} is missing; {mend}")
            if (folder / name).stat().st_size != size:
                raise CacheError(f"{folder / name} has the wrong size; {mend}")
        return store

    def files(self) -> dict[str, int]:
        """The files of all fields, and of their sums, with their sizes in bytes."""
        sizes = {name: self.size(name) for name in self.fields}
        for name, field in self.fields.items() if self.summed else ():
            sizes[f"sum.{name}"] = sizes[name] // max(1, field.itemsize) * SUM.itemsize
        return sizes

    def size(self, *names: str) -> int:
        """Bytes of the files of some fields, by default of all."""
        views = {name: 1 if name == "y" else self.views for name in names or self.fields}
        return sum(self.fields[name].itemsize * self.rows * count for name, count in views.items())

    def read(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Some rows of a field, (n, …); CacheError where they are not those that were written."""
        values = _rows(self.folder / name, self.fields[name], rows)
        if self.summed and not np.array_equal(row_sums(values, rows), _rows(self.folder / f"sum.{name}", SUM, rows)):
            raise CacheError(
                f"{self.folder / name} was changed since it was written; delete {self.folder} and cache again"
            )
        return values

    def write(self, work: Work, chunk: int, progress: bool) -> None:
        """Do the work that no earlier call has finished, in chunks of `chunk` samples; several processes share it."""
        from tqdm import tqdm

        state, done = processes(), self.folder / "done"
        # Several processes take smaller ones, to end together; what is drawn for a view depends on where chunks begin.
        few = -(-self.samples // (4 * state.num_processes))
        size = chunk if self.views > 1 or state.num_processes == 1 else min(chunk, few)
        chunks = [(view, start) for view in range(self.views) for start in range(0, self.samples, size)]
        markers = [done / (f"{view}-{start}" + f"-{size}" * (size != chunk)) for view, start in chunks]
        share = list(zip(chunks, markers, strict=True))[state.process_index :: state.num_processes]
        show = progress and state.is_main_process
        if show:
            times = f" in {self.views} views" if self.views > 1 else ""
            what = f"{self.samples:,} samples{times}: {self.size() / 1e6:,.0f} MB in {self.folder}"
            tqdm.write(plain(f"caching the base's features of {what}"))
        if state.is_main_process:
            self._clear()
        state.wait_for_everyone()
        with ExitStack() as stack:
            files = self._reserve(stack)
            total = sum(min(size, self.samples - start) for (_, start), _ in share)
            bar = stack.enter_context(tqdm(total=total, unit="sample", disable=not show, leave=False))
            for (view, start), marker in share:
                samples = range(start, min(start + size, self.samples))
                if self._is_done(marker):
                    bar.update(len(samples))
                    continue
                started, written = time.perf_counter(), dict[str, tuple[int, int]]()
                for count in work(view, samples, partial(self._put, files, written)):
                    bar.update(count)
                with disk_errors(self.folder):
                    for file in files.values():
                        file.flush()
                        os.fsync(file.fileno())
                    write_json(marker, {"seconds": round(time.perf_counter() - started, 3), "rows": written})
        state.wait_for_everyone()
        if not all(map(self._is_done, markers if state.is_main_process else [])):
            raise CacheError(f"{self.folder} is being written by another process; run again when that one has ended")
        fields = {name: {"shape": list(field.shape), "dtype": str(field.base)} for name, field in self.fields.items()}
        seconds = sum(read_json(marker, MARKER, "")["seconds"] for marker in markers)
        about = {"format_version": FORMAT_VERSION, "samples": self.samples, "views": self.views, "fields": fields}
        write_json(self.folder / "meta.json", signed({**about, "seconds": seconds}))
        state.wait_for_everyone()

    def _clear(self) -> None:
        """Begin anew where something else lies in place of a file: through a link, others' files would be written."""
        done, probe = self.folder / "done", self.folder / PROBE
        for path in self.folder.rglob("*"):
            if path.is_symlink() or not (path.is_dir() if path == done else path.is_file()):
                told = None if probe.is_symlink() or not probe.is_file() else probe.read_text()
                shutil.rmtree(self.folder)
                if told is not None:
                    write_text(probe, told)
                return

    def _reserve(self, stack: ExitStack) -> dict[str, BinaryIO]:
        """Open all files at their full size: a full disk is found before hours of work."""
        files: dict[str, BinaryIO] = {}
        with disk_errors(self.folder):
            (self.folder / "done").mkdir(parents=True, exist_ok=True)
            for name, size in self.files().items():
                handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644)
                files[name] = stack.enter_context(os.fdopen(handle, "r+b"))
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, max(1, size))
                os.truncate(handle, size)
        return files

    def _is_done(self, marker: Path) -> bool:
        """Whether the rows of a chunk are those that its marker speaks of; files may have been lost since."""
        try:
            for name, (first, last) in read_json(marker, MARKER, "")["rows"].items():
                if not 0 <= first <= last <= self.rows * self.views:
                    return False
                self.read(name, np.arange(first, last))
        except (OSError, SideTuningError, ValueError, TypeError, KeyError):
            return False
        return True

    def _put(
        self, files: Mapping[str, BinaryIO], written: dict[str, tuple[int, int]], name: str, value: Tensor, row: int
    ) -> None:
        """Store values of a field, and widen the range of rows that were `written` of it."""
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
            for file, data in ((name, array), (f"sum.{name}", row_sums(array, np.arange(row, row + len(array))))):
                files[file].seek(row * (data.nbytes // max(1, len(data))))
                files[file].write(data.tobytes())
        first, last = written.get(name, (row, row))
        written[name] = min(first, row), max(last, row + len(array))


def _rows(file: Path, field: np.dtype[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Some rows of a file, neighbours in one go.

    Read, not mapped: the pages of a map count as this process's memory, and a file that is cut meanwhile would end it.
    """
    values = np.empty(len(rows), field)
    content, size = memoryview(values.reshape(-1).view(np.uint8).data), field.itemsize
    firsts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    with file.open("rb", buffering=0) as opened:
        for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True):
            opened.seek(int(rows[first]) * size)
            if opened.readinto(content[first * size : last * size]) != (last - first) * size:
                raise CacheError(f"{file} was cut; delete {file.parent} and cache again")
    return values


def row_sums(array: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """A checksum for each row of an array, of its bytes and its number; a change of one number is always found."""
    data = np.ascontiguousarray(array).reshape(len(array), -1 if array.size else 0).view(np.uint8)
    width = next(width for width in (8, 4, 2, 1) if data.shape[1] % width == 0)
    words = data.view(f"u{width}")
    weights = np.arange(1, words.shape[1] + 1, dtype=SUM) * SUM.type(0x9E3779B97F4A7C15) | SUM.type(1)
    own = (rows.astype(SUM) + SUM.type(1)) * SUM.type(0xC2B2AE3D27D4EB4F)
    return own + np.einsum("ij,j->i", words, weights, dtype=SUM, casting="unsafe")


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
    folder = old if old.exists() and not folder.exists() and not other and usual == "nchw" else folder
    # Code that the hashes do not see may compute something else with equal weights.
    while not _computed_by(folder, identity):
        folder = folder.with_name(f"{folder.name}-other")
    return folder


def _computed_by(folder: Path, identity: Identity) -> bool:
    """Whether a folder's features are those of a base, as far as its probe tells; a new folder becomes the base's."""
    file, probe = folder / PROBE, list(identity.probe)
    told = len(probe) > 0 and all(map(math.isfinite, probe))
    if not file.exists() and told and not (folder / "meta.json").exists() and processes().is_main_process:
        with disk_errors(folder):
            about = {"probe": probe, "input_shape": identity.input_shape}
            write_json(own := folder / f"{uuid.uuid4().hex}.{PROBE}", about)
            try:
                # Of two processes with different bases, the first one has it.
                os.link(own, file)
            except FileExistsError:
                pass
            except OSError:
                # A file system without links.
                shutil.copy(own, file)
            own.unlink(missing_ok=True)
    if not told or not file.exists():
        return True
    found = read_json(file, {"probe": [float]}, f"delete {folder} and cache again")
    return found.get("input_shape") != identity.input_shape or same_summary(found["probe"], probe)


def _field(recorded: Mapping[str, Any]) -> np.dtype[Any]:
    return np.dtype((recorded["dtype"], tuple(recorded["shape"])))
