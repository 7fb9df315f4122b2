"""What every result file says about how it was made."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Collection
from dataclasses import asdict, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from sidetuning.files import write_json

PACKAGES = ("sidetuning", "torch", "numpy", "accelerate", "vizdoom", "stable-baselines3", "gymnasium")
RESULTS = Path(__file__).parent / "results"
R = TypeVar("R")


def processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def arguments(given: list[str]) -> list[str]:
    """What a user gave: without the cell, which the scripts put at the end, and the folders of the machine."""
    given = given[: given.index("--cell")] if "--cell" in given else given
    if "--cache" in given:
        at = given.index("--cache")
        given = given[:at] + given[at + 2 :]
    return [f"hf:{Path(w[3:]).name}" if w.startswith("hf:") and Path(w[3:]).is_dir() else w for w in given]


def versions() -> dict[str, str]:
    """Of the packages that results may depend on, where they are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def recorded(name: str, settings: Any, free: Collection[str] = ()) -> bool:
    """Whether there is a result of this name; one that was run with other settings, but for those in `free`, is an error."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return False
    was = json.loads(file.read_text())["settings"]
    now = json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in free}))
    other = [f"{k} {was[k]!r} (now {v!r})" for k, v in now.items() if k in was and was[k] != v]
    if other:
        sys.exit(f"{file.name} was run with {', '.join(other)}; move it away to run it anew")
    return True


def unread(cell: Any) -> set[str]:
    """Settings of a comparison's cell that its method does not read."""
    return {k for k, methods in cell.scenario.READERS.items() if cell.settings.method not in methods}


def read_results(kind: type[R], pattern: str) -> list[R]:
    """The results whose files match, by file name, without what `record` adds."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    contents = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(pattern))]
    return [kind(**{k: v for k, v in content.items() if k in known}) for content in contents]


def record(name: str, content: dict[str, Any]) -> None:
    """Write `results/<name>.json`: the content, and command, machine, versions and date."""
    about = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments(sys.argv[1:])]),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "threads": torch.get_num_threads(),
        "versions": versions() | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_json(RESULTS / f"{name}.json", {**content, **about})
