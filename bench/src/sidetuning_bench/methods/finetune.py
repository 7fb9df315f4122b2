"""Fine-tuning in sequence: one copy of the base, tuned through the tasks, and a head per task."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sidetuning.base import Base, Input
from sidetuning_bench.methods.method import Method, count
from sidetuning_bench.methods.trunk import Trunk


class FineTune(Method):
    """Every task tunes the whole network further, so every task may undo what earlier ones learned."""

    name: ClassVar[str] = "finetune"
    sequential: ClassVar[bool] = True

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunk = Trunk(base)

    def tuned(self, task: str) -> Trunk:
        return self.trunk

    def code(self, inputs: Input, task: str) -> Tensor:
        return self.trunk(inputs)

    def added(self, task: str) -> int:
        return count(self.heads[task])

    def shared(self) -> int:
        return count(self.trunk)
