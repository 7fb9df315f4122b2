"""Boosting: several sides for one task, added one after another (paper, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import TaskError
from sidetuning.objective import parameter_groups
from sidetuning.tuner import SideTuner
from sidetuning_bench.methods.method import Method, Task, count


class Boosting(Method):
    """Each stage is a dense branch whose laterals are the stages before it, and starts from the head of the last one.

    The recipe's steps are shared out over the stages; a stage changes its own side, merge and head alone.

    Args:
        base: the base.
        stages: sides per task.
        side, merge, init, prenorm, side_options: as in `SideTuner.add_task`, side and merge by name; the merge must have a dense variant.
    """

    name: ClassVar[str] = "boosting"
    uses_features: ClassVar[bool] = True

    def __init__(
        self,
        base: Base,
        stages: int = 2,
        side: str = "fcn4",
        merge: str = "mlp2",
        init: str | None = None,
        prenorm: bool = False,
        side_options: Mapping[str, Any] | None = None,
    ) -> None:
        options = {"stages": stages, "side": side, "merge": merge, "init": init, "prenorm": prenorm}
        super().__init__(base, {**options, "side_options": dict(side_options or {})})
        if stages < 1:
            raise TaskError(f"boosting needs at least one stage, not {stages}")
        self.model = SideTuner(base)
        self.phases = stages
        self.stage: dict[str, str] = {}  # the branch that answers for a task

    def add(self, task: Task) -> None:
        self._build(task, self.options["init"])

    def rebuild(self, task: Task) -> None:
        init = self.options["init"]
        self._build(task, init if init in ("zero", "low-energy") else None)  # weights come from the file then

    def _build(self, task: Task, init: str | None) -> None:
        given = self.options
        names = self._stages(task.name)
        for i, name in enumerate(names):
            self.model.add_task(
                name, side=given["side"], merge=given["merge"], head=task.head, head_options=task.head_options, init=init, prenorm=given["prenorm"],
                laterals=names[:i], labels=task.labels, side_options=given["side_options"],
            )  # fmt: skip
        self.stage[task.name] = names[-1]

    def _stages(self, task: str) -> list[str]:
        return [f"{task}-{i + 1}" for i in range(self.options["stages"])]

    def remove(self, task: str) -> None:
        for name in reversed(self._stages(task)):
            if name in self.model:
                self.model.remove_task(name)
        self.stage.pop(task, None)

    def begin(self, task: str, phase: int) -> None:
        self.stage[task] = f"{task}-{phase + 1}"
        if phase:
            before = self.model[f"{task}-{phase}"].head
            self.model[self.stage[task]].head.load_state_dict(before.state_dict())

    def part(self, task: str) -> nn.Module:
        return self.model[self.stage[task]]

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        assert features is not None
        branch = self.model[self.stage[task]]
        return branch(inputs, features, self.model.lateral_outputs(branch, inputs, features))

    def groups(self, task: str, weight_decay: float) -> list[dict[str, Any]]:
        branch = self.model[self.stage[task]]
        return parameter_groups(branch.parameters(), weight_decay, branch.merge.parameters())

    def added(self, task: str) -> int:
        """All sides, and the last stage's merge and head: those of the stages before it are not heard."""
        names = [*self.model[self.stage[task]].config.laterals, self.stage[task]]
        sides = [count(side) for name in names if (side := self.model[name].side) is not None]
        last = self.model[names[-1]]
        return sum(sides) + count(last.merge) + count(last.head)

    def alpha(self, task: str) -> float | None:
        return self.model[self.stage[task]].alpha
