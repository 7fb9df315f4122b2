"""Methods on SQuAD, each run recorded as squad-<grid>-<method>-<seed>.json: `python benchmarks/squad.py --data FOLDER --base hf:FOLDER`.

The grid "epochs" gives every method the same number of passes; "seconds" gives those that read cached features as many passes as fit in
the time that fine-tuning takes for one. A run that has its result is not run again; `--table` prints a grid.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from common import RESULTS, record
from sidetuning.continual import mean_and_error
from sidetuning.results import Estimate, number_text
from sidetuning.scenarios import squad

RATES = {
    "finetune": 2e-4,
    "lora": 1e-3,
    "scratch": 2e-4,
}  # for so small a base and so few steps; the others have the scenario's own
METHODS = ("sidetune", "ladder", "features", "finetune", "lora", "scratch")
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
    grid: Literal["epochs", "seconds"] = "epochs"
    """What is equal."""
    methods: tuple[str, ...] = METHODS
    """Methods."""
    seeds: int = 1
    """Seeds 0, 1, …"""
    epochs: float = 2.0
    """Passes over the questions."""
    questions: int | None = 6000
    """Training questions, None for all."""
    test_questions: int | None = 2000
    """Test questions, None for all."""
    out: str = "runs/benchmarks/squad"
    """Folder of the runs."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    cell: str | None = None
    """Run this method with this seed, "lora 0", in this process: its peak memory is its own then."""
    table: bool = False
    """Only print the table."""


def name(s: Settings, method: str, seed: int) -> str:
    """Of a result."""
    return f"squad-{s.grid}-{method}-{seed}"


def one(s: Settings, method: str, seed: int) -> None:
    """Run and record a cell."""
    epochs = s.epochs
    if s.grid == "seconds":
        whole = json.loads((RESULTS / f"{name(s, 'finetune', 0).replace('seconds', 'epochs')}.json").read_text())
        own = json.loads((RESULTS / f"{name(s, method, 0).replace('seconds', 'epochs')}.json").read_text())
        epochs = min(40.0, s.epochs * whole["seconds"] / own["seconds"])
    result = squad.run(
        squad.Settings(
            data=s.data, base=s.base, method=method, seed=seed, epochs=epochs, questions=s.questions, test_questions=s.test_questions,  # type: ignore[arg-type]
            lr=RATES.get(method),
            out=f"{s.out}/{name(s, method, seed)}", cache=s.cache,
        )
    )  # fmt: skip
    content = asdict(result)
    content["settings"]["base"] = Path(s.base).name
    record(name(s, method, seed), content)


def table(s: Settings) -> str:
    """Methods as rows."""
    more = ("Parameters trained", "Training, s", "s per 1,000 questions", "Memory above the start, MB", "Seeds")
    text = "| Method | " + " | ".join([*COLUMNS, *more]) + " |\n| --- |" + " ---: |" * (len(COLUMNS) + len(more)) + "\n"
    for method in METHODS:
        runs = [json.loads(f.read_text()) for f in sorted(RESULTS.glob(f"squad-{s.grid}-{method}-*.json"))]
        if not runs:
            continue
        cells = [number_text(Estimate(*mean_and_error([r["scores"][k] for r in runs]))) for k in COLUMNS.values()]
        for key in ("added", "seconds", "seconds_per_1000", "memory_mb"):
            cells.append(number_text(sum(r[key] for r in runs) / len(runs), 0))
        text += f"| {method} | " + " | ".join([*cells, str(len(runs))]) + " |\n"
    return text


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if given.cell is not None:
        method, seed = given.cell.split()
        one(given, method, int(seed))
    else:
        for seed in range(0 if given.table else given.seeds):
            for method in given.methods:
                if not (RESULTS / f"{name(given, method, seed)}.json").exists():
                    subprocess.run([sys.executable, *sys.argv, "--cell", f"{method} {seed}"], check=True)
        print(table(given))
