"""What a published number is made of: its settings, its run, its table, and the file that keeps how it was made."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from sidetuning.files import write_json
from sidetuning_bench import grid
from sidetuning_bench.grid import Cell
from sidetuning_bench.options import FREE, flat, translated

PACKAGES = (
    *("sidetuning", "torch", "numpy", "accelerate", "timm", "transformers", "onnxruntime", "openvino", "torchao"),
    *("vizdoom", "stable-baselines3", "gymnasium"),
)
RESULTS = Path(__file__).parent / "results"
# Paths of the machine, which are not published.
PRIVATE = ("base_weights", "threads", *FREE)
R = TypeVar("R")


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        settings: default settings, a dataclass with its groups.
        run: measures what has no result yet, and writes `results/*.json`.
        table: the tables of the documents, from the results.
        report: writes a page of the results.
    """

    settings: Any
    run: Callable[[Any], None]
    table: Callable[[Any], str] | None = None
    report: Callable[[Any, Path], None] | None = None


def run_cells(
    cells: Iterable[Cell[Any]],
    work: Callable[[Any], R],
    finished: Callable[[Cell[Any]], R | None],
    name: Callable[[Cell[Any]], str],
    content: Callable[[Cell[Any], R], dict[str, Any]],
    free: Collection[str] = (),
) -> None:
    """Run and record the cells that have no result yet.

    Args:
        cells, work, finished: as in `grid.run`.
        name: names the result of a cell.
        content: makes the content of its file.
        free: settings that a result may have otherwise.
    """
    todo = [cell for cell in cells if not recorded(name(cell), public(cell.settings), free)]
    progress = all(flat(cell.settings).get("progress", True) for cell in todo)
    for cell, result in grid.run(todo, work, finished, progress=progress):
        write(name(cell), content(cell, result))


def public(settings: Any) -> dict[str, Any]:
    """Settings by flat name, without paths of the machine."""
    values = {name: value for name, value in flat(settings).items() if name not in PRIVATE}
    return {name: shown(value) if isinstance(value, str) else value for name, value in values.items()}


def shown(word: str) -> str:
    """A word of a command or a setting, by the last part of its name where it is a path of the machine."""
    if word.startswith("hf:"):
        return f"hf:{Path(word).name}" if Path(word[3:]).is_dir() else word
    return Path(word).name if Path(word).is_absolute() else word


def recorded(name: str, settings: Mapping[str, Any], free: Collection[str] = ()) -> bool:
    """Whether there is a result of this name; one of other settings, but for those in `free`, ends the program."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return False
    # Some older results do not tell.
    was = translated(json.loads(file.read_text()).get("settings") or {}, settings)
    now = json.loads(json.dumps(dict(settings)))
    other = [f"{k} {was[k]!r} (now {v!r})" for k, v in now.items() if k in was and k not in free and was[k] != v]
    if other:
        sys.exit(f"{file.name} was run with {', '.join(other)}; move it away to run it anew")
    return True


def read(name: str) -> Any:
    """The content of one result; without any, the program ends."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        sys.exit(f"there is no result {file.name} yet: run this without --table")
    return json.loads(file.read_text())


def read_all(pattern: str) -> list[dict[str, Any]]:
    """The contents of the results whose files match, by file name."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))]


def read_results(kind: type[R], pattern: str) -> list[R]:
    """The results whose files match, without what `write` adds."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return [kind(**{k: v for k, v in content.items() if k in known}) for content in read_all(pattern)]


def write(name: str, content: Any, given: Any = None) -> None:
    """Write `results/<name>.json`: the content, with the settings `given`, and command, machine, versions and date."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    values = dict(content) if isinstance(content, dict) else asdict(content)
    if given is not None:
        values["settings"] = public(given)
    elif isinstance(own := values.get("settings"), dict):
        kept = {key: value for key, value in own.items() if key not in PRIVATE}
        values["settings"] = {key: shown(value) if isinstance(value, str) else value for key, value in kept.items()}
    about = {
        "command": shlex.join(["python", "bench/records/run.py", *map(shown, sys.argv[1:])]),
        "machine": f"{os.cpu_count()} cores, {(models or [platform.processor()])[0]}",
        # Of processes that measured, the content tells.
        "threads": values.get("threads", torch.get_num_threads()),
        "versions": versions,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_json(RESULTS / f"{name}.json", {**values, **about})


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long something takes."""
    started = clock()
    work()
    return clock() - started


def ratio(
    many: Callable[[], Any], one: Callable[[], Any], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median, least and most of many / one, measured in turns; the first round warms up."""
    ratios = [seconds(many, clock) / seconds(one, clock) for _ in range(rounds + 1)][1:]
    return [statistics.median(ratios), min(ratios), max(ratios)]
