"""The loop: minimise any objective, step by step.

Everything random is a function of (seed, epoch), and the state of a run is on disk, so a run that is killed and resumed
ends with bitwise the same weights as one that was not.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sidetuning.callbacks import Best, Callback
from sidetuning.errors import TaskError, TrainingError
from sidetuning.launch import default_accelerator
from sidetuning.objective import Objective
from sidetuning.processes import Shares, add_gradients, largest, weighted, whole_batch_norms
from sidetuning.resume import Position, State, description
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
    callbacks: Sequence[Callback] = (),
    accumulate: int = 1,
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
        callbacks: called after steps and validations; see `Callback`.
        accumulate: batches of one step, whose gradients are averaged by what counts in each; the last step of a pass
            may have fewer. Batch norms see one batch at a time.

    Raises:
        TaskError: an accelerator that accumulates gradients.
        TrainingError: the loss or its gradient is not finite (the weights are left as they were before that step),
            `resume` holds the state of another run, or the loader gives fewer batches than before the interruption.
    """
    if accelerator is None:
        accelerator = default_accelerator()
    if accelerator.gradient_accumulation_steps > 1:
        raise TaskError(
            "this accelerator accumulates gradients by itself: give one without, and accumulate= for batches of a step"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and validate is None:
        raise TaskError("ReduceLROnPlateau follows the loss of a validation: give validate=")
    path = None if resume is None else Path(resume)
    loss = getattr(objective, "loss", None)
    precision = f"{getattr(objective, 'precision', 'no')} {accelerator.mixed_precision}"
    how: Any = {} if path is None else description(optimizer, scheduler, clip, loss, loader, precision)
    kept = [f"the weights of the best {callback.monitor}" for callback in callbacks if isinstance(callback, Best)]
    how["kept"] = ", ".join(kept) or "the last weights"
    how["network"] = objective.network() if path and isinstance(objective, Objective) else ""
    if clip is not None and not clip > 0:
        raise TaskError(f"clip must be more than 0, not {clip}; None does not clip")
    if accumulate < 1:
        raise TaskError(f"accumulate must be 1 or more batches, not {accumulate}")
    if path and accumulate > 1:
        how["batches"] += f" x {accumulate}"
    position = Position(seed=seed, steps=steps, label=label, epoch=first_epoch, **how)
    # Gradients are added up below, whatever the objective uses of its parameters.
    wrapped, optimizer = accelerator.prepare_model(objective, evaluation_mode=True), accelerator.prepare(optimizer)
    state = State(path, position, objective, optimizer, scheduler)
    bar = _bar(progress, steps, position.step, accelerator)
    run = _Run(wrapped, state, clip, accelerator, validate, bar, callbacks)
    try:
        for callback in callbacks:
            callback.on_start(position.validation)
        with seeded(seed), Stop(path is not None) as stop:
            run.learn(loader, save_every, stop, accumulate)
    finally:
        run.bar.close()
        objective.eval()
        passes = position.epoch + (position.batch > 0)
        if position.step and isinstance(objective, Objective):
            objective.learned(passes)
        for callback in callbacks:
            callback.on_end()
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
        callbacks: Sequence[Callback],
    ) -> None:
        self.callbacks = callbacks
        self.wrapped, self.state, self.at, self.clip = wrapped, state, state.position, clip
        self.accelerator, self.validate, self.bar = accelerator, validate, bar
        # Other parameters may hold gradients of earlier tasks.
        optimised = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
        self.trained = [p for p in wrapped.parameters() if id(p) in optimised]
        # Whether the rows of this process count in the batch.
        self.counting = [True]
        self.saved = time.monotonic()
        self.started = self.saved - self.at.seconds

    def learn(self, loader: Iterable[Any], save_every: float, stop: Stop, accumulate: int) -> None:
        """Pass over the loader until all steps are done."""
        at, objective = self.at, self.state.objective
        objective.train()
        shares = Shares(loader, self.accelerator)
        while at.step < at.steps and not at.stopped:
            seed_all(mix(at.seed, at.epoch))
            seed_loader(loader, mix(at.seed, at.epoch))
            iterator = self.resumed(shares.read())
            before = at.batch
            while batches := list(islice(iterator, accumulate)):
                self.step(batches)
                self.obey([callback.on_step(at.step, at.losses[-1]) for callback in self.callbacks])
                if at.step == at.steps or at.stopped:
                    break
                # A process that stopped alone would leave the others waiting for it.
                wanted = largest(stop.wanted, self.accelerator) if stop.active else 0
                if wanted or time.monotonic() - self.saved > save_every:
                    self.save()
                    stop.obey(wanted)
            else:
                if at.batch == before == 0:
                    raise TrainingError("the loader gave no batch: its data set is empty, or its iterator was used up")
                at.epoch, at.batch = at.epoch + 1, 0
                self.check()
        self.check()
        self.save()
        stop.obey(stop.wanted)

    def obey(self, wishes: Sequence[bool | None]) -> None:
        """Stop after this step where a callback of any process wants it."""
        if wishes and largest(int(any(wishes)), self.accelerator):
            self.at.stopped = True

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

    def step(self, batches: Sequence[tuple[Any, bool]]) -> None:
        """One step of the optimiser, of batches and of whether this process's rows count in each."""
        accelerator, optimizer, scheduler = self.accelerator, self.state.optimizer, self.state.scheduler
        # Running statistics, which the forward pass already moves.
        buffers = [(b, b.clone()) for b in self.wrapped.buffers()]
        optimizer.zero_grad()
        value = self.backward(batches, buffers)
        add_gradients(self.trained, accelerator)
        norm = accelerator.clip_grad_norm_(self.trained, math.inf if self.clip is None else self.clip)
        # A scaler skips such steps by itself.
        if accelerator.scaler is None and norm is not None:
            self.finite("norm of the gradient", float(norm), buffers)
        optimizer.step()
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        self.at.losses.append(value)
        self.at.step, self.at.batch = self.at.step + 1, self.at.batch + len(batches)
        self.bar.update(1)
        self.bar.set_postfix(loss=f"{value:.3f}", refresh=False)

    def backward(self, batches: Sequence[tuple[Any, bool]], buffers: list[tuple[Tensor, Tensor]]) -> float:
        """Add the gradients of this process's part of the mean loss of all batches, and return that mean."""
        from accelerate.utils import send_to_device

        accelerator, sums = self.accelerator, [0.0, 0.0]
        for batch, self.counting[0] in batches:
            with accelerator.autocast(), whole_batch_norms(self.wrapped, accelerator, self.counting):
                out = self.wrapped(send_to_device(batch, accelerator.device))
            loss, weight = out if isinstance(out, tuple) else (out, torch.ones((), device=accelerator.device))
            loss, value = weighted(loss, weight * self.counting[0], accelerator)
            self.finite("loss", value, buffers)
            if len(batches) == 1:
                accelerator.backward(loss)
                return value
            share = float(accelerator.reduce(torch.as_tensor(weight * self.counting[0]).double(), "sum"))
            accelerator.backward(loss * share)
            sums = [sums[0] + value * share, sums[1] + share]
        for parameter in self.trained:
            if parameter.grad is not None:
                parameter.grad /= max(sums[1], 1e-30)
        return sums[0] / max(sums[1], 1e-30)

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
        self.obey([callback.on_evaluate(row) for callback in self.callbacks])
        if isinstance(self.state.scheduler, ReduceLROnPlateau):
            self.state.scheduler.step(row["loss"])
        if not self.bar.disable:
            self.bar.write("  ".join(f"{key} {value:.4g}" for key, value in row.items()))


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved its state.

    Attributes:
        code: exit code of a program that this ends.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class Stop:
    """Takes Ctrl-C and SIGTERM, so that training can stop between two steps; a second one acts at once.

    Only where there is a file to save to, and in the main thread, which alone may.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, resumable: bool) -> None:
        self.active = resumable and threading.current_thread() is threading.main_thread()
        # The signal that came, or 0.
        self.wanted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if self.active:
            self._before = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if self.wanted:
            raise Stopped(number)
        self.wanted = number

    def obey(self, wanted: int) -> None:
        """Stop for the signal `wanted`, if it is one."""
        if wanted:
            raise Stopped(wanted)


def _bar(label: str | None, steps: int, done: int, accelerator: Accelerator) -> Any:
    from tqdm import tqdm

    off = label is None or not accelerator.is_main_process
    return tqdm(total=steps, initial=done, desc=label, unit="step", disable=off, leave=False, dynamic_ncols=True)
