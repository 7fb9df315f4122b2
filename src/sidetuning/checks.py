"""What must hold before a task is added: its parts fit each other, and share nothing with others."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Features
from sidetuning.branch import Branch
from sidetuning.errors import ShapeError, SideTuningError, TaskError
from sidetuning.inputs import Input, modules_of


def check_name(name: str) -> None:
    """Raise TaskError unless `name` can be a folder, and a key of torch's module dictionaries."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name):
        raise TaskError(f"'{name}' cannot be a task's name; use letters, digits, - and _ (and no method of a dict)")


def tapped_for(name: str, branch: Branch, base: Base) -> Base:
    """The base with what the branch reads beside its own taps.

    Raises:
        TaskError: the side was built for a tap in another layout than the base has it in.
    """
    layouts = branch.config.layouts
    for tap in branch.taps:
        own = base.layouts.get(tap)
        if own is not None and layouts.get(tap, own) != own:
            raise TaskError(
                f"task '{name}' reads the tap '{tap}' as {layouts[tap]}, and this model's base as {own}; give all "
                f"tasks one layout, taps={{'{tap}': '{own}'}}"
            )
    more = {tap: layouts.get(tap) for tap in branch.taps if tap not in base.tap_shapes}
    return base.with_taps({**dict.fromkeys(base.tap_shapes), **base.layouts, **more})


def check_shapes(name: str, branch: Branch, base: Base, laterals: Callable[[Input, Features], list[Tensor]]) -> None:
    """Run the branch on what the base made of its example: shapes that do not fit are found now.

    Raises:
        ShapeError: parts that do not fit each other.
        TaskError: labels that are not one per output.
    """
    branch.eval().to(base.device, base.like.dtype)
    inputs, features = base.prepare(base.example), base.example_features
    try:
        with torch.no_grad():
            out = branch(inputs, features, laterals(inputs, features))
    except SideTuningError:
        raise
    except Exception as error:
        example = base.example if isinstance(base.example, Tensor) else next(iter(base.example.values()))
        shapes = f"input {tuple(example.shape)}, base output {tuple(features.out.shape)}"
        raise ShapeError(f"the parts of task '{name}' do not fit each other ({shapes}): {error}") from error
    labels = branch.labels
    if labels is not None and isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] != len(labels):
        raise TaskError(f"task '{name}' has {len(labels)} labels for {out.shape[1]} outputs; give one per output")


class Owners:
    """Whose tensors are where: a module that two tasks share would let one change the other.

    The time of a question does not grow with the number of tasks.
    """

    def __init__(self) -> None:
        # The `id` of each tensor of a task -> the task.
        self._tasks: dict[int, str] = {}
        self._base: tuple[object, set[int]] = (None, set())

    def check(self, name: str, branch: Branch, base: Base, branches: Mapping[str, nn.Module]) -> None:
        """Raise TaskError where another task of `branches`, or the base, holds a tensor of the new branch."""
        own = {id(tensor) for tensor in _tensors(branch)}
        if self._base[0] is not base.net:
            self._base = base.net, {id(t) for net in modules_of(base.net) for t in _tensors(net)}
        # A tensor that was replaced, by `.to()` for example, leaves its number to others.
        known = {self._tasks[number] for number in own if number in self._tasks}
        held = [task for task in known if task in branches and own & {id(t) for t in _tensors(branches[task])}]
        if own & self._base[1]:
            self._base = base.net, {id(t) for net in modules_of(base.net) for t in _tensors(net)}
        others = ["the base"] if own & self._base[1] else [f"task '{task}'" for task in held]
        if others:
            raise TaskError(
                f"a module of task '{name}' is also that of {others[0]}, which would change with it; "
                "give a copy.deepcopy"
            )

    def add(self, name: str, branch: Branch) -> None:
        """Remember a task's tensors."""
        self._tasks.update({id(tensor): name for tensor in _tensors(branch)})

    def remove(self, name: str) -> None:
        """Forget a task's tensors."""
        self._tasks = {number: task for number, task in self._tasks.items() if task != name}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
