"""`sidetuning info MODEL`: all that the files tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.terminal import say_json, say_table


@dataclass(frozen=True)
class Settings:
    """Show the base and the tasks of a model folder: parts, labels, sizes, metrics."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, or the folder of one task."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Name of the only task to show."""
    json: bool = False
    """Print JSON."""


def main(settings: Settings) -> None:
    """Print a table per task, or JSON."""
    from sidetuning.folder import described

    tasks = described(settings.model, settings.task)
    if settings.json:
        say_json([task.record() for task in tasks])
        return
    for task in tasks:
        rows = []
        for name, value in task.record().items():
            pairs = [f"{key} {number:.4g}" for key, number in value.items()] if isinstance(value, dict) else value
            text = ", ".join(pairs) if isinstance(pairs, list) else f"{pairs:,}" if isinstance(pairs, int) else pairs
            rows.append([name.replace("_", " "), text or "–"])
        say_table(["", task.task], rows)
