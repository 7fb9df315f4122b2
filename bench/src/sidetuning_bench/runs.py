"""A run's folder: settings, metrics, matrix, tasks and resume files; the same command resumes in it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning.files import (
    LONGEST_TEXT,
    atomic_write,
    check_signed,
    parse_json,
    read_bytes,
    read_json,
    signed,
    write_json,
)
from sidetuning.terminal import plain
from sidetuning_bench.options import FREE, defaults, flat, translated, with_values

# Version 1 had no checksums; version 0.1.0 of the library wrote no version.
FORMAT_VERSION = 2
# What can be done about a damaged line.
LINE = "remove the line, or choose another folder with --out"
MEND = "choose another folder with --out, or delete this one"
SCHEMA = {"scenario": str, "settings": dict, "format_version?": int, "fingerprints?": dict}
S = TypeVar("S")
# A setting of dense tasks that came later, and what it was for all runs before.
BEFORE = {"units": "range"}
# What is the default of another, and was then.
WAS = {"merge": ("mlp2", "alpha")}


class Run:
    """`run.json`, `metrics.jsonl`, `matrix.json`, `tasks/` and `resume/` under one folder.

    Args:
        folder: made where it does not exist.
        scenario: name of the scenario.
        settings: its frozen dataclass, with its groups.
        free: names of settings that may differ when a run resumes (paths, not science).

    Raises:
        SideTuningError: the folder cannot be written, or holds a run with other settings.
    """

    def __init__(self, folder: str | Path, scenario: str, settings: Any, free: tuple[str, ...] = FREE) -> None:
        self.folder = Path(folder)
        wanted = {name: value for name, value in flat(settings).items() if name not in free}
        writable(self.folder)
        file = self.folder / "run.json"
        # What failed before it began, by a mistake in its settings, may begin again with others.
        if file.exists() and any(other != file for other in self.folder.iterdir()):
            self._check(scenario, settings, as_json(wanted), free)
            return
        versions = {name: version(name) for name in ("sidetuning", "torch", "numpy", "accelerate")}
        content = {
            "format_version": FORMAT_VERSION,
            "scenario": scenario,
            "settings": wanted,
            "versions": versions | {"python": platform.python_version()},
            "command": sys.argv,
        }
        try:
            write_json(file, signed(content))
        except OSError as error:
            raise SideTuningError(
                f"{folder} cannot be written to ({error.strerror}); choose another with --out"
            ) from error

    def _check(self, scenario: str, settings: Any, wanted: Mapping[str, Any], free: tuple[str, ...]) -> None:
        found = read_run(self.folder)
        known = {k: v for k, v in {**as_json(defaults(settings)), **BEFORE}.items() if k in wanted}
        own = found["settings"] if "format_version" in found else translated(found["settings"], wanted)
        saved, was = {**known, **own}, found["scenario"]
        if was != scenario:
            raise SideTuningError(f"{self.folder} holds a run of {was}; choose another folder with --out")
        names = [*wanted, *(name for name in saved if name not in wanted and name not in free)]
        other = [f"{n} {saved.get(n)!r} (now {wanted.get(n)!r})" for n in names if saved.get(n) != wanted.get(n)]
        if other:
            raise SideTuningError(f"{self.folder} holds a run with other settings: {', '.join(other)}; {MEND}")

    def belongs(self, **what: str) -> None:
        """Keep fingerprints of what the run is of, such as its data, and refuse others when it goes on.

        Raises:
            SideTuningError: another was kept.
        """
        content = read_run(self.folder)
        kept = content.setdefault("fingerprints", {})
        before = dict(kept)
        for name, value in what.items():
            if kept.setdefault(name, value) != value:
                raise SideTuningError(f"{self.folder} holds a run of another {name}; {MEND}")
        if kept != before:
            write_json(self.folder / "run.json", signed(content))

    def tasks(self, name: str = "") -> Path:
        """Where a method saves its tasks; a method that has one task alone goes by that task's name."""
        return self.folder / "tasks" / name

    def done(self, name: str) -> None:
        """Forget the resume files of a task that is learned and saved."""
        for file in (self.folder / "resume").glob(f"{name}.pt*"):
            file.unlink()

    def resume(self, name: str) -> Path:
        """The resume file of a task's training."""
        (self.folder / "resume").mkdir(exist_ok=True)
        return self.folder / "resume" / f"{name}.pt"

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; a last line cut short by a kill is left out.

        Raises:
            SideTuningError: another line is damaged.
        """
        return [row for row, _, _ in self._rows()]

    def _rows(self) -> list[tuple[dict[str, Any], bytes, int]]:
        """The rows, each with its line and its place in the order of writing."""
        file = self.folder / "metrics.jsonl"
        try:
            lines = read_bytes(file, LONGEST_TEXT).split(b"\n")[:-1] if file.exists() else []
        except OSError as error:
            raise SideTuningError(f"{file} cannot be read ({error}); {MEND}") from error
        last, rows, needed = 0, [], (read_run(self.folder).get("format_version") or 0) > 1
        for number, line in enumerate(lines, start=1):
            name = f"{file}, line {number},"
            row = parse_json(line.decode(errors="replace"), name, {}, LINE)
            row = check_signed(row, name, LINE, needed)
            # Of a run that an older version began.
            place = row.pop("place", last)
            if type(place) is not int or place < last:
                raise SideTuningError(f"{name} was moved from another place; {LINE}")
            last = place
            rows.append((row, line + b"\n", place))
        return rows

    def keep(self, which: Callable[[Mapping[str, Any]], bool]) -> None:
        """Leave those rows of `metrics.jsonl` alone."""
        lines = [line if which(row) else b"" for row, line, _ in self._rows()]
        if not all(lines):
            with atomic_write(self.folder / "metrics.jsonl") as temporary:
                temporary.write_bytes(b"".join(lines))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to `metrics.jsonl`, after dropping a line that a kill cut short."""
        file = self.folder / "metrics.jsonl"
        rows = self._rows()
        with file.open("r+b" if file.exists() else "wb") as out:
            out.seek(sum(len(line) for _, line, _ in rows))
            out.truncate()
            out.write(json.dumps(signed({**row, "place": rows[-1][2] + 1 if rows else 0})).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())  # what is saved after it must not outlive it


def read_run(folder: str | Path) -> dict[str, Any]:
    """What the run in a folder is, by its `run.json`.

    Raises:
        SideTuningError: there is no run, or its file is damaged.
    """
    file = Path(folder) / "run.json"
    try:
        content = read_json(file, SCHEMA, MEND)
    except FileNotFoundError as error:
        raise SideTuningError(f"{folder} holds no run: run.json is missing; give the folder of a run") from error
    return check_signed(content, str(file), MEND, needed=(content.get("format_version") or 0) > 1)


def dated(settings: S, folder: str | Path) -> S:
    """Settings of dense tasks whose `units` are "labels" where they are not given.

    In the folder of a run that began before there was a choice they are "range", and defaults are what they were then.
    """
    now = flat(settings)
    if now["units"] is not None:
        return settings
    saved = read_run(folder)["settings"] if (Path(folder) / "run.json").exists() else {"units": "labels"}
    if "units" in saved:
        return with_values(settings, {"units": "labels"})
    was = {name: old for name, (new, old) in WAS.items() if (now.get(name), saved.get(name)) == (new, old)}
    tqdm.write(plain(f"{folder} holds a run of an earlier version, and goes on with its defaults: {BEFORE | was}"))
    return with_values(settings, BEFORE | was)


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are read from JSON: tuples are lists."""
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def writable(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        SideTuningError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SideTuningError(
            f"{folder} cannot be written to ({error.strerror}); choose another folder with --out"
        ) from error


def absolute(path: str | None) -> str | None:
    """The whole path, which is the same from every folder."""
    return None if path is None else str(Path(path).expanduser().resolve())


def read_result(kind: Callable[..., Any], file: Path) -> Any:
    """A result that an earlier call wrote.

    Raises:
        SideTuningError: it cannot be read, or another version of the library wrote it.
    """
    mend = "delete it, and run the same command again"
    try:
        return kind(**check_signed(read_json(file, {}, mend), str(file), mend, needed=False))
    except ArtifactError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise SideTuningError(f"{file} cannot be read ({error}); {mend}") from error


def write_result(file: Path, result: Any) -> None:
    """Write a result, a dataclass, for `read_result`."""
    write_json(file, signed(asdict(result)))


def peak_memory_mb(anew: bool = False) -> float | None:
    """The most memory that this process has held, in MB; None where the system does not tell (Windows).

    Args:
        anew: count from here on, where the system can (Linux).
    """
    status = Path("/proc/self/status")
    if status.exists():  # unlike `ru_maxrss` it does not start at the peak of the process that started this one
        if anew:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        row = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(row.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def end_with_parent() -> None:
    """In a process that another one has started: end when that one ends, even if it was killed."""
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
