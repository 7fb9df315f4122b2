"""Boosting: several sides for one task, added one after another (paper, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sidetuning.base import Base
from sidetuning.branch import Branch
from sidetuning.errors import TaskError
from sidetuning_bench.methods.method import count
from sidetuning_bench.methods.recipe import Task
from sidetuning_bench.methods.sidetune import Branches


class Boosting(Branches):
    """Each stage is a branch whose laterals are the stages before it, and starts from the head of the last one.

    The recipe's steps are shared out over the stages; a stage changes its own side, merge and head alone.

    Args:
        base: the base.
        stages: number of sides per task.
        side, merge, init, prenorm, side_options: as in `SideTuner.add_task`, by name; the merge must take laterals.
    """

    name: ClassVar[str] = "boosting"

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
        super().__init__(base, (side, merge, init, prenorm, side_options), {"stages": stages})
        if stages < 1:
            raise TaskError(f"boosting needs at least one stage, not {stages}")
        self.phases = stages
        # The branch that answers for a task.
        self.stage: dict[str, str] = {}

    def add(self, task: Task) -> None:
        self._build(task, self.parts["init"])

    def rebuild(self, task: Task) -> None:
        # All other weights come from the file.
        init = self.parts["init"]
        self._build(task, init if init in ("zero", "low-energy") else None)

    def _build(self, task: Task, init: str | None) -> None:
        names = self._stages(task.name)
        for i, name in enumerate(names):
            self.add_branch(name, task, names[:i], init)
        self.stage[task.name] = names[-1]

    def _stages(self, task: str) -> list[str]:
        return [f"{task}-{i + 1}" for i in range(self.phases)]

    def remove(self, task: str) -> None:
        for name in reversed(self._stages(task)):
            super().remove(name)
        self.stage.pop(task, None)

    def begin(self, task: str, phase: int) -> None:
        self.stage[task] = f"{task}-{phase + 1}"
        if phase:
            before = self.model[f"{task}-{phase}"].head
            self.model[self.stage[task]].head.load_state_dict(before.state_dict())

    def branch(self, task: str) -> Branch:
        return self.model[self.stage[task]]

    def added(self, task: str) -> int:
        """All sides, and the merge and head of the last stage: those of the stages before it are not used any more."""
        last = self.branch(task)
        sides = [self.model[name].side for name in [*last.config.laterals, self.stage[task]]]
        return sum(count(side) for side in sides if side is not None) + count(last.merge) + count(last.head)
