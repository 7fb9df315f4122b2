"""Training: `train` optimises any objective, `fit` trains exactly one task of a `SideTuner`, `evaluate` scores it.

Device placement, data-parallel training and mixed precision are accelerate's: the same script runs alone or under
`accelerate launch`. Everything random is a function of (seed, epoch), so a run that is killed and resumed ends with
bitwise the same weights as one that was not.
"""

from __future__ import annotations

import atexit
import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.errors import DataError, TaskError, TrainingError
from sidetuning.objective import Loss, Objective, TaskModel, accuracy, check_labels, parameter_groups, unpack
from sidetuning.resume import Position, restore_state, save_state, set_generators
from sidetuning.seeding import mix, seed_all, seed_loader, seeded
from sidetuning.tuner import SideTuner

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class TrainResult:
    """What a training run did: optimiser steps, seconds, interrupted ones included, the loss of every step, validation rows."""

    steps: int
    seconds: float
    losses: list[float] = field(repr=False)
    validation: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    loss: Loss = F.cross_entropy,
    clip: float | None = 1.0,
    validate: Iterable[Any] | None = None,
    metrics: Mapping[str, Loss] | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    save_every: float = 60.0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train exactly `model[task].parameters()`; the base and the other tasks cannot change.

    Args:
        model: the model.
        task: the task to train.
        loader: of `(x, y)`, of `(x, features, y)` (no base pass then), or of mappings with the key "labels".
        epochs: passes over the loader; 1 where neither this nor `steps` is given.
        steps: optimiser steps instead.
        lr: learning rate.
        weight_decay: of sides and heads; merges get none.
        optimizer: called as `optimizer(groups, lr=lr)`.
        scheduler: called with the optimiser; stepped after every optimiser step.
        loss: `loss(output, target)`.
        clip: largest gradient norm; None does not clip.
        validate: a loader to evaluate after every pass.
        metrics: for the validation, as in `evaluate`.
        seed: orders the batches; the same seed gives bitwise the same weights on the same machine.
        resume: file of the run's state: an interrupted call goes on from it, a finished one returns at once.
        save_every: seconds between two writes of it.
        accelerator: accelerate's; by default one that splits each batch over the launched processes.
        progress: show a bar.

    Raises:
        TaskError: the task is frozen, has nothing to train, or is a lateral of another.
        TrainingError: the loss or its gradient is not finite, or `resume` belongs to another run.
        DataError: a label that the head has no output for.
    """
    branch = model[task]
    if not any(p.requires_grad for p in branch.parameters()):
        raise TaskError(
            f"task '{task}' has nothing to train: it is frozen, or without parameters; freeze_task('{task}', False)"
        )
    if users := model.users(task):
        raise TaskError(
            f"task '{task}' is a lateral of {', '.join(users)}, which would change with it; train another task"
        )
    if steps is not None and epochs is not None:
        raise TaskError("give epochs or steps, not both")
    for name, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and count < 1:
            raise TaskError(f"{name} must be 1 or more, not {count}")
    if steps is None:
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError as error:  # a DataLoader has a length by type, but none over a stream
            raise TaskError("a loader without a length needs steps=") from error
        steps = (epochs or 1) * batches
    if accelerator is None:
        accelerator = default_accelerator()
    model.to(accelerator.device)
    built = optimizer(parameter_groups(branch.parameters(), weight_decay, branch.merge.parameters()), lr=lr)
    check: Callable[[], Mapping[str, float]] | None = None
    if validate is not None:
        held_out = validate

        def check() -> Mapping[str, float]:
            return evaluate(model, task, held_out, loss=loss, metrics=metrics, accelerator=accelerator)

    return train(
        Objective(branch, model, task, loss), loader, built, steps=steps,
        scheduler=None if scheduler is None else scheduler(built), clip=clip, seed=seed, resume=resume,
        save_every=save_every, validate=check, accelerator=accelerator, progress=task if progress else None,
        label=f"task {task}",
    )  # fmt: skip


@torch.no_grad()
def evaluate(
    model: TaskModel,
    task: str,
    loader: Iterable[Any],
    *,
    loss: Loss = F.cross_entropy,
    metrics: Mapping[str, Loss] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Average the loss and metrics of a task over a loader.

    Args:
        model: a `SideTuner`, or a method.
        task: the task.
        loader: as in `fit`; a `DataLoader` is sharded over the launched processes.
        loss: `loss(output, target)`, averaged over samples.
        metrics: name -> function of (output, target) that returns one number per sample; by default accuracy, where targets are classes.
        accelerator: as in `fit`.

    Returns:
        {"loss": …, every metric, "samples": how many}.
    """
    from accelerate.utils import send_to_device

    if accelerator is None:
        accelerator = default_accelerator()
    model.to(accelerator.device)
    branch = model[task]
    modes = [(module, module.training) for module in branch.modules()]
    branch.eval()
    sums: dict[str, float] = defaultdict(float)
    samples = 0
    batches = accelerator.prepare(loader) if isinstance(loader, torch.utils.data.DataLoader) else loader
    try:
        for batch in batches:
            x, features, y = unpack(send_to_device(batch, accelerator.device))
            output = model(x, task, features=features)
            check_labels(output, y)
            if metrics is None:
                classes = isinstance(output, Tensor) and y.dtype == torch.int64 and output.ndim == y.ndim + 1
                metrics = {"accuracy": accuracy} if classes else {}
            each = {
                "loss": loss(output, y).expand(len(y)),
                **{name: metric(output, y) for name, metric in metrics.items()},
            }
            for name, values in each.items():
                gathered = accelerator.gather_for_metrics(values.contiguous())
                sums[name] += float(gathered.sum())
            samples += len(gathered)
    finally:
        for module, training in modes:
            module.training = training
    if samples == 0:
        raise DataError("the loader gave no batch: its data set is empty, or its iterator was used up")
    return {**{name: total / samples for name, total in sums.items()}, "samples": float(samples)}


def train(
    objective: nn.Module,
    loader: Iterable[Any],
    optimizer: Optimizer,
    *,
    steps: int,
    scheduler: LRScheduler | None = None,
    clip: float | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    save_every: float = 60.0,
    validate: Callable[[], Mapping[str, float]] | None = None,
    accelerator: Accelerator | None = None,
    progress: str | None = None,
    label: str = "",
) -> TrainResult:
    """Minimise `objective(batch)` over the batches of `loader` for `steps` optimiser steps.

    Args:
        objective: a module whose `forward(batch)` returns a scalar loss; what it returns is averaged over processes.
        loader: gives batches; read from its start again whenever it ends. A `DataLoader` is sharded over processes.
        optimizer: already built over the parameters to train.
        steps: optimiser steps in all, those of an interrupted run included.
        scheduler: stepped once per optimiser step.
        clip: largest gradient norm; None does not clip.
        seed: orders the batches and draws whatever the objective draws.
        resume: file that holds the state of the run; written every `save_every` seconds and at the end, read at the start.
        validate: called at the end of every pass over the loader and after the last step; its numbers are kept.
        accelerator: how to place and spread the work; by default one that splits each batch over the processes.
        progress: text of the progress bar; None shows none.
        label: what is trained; a resume file of something else is refused.

    Raises:
        TaskError: an accelerator that accumulates gradients.
        TrainingError: the loss or its gradient is not finite (the weights are left as they were before that step), `resume` holds
            the state of another run, or the loader gives fewer batches than before the interruption.
    """
    from accelerate.utils import send_to_device

    if accelerator is None:
        accelerator = default_accelerator()
    path = None if resume is None else Path(resume)
    if accelerator.gradient_accumulation_steps > 1:
        raise TaskError(
            "gradients are not accumulated: give a loader with larger batches, and an accelerator without accumulation"
        )
    rates = ", ".join(f"{group.get('initial_lr', group['lr']):g}" for group in optimizer.param_groups)
    how = f"{type(optimizer).__name__} at {rates}" + (f" with {type(scheduler).__name__}" if scheduler else "")
    if decay := max(group.get("weight_decay", 0) for group in optimizer.param_groups):
        how += f", weight decay {decay:g}"
    state = Position(seed=seed, steps=steps, label=label, optimizer=how)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in wrapped.parameters() if id(p) in optimised]  # others may hold gradients of earlier tasks
    # One process reads the loader as it is: accelerate's fetches a batch ahead, so what data and objective draw would come in another
    # order after an interruption.
    many = accelerator.num_processes > 1 and isinstance(loader, torch.utils.data.DataLoader)
    batches = accelerator.prepare(loader) if many else loader
    rng: dict[str, Any] | None = None
    if path is not None and path.exists():
        rng = restore_state(path, state, objective, optimizer, scheduler)

    def save() -> None:
        state.seconds = time.monotonic() - started
        if path is not None:
            save_state(path, state, objective, optimizer, scheduler, accelerator)

    def check() -> None:
        if validate is not None and (not state.validation or state.validation[-1]["step"] != state.step):
            if state.step == steps:
                save()  # it may fail
            objective.eval()
            row = {"step": float(state.step), **validate()}
            objective.train()
            state.validation.append(row)
            bar.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))

    saved = time.monotonic()
    started = saved - state.seconds
    bar = _bar(progress, steps, state.step, accelerator)
    try:
        objective.train()
        with seeded(seed):
            while state.step < steps:
                seed_all(mix(seed, state.epoch))
                seed_loader(loader, mix(seed, state.epoch))
                iterator, any_batch = iter(batches), False
                for _ in range(state.batch):  # of this pass, already trained on
                    if next(iterator, None) is None:
                        raise TrainingError(
                            f"{path} stopped at batch {state.batch} of a pass, and the loader ends before it; resume with "
                            "the same data, or delete the file to start over"
                        )
                    any_batch = True
                if rng is not None:
                    set_generators(rng)
                    rng = None
                for batch in iterator:
                    any_batch = True
                    batch = send_to_device(batch, accelerator.device)
                    loss = _step(wrapped, batch, optimizer, scheduler, trained, clip, accelerator, state.step)
                    state.losses.append(loss)
                    state.step, state.batch = state.step + 1, state.batch + 1
                    bar.update(1)
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    if state.step == steps:
                        break
                    if path is not None and time.monotonic() - saved > save_every:
                        save()
                        saved = time.monotonic()
                else:
                    state.epoch, state.batch = state.epoch + 1, 0
                if not any_batch:
                    raise TrainingError("the loader gave no batch: its data set is empty, or its iterator was used up")
                if state.step < steps and state.batch == 0:
                    check()
            check()
            save()
    finally:
        bar.close()
        objective.eval()
    return TrainResult(state.step, state.seconds, state.losses, state.validation)


def _step(
    wrapped: nn.Module,
    batch: Any,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    trained: list[nn.Parameter],
    clip: float | None,
    accelerator: Accelerator,
    step: int,
) -> float:
    buffers = [(b, b.clone()) for b in wrapped.buffers()]  # running statistics, which the forward pass already moves
    with accelerator.autocast():
        loss = wrapped(batch)

    def finite(what: str, value: float) -> None:
        if not math.isfinite(value):
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            raise TrainingError(
                f"the {what} is {value} at step {step}; the weights are those before this step. "
                "Lower the learning rate, clip the gradient, or look for NaN in the inputs and labels."
            )

    value = float(accelerator.reduce(loss.detach(), "mean"))
    finite("loss", value)
    optimizer.zero_grad()
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(trained, math.inf if clip is None else clip)
    if accelerator.scaler is None and norm is not None:  # a scaler skips such steps by itself
        finite("norm of the gradient", float(norm))
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return value


def default_accelerator() -> Accelerator:
    """An accelerator that splits each batch over the processes: the step is the same however many there are."""
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if accelerator.num_processes > 1:
        _leave_at_exit()
    return accelerator


@functools.cache
def _leave_at_exit() -> None:
    """Let Gloo's threads come to rest before the interpreter ends.

    The thread that ran the last collective still has to let go of its tensors, which needs the interpreter's lock; a thread that
    asks for the lock of an ending interpreter is killed, and its destructors abort the finished process. Nothing tells when it is
    done, so it gets a tenth of a second in which the lock is free.
    """
    from accelerate import PartialState

    def leave() -> None:
        PartialState().destroy_process_group()
        time.sleep(0.1)

    atexit.register(leave)


def _bar(label: str | None, steps: int, done: int, accelerator: Accelerator) -> Any:
    from tqdm import tqdm

    off = label is None or not accelerator.is_main_process
    return tqdm(total=steps, initial=done, desc=label, unit="step", disable=off, leave=False, dynamic_ncols=True)
