"""Fine-tuning in sequence: one copy of the base, tuned through the tasks, and a head per task."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.heads import run_head
from sidetuning_bench.methods.method import Method, Task, count
from sidetuning_bench.methods.trunk import Trunk


class FineTune(Method):
    """Every task tunes the whole network on, so every task may undo what earlier ones learned."""

    name: ClassVar[str] = "finetune"
    sequential: ClassVar[bool] = True

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunk = Trunk(base)
        self.heads = nn.ModuleDict()

    def add(self, task: Task) -> None:
        self.heads[task.name] = self.head(task)

    def part(self, task: str) -> nn.Module:
        return nn.ModuleList([self.trunk, self.heads[task]])

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        return run_head(self.heads[task], self.trunk(inputs), inputs)

    def added(self, task: str) -> int:
        return count(self.heads[task])

    def shared(self) -> int:
        return count(self.trunk)
