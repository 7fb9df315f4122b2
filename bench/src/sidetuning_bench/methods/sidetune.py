"""Side-tuning as a method (paper, section 3), fixed features, and boosting by several sides per task (section 4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sidetuning.artifacts import is_saved
from sidetuning.base import Base, Features, Input
from sidetuning.branch import Branch
from sidetuning.closed_form import solve
from sidetuning.errors import TaskError
from sidetuning.loop import TrainResult
from sidetuning.objective import parameter_groups
from sidetuning.tuner import SideTuner
from sidetuning_bench.methods.method import Method, count
from sidetuning_bench.methods.recipe import Recipe, Task

PARTS = ("side", "merge", "init", "prenorm", "side_options")


class Branches(Method):
    """A method whose tasks are branches of one `SideTuner`.

    Args:
        base: the base.
        parts: arguments of `SideTuner.add_task` that all tasks share, in the order of `PARTS`.
        options: the method's other arguments.
    """

    uses_features: ClassVar[bool] = True

    def __init__(self, base: Base, parts: Sequence[Any], options: Mapping[str, Any]) -> None:
        named = dict(zip(PARTS, parts, strict=True))
        named["side_options"] = dict(named["side_options"] or {})
        super().__init__(base, {**named, **options})
        self.parts = named
        self.model = SideTuner(base)

    def add_branch(self, name: str, task: Task, laterals: Sequence[str], init: str | None) -> None:
        """Add a branch with the task's head."""
        parts = {**self.parts, "head": task.head, "head_options": task.head_options, "init": init}
        self.model.add_task(name, laterals=laterals, labels=task.labels, **parts)

    def branch(self, task: str) -> Branch:
        """The branch that answers for a task."""
        return self.model[task]

    def part(self, task: str) -> Branch:
        return self.branch(task)

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        assert features is not None
        branch = self.branch(task)
        return branch(inputs, features, self.model.lateral_outputs(branch, inputs, features))

    def groups(self, task: str, weight_decay: float) -> list[dict[str, Any]]:
        branch = self.branch(task)
        return parameter_groups(branch.parameters(), weight_decay, branch.merge.parameters())

    def remove(self, task: str) -> None:
        if task in self.model:
            self.model.remove_task(task)

    def alpha(self, task: str) -> float | None:
        return self.branch(task).alpha


class SideTune(Branches):
    """A branch per task on one frozen base.

    Args:
        base: the base.
        side, merge, init, prenorm, side_options: as in `SideTuner.add_task`, side and merge by name.
        dense: feed the sides of all earlier tasks into the merge, detached.
    """

    name: ClassVar[str] = "sidetune"

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
        super().__init__(base, (side, merge, init, prenorm, side_options), {"dense": dense})
        self.dense = dense

    def add(self, task: Task) -> None:
        self.add_branch(task.name, task, self.model.tasks if self.dense else [], self.parts["init"])

    def rebuild(self, task: Task) -> None:
        """Build nothing: `read_tensors` builds each task from its own folder."""

    def write_tensors(self, folder: Path, metrics: Mapping[str, float] | None) -> str:
        """Write each new task to its own folder under `folder`, by `SideTuner.save_task`; no file holds them all."""
        last, identity = list(self.tasks)[-1:], self.model.base.identity()
        for task in self.tasks:
            if not is_saved(folder / task, task, self.model[task], identity, self.model._laterals(task)):
                self.model.save_task(task, folder / task, metrics=metrics if task in last else None)
        return ""

    def read_tensors(self, folder: Path, name: str) -> None:
        for task in self.tasks:
            self.model.load_task(folder / task)


class FixedFeatures(SideTune):
    """Side-tuning without a side (a = 1): a head per task on the frozen base's code."""

    name: ClassVar[str] = "features"

    def __init__(self, base: Base, prenorm: bool = False) -> None:
        super().__init__(base, side=None, merge="base-only", prenorm=prenorm)
        self.options = {"prenorm": prenorm}


class Solve(FixedFeatures):
    """Fixed features with a head in closed form (`st.solve`): the best linear probe, or more, without a gradient.

    Args:
        base: the base.
        width: features of a random expansion of the base's taps, which the head reads beside the code; 0 reads the code
            alone.
        grid: places along an edge to which taps are pooled.
    """

    name: ClassVar[str] = "solve"

    def __init__(self, base: Base, width: int = 0, grid: int = 4) -> None:
        super().__init__(base)
        self.options = {"width": width, "grid": grid}

    def add(self, task: Task) -> None:
        if getattr(task.loss, "func", task.loss) is not F.cross_entropy:
            raise TaskError("the method 'solve' learns classes, by regression on their numbers; use features")
        head: dict[str, Any] = {"head": task.head, "head_options": task.head_options}
        if self.options["width"]:
            head = {"head": "random", "head_options": {"outputs": task.head, "seed": task.seed, **self.options}}
        self.model.add_task(task.name, side=None, merge="base-only", labels=task.labels, problem="classes", **head)

    def _train(self, task: Task, loader: Iterable[Any], recipe: Recipe, phase: int, **run: Any) -> TrainResult:
        # A second or two: there is nothing to resume, and a recipe's steps and rates have no meaning.
        found = solve(self.model, task.name, loader, progress=run["progress"] is not None)
        return TrainResult(recipe.steps, found.seconds, [found.error])


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
