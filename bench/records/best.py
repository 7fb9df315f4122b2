"""`icifar --recipe best` over seeds, and its ceiling: `python benchmarks/best.py --data CIFAR100_FOLDER`.

The ceiling (`--ceiling`) is a fine-tuned copy of the base per task, with the same passes, mirrored and randomly cropped images, label
smoothing and schedule. `--cold` runs one seed with nothing cached, for its time. A run that has its result is not run again.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import tyro

from common import RESULTS, record
from sidetuning_bench import icifar


@dataclass(frozen=True)
class Settings:
    """Run and record."""

    data: str = "uoft-cs/cifar100"
    """A folder with the parquet files, or a data set on the Hub."""
    out: str = "runs/benchmarks"
    """Folder of the runs."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    seeds: int = 3
    """Seeds 0, 1, …"""
    ceiling: bool = False
    """Run the ceiling instead."""
    cold: bool = False
    """One run with nothing cached."""
    tasks: int = 10
    """How many tasks."""
    precision: str = "no"
    """Of the ceiling's training."""
    cell: int | None = None
    """Run this seed in this process."""


def one(s: Settings, seed: int, name: str) -> None:
    """Run a seed and write its result."""
    common: dict[str, Any] = {
        "data": s.data,
        "cache": s.cache,
        "seed": seed,
        "tasks": s.tasks,
        "out": f"{s.out}/{name}",
    }
    settings = icifar.Settings(recipe="best", **common)
    if s.ceiling:
        recipe = {
            k: v for k, v in icifar.BEST.items() if k not in ("side", "side_shift", "taps", "merge", "init", "lr")
        }
        settings = icifar.Settings(method="independent", lr=1e-3, precision=s.precision, **recipe, **common)  # type: ignore[arg-type]
    started = time.perf_counter()
    result = icifar.run(settings)
    record(name, {**asdict(replace(result, variant=name)), "average": result.matrix.average,
                  "whole_seconds": time.perf_counter() - started})  # fmt: skip
    print(f"{name}: {100 * result.matrix.average:.2f} %")


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    what = "ceiling" if given.ceiling else "best"
    if given.cold:
        with tempfile.TemporaryDirectory() as folder:
            one(replace(given, cache=folder, out=folder), 0, "best-cold")
    elif given.cell is not None:
        one(given, given.cell, f"{what}-{given.cell}")
    else:
        for seed in range(given.seeds):
            if not (RESULTS / f"{what}-{seed}.json").exists():
                subprocess.run([sys.executable, *sys.argv, "--cell", str(seed)], check=True)
