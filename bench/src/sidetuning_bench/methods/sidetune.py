"""Side-tuning as a method: a frozen base, and a side, merge and head per task (paper, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sidetuning.artifacts import is_saved
from sidetuning.base import Base, Features, Input
from sidetuning.objective import parameter_groups
from sidetuning.tuner import SideTuner
from sidetuning_bench.methods.method import Method, Task, count


class SideTune(Method):
    """A branch per task on one frozen base.

    Args:
        base: the base.
        side, merge, init, prenorm, side_options: as in `SideTuner.add_task`, side and merge by name.
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
        options = {"side": side, "merge": merge, "init": init, "prenorm": prenorm, "dense": dense}
        super().__init__(base, {**options, "side_options": dict(side_options or {})})
        self._branch = dict(self.options)
        self.model = SideTuner(base)

    def add(self, task: Task) -> None:
        given = self._branch
        laterals = self.model.tasks if given["dense"] else []
        self.model.add_task(
            task.name, side=given["side"], merge=given["merge"], head=task.head, head_options=task.head_options, init=given["init"],
            prenorm=given["prenorm"], laterals=laterals, labels=task.labels, side_options=given["side_options"],
        )  # fmt: skip

    def part(self, task: str) -> nn.Module:
        return self.model[task]

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        assert features is not None
        branch = self.model[task]
        return branch(inputs, features, self.model.lateral_outputs(branch, inputs, features))

    def groups(self, task: str, weight_decay: float) -> list[dict[str, Any]]:
        branch = self.model[task]
        return parameter_groups(branch.parameters(), weight_decay, branch.merge.parameters())

    def added(self, task: str) -> int:
        return count(self.model[task])

    def remove(self, task: str) -> None:
        if task in self.model:
            self.model.remove_task(task)

    def rebuild(self, task: Task) -> None:
        """Nothing: `read_tensors` builds each task from its own folder."""

    def alpha(self, task: str) -> float | None:
        return self.model[task].alpha

    def write_tensors(self, folder: Path, metrics: Mapping[str, float] | None) -> str:
        """Write each task to a folder of its own under `folder`, as `SideTuner.save_task` does; what is there already stays."""
        for task in self.tasks:
            if not is_saved(folder / task, task, self.model[task]):
                self.model.save_task(task, folder / task, metrics=metrics if task == list(self.tasks)[-1] else None)
        return ""

    def read_tensors(self, folder: Path, name: str) -> None:
        for task in self.tasks:
            self.model.load_task(folder / task)
