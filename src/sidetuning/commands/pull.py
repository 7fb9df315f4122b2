"""`sidetuning pull REPOSITORY --out MODEL`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.terminal import say


@dataclass(frozen=True)
class Settings:
    """Download a model or one of its tasks from the Hugging Face Hub into a model folder, beside the tasks there."""

    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]
    """Repository of the Hub."""
    out: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """Model folder that the tasks are added to; created if it does not exist."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Name of the only task to download."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="REVISION")] = None
    """Branch, tag or commit."""
    subfolder: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the repository that holds the model."""
    quiet: bool = False
    """Print nothing but errors."""


def main(settings: Settings) -> None:
    """Download, and print the names of the tasks."""
    from sidetuning.hub import copy_tasks, pull

    folder = pull(settings.repository, task=settings.task, revision=settings.revision, subfolder=settings.subfolder)
    names = copy_tasks(folder, settings.out)
    if not settings.quiet:
        say(f"{settings.out}: {', '.join(names)}")
