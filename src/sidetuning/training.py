"""Training a task and scoring it. Device placement, data-parallel training and mixed precision are accelerate's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning.branch import Branch
from sidetuning.callbacks import Callback, Tracker, best_of
from sidetuning.content import content_sha256
from sidetuning.errors import DataError, TaskError
from sidetuning.launch import default_accelerator
from sidetuning.loop import TrainResult, train
from sidetuning.objective import (
    Loss,
    Objective,
    TaskModel,
    accuracy,
    check_loader,
    classes_second,
    full,
    loss_of,
    meaning_of,
    parameter_groups,
    unpack,
    weight_of,
)
from sidetuning.problems import Classes, Problem
from sidetuning.processes import Shares, rows_of_all
from sidetuning.transforms import ImageTransform
from sidetuning.tuner import SideTuner
from sidetuning.units import measured

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
    weight_decay: float | None = None,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    loss: Loss | None = None,
    clip: float | None = 1.0,
    validate: Iterable[Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    save_every: float = 60.0,
    callbacks: Sequence[Callback] = (),
    keep_best: bool = False,
    patience: int | None = None,
    monitor: str = "loss",
    tracker: str | None = None,
    precision: Literal["no", "bf16"] = "no",
    accumulate: int = 1,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train exactly `model[task].parameters()`; the base and the other tasks cannot change.

    Before the first step of a task of numbers, the centre and scale of some training labels are measured, so that the
    task answers in their units from then on; see `sidetuning.units`.

    Args:
        model: the model.
        task: the task to train.
        loader: gives `(x, y)`, `(x, features, y)` (no base pass then), or mappings with the key "labels".
        epochs: passes over the loader; 1 where neither this nor `steps` is given.
        steps: optimiser steps instead.
        lr: learning rate.
        weight_decay: weight decay of sides and heads; merges, norms, biases and scalars get none. By default none, or
            that of an optimizer of one's own.
        optimizer: called as `optimizer(groups, lr=lr)`.
        scheduler: called with the optimiser; stepped after every optimiser step.
        loss: `loss(output, target)`, by default that of the task's problem; parameters of its own are trained too. A
            task without a problem gets that of the loss: "labels" or "numbers" of torch's, "own" of others.
            Numbers that it sees are in the targets' units.
        clip: largest norm of the gradient; None does not clip.
        validate: a loader to evaluate after every pass.
        metrics: metrics of the validation, as in `evaluate`.
        seed: seed for the order of the batches; the same seed gives bitwise the same weights on the same machine. A
            task that is fitted again draws other orders than before.
        resume: file of the run's state: an interrupted call resumes from it, a finished one returns at once.
        save_every: seconds between two writes of it.
        callbacks: called after steps and validations, and may stop training; see `Callback`.
        keep_best: end with the weights of the best validation.
        patience: stop after this many validations without a better one.
        monitor: the number of the validation that decides which is the best: "loss", or a metric.
        tracker: accelerate's tracker that logs losses and validations, such as "tensorboard"; files go to "logs".
        precision: "bf16" runs the forward pass under autocast; others are accelerate's, Accelerator(mixed_precision=…).
        accumulate: batches of one step, where larger ones do not fit into memory.
        accelerator: accelerate's; by default one that splits each batch over the launched processes.
        progress: show a bar.

    Raises:
        TaskError: the task is frozen, has nothing to train, or is a lateral of another.
        TrainingError: the loss or its gradient is not finite, or `resume` belongs to another run.
        DataError: targets that the problem does not take, or no batches.
    """
    branch = trainable(model, task, loader)
    steps = _steps(loader, epochs, steps, accumulate)
    accelerator = accelerator or default_accelerator()
    model.to(accelerator.device)
    problem = branch.problem if loss is None else branch.own_problem
    objective = BranchObjective(branch, model, task, loss, problem, precision=precision)
    best = best_of(objective, monitor, patience, keep_best, resume, validate, metrics)
    built = _optimizer(branch, loss, optimizer, lr, weight_decay)
    score = functools.partial(evaluate, model, task, loss=loss, metrics=metrics, accelerator=accelerator)
    with measured(branch, model, task, loader, problem, seed, accelerator) as batches:
        result = train(
            objective,
            batches,
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
            first_epoch=branch.passes,
            callbacks=[*callbacks, *best, *([Tracker(tracker, "logs", task)] if tracker else [])],
            accumulate=accumulate,
        )
        for kept in best if keep_best else ():
            kept.restore()
    return result


class BranchObjective(Objective):
    """The loss of a branch, which records the size of the images that it learns from."""

    def network(self) -> str:
        """As `Objective`: the base, how the branch was built, and its laterals."""
        model, task = self._task
        assert isinstance(model, SideTuner) and isinstance(self.part, Branch)
        told = [model.base.identity().digest(), asdict(self.part.config), model._laterals(task)]
        return content_sha256(told)[:16]

    def learned(self, passes: int) -> None:
        """As `Objective`: the branch knows how often, and what its targets mean."""
        assert isinstance(self.part, Branch)
        self.part.passes = passes
        if self.loss is not None:
            self.part.trained_as = meaning_of(self.loss)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """As `Objective`."""
        model, _ = self._task
        assert isinstance(model, SideTuner) and isinstance(self.part, Branch)
        record_size(self.part, model.base, unpack(batch)[0])
        return super().forward(batch)


def record_size(branch: Branch, base: Base, x: Input) -> None:
    """Give a branch the transform of the images x (b, 3, h, w) that it learns from, where theirs is another size."""
    asked = branch.transform or base.transform
    if isinstance(asked, ImageTransform) and isinstance(x, Tensor) and x.ndim == 4:
        size = (int(x.shape[2]), int(x.shape[3]))
        if size != asked.size:
            branch.transform = replace(asked, size=size)


def trainable(model: SideTuner, task: str, loader: Iterable[Any]) -> Branch:
    """The branch of a task that may be trained with what a loader gives.

    Raises:
        TaskError: the task is frozen, has nothing to train, or is a lateral of another.
        DataError: a data set in place of a loader.
    """
    branch = model[task]
    check_loader(loader)
    if branch.frozen:
        raise TaskError(
            f"task '{task}' has nothing to train: it is frozen, or without parameters; freeze_task('{task}', False)"
        )
    if users := model.users(task):
        raise TaskError(
            f"task '{task}' is a lateral of {', '.join(users)}, which would change with it; train another task"
        )
    return branch


def _optimizer(
    branch: Branch, loss: Loss | None, optimizer: Callable[..., Optimizer], lr: float, weight_decay: float | None
) -> Optimizer:
    """The optimiser of a branch, and of the parameters of a loss."""
    if weight_decay is None and optimizer is torch.optim.AdamW:
        weight_decay = 0.0
    own = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    return optimizer(parameter_groups([*branch.parameters(), *own], weight_decay, branch.merge.parameters()), lr=lr)


def _steps(loader: Iterable[Any], epochs: int | None, steps: int | None, accumulate: int) -> int:
    """Optimiser steps of so many passes over a loader, or as given."""
    if steps is not None and epochs is not None:
        raise TaskError("give epochs or steps, not both")
    for name, count in (("epochs", epochs), ("steps", steps)):
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise TaskError(f"{name} must be 1 or more, a whole number, not {count}")
    if steps is not None:
        return int(steps)
    try:
        batches = len(loader)  # type: ignore[arg-type]
    except TypeError as error:
        # A DataLoader has a length by type, but none over a stream.
        raise TaskError("a loader without a length needs steps=") from error
    if not batches:
        raise DataError("the loader has no batches: its data set is empty, or smaller than a batch with drop_last=True")
    return int(epochs or 1) * -(-batches // max(1, accumulate))


@torch.no_grad()
def evaluate(
    model: TaskModel,
    task: str,
    loader: Iterable[Any],
    *,
    loss: Loss | None = None,
    metrics: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Average the loss and metrics of a task over what counts of a loader's targets.

    Args:
        model: a `SideTuner`, or a method.
        task: the task.
        loader: as in `fit`; a `DataLoader` is sharded over the launched processes.
        loss: `loss(output, target)`, the mean of a batch; by default that of the task's problem.
        metrics: name -> metric of torchmetrics, or a function of (output, target) that returns a number per target, per
            sample, or the mean of the batch; by default those of the problem.
        accelerator: as in `fit`.

    Returns:
        {"loss": …, every metric, "samples": how many}.

    Raises:
        DataError: targets that the problem does not take, no batches, or a metric of another shape.
    """
    from accelerate.utils import send_to_device

    check_loader(loader)
    if accelerator is None:
        accelerator = default_accelerator()
    model.to(accelerator.device)
    branch = model[task]
    problem = None
    if isinstance(branch, Branch):
        problem = branch.problem if loss is None else branch.own_problem
    scores = Scores(metrics)
    with in_evaluation(branch):
        for batch, counting in Shares(loader, accelerator).read():
            x, features, y = unpack(send_to_device(batch, accelerator.device), accelerator.device)
            output = full(model(x, task, features=features))
            y = y if problem is None else problem.among(y, x)
            value, given, counts = loss_of(output, y, loss, problem)
            weight = weight_of(loss, y, counts) * counting
            if loss is not None and problem is not None:
                # The loss is the user's own, and what the targets mean stays.
                given = problem.prepare(output, y)
                counts = problem.counts(given[1])
            scores.add(value, weight, given, counts & counting, problem, counting)
    return scores.result(accelerator)


@contextlib.contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own when the block ends."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    if isinstance(module, Branch):
        module.learning += 1
    try:
        yield
    finally:
        if isinstance(module, Branch):
            module.learning -= 1
        for part, training in modes:
            part.training = training


class Scores:
    """Sums of a loss and of metrics over batches, each with the weight of what counts in it."""

    def __init__(self, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None and (not isinstance(metrics, Mapping) or metrics.keys() & {"loss", "samples", "step"}):
            raise DataError("metrics are given by name, as {'f1': f1}, but not 'loss', 'samples' or 'step'")
        self.metrics = None if metrics is None else dict(metrics)
        for metric in (metrics or {}).values():
            if hasattr(metric, "update") and hasattr(metric, "reset"):
                # It may hold rows of a loop of its owner's, or of a call that was stopped.
                metric.reset()
        self.final: Callable[[dict[str, float]], dict[str, float]] = dict
        self.sums: dict[str, float] = {"loss": 0.0, "samples": 0.0}
        self.weights: dict[str, float] = {"loss": 0.0}

    def add(
        self,
        loss: Tensor,
        weight: Tensor,
        given: tuple[Any, Tensor],
        counts: Tensor,
        problem: Problem | None,
        counting: bool,
    ) -> None:
        """Add a batch: mean loss and weight, output and target, which targets count, and whether it does."""
        output, target = given
        if self.metrics is None:
            classes = isinstance(output, Tensor) and target.dtype == torch.int64 and classes_second(output, target)
            # Of maps each pixel counts by itself, where the loss tells which do.
            right = Classes().metrics()["accuracy"] if counts.shape == target.shape else accuracy
            self.metrics = problem.metrics() if problem is not None else {"accuracy": right} if classes else {}
            self.final = self.final if problem is None else problem.final
        self.sums["samples"] += len(target) * counting
        # Nothing weighs nothing, even where its mean is no number.
        self.sums["loss"] += float(loss) * float(weight) if float(weight) else 0.0
        self.weights["loss"] += float(weight)
        for name, metric in self.metrics.items():
            if hasattr(metric, "update") and hasattr(metric, "compute"):
                for rows in rows_of_all(given, counts, metric):
                    metric.update(*rows)
            else:
                self._count(name, metric(output, target), counts)

    def _count(self, name: str, value: Any, counts: Tensor) -> None:
        value = torch.as_tensor(value, device=counts.device).float()
        if value.ndim and value.shape == counts.shape:
            weights = counts
        elif value.ndim and len(value) == len(counts):
            value = value.flatten(1).mean(1) if value.ndim > 1 else value
            weights = counts.reshape(len(counts), -1).any(1)
        elif value.numel() == 1:
            weights = counts.sum().reshape(1)
        else:
            raise DataError(
                f"the metric '{name}' returns {tuple(value.shape)} for {len(counts)} samples; return one number "
                "for each, or the mean of the batch"
            )
        value = value.reshape(weights.shape)
        self.sums[name] = self.sums.get(name, 0.0) + float(
            torch.where(weights > 0, value * weights, 0.0).double().sum()
        )
        self.weights[name] = self.weights.get(name, 0.0) + float(weights.sum())

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages over all processes."""
        names = list(self.weights)
        rows = [[self.sums[name], self.weights[name]] for name in names] + [[self.sums["samples"], 0.0]]
        totals = accelerator.reduce(torch.tensor(rows, dtype=torch.float64, device=accelerator.device), "sum").tolist()
        if totals[-1][0] == 0:
            raise DataError("the loader gave no batch: its data set is empty, or its iterator was used up")
        averages = {
            name: total / weight if weight else 0.0 for name, (total, weight) in zip(names, totals, strict=False)
        }
        found = {name: m for name, m in (self.metrics or {}).items() if hasattr(m, "update") and hasattr(m, "compute")}
        for name, metric in found.items():
            value = metric.compute()
            try:
                averages[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                told = f"the metric '{name}' computes {value}; give one that computes a single number"
                raise DataError(told) from error
            metric.reset()
        return {**self.final(averages), "samples": totals[-1][0]}
