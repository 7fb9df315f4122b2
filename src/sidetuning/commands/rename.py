"""`sidetuning rename MODEL TASK NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.terminal import say


@dataclass(frozen=True)
class Settings:
    """Rename a task of a model folder; its weights do not change, and tasks that read its side are updated."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder."""
    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Name of the task."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Its new name: letters, digits, "-" and "_"."""
    quiet: bool = False
    """Print nothing but errors."""


def main(settings: Settings) -> None:
    """Rename it."""
    from sidetuning.folder import rename

    shown = rename(settings.model, settings.task, settings.name)
    if not settings.quiet:
        say(f"Renamed {settings.task} to {settings.name} in {settings.model}.")
        if shown:
            say("Its report.html was deleted too; write it again: sidetuning evaluate … --report")
