"""Methods on SQuAD, each run recorded as squad-<grid>-<method>-<seed>.json: `python benchmarks/squad.py --data FOLDER --base hf:FOLDER`.

The grid "epochs" gives every method the same questions and passes; "seconds" the same passes and the same time, base features included: as
many questions as it gets through, by its speed on the first few; "all" gives all questions there are. Times and memory of steps are left to `squad_cost.py`, which measures
methods in turn. A run that has its result is not run again; `--table` prints a grid.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common import RESULTS, record
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.language import squad
from sidetuning_bench.options import with_values
from sidetuning_bench.results import Estimate, number_text

METHODS: dict[str, dict[str, Any]] = {
    "sidetune, match": {"method": "sidetune"},
    "sidetune, slim": {"method": "sidetune", "side": "slim"},
    "ladder": {"method": "ladder"},
    "features": {"method": "features"},
    # Rates for so small a base and so few steps; the others have the scenario's own.
    "lora": {"method": "lora", "lr": 1e-3},
    "finetune": {"method": "finetune", "lr": 2e-4},
    "scratch": {"method": "scratch", "lr": 2e-4},
}
FEW = 160  # questions on which the speed is measured
COLUMNS = {
    "F1, %": "f1", "Exact, %": "exact", "F1 with an answer, %": "has_answer", "F1 without, %": "no_answer", "Best F1, %": "best_f1",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Run and record."""

    data: str = "rajpurkar/squad_v2"
    """A SQuAD folder."""
    base: str = "hf:sentence-transformers/all-MiniLM-L6-v2"
    """The base; recorded by the last part of its name."""
    grid: Literal["epochs", "seconds", "all"] = "epochs"
    """What is equal."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods."""
    seeds: int = 1
    """Seeds 0, 1, …"""
    epochs: float = 2.0
    """Passes over the questions."""
    seconds: float = 600.0
    """Of training and of base features together, where these are equal."""
    questions: int = 6000
    """Training questions of the grid "epochs"."""
    test_questions: int | None = 2000
    """Test questions, None for all."""
    out: str = "runs/benchmarks/squad"
    """Folder of the runs."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    cell: str | None = None
    """Run this method with this seed, "lora:0", in this process."""
    table: bool = False
    """Only print the table."""


def name(grid: str, method: str, seed: int | str) -> str:
    """Of a result."""
    return f"squad-{grid}-{method.replace(', ', '-')}-{seed}"


def protocol(s: Settings, method: str) -> dict[str, Any]:
    """What two results must share to stand in one table."""
    equal = {"epochs": {"questions": s.questions}, "seconds": {"seconds": s.seconds}, "all": {"questions": None}}[
        s.grid
    ]
    return {
        "base": Path(s.base).name,
        "epochs": s.epochs,
        "test_questions": s.test_questions,
        **equal,
        **METHODS[method],
    }


def recorded(s: Settings, method: str, seed: int) -> bool:
    """Whether the cell has its result; one of another protocol is an error."""
    file = RESULTS / f"{name(s.grid, method, seed)}.json"
    if not file.exists():
        return False
    was, now = json.loads(file.read_text())["protocol"], protocol(s, method)
    if was != now:
        sys.exit(f"{file.name} is of {was}, not of {now}; move it away to measure anew")
    return True


def one(s: Settings, method: str, seed: int) -> None:
    """Run and record a cell."""
    questions, out = None if s.grid == "all" else s.questions, f"{s.out}/{name(s.grid, method, seed)}"
    shared = {"data": s.data, "base": s.base, "seed": seed, "epochs": s.epochs, "test_questions": s.test_questions}
    given = squad.settings_of({**shared, "questions": questions, "out": out, "cache": s.cache, **METHODS[method]})
    if s.grid == "seconds":
        few = squad.run(with_values(given, {"questions": FEW, "test_questions": 1, "out": f"{out}-few"}))
        given = with_values(given, {"questions": int(FEW * s.seconds / (few.base_seconds + few.seconds))})
    result = squad.run(given)
    content = asdict(result)
    content["settings"]["base"] = Path(s.base).name
    del content["memory_mb"]
    content["protocol"] = protocol(s, method)
    record(name(s.grid, method, seed), content)


def table(s: Settings) -> str:
    """Methods as rows."""
    more = ("Parameters trained", "Questions", "Training, s", "Base features, s", "1,000 answers, s", "Seeds")
    text = "| Method | " + " | ".join([*COLUMNS, *more]) + " |\n| --- |" + " ---: |" * (len(COLUMNS) + len(more)) + "\n"
    for method in METHODS:
        runs = [json.loads(f.read_text()) for f in sorted(RESULTS.glob(f"{name(s.grid, method, '*')}.json"))]
        if not runs:
            continue
        cells = [number_text(Estimate(*mean_and_error([r["scores"][k] for r in runs]))) for k in COLUMNS.values()]
        means = [
            sum(r[k] for r in runs) / len(runs)
            for k in ("added", "questions", "seconds", "base_seconds", "seconds_per_1000")
        ]
        cells += [number_text(m, 0) for m in means]
        text += f"| {method} | " + " | ".join([*cells, str(len(runs))]) + " |\n"
    return text


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if given.cell is not None:
        method, seed = given.cell.split(":")
        one(given, method, int(seed))
    else:
        for seed in range(0 if given.table else given.seeds):
            for method in given.methods:
                if not recorded(given, method, seed):
                    subprocess.run([sys.executable, *sys.argv, "--cell", f"{method}:{seed}"], check=True)
        print(table(given))
