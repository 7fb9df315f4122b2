"""What must hold before a task is added: its parts fit each other and their file, and share nothing with others."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from sidetuning.base import Base, Features
from sidetuning.branch import CUSTOM, Branch
from sidetuning.errors import ArtifactError, TaskError, told
from sidetuning.generating import tokenwise
from sidetuning.heads import LanguageHead
from sidetuning.inputs import Input
from sidetuning.probe import influence, shapes_of
from sidetuning.problems import Tokens
from sidetuning.reach import modules_of
from sidetuning.seeding import seeded
from sidetuning.sides import run_side

# Bytes of a task's name: names of folders end at 255, and temporary ones are longer.
LONGEST = 200


def check_name(name: str) -> None:
    """Raise TaskError unless `name` can be a folder, and a key of torch's module dictionaries."""
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict(), name) or len(name.encode()) > LONGEST:
        raise TaskError(
            f"'{name}' cannot be a task's name; use up to {LONGEST} letters, digits, - and _ (and no method of a dict)"
        )


def check_state(name: str, branch: Branch) -> None:
    """Raise TaskError unless a file can hold all that the branch holds: before it is trained, and not after."""
    for key, value in branch.state_dict().items():
        plain = isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__") and not is_lazy(value)
        if not plain or value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise TaskError(
                f"'{key}' of task '{name}' is a {type(value).__name__} that a task's file cannot hold: give parts of "
                "plain tensors, not quantised or sparse ones"
            )


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
    shapes = f"input {shapes_of(base.example)}, base output {shapes_of(features.out)}"
    with torch.no_grad(), told(f"the parts of task '{name}' do not fit each other ({shapes}): {{}}"):
        out = branch(inputs, features, laterals(inputs, features))
        if isinstance(branch.head, LanguageHead):
            _check_causal(name, branch, base, laterals)
    labels = branch.labels
    told_apart = isinstance(out, Tensor) and (out.ndim == 2 or isinstance(branch.problem, Tokens))
    if labels is not None and told_apart and out.shape[-1] != len(labels):
        raise TaskError(f"task '{name}' has {len(labels)} labels for {out.shape[-1]} outputs; give one per output")


def _check_causal(name: str, branch: Branch, base: Base, laterals: Callable[[Input, Features], list[Tensor]]) -> None:
    """Raise TaskError where the code of a token depends on later ones, which a text that is written does not have."""
    parts = branch.config
    if base.causal and not parts.laterals and (parts.side or ("",))[0] != CUSTOM and tokenwise(branch):
        # It sees what the base saw: a thousand such tasks are added without a base pass.
        return
    # Weights that start at 0 hide what a side sees.
    side = copy.deepcopy(branch.side)
    with seeded(0):
        for parameter in () if side is None else side.parameters():
            parameter.data = parameter.data if parameter.any() else torch.randn_like(parameter)

    def sides(x: Input) -> Tensor:
        inputs = base.prepare(x)
        features = base.encode(inputs)
        own = [] if side is None else [run_side(side, inputs, features)]
        found = [*own, *laterals(inputs, features)]
        return torch.cat(found or [features.out], -1)

    moved = influence(sides, base.example)
    if not base.causal or (moved is not None and moved[0] > 1e-3 * moved[1]):
        raise TaskError(
            f"the side of task '{name}', or a lateral's, sees later tokens, which a text that is being written does "
            "not have: leave causal= out of its side_options, or choose another side"
        )


class Lock:
    """A lock that a copy of its owner, or a pickled one, has of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


class Owners:
    """Whose tensors are where: a module that two tasks share would let one change the other.

    The time of a question does not grow with the number of tasks.
    """

    def __init__(self) -> None:
        # The `id` of each tensor of a task -> the task.
        self._tasks: dict[int, str] = {}
        self._own: dict[str, list[int]] = {}
        self._base: tuple[object, set[int]] = (None, set())

    def check(self, name: str, branch: Branch, base: Base, branches: Mapping[str, nn.Module]) -> None:
        """Raise TaskError where another task of `branches`, or the base, holds a tensor of the new branch."""
        own = {id(tensor) for tensor in _tensors(branch)}
        for task in branches if len(branches) != len(self._own) else ():
            # Those of a copy of the model.
            self.add(task, branches[task])
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

    def __reduce__(self) -> tuple[type[Owners], tuple[()]]:
        # A copy has other tensors.
        return Owners, ()

    def add(self, name: str, branch: nn.Module) -> None:
        """Remember a task's tensors."""
        self._own[name] = [id(tensor) for tensor in _tensors(branch)]
        self._tasks.update(dict.fromkeys(self._own[name], name))

    def remove(self, name: str) -> None:
        """Forget a task's tensors."""
        for number in self._own.pop(name, ()):
            # Another task's tensor may have come to where this one's was.
            if self._tasks.get(number) == name:
                del self._tasks[number]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class Sized(TorchFunctionMode):
    """Inside it a part cannot take much more memory than its file: a small one may describe a large network.

    Args:
        tensors: those of the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        # In numbers; every tensor counts for some, so that a billion small layers end too.
        self.left = 10_000_000 + sum(20_000 + 4 * tensor.numel() for tensor in tensors.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a function of torch allocates before it does."""
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full, torch.arange):
            shape = (kwargs or {}).get("size") or (args[0] if args and isinstance(args[0], (tuple, list)) else args)
            self.left -= 10_000 + math.prod(size for size in shape if isinstance(size, int))
            if self.left < 0:
                raise ArtifactError("it would take far more memory than its tensors")
        return func(*args, **(kwargs or {}))
