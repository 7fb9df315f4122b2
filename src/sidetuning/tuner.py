"""The heart: one frozen base, and per task a branch of side, merge and head that the other tasks cannot touch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor, nn

from sidetuning.artifacts import SavedTask, has_tensors, is_saved, read_branch, read_task, tensors_sha256, write_task
from sidetuning.base import Base, Features, Input, Taps
from sidetuning.branch import Branch, build_branch
from sidetuning.checks import Lock, Owners, check_name, check_shapes, check_state, tapped_for
from sidetuning.errors import ArtifactError, TaskError, UnknownNameError
from sidetuning.generating import generate
from sidetuning.identity import Identity
from sidetuning.predicting import predict, run, run_in_parts, run_mixed
from sidetuning.registry import unknown
from sidetuning.router import Router, Routes, kept_routes, stamps
from sidetuning.seeding import seeded
from sidetuning.shelf import Shelf
from sidetuning.summary import Summary, summarise


class SideTuner(nn.Module):
    """A base and its tasks.

    `parameters()` and `state_dict()` are those of the branches: the base is never trained and never saved with a task.
    The model starts and stays in evaluation mode; `fit` puts only the branch that it trains in training mode.

    Args:
        base: a `Base`; wrap a module of your own with `Base(module, example=x)`.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        if not isinstance(base, Base):
            raise TaskError(f"SideTuner takes a Base, not a {type(base).__name__}: wrap it, Base(module, example=x)")
        self.base = base
        self.branches = nn.ModuleDict()
        self._owners, self._changes = Owners(), Lock()
        # Tasks that were removed, with the hashes of their weights as they were read, written and removed.
        self._removed: dict[str, set[str]] = {}
        # Saved tasks that are read when they are asked for.
        self._shelf: Shelf | None = None
        self._router: Router | None = None
        # The taps that it came with; others come and go with the tasks.
        self._taps = tuple(base.tap_shapes)
        self.eval()

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks in the order in which they were added; those that `load` left on disk come first."""
        shelved = () if self._shelf is None else self._shelf.folders
        return [*shelved, *(name for name in self.branches if name not in shelved)]

    def __getitem__(self, task: str) -> Branch:
        shelf, branch = self._shelf, self.branches._modules.get(task)
        if shelf is not None and task in shelf.folders:
            branch = self._from_shelf(shelf, task)
        if not isinstance(branch, Branch):
            raise UnknownNameError(unknown("task", task, self.tasks, verb="in this model"))
        return branch

    def _from_shelf(self, shelf: Shelf, task: str) -> Branch:
        """A saved task, read where it is not in memory; the least used one leaves in its place."""
        with self._changes:
            if task not in self.branches:
                with shelf.reads(task), torch.inference_mode(False):
                    self._add_saved(shelf.folders[task], read_task(shelf.folders[task]), shelf.identity, name=task)
            for left in shelf.take(task, self.branches._modules):
                del self.branches[left]
                self._owners.remove(left)
            return self.branches[task]  # type: ignore[return-value]

    def __contains__(self, task: str) -> bool:
        return task in self.branches or (self._shelf is not None and task in self._shelf.folders)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def add_task(
        self,
        name: str,
        *,
        side: str | nn.Module | None,
        head: int | str | nn.Module,
        merge: str | nn.Module | None = None,
        taps: Taps | None = None,
        laterals: Sequence[str] = (),
        prenorm: bool = False,
        init: str | Path | None = None,
        side_options: Mapping[str, Any] | None = None,
        merge_options: Mapping[str, Any] | None = None,
        head_options: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        problem: str | None = None,
        seed: int | None = None,
    ) -> Branch:
        """Add a task; the others do not change.

        Args:
            name: letters, digits, "-" and "_".
            side: a registered side, your own module, or None with a merge that ignores it.
            head: number of outputs of a linear head, a registered head, or your own module.
            merge: a registered merge ("alpha"; of head "lm" "sum" and init="silent") or your own, called as `Merge` is.
            taps: the base's inner modules that the side reads, as `Base` takes them; by default all that it returns.
            laterals: earlier tasks whose side outputs, detached, the merge reads too; they can no longer be trained.
            prenorm: group-normalise the merged code before the head, as the original code does.
            init: how the side starts. None: as built. "xavier". "low-energy": its output scaled to 1 %. "zero": as the
                base, by a gate at 0. "silent": its last layer at 0. "distilled": shipped weights. A path: of weights.
            side_options, merge_options, head_options: keyword arguments of registered parts.
            labels: names of the classes, one per output, saved with the task.
            problem: what targets mean: "classes", "labels" (several may be right), "numbers", "tokens", "next",
                "span", "pixels" or "own" (a loss alone knows); by default what goes with the loss or the head.
            seed: seed for the initial weights; by default torch's generator is used as it is.

        Returns:
            The new branch, in evaluation mode, on the base's device.

        Raises:
            TaskError: the name is taken or not allowed; parts do not go together, or are another task's or the base's.
            UnknownNameError: a part, an option or a lateral that does not exist.
            ShapeError: a side or head that does not fit the base's shapes.
        """
        self._check_name(name)
        for lateral in laterals:
            # Raises, with near names.
            self[lateral]
        with contextlib.nullcontext() if seed is None else seeded(seed):
            branch = build_branch(
                self.base if taps is None else self.base.with_taps(taps),
                side=side,
                head=head,
                merge=merge,
                laterals=laterals,
                prenorm=prenorm,
                init=init,
                problem=problem,
                side_options=side_options,
                merge_options=merge_options,
                head_options=head_options,
            )
        if taps and not branch.taps:
            raise TaskError(f"the side of task '{name}' reads no taps; leave taps= out, or use a side that does")
        branch.labels = None if labels is None else [str(label) for label in labels]
        return self.add_branch(name, branch)

    def add_branch(self, name: str, branch: Branch) -> Branch:
        """Add a branch that is built already, under a task's name; `add_task` and `load_task` end here."""
        with self._changes:
            self._check_name(name)
            return self._add(name, branch)

    def _add(self, name: str, branch: Branch) -> Branch:
        for lateral in branch.config.laterals:
            if self[lateral].side is None:
                raise TaskError(f"task '{lateral}' has no side, so it cannot be a lateral of '{name}'")
        self._owners.check(name, branch, self.base, self.branches._modules)  # type: ignore[arg-type]
        base = tapped_for(name, branch, self.base)
        check_shapes(name, branch, base, partial(self.lateral_outputs, branch))
        check_state(name, branch)
        for lateral in branch.config.laterals:
            self[lateral].pinned = True
            self[lateral].eval()
        self._owners.add(name, branch)
        self.base = base
        self.branches[name] = branch
        return branch

    def _check_name(self, name: str) -> None:
        if name in self and (self._shelf is None or name not in self._shelf.reading or name in self.branches):
            raise TaskError(f"task '{name}' exists already; remove_task('{name}') first, or choose another name")
        check_name(name)

    def remove_task(self, name: str) -> None:
        """Remove a task. Raises TaskError where a later task has it as a lateral."""
        with self._changes:
            branch = self[name]
            if users := self.users(name):
                raise TaskError(f"task '{name}' is a lateral of {', '.join(users)}; remove those first")
            self._removed[name] = {*self._removed.get(name, ()), *branch.written, tensors_sha256(branch)}
            del self.branches[name]
            self._owners.remove(name)
            if self._shelf is not None:
                self._shelf.folders.pop(name, None)
            for lateral in branch.config.laterals:
                self[lateral].pinned = bool(self.users(lateral))
            needed = {*self._taps, *(tap for other in self._in_memory().values() for tap in other.taps)}
            self.base = self.base.with_taps([tap for tap in self.base.tap_shapes if tap in needed])

    def users(self, name: str) -> list[str]:
        """The tasks that have this one as a lateral."""
        laterals = {} if self._shelf is None else self._shelf.laterals()
        laterals |= {task: branch.config.laterals for task, branch in self._in_memory().items()}
        return [task for task, read in laterals.items() if name in read]

    def _in_memory(self) -> dict[str, Branch]:
        return dict(self.branches._modules)  # type: ignore[arg-type]

    def freeze_task(self, name: str, frozen: bool = True) -> None:
        """Freeze the parameters of the task `name` (`fit` then refuses it), or thaw them with `frozen=False`."""
        self[name].requires_grad_(not frozen).train(self[name].training)

    @overload
    def forward(self, x: Input, task: str, *, features: Features | Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Input, *, tasks: Sequence[str], features: Features | Tensor | None = None) -> list[Tensor]: ...

    def forward(
        self,
        x: Input,
        task: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        features: Features | Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Run one task on a batch, or a task per sample.

        Args:
            x: a batch as the base takes it, batch first.
            task: the task of the whole batch.
            tasks: the task of each sample instead; one base pass serves them all.
            features: what the base returned for `x`, to spare the base pass.

        Returns:
            With `task` the task's output; with `tasks` a list of each sample's output, without the batch dimension.
        """
        if (task is None) == (tasks is None):
            raise TaskError("name one task for the batch, model(x, 'pets'), or one per sample, model(x, tasks=[…])")
        wanted = [task] if task is not None else list(tasks or [])
        base, branches = self._moment(wanted)
        inputs = base.prepare(x)
        known = base.features(inputs, features)
        if task is not None:
            return run([task], branches, inputs, known)[task]
        return run_mixed(wanted, branches, inputs, known)

    def _moment(self, tasks: Sequence[str] | None) -> tuple[Base, dict[str, Branch]]:
        """The base and the tasks of one moment, which hold all of `tasks`; other threads add and remove tasks."""
        if self._shelf is not None:
            with self._changes:
                held = {name: self[name] for name in tasks or ()}
                held |= {name: self[name] for branch in list(held.values()) for name in branch.config.laterals}
                return self.base, held
        while True:
            base, branches = self.base, self._in_memory()
            for name in tasks or ():
                if name not in branches:
                    # Raises, with near names, unless it was added just now.
                    self[name]
            if base is self.base and branches.keys() >= set(tasks or ()):
                return base, branches

    def forward_all(
        self, x: Input, *, tasks: Sequence[str] | None = None, features: Features | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Every task's output (or that of `tasks`) for `x` from one base pass, or from none with `features` given."""
        if self._shelf is not None:
            return run_in_parts(self._moment, self.tasks if tasks is None else tasks, x, features, self._shelf.most)
        base, branches = self._moment(tasks)
        inputs = base.prepare(x)
        known = base.features(inputs, features)
        return run(list(branches) if tasks is None else list(tasks), branches, inputs, known)

    @torch.no_grad()
    def lateral_outputs(self, branch: Branch, inputs: Input, features: Features) -> list[Tensor]:
        """The detached outputs, of prepared `inputs` and `features`, of the sides that `branch` takes as laterals."""
        outputs = [self[name].side_output(inputs, features) for name in branch.config.laterals]
        return [out for out in outputs if out is not None]

    def predict(
        self, sources: Any, tasks: Sequence[str] | None = None, *, top: int | None = None, mirror: bool = False
    ) -> dict[str, Any]:
        """Every task's answer to files, images or texts, prepared as they were for the task's training.

        Args:
            sources: what `base.transform` takes: a path, the bytes of a file, a Pillow image, uint8 pixels; or a text,
                or a tuple of two, or of the words of one for a task of words; or a list of such.
            tasks: the tasks to ask; by default all. Those with equal preprocessing share one base pass.
            top: this many of the most probable classes or labels; by default all.
            mirror: average over each image and its mirror image.

        Returns:
            Task -> `list[Answer]`, of words `list[Word]`, of maps a tensor (see `predicting.answers`); of a list each.

        Raises:
            DataError: a source that cannot be read; the message names it.
            TaskError: a base that reads neither images nor texts.
        """
        base, branches = self._moment(self.tasks if tasks is None and self._shelf is not None else tasks)
        wanted = list(branches) if tasks is None else list(tasks)
        return predict(base, branches, sources, wanted, top=top, mirror=mirror)

    generate = generate

    def route(self, x: Input, *, features: Features | Tensor | None = None, views: int = 1) -> Routes:
        """Tell which task each sample of a batch is of, or none; one base pass, and no task is run.

        Args:
            x: a batch as the base takes it; tasks take part after `st.learn_routes`.
            features, views: what the base returned for `x`, to spare the base pass; and as of `st.learn_routes`.
        """
        with self._changes:
            router, kept = self._router, kept_routes(self._in_memory(), self._shelf)
            if router is None or router.kept != stamps(kept):
                router = self._router = Router(self.base, kept)
        return router.routes(self.base, x, features, views)

    def save(self, path: str | Path) -> None:
        """Write every task that is not there already to its folder in `path`/tasks; `load(path)` reads them again.

        A task that was removed from the model is deleted there, if it is what the model held; others stay.
        """
        root, identity = Path(path) / "tasks", self.base.identity()
        for name, hashes in self._removed.items():
            if name not in self and has_tensors(root / name, hashes):
                shutil.rmtree(root / name)
        for name in self.tasks:
            if not is_saved(root / name, name, self[name], identity, self._laterals(name)):
                self._save(name, root / name, {}, identity)

    def save_task(self, name: str, path: str | Path, *, metrics: Mapping[str, float] | None = None) -> None:
        """Write task `name`, with `metrics`, to `path`/side.json and `path`/side.safetensors; see `write_task`."""
        self._save(name, path, metrics or {}, self.base.identity())

    def _save(self, name: str, path: str | Path, metrics: Mapping[str, float], identity: Identity) -> None:
        write_task(path, name, self[name], self.base, identity, self._laterals(name), metrics)

    def _laterals(self, name: str) -> dict[str, str]:
        return {lateral: tensors_sha256(self[lateral].side) for lateral in self[name].config.laterals}

    def load_task(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        any_base: bool = False,
        side: nn.Module | None = None,
        merge: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> str:
        """Add the task saved at `path`; nothing is added unless all of it is right.

        Args:
            path: the folder.
            name: another name for the task.
            any_base: load it even where the base or a lateral differs; its outputs are not what they were then.
            side, merge, head: instances of the parts that were the user's own modules.

        Returns:
            The name of the task.

        Raises:
            ArtifactError: missing, truncated, tampered with, of another base or an unknown format.
            TaskError: the task exists already, or a part of your own must be passed, or is given and not needed.
        """
        own = {"side": side, "merge": merge, "head": head}
        return self._add_saved(path, read_task(path), self.base.identity(), name=name, own=own, any_base=any_base)

    def _add_saved(
        self,
        path: str | Path,
        task: SavedTask,
        identity: Identity,
        *,
        name: str | None = None,
        own: Mapping[str, nn.Module | None] = MappingProxyType({}),
        any_base: bool = False,
    ) -> str:
        """As `load_task`, of what was read at `path` already; `identity` is the base's, `own` its three instances."""
        config = task[0]
        name = name or str(config["task"])
        self._check_name(name)
        recorded = config.get("laterals_sha256", {})
        for lateral in config["parts"].get("laterals", []):
            if lateral not in self:
                raise TaskError(f"task '{name}' reads the side of '{lateral}'; load that task first")
            if recorded.get(lateral) != tensors_sha256(self[lateral].side) and not any_base:
                raise ArtifactError(
                    f"{path} was trained beside another task '{lateral}' than this model's; load that one, or pass "
                    "any_base=True"
                )
        self.add_branch(name, read_branch(path, task, self.base, identity, own, any_base=any_base))
        return name

    def summary(self) -> Summary:
        """Parameters and memory of the base and of every task; `print` it."""
        return Summary(self.base.parameter_count(), [summarise(name, self[name]) for name in self.tasks])
