"""Whole networks and a head per task: one that is fine-tuned from task to task, or one per task."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning_bench.methods.method import Method, count
from sidetuning_bench.methods.recipe import Task
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


class Independent(Method):
    """Every task fine-tunes its own copy of the base and its own head: nothing is forgotten, at the highest cost."""

    name: ClassVar[str] = "independent"
    pretrained: ClassVar[bool] = True

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunks = nn.ModuleDict()

    def add(self, task: Task) -> None:
        # The head first: so it is the same head as fine-tuning draws.
        super().add(task)
        self.trunks[task.name] = Trunk(self.base, pretrained=self.pretrained)

    def tuned(self, task: str) -> nn.Module:
        return self.trunks[task]

    def code(self, inputs: Input, task: str) -> Tensor:
        return self.trunks[task](inputs)

    def shared(self) -> int:
        return 0


class Scratch(Independent):
    """Independent networks of the base's shape, trained from random weights."""

    name: ClassVar[str] = "scratch"
    pretrained: ClassVar[bool] = False
