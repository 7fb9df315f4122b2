"""`sidetuning push MODEL REPOSITORY`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.terminal import say


@dataclass(frozen=True)
class Settings:
    """Upload a model folder or one of its tasks to the Hugging Face Hub, with a model card.

    Tensors, texts and the card are uploaded and nothing else of the folder. Log in once before: `hf auth login`.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, or the folder of one task."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")]
    """Repository of the Hub; created if it does not exist."""
    task: Annotated[str | None, tyro.conf.arg(metavar="TASK")] = None
    """Name of the only task to upload."""
    revision: Annotated[str | None, tyro.conf.arg(metavar="BRANCH")] = None
    """Branch to upload to; created if it does not exist."""
    subfolder: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the repository to upload to."""
    licence: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Licence of the tasks, as the Hub names it, such as "mit"."""
    private: bool = False
    """Make a new repository private."""
    quiet: bool = False
    """Print nothing but errors."""


def main(settings: Settings) -> None:
    """Upload, and print the address."""
    from sidetuning import push

    address = push(
        settings.model,
        settings.repository,
        task=settings.task,
        private=settings.private,
        revision=settings.revision,
        subfolder=settings.subfolder,
        licence=settings.licence,
    )
    if not settings.quiet:
        say(address)
