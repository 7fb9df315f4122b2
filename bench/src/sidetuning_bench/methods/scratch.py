"""From scratch: a network of the base's shape per task, trained from random weights."""

from __future__ import annotations

from typing import ClassVar

from sidetuning_bench.methods.independent import Independent


class Scratch(Independent):
    """Independent networks that know nothing of the base."""

    name: ClassVar[str] = "scratch"
    pretrained: ClassVar[bool] = False
