"""What the best answer that does not look comes to, task by task, recorded: `python benchmarks/dense_constants.py --data FOLDER`.

The median or mean of training labels, the most frequent class, the set of frequent categories with the highest F1. `--table` prints the table from the result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import tyro

from common import RESULTS, record
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.dense.tasks import ORDER, dense_task
from sidetuning_bench.domains import names


@dataclass(frozen=True)
class Settings:
    """Measure on the frames that a comparison tests on."""

    data: str = "runs/doom"
    """A folder in Taskonomy's layout."""
    frames: int = 5000
    """Training frames to choose from."""
    draw: int = 0
    """Seed of their draw."""
    table: bool = False
    """Only print the table."""


def measure(s: Settings) -> list[dict[str, object]]:
    """For each task its measure and the value."""
    train, test = itaskonomy.frames_of(itaskonomy.Settings(data=s.data, frames=s.frames, draw=s.draw))
    pictures, masks = itaskonomy.Stack(test, "rgb"), itaskonomy.Stack(test, "mask")
    classes = names(train.root, "segment_semantic")
    rows = []
    for name in ORDER:
        task = dense_task(name, train, classes)
        labelled = itaskonomy.Labelled(pictures, itaskonomy.Stack(test, task.domain), masks, task)
        value = itaskonomy.constant(task, train, labelled)
        rows.append({"task": name, "measure": task.measure, "value": value})
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """In Markdown."""
    text = "| Task | Measure | The best answer that does not look |\n| --- | --- | ---: |\n"
    return text + "".join(f"| {r['task']} | {r['measure']} | {r['value']:.3g} |\n" for r in rows)


if __name__ == "__main__":
    given = tyro.cli(Settings)
    if not given.table:
        record("dense-constants", {"frames": given.frames, "draw": given.draw, "rows": measure(given)})
    print(table(json.loads((RESULTS / "dense-constants.json").read_text())["rows"]))
