"""The contract of a method: learn a task, answer for a task, count what it stores, save, load, resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.checks import check_name
from sidetuning.errors import ArtifactError, TaskError, UnknownNameError
from sidetuning.files import atomic_write, check_signed, read_json, read_safetensors, signed, write_json
from sidetuning.heads import HEADS, named_head, run_head
from sidetuning.launch import default_accelerator
from sidetuning.loop import TrainResult, train
from sidetuning.objective import Objective, parameter_groups
from sidetuning.registry import unknown
from sidetuning.seeding import seed_loader, seeded
from sidetuning.sides.initialise import mismatch
from sidetuning_bench.methods.recipe import Recipe, Task

# Version 1 had no checksum.
FORMAT_VERSION = 2
MEND = "learn the tasks again"
CONFIG = "method.json"
TASK = {"name": str, "labels?": [str], "head_options?": dict}
BASE = {"base": str, "probe?": [float], "preparation?": dict, "output_shape?": [int]}
SCHEMA = {"format_version": int, "method": str, "options": dict, "tasks": [TASK], "tensors": str, **BASE}


class Method(nn.Module):
    """A way to learn tasks one after another from one pretrained base; `method(x, task)` answers for a task.

    A subclass builds what a task needs (`add`), and says which module learning the task changes (`tuned`) and how the
    code that its head reads is made (`code`). Without heads in `heads` it overrides `part` and `output` instead.

    Args:
        base: the base; no method ever changes it.
        options: the subclass's other arguments, as JSON values.

    Attributes:
        name: the method's registered name.
        options: the subclass's arguments, by which `load_method` builds it again.
        tasks: the learned tasks, in order.
        heads: the head of each task.
        uses_features: whether `output` reads the frozen base's features, which a cache can hold.
        sequential: whether learning a task may change what was learned of others.
        phases: number of runs of the optimiser into which a task's training is split.
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
        self.heads = nn.ModuleDict()

    # ---- what a subclass says

    def add(self, task: Task) -> None:
        """Build what the task needs, its head first. Called with torch's generator seeded by `task.seed`."""
        name, options = named_head(task.head, task.head_options)
        self.heads[task.name] = HEADS.build(name, self.base, options=options)

    def tuned(self, task: str) -> nn.Module:
        """The module that learning the task changes beside its head."""
        raise NotImplementedError

    def code(self, inputs: Input, task: str) -> Tensor:
        """The task's code of a prepared input, of the base's output shape."""
        raise NotImplementedError

    def part(self, task: str) -> nn.Module:
        """All that learning the task changes; what of it requires a gradient is trained."""
        return nn.ModuleList([self.tuned(task), self.heads[task]])

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        """The task's output for a prepared input; `features` are the base's where the method `uses_features`."""
        return run_head(self.heads[task], self.code(inputs, task), inputs)

    def added(self, task: str) -> int:
        """How many numbers must be stored for this task alone: parameters and statistics, in units of one float."""
        return count(self.part(task))

    def shared(self) -> int:
        """How many numbers are stored once for all tasks."""
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
        """The trained parameters, as parameter groups for an optimiser."""
        return parameter_groups(self.trained(task), weight_decay)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name in `state_dict()`; a subclass leaves out those that are the base's."""
        return self.state_dict()

    # ---- learning and answering, the same for all methods

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
        """Learn a task. If that fails, the method is left as if it had not begun.

        Args:
            task: the task, of a name not learned yet.
            loader: gives `(x, y)`, `(x, features, y)` or mappings with "labels", as for `fit`.
            recipe: how to train.
            resume: file of the training's state, from which an interrupted call resumes.
            save_every: seconds between two writes of it.
            progress: show a bar.

        Raises:
            TaskError: the task is learned already, its name is not allowed, or a part is not given by name.
            TrainingError, DataError: as `fit`.
        """
        if task.name in self.tasks:
            raise TaskError(f"task '{task.name}' is learned already; choose another name")
        self.to(default_accelerator().device)
        run: dict[str, Any] = {"save_every": save_every, "progress": f"{self.name}: {task.name}" if progress else None}
        before = {k: v.clone() for k, v in self.state_dict().items()} if self.sequential else None
        try:
            self._add(task, self.add)
            results = []
            for phase in range(self.phases):
                # The state of the first phase is in `resume` itself.
                run["resume"] = f"{resume}.{phase}" if resume is not None and phase else resume
                results.append(self._train(task, loader, recipe, phase, **run))
            started = time.monotonic()
            seed_loader(loader, task.seed)
            with seeded(task.seed):
                self.learned(task, loader)
        except BaseException:
            self._forget(task.name)
            if before is not None:
                self.load_state_dict(before)
            raise
        finally:
            self.eval()
        seconds = sum(r.seconds for r in results) + time.monotonic() - started
        return TrainResult(recipe.steps, seconds, [loss for r in results for loss in r.losses])

    def _train(self, task: Task, loader: Iterable[Any], recipe: Recipe, phase: int, **run: Any) -> TrainResult:
        """Run one phase of a task's training."""
        self.begin(task.name, phase)
        steps = recipe.steps // self.phases + (phase < recipe.steps % self.phases)
        optimizer = recipe.optimizer(self.groups(task.name, recipe.weight_decay), lr=recipe.lr)
        run["scheduler"] = None if recipe.scheduler is None else recipe.scheduler(optimizer, steps)
        part, precision = self.part(task.name), recipe.precision
        objective = Objective(part, self, task.name, task.loss, penalty=self.penalty, precision=precision)
        label = f"{self.name}, task {task.name}"
        return train(objective, loader, optimizer, steps=steps, clip=recipe.clip, seed=recipe.seed, label=label, **run)

    def _add(self, task: Task, add: Callable[[Task], None]) -> None:
        check_name(task.name)
        for name, value in {"head": task.head, "head_options": dict(task.head_options), **self.options}.items():
            try:
                json.dumps(value)
            except TypeError:
                # A module would be one for all tasks, and could not be built again.
                raise TaskError(
                    f"{name} is a {type(value).__name__}, and a method builds its parts anew for every task: "
                    "register it (with SIDES, MERGES or HEADS) and give its name"
                ) from None
        with seeded(task.seed):
            add(task)
        self.tasks[task.name] = task
        self.to(self.base.device)
        self.eval()

    def _forget(self, task: str) -> None:
        self.tasks.pop(task, None)
        self.remove(task)

    def __getitem__(self, task: str) -> nn.Module:
        if task not in self.tasks:
            raise UnknownNameError(unknown("task", task, list(self.tasks), verb="learned"))
        return self.part(task)

    def forward(self, x: Input, task: str, *, features: Features | Tensor | None = None) -> Tensor:
        """Answer for a task; any number of threads get their own answers.

        Args:
            x: a batch as the base takes it.
            task: the task.
            features: what the base returned for `x`, to save the base pass of a method that `uses_features`.
        """
        self[task]
        inputs = self.base.prepare(x)
        known = self.base.features(inputs, features) if self.uses_features else None
        return self.output(inputs, known, task)

    # ---- files

    def save(self, folder: str | Path, *, metrics: Mapping[str, float] | None = None) -> None:
        """Write all tasks to `folder`/method.json and the tensors beside it.

        `method.json` names the tensors' file and is written last, so a save that is interrupted changes nothing.

        Args:
            folder: folder of the method, made where it does not exist.
            metrics: numbers to record with the task learned last.
        """
        folder = Path(folder)
        file = self.write_tensors(folder, metrics)
        base = self.base.identity().record()
        tasks = [
            {"name": t.name, "head": t.head, "labels": t.labels, "head_options": dict(t.head_options)}
            for t in self.tasks.values()
        ]
        config = {"format_version": FORMAT_VERSION, "method": self.name, "options": self.options}
        config |= {"base": base.pop("sha256"), **base, "tasks": tasks, "metrics": dict(metrics or {}), "tensors": file}
        write_json(folder / CONFIG, signed(config))
        for old in folder.glob("method-*.safetensors"):
            if old.name != file:
                old.unlink()

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote into this method, which must have learned nothing yet.

        Raises:
            TaskError: the method has learned something.
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
                self._add(Task(t["name"], t["head"], labels=t.get("labels"), head_options=options), self.rebuild)
            self.read_tensors(folder, config["tensors"])
        except BaseException:
            for task in list(self.tasks):
                self._forget(task)
            raise

    def write_tensors(self, folder: Path, metrics: Mapping[str, float] | None) -> str:
        """Write the tensors of all tasks, and return the name of their file, which holds its sha256."""
        # Clones: safetensors refuses tied weights, which share their memory.
        content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors().items()})
        file = f"method-{hashlib.sha256(content).hexdigest()}.safetensors"
        with atomic_write(folder / file) as temporary:
            temporary.write_bytes(content)
        return file

    def read_tensors(self, folder: Path, name: str) -> None:
        """Read the tensors into the tasks, which are built already."""
        file = folder / name
        try:
            content = read_safetensors(file)
            tensors = load(content)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file} cannot be read ({error}); {MEND}") from error
        if f"method-{hashlib.sha256(content).hexdigest()}.safetensors" != file.name:
            raise ArtifactError(f"{file} was changed: its sha256 is not the one in its name; {MEND}")
        if problem := mismatch(self.tensors(), tensors):
            raise ArtifactError(f"{file} does not fit: {problem}")
        self.load_state_dict({**self.state_dict(), **tensors})


def count(module: nn.Module) -> int:
    """Parameters and running statistics of a module."""
    buffers = sum(b.numel() for b in module.buffers() if b.is_floating_point())
    return sum(p.numel() for p in module.parameters()) + buffers


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `method.json`, checked."""
    file = folder / CONFIG
    try:
        config: dict[str, Any] = read_json(file, SCHEMA, MEND)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} does not exist; give the folder that save() wrote") from error
    version = config["format_version"]
    if not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(f"{file} has the format_version {version}; this library reads 1 to {FORMAT_VERSION}")
    config = check_signed(config, str(file), MEND, needed=version > 1)
    if not all(isinstance(task.get("head"), (int, str)) for task in config["tasks"]):
        raise ArtifactError(f"{file} has no valid field 'tasks.head'; {MEND}")
    if Path(config["tensors"]).name != config["tensors"]:
        raise ArtifactError(f"{file} names a file of another folder, {config['tensors']}; {MEND}")
    return config


def saved_tasks(folder: Path) -> list[str]:
    """Names of the tasks that were saved to a folder; none where nothing was saved yet."""
    return [task["name"] for task in read_config(folder)["tasks"]] if (folder / CONFIG).exists() else []
