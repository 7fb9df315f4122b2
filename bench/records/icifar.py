"""iCIFAR over merges and seeds, each run a process of its own: `python benchmarks/icifar.py --data CIFAR100_FOLDER`.

With `--weights FOLDER` the base and the distilled side are the original authors' (resnet44-cifar10.safetensors and
fcn4-cifar10-distilled.safetensors), else the packaged ones. A run that has its result is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from common import RESULTS, record
from sidetuning_bench import icifar
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.runs import peak_memory_mb

MERGES = ("mlp2", "alpha", "base-only", "side-only")


def one(arguments: argparse.Namespace, merge: str, seed: int, name: str | None = None) -> None:
    """Run one cell and write its result."""
    weights = Path(arguments.weights) if arguments.weights else None
    settings = icifar.Settings(
        data=arguments.data, out=f"{arguments.out}/{label(arguments)}-{merge}-{seed}", merge=merge, seed=seed, cache=arguments.cache,
        base_weights=str(weights / "resnet44-cifar10.safetensors") if weights else None,
        init=str(weights / "fcn4-cifar10-distilled.safetensors") if weights else "distilled",
    )  # fmt: skip
    started = time.perf_counter()
    result = icifar.run(settings)
    public = {k: v for k, v in asdict(settings).items() if k not in ("data", "out", "cache", "base_weights", "init")}
    matrix = result.matrix
    record(
        name or f"icifar-{label(arguments)}-{merge}-{seed}",
        {
            "settings": public, "weights": label(arguments), "average": matrix.average, "learned": matrix.learned,
            "final": matrix.final, "forgetting": matrix.forgetting, "alphas": result.alphas,
            "parameters_per_task": max(result.parameters), "base_seconds": result.base_seconds,
            "task_seconds": result.seconds, "whole_seconds": time.perf_counter() - started,
            "peak_memory_mb": peak_memory_mb(),
        },
    )  # fmt: skip


def label(arguments: argparse.Namespace) -> str:
    """Whose weights."""
    return "original" if arguments.weights else "packaged"


def table() -> str:
    """Mean and standard error of the average accuracy per weights and merge, as Markdown."""
    cells: dict[tuple[str, str], list[float]] = {}
    for file in sorted(RESULTS.glob("icifar-*.json")):
        result = json.loads(file.read_text())
        cells.setdefault((result["settings"]["merge"], result["weights"]), []).append(100 * result["average"])
    lines = ["| merge | original weights | packaged weights |", "|---|---|---|"]
    for merge in MERGES:
        row = []
        for weights in ("original", "packaged"):
            values = cells.get((merge, weights), [])
            mean, error = mean_and_error(values) if values else (0.0, 0.0)
            row.append(f"{mean:.1f} ± {error:.1f} ({len(values)} seeds)" if values else "–")
        lines.append(f"| {merge} | {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="uoft-cs/cifar100")
    parser.add_argument("--weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--merges", nargs="+", default=list(MERGES))
    parser.add_argument("--out", default="runs/benchmarks")
    parser.add_argument("--cache", default="~/.cache/sidetuning")
    parser.add_argument("--cell", nargs=2)
    parser.add_argument("--whole", action="store_true", help="one run of mlp2 with nothing cached, for its time")
    parser.add_argument("--table", action="store_true", help="only print the table of docs/benchmarks.md")
    given = parser.parse_args()
    if given.cell:
        one(given, given.cell[0], int(given.cell[1]))
    elif given.whole:
        with tempfile.TemporaryDirectory() as folder:
            given.cache = given.out = folder
            one(given, "mlp2", 0, "whole-icifar")
    elif given.table:
        print(table())
    else:
        for seed in range(given.seeds):
            for merge in given.merges:
                if not (RESULTS / f"icifar-{label(given)}-{merge}-{seed}.json").exists():
                    subprocess.run([sys.executable, *sys.argv, "--cell", merge, str(seed)], check=True)
        print(table())
