"""Methods on SQuAD.

The grid "epochs" gives every method the same questions and passes; "seconds" the same passes and the same time, base
features included: as many questions as it gets through, by its speed on the first few; "all" gives all questions.
Times and memory of a step are in `text_step_cost.py`, which measures methods in turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from record import RESULTS, Record, read_all, run_cells
from sidetuning_bench.grid import Cell
from sidetuning_bench.language import methods, squad
from sidetuning_bench.options import Count, GridOptions, Names, Positive, with_values
from sidetuning_bench.results import estimate, number_text

METHODS: dict[str, dict[str, Any]] = {
    "sidetune, match": {"method": "sidetune"},
    "sidetune, slim": {"method": "sidetune", "side": "slim"},
    "sidetune, copy": {"method": "sidetune", "side": "copy", "lr": 2e-4},
    **{f"sidetune, top {n}": {"method": "sidetune", "side": "top", "layers": n, "lr": 2e-4} for n in (1, 2, 3)},
    "ladder": {"method": "ladder"},
    "features": {"method": "features"},
    # Rates for so small a base and so few steps; the others have the scenario's own.
    "lora": {"method": "lora", "lr": 1e-3},
    "finetune": {"method": "finetune", "lr": 2e-4},
    "scratch": {"method": "scratch", "lr": 2e-4},
}
# Questions on which the speed is measured.
FEW = 160
SCORES = {
    "F1 with an answer, %": "has_answer",
    "Best F1, %": "best_f1",
    "Area, %": "area",
    "F1, %": "f1",
    "Exact, %": "exact",
    "F1 without, %": "no_answer",
}
COSTS = {
    "Parameters trained": "added",
    "Questions": "questions",
    "Training, s": "seconds",
    "Base features, s": "base_seconds",
    "1,000 answers, s": "seconds_per_1000",
}


@dataclass(frozen=True)
class Settings:
    """Methods on SQuAD, at equal passes, equal time, or with all questions."""

    data: str = squad.Settings.data
    """A SQuAD folder."""
    base: str = "hf:sentence-transformers/all-MiniLM-L6-v2"
    """Base network; recorded by the last part of its name."""
    grid: Literal["epochs", "seconds", "all"] = "epochs"
    """What is equal."""
    methods: Names = tuple(METHODS)
    """Methods."""
    epochs: Positive = 2.0
    """Passes over the questions."""
    seconds: Positive = 600.0
    """Time of training and of base features together, in the grid "seconds"."""
    questions: Count = 6000
    """Number of training questions, in the grid "epochs"."""
    test_questions: Count | None = 2000
    """Number of test questions; None for all."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    answerable: bool = False
    """Leave out the questions without an answer, as in SQuAD v1.1."""
    run: GridOptions = field(default=GridOptions(out="runs/records/squad", seeds=1))


def settings_of(method: str, values: dict[str, Any]) -> squad.Settings:
    """Settings of a run with one of METHODS."""
    own = METHODS[method]
    default = replace(squad.Settings(), method=methods.METHODS[own["method"]])
    return with_values(default, {**{name: value for name, value in own.items() if name != "method"}, **values})


def file_name(given: Settings, method: str, seed: int | str) -> str:
    """The name of a result."""
    form = "answerable" if given.answerable else given.grid
    return f"squad-{form}-{method.replace(', ', '-')}-{seed}"


def cells(given: Settings) -> Iterator[Cell[squad.Settings]]:
    """The runs, seed by seed; a variant is one of METHODS."""
    names = ("data", "base", "epochs", "test_questions", "cache", "answerable")
    shared = {name: getattr(given, name) for name in names}
    questions = given.questions if given.grid == "epochs" else None
    for seed in range(given.run.seeds):
        for method in given.methods:
            name = file_name(given, method, seed)
            folder = Path(given.run.out) / name
            values = {**shared, "questions": questions, "seed": seed, "out": str(folder), "progress": False}
            yield Cell(name, folder, settings_of(method, values), method)


def within(seconds: float, settings: squad.Settings) -> squad.Result:
    """A run on as many questions as fit into a time, by the speed on the first few."""
    out = f"{settings.run.out}-few"
    few = squad.run(with_values(settings, {"questions": FEW, "test_questions": 1, "out": out}))
    questions = int(FEW * seconds / (few.base_seconds + few.seconds))
    return squad.run(replace(settings, questions=questions))


def run(given: Settings) -> None:
    """Run and record."""
    for cell in cells(given) if given.grid == "seconds" else ():
        file = RESULTS / f"{cell.name}.json"
        own = json.loads(file.read_text())["settings"].get("seconds", given.seconds) if file.exists() else given.seconds
        if own != given.seconds:
            sys.exit(f"{file.name} was run with {own:g} seconds; move it away to run it anew")
    work = partial(within, given.seconds) if given.grid == "seconds" else squad.run

    def content(cell: Cell[squad.Settings], result: squad.Result) -> dict[str, Any]:
        found = asdict(result)
        found["settings"]["base"] = Path(given.base).name
        if given.grid == "seconds":
            found["settings"]["seconds"] = given.seconds
        # Memory is measured in `text_step_cost.py`.
        del found["memory_mb"]
        return found

    # What results of version 0.1.0 say of the side are that version's defaults; paths are shortened.
    free = {"base", "layers", "side", "lr", *({"questions"} if given.grid == "seconds" else ())}
    run_cells(cells(given), work, lambda cell: None, lambda cell: cell.name, content, free)


def table(given: Settings) -> str:
    """Methods as rows."""
    rows = {method: read_all(f"{file_name(given, method, '*')}.json") for method in METHODS}
    # Older results have no area.
    known = {name for runs in rows.values() for run in runs for name in run["scores"]}
    scores = {column: name for column, name in SCORES.items() if name in known}
    columns = [*scores, *COSTS, "Seeds"]
    text = f"| Method | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}\n"
    for method, runs in rows.items():
        if runs:
            found = [[run["scores"][name] for run in runs if name in run["scores"]] for name in scores.values()]
            texts = [number_text(estimate(values)) for values in found]
            costs = [sum(run[name] for run in runs) / len(runs) for name in COSTS.values()]
            row = [method, *texts, *(number_text(cost, 0) for cost in costs), str(len(runs))]
            text += f"| {' | '.join(row)} |\n"
    return text


SQUAD = Record(Settings(), run, table)
