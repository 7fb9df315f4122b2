"""What every result file says about how it was made."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sidetuning.artifacts import write_json

PACKAGES = ("sidetuning", "torch", "numpy", "accelerate", "vizdoom", "stable-baselines3", "gymnasium")
RESULTS = Path(__file__).parent / "results"


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
