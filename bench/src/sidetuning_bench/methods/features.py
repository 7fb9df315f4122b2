"""Fixed features: a head per task on the frozen base's code."""

from __future__ import annotations

from typing import ClassVar

from sidetuning.base import Base
from sidetuning_bench.methods.sidetune import SideTune


class FixedFeatures(SideTune):
    """Side-tuning without a side (a = 1): only heads are trained."""

    name: ClassVar[str] = "features"

    def __init__(self, base: Base, prenorm: bool = False) -> None:
        super().__init__(base, side=None, merge="base-only", prenorm=prenorm)
        self.options = {"prenorm": prenorm}
