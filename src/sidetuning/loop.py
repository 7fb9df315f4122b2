"""The loop: minimise any objective, step by step.

Everything random is a function of (seed, epoch), and the state of a run is on disk, so a run that is killed and resumed
ends with bitwise the same weights as one that was not.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sidetuning.errors import TaskError, TrainingError
from sidetuning.files import atomic_write
from sidetuning.launch import default_accelerator
from sidetuning.processes import Shares, add_gradients, weighted, whole_batch_norms
from sidetuning.seeding import mix, seed_all, seed_loader, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        steps: optimiser steps.
        seconds: time of training, that of interrupted calls included.
        losses: loss of every step.
        validation: numbers of every validation, with its step.
        passes: passes over the loader, with those before this run.
    """

    steps: int
    seconds: float
    losses: list[float] = field(repr=False)
    validation: list[dict[str, float]] = field(default_factory=list)
    passes: int = 0


def train(
    objective: nn.Module,
    loader: Iterable[Any],
    optimizer: Optimizer,
    *,
    steps: int,
    accelerator: Accelerator | None = None,
    scheduler: LRScheduler | None = None,
    clip: float | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    save_every: float = 60.0,
    validate: Callable[[], Mapping[str, float]] | None = None,
    progress: str | None = None,
    label: str = "",
    first_epoch: int = 0,
) -> TrainResult:
    """Minimise `objective(batch)` over the batches of `loader` for `steps` optimiser steps.

    Args:
        objective: a module whose `forward(batch)` returns the mean loss of a batch, or that and its weight in a mean
            over several, by default its number of rows.
        loader: gives batches; read from its start again whenever it ends. Processes share the rows of each batch.
        optimizer: already built over the parameters to train.
        steps: optimiser steps in all, those of an interrupted run included.
        scheduler: stepped once per optimiser step.
        clip: largest gradient norm; None does not clip.
        seed: seed for the order of the batches and for what the objective draws.
        resume: file of the run's state; written every `save_every` seconds and at the end, read at the start.
        validate: called at the end of every pass over the loader and after the last step; its numbers are kept.
        accelerator: how to place and spread the work; by default one that splits each batch over the processes.
        progress: text of the progress bar; None shows none.
        label: what is trained; a resume file of something else is refused.
        first_epoch: passes that were made before; each pass has an order of its own.

    Raises:
        TaskError: an accelerator that accumulates gradients.
        TrainingError: the loss or its gradient is not finite (the weights are left as they were before that step),
            `resume` holds the state of another run, or the loader gives fewer batches than before the interruption.
    """
    if accelerator is None:
        accelerator = default_accelerator()
    if accelerator.gradient_accumulation_steps > 1:
        raise TaskError(
            "gradients are not accumulated: give a loader with larger batches, and an accelerator without accumulation"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and validate is None:
        raise TaskError("ReduceLROnPlateau follows the loss of a validation: give validate=")
    position = Position(
        seed=seed, steps=steps, label=label, optimizer=_description(optimizer, scheduler), epoch=first_epoch
    )
    # Gradients are added up below, whatever the objective uses of its parameters.
    wrapped, optimizer = accelerator.prepare_model(objective, evaluation_mode=True), accelerator.prepare(optimizer)
    state = State(None if resume is None else Path(resume), position, objective, optimizer, scheduler)
    run = _Run(wrapped, state, clip, accelerator, validate, _bar(progress, steps, position.step, accelerator))
    try:
        with seeded(seed):
            run.learn(loader, save_every)
    finally:
        run.bar.close()
        objective.eval()
    passes = position.epoch + (position.batch > 0)
    return TrainResult(position.step, position.seconds, position.losses, position.validation, passes)


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        wrapped: nn.Module,
        state: State,
        clip: float | None,
        accelerator: Accelerator,
        validate: Callable[[], Mapping[str, float]] | None,
        bar: Any,
    ) -> None:
        self.wrapped, self.state, self.at, self.clip = wrapped, state, state.position, clip
        self.accelerator, self.validate, self.bar = accelerator, validate, bar
        # Other parameters may hold gradients of earlier tasks.
        optimised = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
        self.trained = [p for p in wrapped.parameters() if id(p) in optimised]
        # Whether the rows of this process count in the batch.
        self.counting = [True]
        self.saved = time.monotonic()
        self.started = self.saved - self.at.seconds

    def learn(self, loader: Iterable[Any], save_every: float) -> None:
        """Pass over the loader until all steps are done."""
        at, objective = self.at, self.state.objective
        objective.train()
        shares = Shares(loader, self.accelerator)
        while at.step < at.steps:
            seed_all(mix(at.seed, at.epoch))
            seed_loader(loader, mix(at.seed, at.epoch))
            iterator = self.resumed(shares.read())
            before = at.batch
            for batch, self.counting[0] in iterator:
                self.step(batch)
                if at.step == at.steps:
                    break
                if time.monotonic() - self.saved > save_every:
                    self.save()
            else:
                if at.batch == before == 0:
                    raise TrainingError("the loader gave no batch: its data set is empty, or its iterator was used up")
                at.epoch, at.batch = at.epoch + 1, 0
                self.check()
        self.check()
        self.save()

    def resumed(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """The rest of a pass, whose first batches an interrupted call has trained on."""
        for _ in range(self.at.batch):
            if next(iterator, None) is None:
                raise TrainingError(
                    f"{self.state.path} stopped at batch {self.at.batch} of a pass, and the loader ends before it; "
                    "resume with the same data, or delete the file to start over"
                )
        self.state.set_generators()
        return iterator

    def step(self, batch: Any) -> None:
        """One step of the optimiser."""
        from accelerate.utils import send_to_device

        accelerator, optimizer, scheduler = self.accelerator, self.state.optimizer, self.state.scheduler
        # Running statistics, which the forward pass already moves.
        buffers = [(b, b.clone()) for b in self.wrapped.buffers()]
        with accelerator.autocast(), whole_batch_norms(self.wrapped, accelerator, self.counting):
            out = self.wrapped(send_to_device(batch, accelerator.device))
        loss, weight = out if isinstance(out, tuple) else (out, torch.ones((), device=accelerator.device))
        loss, value = weighted(loss, weight * self.counting[0], accelerator)
        self.finite("loss", value, buffers)
        optimizer.zero_grad()
        accelerator.backward(loss)
        add_gradients(self.trained, accelerator)
        norm = accelerator.clip_grad_norm_(self.trained, math.inf if self.clip is None else self.clip)
        # A scaler skips such steps by itself.
        if accelerator.scaler is None and norm is not None:
            self.finite("norm of the gradient", float(norm), buffers)
        optimizer.step()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        self.at.losses.append(value)
        self.at.step, self.at.batch = self.at.step + 1, self.at.batch + 1
        self.bar.update(1)
        self.bar.set_postfix(loss=f"{value:.3f}", refresh=False)

    @torch.no_grad()
    def finite(self, what: str, value: float, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Stop at a number that is none, with everything as it was before the step."""
        if math.isfinite(value):
            return
        for buffer, before in buffers:
            buffer.copy_(before)
        raise TrainingError(
            f"the {what} is {value} at step {self.at.step}; the weights are those before this step. Lower the learning "
            "rate, clip the gradient, or look for NaN in the inputs and labels."
        )

    def save(self) -> None:
        """Write the state, where there is a file for it."""
        self.saved = time.monotonic()
        self.at.seconds = self.saved - self.started
        if self.accelerator.is_main_process:
            self.state.save()

    def check(self) -> None:
        """Validate, once at each step."""
        at = self.at
        if self.validate is None or (at.validation and at.validation[-1]["step"] == at.step):
            return
        if at.step == at.steps:
            # The validation may fail, and what was learned must not be lost with it.
            self.save()
        self.state.objective.eval()
        row = {"step": float(at.step), **self.validate()}
        self.state.objective.train()
        at.validation.append(row)
        if isinstance(self.state.scheduler, ReduceLROnPlateau):
            self.state.scheduler.step(row["loss"])
        if not self.bar.disable:
            self.bar.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))


def _description(optimizer: Optimizer, scheduler: LRScheduler | None) -> str:
    """How the weights move; a resume file of another way is refused."""
    rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in optimizer.param_groups)
    how = f"{type(optimizer).__name__} at {rates}" + (f" with {type(scheduler).__name__}" if scheduler else "")
    decay = max(group.get("weight_decay", 0) for group in optimizer.param_groups)
    return how + (f", weight decay {decay:g}" if decay else "")


def _bar(label: str | None, steps: int, done: int, accelerator: Accelerator) -> Any:
    from tqdm import tqdm

    off = label is None or not accelerator.is_main_process
    return tqdm(total=steps, initial=done, desc=label, unit="step", disable=off, leave=False, dynamic_ncols=True)


@dataclass
class Position:
    """Where a run is: everything but the weights, the optimiser and the generators. Times are in seconds."""

    seed: int
    steps: int
    label: str = ""
    optimizer: str = ""
    seconds: float = 0.0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


class State:
    """Everything that the rest of a run depends on; read from `path` where an interrupted call left it.

    Raises:
        TrainingError: the file cannot be read, or holds the state of another run.
    """

    def __init__(
        self,
        path: Path | None,
        position: Position,
        objective: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> None:
        self.path, self.position, self.objective = path, position, objective
        self.optimizer, self.scheduler = optimizer, scheduler
        # The states of the generators where the run was interrupted, until they are set.
        self._generators: dict[str, Any] | None = None
        if path is not None and path.exists():
            self._restore(path)

    def save(self) -> None:
        """Write it to `path`, if there is one."""
        if self.path is None:
            return
        content = {
            "position": vars(self.position),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": _generators(),
        }
        with atomic_write(self.path) as temporary:
            torch.save(content, temporary)

    def _restore(self, path: Path) -> None:
        mend = "give another resume file, or delete this one to start over"
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            found, own = content["position"], self.position
        except Exception as error:
            raise TrainingError(f"{path} cannot be read as a resume file ({error}); delete it to start over") from error
        if (found["seed"], found["steps"]) != (own.seed, own.steps):
            raise TrainingError(
                f"{path} belongs to a run of {found['steps']} steps with seed {found['seed']}, this one has "
                f"{own.steps} steps and seed {own.seed}; {mend}"
            )
        for name in ("label", "optimizer"):
            if (before := found.get(name, "")) != (now := getattr(own, name)):
                raise TrainingError(f"{path} holds the state of {before or 'something else'}, not of {now}; {mend}")
        # Version 0.1.0 called what `fit` trains its branch.
        weights = {re.sub("^branch[.]", "part.", key): value for key, value in content["objective"].items()}
        try:
            self.objective.load_state_dict(weights)
        except RuntimeError as error:
            raise TrainingError(f"{path} holds the weights of another network ({error}); {mend}") from error
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        vars(own).update(found)
        self._generators = content["rng"]

    def set_generators(self) -> None:
        """Draw on where the interrupted call stopped; nothing where there was none."""
        states, self._generators = self._generators, None
        if states is None:
            return
        numpy = states["numpy"]
        key = numpy["state"]["key"].numpy().astype(np.uint32)
        random.setstate(states["python"])
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
        torch.set_rng_state(states["torch"])
        if states["cuda"]:
            torch.cuda.set_rng_state_all(states["cuda"])


def _generators() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators, of types that `torch.load(weights_only=True)` reads."""
    state = np.random.get_state(legacy=False)
    state["state"]["key"] = torch.from_numpy(state["state"]["key"].astype(np.int64))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": state, "torch": torch.get_rng_state(), "cuda": cuda}
