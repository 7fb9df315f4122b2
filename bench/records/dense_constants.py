"""What the best answer that does not look at the picture comes to, task by task.

The median or mean of training labels, the most frequent class, the set of frequent categories with the highest F1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from record import Record, read, write
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.dense.tasks import ORDER, dense_task
from sidetuning_bench.domains import names
from sidetuning_bench.options import Count


@dataclass(frozen=True)
class Settings:
    """The best constant answers, on the frames that a comparison tests on."""

    frames: Count = 5000
    """Number of training frames to choose from."""
    draw: int = 0
    """Seed of their draw."""
    source: itaskonomy.FrameOptions = field(default=itaskonomy.FrameOptions())


def run(given: Settings) -> None:
    """Record each task's measure and value."""
    settings = itaskonomy.Settings(source=given.source, frames=given.frames, draw=given.draw)
    train, test = itaskonomy.frames_of(settings)
    pictures, masks = itaskonomy.Stack(test, "rgb"), itaskonomy.Stack(test, "mask")
    classes = names(train.root, "segment_semantic")
    rows = []
    for name in ORDER:
        task = dense_task(name, train, classes)
        labelled = itaskonomy.Labelled(pictures, itaskonomy.Stack(test, task.domain), masks, task)
        rows.append({"task": name, "measure": task.measure, "value": itaskonomy.constant(task, train, labelled)})
    write("dense-constants", {"frames": given.frames, "draw": given.draw, "rows": rows})


def table(given: Settings) -> str:
    """In Markdown."""
    text = "| Task | Measure | The best answer that does not look |\n| --- | --- | ---: |\n"
    rows = read("dense-constants")["rows"]
    return text + "".join(f"| {row['task']} | {row['measure']} | {row['value']:.3g} |\n" for row in rows)


DENSE_CONSTANTS = Record(Settings(), run, table)
