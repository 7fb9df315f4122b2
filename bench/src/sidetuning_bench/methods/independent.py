"""Independent networks: a fine-tuned copy of the base per task, the ceiling that costs a whole network each time."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.heads import run_head
from sidetuning_bench.methods.method import Method, Task, count
from sidetuning_bench.methods.trunk import Trunk


class Independent(Method):
    """Every task has its own copy of the network and its own head."""

    name: ClassVar[str] = "independent"
    pretrained: ClassVar[bool] = True

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunks = nn.ModuleDict()
        self.heads = nn.ModuleDict()

    def add(self, task: Task) -> None:
        self.heads[task.name] = self.head(task)  # before the trunk: the same head as fine-tuning draws
        self.trunks[task.name] = Trunk(self.base, pretrained=self.pretrained)

    def part(self, task: str) -> nn.Module:
        return nn.ModuleList([self.trunks[task], self.heads[task]])

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        return run_head(self.heads[task], self.trunks[task](inputs), inputs)

    def added(self, task: str) -> int:
        return count(self.part(task))

    def shared(self) -> int:
        return 0
