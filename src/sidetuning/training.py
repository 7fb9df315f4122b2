"""Training a task and scoring it. Device placement, data-parallel training and mixed precision are accelerate's."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.errors import DataError, TaskError
from sidetuning.launch import default_accelerator
from sidetuning.loop import TrainResult, train
from sidetuning.objective import Loss, Objective, TaskModel, accuracy, check_labels, parameter_groups, unpack
from sidetuning.tuner import SideTuner

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


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
        loader: gives `(x, y)`, `(x, features, y)` (no base pass then), or mappings with the key "labels".
        epochs: passes over the loader; 1 where neither this nor `steps` is given.
        steps: optimiser steps instead.
        lr: learning rate.
        weight_decay: weight decay of sides and heads; merges, norms, biases and scalars get none.
        optimizer: called as `optimizer(groups, lr=lr)`.
        scheduler: called with the optimiser; stepped after every optimiser step.
        loss: `loss(output, target)`.
        clip: largest norm of the gradient; None does not clip.
        validate: a loader to evaluate after every pass.
        metrics: metrics of the validation, as in `evaluate`.
        seed: seed for the order of the batches; the same seed gives bitwise the same weights on the same machine.
        resume: file of the run's state: an interrupted call resumes from it, a finished one returns at once.
        save_every: seconds between two writes of it.
        accelerator: accelerate's; by default one that splits each batch over the launched processes.
        progress: show a bar.

    Raises:
        TaskError: the task is frozen, has nothing to train, or is a lateral of another.
        TrainingError: the loss or its gradient is not finite, or `resume` belongs to another run.
        DataError: a label that the head has no output for.
    """
    branch = model[task]
    if branch.frozen:
        raise TaskError(
            f"task '{task}' has nothing to train: it is frozen, or without parameters; freeze_task('{task}', False)"
        )
    if users := model.users(task):
        raise TaskError(
            f"task '{task}' is a lateral of {', '.join(users)}, which would change with it; train another task"
        )
    steps = _steps(loader, epochs, steps)
    if accelerator is None:
        accelerator = default_accelerator()
    model.to(accelerator.device)
    built = optimizer(parameter_groups(branch.parameters(), weight_decay, branch.merge.parameters()), lr=lr)
    score = functools.partial(evaluate, model, task, loss=loss, metrics=metrics, accelerator=accelerator)
    return train(
        Objective(branch, model, task, loss),
        loader,
        built,
        steps=steps,
        scheduler=None if scheduler is None else scheduler(built),
        clip=clip,
        seed=seed,
        resume=resume,
        save_every=save_every,
        validate=None if validate is None else functools.partial(score, validate),
        accelerator=accelerator,
        progress=task if progress else None,
        label=f"task {task}",
    )


def _steps(loader: Iterable[Any], epochs: int | None, steps: int | None) -> int:
    """Optimiser steps of so many passes over a loader, or as given."""
    if steps is not None and epochs is not None:
        raise TaskError("give epochs or steps, not both")
    for name, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and count < 1:
            raise TaskError(f"{name} must be 1 or more, not {count}")
    if steps is not None:
        return steps
    try:
        return (epochs or 1) * len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        # A DataLoader has a length by type, but none over a stream.
        raise TaskError("a loader without a length needs steps=") from error


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
        metrics: name -> function of (output, target) that returns one number per sample; by default accuracy, where
            targets are classes.
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
            each = {name: metric(output, y) for name, metric in metrics.items()}
            each["loss"] = loss(output, y).expand(len(y))
            for name, values in each.items():
                gathered = accelerator.gather_for_metrics(values.contiguous())
                sums[name] += float(gathered.sum())
            samples += len(gathered)
    finally:
        for module, training in modes:
            module.training = training
    if samples == 0:
        raise DataError("the loader gave no batch: its data set is empty, or its iterator was used up")
    averages = {name: sums[name] / samples for name in ("loss", *(metrics or {}))}
    return {**averages, "samples": float(samples)}
