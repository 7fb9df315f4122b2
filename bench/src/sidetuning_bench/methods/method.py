"""The contract of a method: learn a task, answer for a task, count what it keeps, save, load, resume."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ArtifactError, TaskError, UnknownNameError
from sidetuning.files import atomic_write, write_json
from sidetuning.heads import HEADS, named_head
from sidetuning.objective import Loss, Objective, parameter_groups
from sidetuning.registry import unknown
from sidetuning.seeding import seed_loader, seeded
from sidetuning.sides.initialise import mismatch
from sidetuning.launch import default_accelerator
from sidetuning.loop import TrainResult, train

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

FORMAT_VERSION = 1
CONFIG = "method.json"


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        name: letters, digits, "-" and "_".
        head: outputs of a linear classifier, or the name of a registered head.
        loss: `loss(output, target)`.
        labels: names of the classes.
        seed: of the weights that are drawn for this task.
        head_options: arguments of a registered head, JSON values.
    """

    name: str
    head: int | str
    loss: Loss = F.cross_entropy
    labels: list[str] | None = None
    seed: int = 0
    head_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How to train; one recipe serves all methods of a comparison.

    Attributes:
        steps: optimiser steps per task.
        lr: learning rate.
        weight_decay: on matrices and kernels; scalars, biases, norms and merges get none.
        clip: largest gradient norm, None for no limit.
        optimizer: called as `optimizer(groups, lr=lr)`.
        scheduler: called with the optimiser and the number of its steps; stepped after every step.
        seed: orders the batches.
        precision: "bf16" runs forward passes under bfloat16 autocast.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"


def one_cycle(lr: float, rise: float) -> Callable[[Optimizer, int], LRScheduler]:
    """A schedule for a recipe: a warm-up to the learning rate over a fraction `rise` of the steps, and a cosine down to almost 0."""

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        # Of few steps more of them rise: where just one does, torch's schedule divides by zero.
        share = min(1.0, max(rise, 2 / (steps + 1)))
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps + 1, pct_start=share, cycle_momentum=False
        )

    return schedule


class Method(nn.Module):
    """A way to learn tasks one after another from one pretrained base.

    `method(x, task)` answers for a task. A subclass says how a task is added (`add`), which module learning it may
    change (`part`), how it answers (`output`), and what it keeps (`added`, `shared`).

    Args:
        base: the base; never changed, whatever the method.
        options: the subclass's other arguments, as JSON values.

    Attributes:
        name: under which the method is registered.
        options: the subclass's arguments, kept to build it again.
        tasks: those learned, in order.
        uses_features: whether `output` reads the frozen base's features, which a cache can hold.
        sequential: whether learning a task may change what is learned of others.
        phases: into how many runs of the optimiser a task's training is split.
    """

    name: ClassVar[str]
    uses_features: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    phases: int = 1

    def __init__(self, base: Base, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.base = base
        self.options = dict(options or {})
        self.tasks: dict[str, Task] = {}

    # what a subclass says ---------------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """Build what the task needs. Called with torch's generator seeded by `task.seed`."""
        raise NotImplementedError

    def part(self, task: str) -> nn.Module:
        """The module that learning the task changes; what of it requires a gradient is trained."""
        raise NotImplementedError

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        """The task's output for a prepared input; `features` are the base's where the method `uses_features`."""
        raise NotImplementedError

    def added(self, task: str) -> int:
        """Numbers that must be kept for this task alone: parameters and statistics, in units of one float."""
        raise NotImplementedError

    def shared(self) -> int:
        """Numbers that are kept once for all tasks."""
        return count(self.base.net) if isinstance(self.base.net, nn.Module) else 0

    def penalty(self) -> Tensor | float:
        """A term added to the loss."""
        return 0.0

    def begin(self, task: str, phase: int) -> None:
        """Called before each of the `phases` in which a task is learned."""

    def learned(self, task: Task, loader: Iterable[Any]) -> None:
        """Called when a task's training has ended."""

    def remove(self, task: str) -> None:
        """Take back what `add` built; called where learning the task did not end."""
        for child in self.children():
            if isinstance(child, nn.ModuleDict) and task in child:
                del child[task]

    def rebuild(self, task: Task) -> None:
        """Build a task in the form that it has once learned; `load` then reads its tensors."""
        self.add(task)

    def alpha(self, task: str) -> float | None:
        """The weight of the base in the task's merge, where it has one."""
        return None

    def trained(self, task: str) -> list[nn.Parameter]:
        """The parameters that learning the task trains."""
        return [p for p in self.part(task).parameters() if p.requires_grad]

    def groups(self, task: str, weight_decay: float) -> list[dict[str, Any]]:
        """What is trained, as parameter groups for an optimiser."""
        return parameter_groups(self.trained(task), weight_decay)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name in `state_dict()`; a subclass leaves out what the base can give again."""
        return self.state_dict()

    # what they share --------------------------------------------------------------------------------------------

    def learn(
        self,
        task: Task,
        loader: Iterable[Any],
        recipe: Recipe,
        *,
        resume: str | Path | None = None,
        save_every: float = 60.0,
        progress: bool = True,
    ) -> TrainResult:
        """Learn a task.

        Args:
            task: the task, of a name not learned yet.
            loader: of `(x, y)`, `(x, features, y)` or mappings with "labels", as `fit` takes them.
            recipe: how to train.
            resume: file of the training's state; an interrupted call goes on from it.
            save_every: seconds between two writes of it.
            progress: show a bar.

        Raises:
            TaskError: the task is learned already, its name is not allowed, or a part is not given by name.
            TrainingError, DataError: as `fit`.
        """
        if task.name in self.tasks:
            raise TaskError(f"task '{task.name}' is learned already; choose another name")
        self.to(default_accelerator().device)
        before = {k: v.clone() for k, v in self.state_dict().items()} if self.sequential else None
        results = []
        try:
            self._add(task, self.add)
            for phase in range(self.phases):
                self.begin(task.name, phase)
                steps = recipe.steps // self.phases + (phase < recipe.steps % self.phases)
                optimizer = recipe.optimizer(self.groups(task.name, recipe.weight_decay), lr=recipe.lr)
                result = train(
                    self._objective(task, recipe.precision), loader, optimizer, steps=steps,
                    scheduler=None if recipe.scheduler is None else recipe.scheduler(optimizer, steps), clip=recipe.clip,
                    seed=recipe.seed, resume=resume if resume is None or phase == 0 else f"{resume}.{phase}",
                    save_every=save_every, progress=f"{self.name}: {task.name}" if progress else None,
                    label=f"{self.name}, task {task.name}",
                )  # fmt: skip
                results.append(result)
            started = time.monotonic()
            seed_loader(loader, task.seed)
            with seeded(task.seed):
                self.learned(task, loader)
        except BaseException:  # as if it had not begun; what was trained so far is in the resume file
            self.tasks.pop(task.name, None)
            self.remove(task.name)
            if before is not None:
                self.load_state_dict(before)
            self.eval()
            raise
        self.eval()
        seconds = sum(r.seconds for r in results) + time.monotonic() - started
        return TrainResult(recipe.steps, seconds, [loss for r in results for loss in r.losses])

    def _objective(self, task: Task, precision: Literal["no", "bf16"]) -> Objective:
        part = self.part(task.name)
        return Objective(part, self, task.name, task.loss, penalty=self.penalty, precision=precision)

    def _add(self, task: Task, add: Callable[[Task], None]) -> None:
        if not re.fullmatch(r"[\w-]+", task.name) or hasattr(nn.ModuleDict(), task.name):
            raise TaskError(
                f"'{task.name}' cannot be a task's name; use letters, digits, - and _ (and no attribute of a dict)"
            )
        for name, value in {"head": task.head, "head_options": dict(task.head_options), **self.options}.items():
            try:
                json.dumps(value)
            except TypeError:  # a module would be one for all tasks, and could not be built again
                raise TaskError(
                    f"{name} is a {type(value).__name__}, and a method builds its parts anew for every task: register it "
                    "(with SIDES, MERGES or HEADS) and give its name"
                ) from None
        with seeded(task.seed):
            add(task)
        self.tasks[task.name] = task
        self.to(self.base.device)
        self.eval()

    def __getitem__(self, task: str) -> nn.Module:
        if task not in self.tasks:
            raise UnknownNameError(unknown("task", task, list(self.tasks), verb="learned"))
        return self.part(task)

    def forward(self, x: Input, task: str, *, features: Features | Tensor | None = None) -> Tensor:
        """Answer for a task.

        Args:
            x: a batch as the base takes it.
            task: the task.
            features: what the base returned for `x`, to spare the base pass of a method that `uses_features`.
        """
        self[task]
        inputs = self.base.prepare(x)
        if isinstance(features, Tensor):
            features = Features(features)
        if features is None and self.uses_features:
            features = self.base.encode(inputs)
        return self.output(inputs, features, task)

    def head(self, task: Task) -> nn.Module:
        """A new head for a task."""
        name, options = named_head(task.head, task.head_options)
        head = HEADS.build(name, self.base, options=options)
        assert isinstance(head, nn.Module)
        return head

    def save(self, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> None:
        """Write all tasks to `folder`/method.json and the tensors beside it.

        The tensors' file is named by its content and `method.json`, which names it, is written last: a save that is cut
        short leaves the one before it as it was.

        Args:
            folder: made where it does not exist.
            metrics: numbers to record with the task learned last.
        """
        folder = Path(folder)
        file = self.write_tensors(folder, metrics)
        known = self.base.identity().record()
        config = {
            "format_version": FORMAT_VERSION,
            "method": self.name,
            "options": self.options,
            "base": known["sha256"],
            **{key: known[key] for key in ("kind", "output_shape", "preparation")},
            "tasks": [
                {"name": t.name, "head": t.head, "labels": t.labels, "head_options": dict(t.head_options)}
                for t in self.tasks.values()
            ],
            "metrics": dict(metrics or {}),
            "tensors": file,
        }
        write_json(folder / CONFIG, config)
        for old in folder.glob("method-*.safetensors"):
            if old.name != file:
                old.unlink()

    def write_tensors(self, folder: Path, metrics: Mapping[str, float] | None) -> str:
        """Write the tensors and return the name of their file, which is their sha256."""
        content = save({k: v.detach().cpu().contiguous().clone() for k, v in self.tensors().items()})  # tied ones apart
        file = f"method-{hashlib.sha256(content).hexdigest()}.safetensors"
        with atomic_write(folder / file) as temporary:
            temporary.write_bytes(content)
        return file

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote into this method, which must have learned nothing yet.

        Raises:
            TaskError: it has learned something.
            ArtifactError: the folder is missing, damaged, or of another method or base.
        """
        folder = Path(folder)
        if self.tasks:
            raise TaskError(f"this method has learned {', '.join(self.tasks)}; load into a new one")
        config = read_config(folder)
        if config["method"] != self.name:
            raise ArtifactError(f"{folder} holds the method '{config['method']}', not '{self.name}'")
        if difference := self.base.identity().difference({**config, "sha256": config["base"]}):
            raise ArtifactError(f"{folder} was learned from another base: {difference}; load that one")
        try:
            for t in config["tasks"]:
                options = t.get("head_options", {})
                self._add(Task(t["name"], t["head"], labels=t["labels"], head_options=options), self.rebuild)
            self.read_tensors(folder, config["tensors"])
        except BaseException:
            for task in list(self.tasks):
                self.tasks.pop(task)
                self.remove(task)
            raise

    def read_tensors(self, folder: Path, name: str) -> None:
        """Read the tensors into the tasks, which are built already."""
        file = folder / name
        try:
            content = file.read_bytes()
            tensors = parse(content)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file} cannot be read ({error}); learn the tasks again") from error
        if f"method-{hashlib.sha256(content).hexdigest()}.safetensors" != name:
            raise ArtifactError(f"{file} was changed: its sha256 is not the one in its name; learn the tasks again")
        problem = mismatch(self.tensors(), tensors)
        if problem:
            raise ArtifactError(f"{file} does not fit: {problem}")
        self.load_state_dict({**self.state_dict(), **tensors})


def load_method(folder: str | Path, base: Base) -> Method:
    """Build the method saved in `folder`, with all its tasks, on `base`."""
    from sidetuning_bench.methods import METHODS

    config = read_config(Path(folder))
    method: Method = METHODS.build(config["method"], base, options=config["options"])
    method.load(folder)
    return method


def saved_tasks(folder: Path) -> list[str]:
    """Names of the tasks that `save` wrote to a folder; none where it wrote nothing yet."""
    return [task["name"] for task in read_config(folder)["tasks"]] if (folder / CONFIG).exists() else []


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `method.json`, checked."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} does not exist; give the folder that save() wrote") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); learn the tasks again") from error
    fields = {"method": str, "options": dict, "base": str, "tasks": list, "tensors": str}
    if not isinstance(config, dict) or config.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(f"{file} has an unknown format_version; this library reads {FORMAT_VERSION}")
    for name, kind in fields.items():
        if not isinstance(config.get(name), kind):
            raise ArtifactError(f"{file} is damaged: '{name}' is missing or no {kind.__name__}; learn the tasks again")
    return config


def count(module: nn.Module) -> int:
    """Parameters and running statistics of a module."""
    buffers = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    return sum(p.numel() for p in module.parameters()) + buffers
