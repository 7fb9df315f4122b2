"""`sidetuning pretrain BASE`: make a packaged base and the side that is distilled from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sidetuning.scenarios import pretrain_cifar, pretrain_doom


@dataclass(frozen=True)
class Settings:
    """Pretrain a packaged base and distil its side."""

    base: (
        Annotated[pretrain_cifar.Settings, tyro.conf.subcommand("cifar10")]
        | Annotated[pretrain_doom.Settings, tyro.conf.subcommand("doom-curvature")]
    )


def main(settings: Settings) -> None:
    """Dispatch on what to make."""
    if isinstance(settings.base, pretrain_cifar.Settings):
        pretrain_cifar.main(settings.base)
    else:
        pretrain_doom.main(settings.base)
