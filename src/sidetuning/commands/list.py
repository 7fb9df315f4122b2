"""`sidetuning list MODEL`: a line per task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.terminal import say_json, say_table, size_text


@dataclass(frozen=True)
class Settings:
    """List the tasks of a model folder: what each answers, its size, and what was measured."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, or the folder of one task."""
    json: bool = False
    """Print JSON."""


def main(settings: Settings) -> None:
    """Print a table, or JSON."""
    from sidetuning.folder import described

    tasks = described(settings.model)
    if settings.json:
        say_json([task.record() for task in tasks])
        return
    rows = []
    for task in tasks:
        labels = str(len(task.labels)) if task.labels else ""
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in task.metrics.items())
        rows.append([task.task, task.problem, labels, size_text(task.bytes), metrics, ", ".join(task.laterals)])
    say_table(["task", "problem", "labels", "size", "metrics", "reads the side of"], rows, right=("labels", "size"))
