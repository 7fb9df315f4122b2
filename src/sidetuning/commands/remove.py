"""`sidetuning remove MODEL TASK`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.terminal import say


@dataclass(frozen=True)
class Settings:
    """Remove a task from a model folder, with all its files; the other tasks do not change."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder."""
    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of the task."""
    quiet: bool = False
    """Print nothing but errors."""


def main(settings: Settings) -> None:
    """Remove it."""
    from sidetuning.folder import remove

    shown = remove(settings.model, settings.task)
    if not settings.quiet:
        say(f"Removed {settings.task} from {settings.model}.")
        if shown:
            say("Its report.html was deleted too; write it again: sidetuning evaluate … --report")
