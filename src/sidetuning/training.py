"""Training: `train` optimises any objective, `fit` trains exactly one task of a `SideTuner`, `evaluate` scores it.

Device placement, data-parallel training and mixed precision are accelerate's: the same script runs alone or under
`accelerate launch`. Everything random is a function of (seed, epoch), so a run that is killed and resumed ends with
bitwise the same weights as one that was not.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.artifacts import atomic_write
from sidetuning.base import Features, Input
from sidetuning.branch import Branch
from sidetuning.errors import DataError, TaskError, TrainingError
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch inside the block and put their generators back as they were after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(enabled=True):
        _seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


Loss = Callable[[Any, Tensor], Tensor]  # (output, target) -> scalar


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
    built = optimizer(parameter_groups(branch, weight_decay), lr=lr)
    check: Callable[[], Mapping[str, float]] | None = None
    if validate is not None:
        held_out = validate

        def check() -> Mapping[str, float]:
            return evaluate(model, task, held_out, loss=loss, metrics=metrics, accelerator=accelerator)

    return train(
        _TaskObjective(model, task, loss), loader, built, steps=steps,
        scheduler=None if scheduler is None else scheduler(built), clip=clip, seed=seed, resume=resume,
        save_every=save_every, validate=check, accelerator=accelerator, progress=task if progress else None,
        label=f"task {task}",
    )  # fmt: skip


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the highest output is the target's, else 0; of maps the share of pixels, but for those of -100, which cross-entropy
    ignores: (b, c, …), (b, …) -> (b,)."""
    right = (output.argmax(1) == target).float()
    if target.ndim == 1:
        return right
    counts = (target != -100).float()
    return (right * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)


class TaskModel(Protocol):
    """What `evaluate` needs: a `SideTuner`, or a method."""

    def __getitem__(self, task: str, /) -> nn.Module: ...

    def __call__(self, x: Input, task: str, *, features: Features | Tensor | None = None) -> Tensor: ...

    def to(self, device: torch.device, /) -> Any: ...


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


def parameter_groups(branch: Branch, weight_decay: float) -> list[dict[str, Any]]:
    """The branch's parameters for an optimiser: merges, gates and norms decay by nothing (original code and paper)."""
    merge = {id(p) for p in branch.merge.parameters()}
    trained = [p for p in branch.parameters() if p.requires_grad]
    decay = [p for p in trained if id(p) not in merge and p.ndim > 1]
    rest = [p for p in trained if id(p) in merge or p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def unpack(batch: Any) -> tuple[Input, Features | None, Tensor]:
    """`(x, y)`, `(x, features or None, y)` or a mapping with "labels" to x, features or None, and y."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"a batch that is a mapping needs the key 'labels'; it has {', '.join(batch)}")
        return {k: v for k, v in batch.items() if k != "labels"}, None, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], None, batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        features = batch[1]
        if features is not None:
            features = Features(features) if isinstance(features, Tensor) else Features(*features)
        return batch[0], features, batch[2]
    raise DataError("a batch is (x, y), (x, features, y) or a mapping with 'labels'")


class _TaskObjective(nn.Module):
    """The loss of one task; holds its branch alone, so that this is what is trained, saved and synchronised."""

    def __init__(self, model: SideTuner, task: str, loss: Loss) -> None:
        super().__init__()
        self.branch = model[task]
        self.loss = loss
        self._model = (model,)  # a tuple: the rest of the model is no part of the objective

    def forward(self, batch: Any) -> Tensor:
        model = self._model[0]
        x, features, y = unpack(batch)
        inputs = model.base.prepare(x)
        known = model.base.encode(inputs) if features is None else features
        output = self.branch(inputs, known, model.lateral_outputs(self.branch, inputs, known))
        check_labels(output, y)
        return self.loss(output, y)


def check_labels(output: Any, target: Tensor) -> None:
    """Class labels must have an output; on a GPU the loss itself would kill the process."""
    if isinstance(output, Tensor) and output.ndim == 2 and target.ndim == 1 and target.dtype == torch.int64:
        labels = target[target != -100]  # what cross-entropy ignores
        if len(labels) == 0:
            return
        low, high, outputs = int(labels.min()), int(labels.max()), output.shape[1]
        if low < 0 or high >= outputs:
            bad = high if high >= outputs else low
            raise DataError(f"the label {bad} is out of range: the head has {outputs} outputs, 0 … {outputs - 1}")


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
    state = _Position(seed=seed, steps=steps, label=label, optimizer=how)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in wrapped.parameters() if id(p) in optimised]  # others may hold gradients of earlier tasks
    # One process reads the loader as it is: accelerate's fetches a batch ahead, so what data and objective draw would come in another
    # order after an interruption.
    many = accelerator.num_processes > 1 and isinstance(loader, torch.utils.data.DataLoader)
    batches = accelerator.prepare(loader) if many else loader
    rng: dict[str, Any] | None = None
    if path is not None and path.exists():
        rng = _restore(path, state, objective, optimizer, scheduler)

    def save() -> None:
        state.seconds = time.monotonic() - started
        if path is not None:
            _save(path, state, objective, optimizer, scheduler, accelerator)

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
                _seed_all(_mix(seed, state.epoch))
                seed_loader(loader, _mix(seed, state.epoch))
                iterator, any_batch = iter(batches), False
                for _ in range(state.batch):  # of this pass, already trained on
                    if next(iterator, None) is None:
                        raise TrainingError(
                            f"{path} stopped at batch {state.batch} of a pass, and the loader ends before it; resume with "
                            "the same data, or delete the file to start over"
                        )
                    any_batch = True
                if rng is not None:
                    _set_generators(rng)
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


@dataclass
class _Position:
    """Where a run is: everything but the weights, the optimiser and the generators."""

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


def _mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch * 7_919 + 1) % 2**63


def seed_loader(loader: Iterable[Any], seed: int) -> None:
    """A loader or sampler with a generator of its own does not hear the global seed."""
    batches = getattr(loader, "batch_sampler", None)
    for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def _save(
    path: Path,
    state: _Position,
    objective: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    accelerator: Accelerator,
) -> None:
    if not accelerator.is_main_process:
        return
    content = {
        "position": vars(state),
        "objective": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "rng": _generators(),
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def _restore(
    path: Path, state: _Position, objective: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None
) -> dict[str, Any]:
    """Read `path` into the run and return the states of the generators."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        position = content["position"]
    except Exception as error:
        raise TrainingError(f"{path} cannot be read as a resume file ({error}); delete it to start over") from error
    if (position["seed"], position["steps"]) != (state.seed, state.steps):
        raise TrainingError(
            f"{path} belongs to a run of {position['steps']} steps with seed {position['seed']}, this one has "
            f"{state.steps} steps and seed {state.seed}; give another resume file, or delete this one to start over"
        )
    for name in ("label", "optimizer"):
        if position.get(name, "") != getattr(state, name):
            raise TrainingError(
                f"{path} holds the state of {position.get(name) or 'something else'}, not of {getattr(state, name)}; give "
                "another resume file, or delete this one to start over"
            )
    try:
        objective.load_state_dict(content["objective"])
    except RuntimeError as error:
        raise TrainingError(
            f"{path} holds the weights of another network ({error}); delete it to start over"
        ) from error
    optimizer.load_state_dict(content["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(content["scheduler"])
    vars(state).update(position)
    rng: dict[str, Any] = content["rng"]
    return rng


def _generators() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators, of types that `torch.load(weights_only=True)` reads."""
    state = np.random.get_state(legacy=False)
    state["state"]["key"] = torch.from_numpy(state["state"]["key"].astype(np.int64))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": state, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_generators(states: dict[str, Any]) -> None:
    numpy = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _bar(label: str | None, steps: int, done: int, accelerator: Accelerator) -> Any:
    from tqdm import tqdm

    off = label is None or not accelerator.is_main_process
    return tqdm(total=steps, initial=done, desc=label, unit="step", disable=off, leave=False, dynamic_ncols=True)


def one_cycle(lr: float, rise: float) -> Callable[[Optimizer, int], LRScheduler]:
    """A schedule for a recipe: a warm-up to the learning rate over a fraction `rise` of the steps, and a cosine down to almost 0."""

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        # Of few steps more of them rise: where just one does, torch's schedule divides by zero.
        share = min(1.0, max(rise, 2 / (steps + 1)))
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps + 1, pct_start=share, cycle_momentum=False
        )

    return schedule
