"""Side-tuning as a method: a frozen base, and a side, merge and head per task (paper, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.methods.method import Method, Task
from sidetuning.training import parameter_groups
from sidetuning.tuner import SideTuner


class SideTune(Method):
    """A branch per task on one frozen base.

    Args:
        base: the base.
        side, merge, init, prenorm, side_options: as in `SideTuner.add_task`.
        dense: feed the sides of all earlier tasks into the merge, detached.
    """

    name: ClassVar[str] = "sidetune"
    uses_features: ClassVar[bool] = True

    def __init__(
        self,
        base: Base,
        side: str | None = "fcn4",
        merge: str = "mlp2",
        init: str | None = None,
        prenorm: bool = False,
        dense: bool = False,
        side_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            base, side=side, merge=merge, init=init, prenorm=prenorm, dense=dense, side_options=dict(side_options or {})
        )
        self._branch = dict(self.options)
        self.model = SideTuner(base)
        self._saved: set[Path] = set()

    def add(self, task: Task) -> None:
        given = self._branch
        if task.name in self.model:  # left by training that did not end
            self.model.remove_task(task.name)
        laterals = self.model.tasks if given["dense"] else []
        self.model.add_task(
            task.name, side=given["side"], merge=given["merge"], head=task.head, init=given["init"],
            prenorm=given["prenorm"], laterals=laterals, labels=task.labels, side_options=given["side_options"],
        )  # fmt: skip

    def part(self, task: str) -> nn.Module:
        return self.model[task]

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        assert features is not None
        branch = self.model[task]
        return branch(inputs, features, self.model.lateral_outputs(branch, inputs, features))

    def groups(self, task: str, weight_decay: float) -> list[dict[str, Any]]:
        return parameter_groups(self.model[task], weight_decay)

    def added(self, task: str) -> int:
        return sum(p.numel() for p in self.model[task].parameters())

    def alpha(self, task: str) -> float | None:
        return self.model[task].alpha

    def write_tensors(self, folder: Path, metrics: Mapping[str, float] | None) -> str:
        """Write each task to a folder of its own under `folder`, as `SideTuner.save_task` does, once: a task does not change."""
        for task in self.model.tasks:
            if folder / task not in self._saved:
                self.model.save_task(task, folder / task, metrics=metrics)
                self._saved.add(folder / task)
        return ""

    def read_tensors(self, folder: Path, name: str) -> None:
        for task in reversed(self.model.tasks):
            self.model.remove_task(task)
        for task in self.tasks:
            self.model.load_task(folder / task)
            self._saved.add(folder / task)
