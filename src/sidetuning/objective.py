"""What one step of training or evaluation asks of a task: its batch, its output, its loss, its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Features, Input
from sidetuning.errors import DataError, TaskError
from sidetuning.problems import IGNORED, Classes, Problem, check_range

# (output, target) -> scalar
Loss = Callable[[Any, Tensor], Tensor]
# Losses of torch that compare number with number.
ELEMENTWISE: tuple[Any, ...] = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
ELEMENTWISE += (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


class TaskModel(Protocol):
    """What `evaluate` needs: a `SideTuner`, or a method."""

    def __getitem__(self, task: str, /) -> nn.Module: ...

    def __call__(self, x: Input, task: str, *, features: Features | Tensor | None = None) -> Tensor: ...

    def to(self, device: torch.device, /) -> Any: ...


class Objective(nn.Module):
    """The loss of one task. It holds the module that is trained, which alone is saved and synchronised.

    Args:
        part: the module that learning the task changes: a branch, a network.
        model: the model that answers for the task; the rest of it is no part of the objective.
        task: the task.
        loss: `loss(output, target)`; None takes the problem's. A module's parameters are trained too.
        problem: what the targets mean; None does not check the targets of a loss of one's own.
        penalty: a term that is added to the loss.
        precision: "bf16" runs the forward pass under bfloat16 autocast, and the loss in float32.
    """

    def __init__(
        self,
        part: nn.Module,
        model: TaskModel,
        task: str,
        loss: Loss | None,
        problem: Problem | None = None,
        *,
        penalty: Callable[[], Tensor | float] = lambda: 0.0,
        precision: Literal["no", "bf16"] = "no",
    ) -> None:
        super().__init__()
        if precision not in ("no", "bf16"):
            raise TaskError(f"precision is 'no' or 'bf16', not {precision!r}; others are accelerate's, accelerator=")
        self.part, self.loss, self.problem = part, loss, problem
        self.penalty, self.precision = penalty, precision
        # A tuple: torch would register the model.
        self._task = (model, task)

    def network(self) -> str:
        """A hash of what the part learns beside; empty where it is not known."""
        return ""

    def learned(self, passes: int) -> None:
        """Called when training ends, or fails after some steps, with the passes over the data in all."""

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and its weight in a mean over several."""
        model, task = self._task
        x, features, y = unpack(batch, next((p.device for p in self.part.parameters()), None))
        low = self.precision == "bf16"
        with torch.autocast(y.device.type, torch.bfloat16) if low else contextlib.nullcontext():
            output = model(x, task, features=features)
        output = full(output)
        y = y if self.problem is None else self.problem.among(y, x)
        value, _, counts = loss_of(output, y, self.loss, self.problem)
        return value + self.penalty(), weight_of(self.loss, y, counts)


def full(output: Any) -> Any:
    """An output in single precision, where it has less: targets are given in its type."""
    half = isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16)
    return output.float() if half else output


def loss_of(
    output: Any, target: Any, loss: Loss | None, problem: Problem | None
) -> tuple[Tensor, tuple[Any, Any], Tensor]:
    """The mean loss of a batch, output and target as metrics take them, and which targets count, as booleans.

    Raises:
        DataError: targets that the problem or the loss does not take.
    """
    if loss is None:
        given = (problem or Classes()).prepare(output, target)
        return (problem or Classes()).loss(*given), given, (problem or Classes()).counts(given[1])
    if problem is not None:
        problem.prepare(output, target)
    ignored = _option(loss, "ignore_index", IGNORED)
    if _option(loss, "reduction", "mean") not in ("mean", "none"):
        raise DataError("the loss sums over the batch, so that a step would depend on its size: use reduction='mean'")
    if _of_classes(loss):
        pairs = isinstance(output, Tensor) and output.ndim == 2 and target.ndim == 1
        if pairs and target.dtype == torch.int64:
            check_range(target, output.shape[1], ignored)
    column = isinstance(output, Tensor) and target.is_floating_point() and output.shape == (*target.shape, 1)
    if (column and _of_torch(loss)) or (_is(loss, ELEMENTWISE) and target.shape != output.shape):
        # Torch would spread one over the other, with a warning at most.
        raise DataError(
            f"the loss compares an output {tuple(output.shape)} with a target {tuple(target.shape)}; they differ"
        )
    whole = not target.is_floating_point()
    counts = target != ignored if whole and _of_classes(loss) else torch.ones(len(target), dtype=torch.bool)
    counts = counts.to(target.device)
    if not bool(counts.any()):
        return 0.0 * output.sum(), (output, target), counts
    try:
        value = torch.as_tensor(loss(output, target))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"the loss does not take an output {_kind(output)} with a target {_kind(target)}: {error}; convert the "
            "targets, or choose problem= and leave loss= out"
        ) from error
    if value.numel() != 1:
        raise DataError(f"the loss returns {tuple(value.shape)}, not one number: take its mean, reduction='mean'")
    return value.squeeze(), (output, target), counts


def weight_of(loss: Loss | None, target: Tensor, counts: Tensor) -> Tensor:
    """What a batch weighs in a mean over several: how many targets count, or the sum of their classes' weights."""
    given = _option(loss, "weight", None)
    if loss is not None and _of_classes(loss) and isinstance(given, Tensor) and not target.is_floating_point():
        return given.to(target.device)[target[counts]].sum()
    return counts.sum()


def _option(loss: Loss | None, name: str, default: Any) -> Any:
    """An option that a loss was given: as an attribute, or where some of a function's arguments are fixed."""
    return loss.keywords.get(name, default) if isinstance(loss, partial) else getattr(loss, name, default)


def _is(loss: Loss, kinds: tuple[Any, ...]) -> bool:
    """Whether a loss is one of these functions or classes, perhaps with some arguments given."""
    inner = loss.func if isinstance(loss, partial) else loss
    return inner in kinds or type(inner) in kinds


def _of_torch(loss: Loss) -> bool:
    inner: Any = loss.func if isinstance(loss, partial) else loss
    return str(getattr(inner, "__module__", "")).startswith("torch.nn.")


def _of_classes(loss: Loss) -> bool:
    """Whether a loss is torch's cross-entropy, which kills a process on a GPU at a label out of range."""
    return _is(loss, (F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss))


def meaning_of(loss: Loss) -> str | None:
    """The problem that a loss of torch belongs to, "own" for other losses; None is what goes with the head."""
    if _is(loss, (F.cross_entropy, nn.CrossEntropyLoss)):
        return None
    if _is(loss, (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss)):
        return "labels"
    return "numbers" if _is(loss, ELEMENTWISE) else "own"


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def parameter_groups(
    trained: Iterable[nn.Parameter], weight_decay: float | None, exempt: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser; vectors, scalars and those in `exempt` do not decay (original code)."""
    spared = {id(p) for p in exempt}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in trained:
        if p.requires_grad:
            groups[p.ndim > 1 and id(p) not in spared].append(p)
    # Without a value, the optimiser's own holds.
    decay = {True: {} if weight_decay is None else {"weight_decay": weight_decay}, False: {"weight_decay": 0.0}}
    return [{"params": ps, **decay[decays]} for decays, ps in groups.items() if ps]


def unpack(batch: Any, device: torch.device | None = None) -> tuple[Input, Features | None, Tensor]:
    """`(x, y)`, `(x, features or None, y)` or a mapping with "labels" to x, features or None, and y, on a device."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"a batch that is a mapping needs the key 'labels'; it has {', '.join(batch)}")
        return {k: v for k, v in batch.items() if k != "labels"}, None, _tensor(batch["labels"], "labels", device)
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise DataError(f"a batch is (x, y), (x, features, y) or a mapping with 'labels', not {_form(batch)}")
    features = batch[1] if len(batch) == 3 else None
    if features is not None:
        features = Features(features) if isinstance(features, Tensor) else Features(*features)
    x = batch[0] if isinstance(batch[0], Mapping) else _tensor(batch[0], "inputs", device)
    return x, features, _tensor(batch[-1], "targets", device)


def _tensor(value: Any, what: str, device: torch.device | None) -> Tensor:
    """A batch of numbers as a tensor: numpy arrays and lists of numbers are taken too."""
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the {what} of a batch are {_form(value)}, not a tensor ({error}); convert them") from error


def _form(value: Any) -> str:
    items = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{items}"


def check_loader(loader: Any) -> None:
    """A loader gives batches; a data set gives samples, which would be taken for batches."""
    package = type(loader).__module__.partition(".")[0]
    if isinstance(loader, torch.utils.data.Dataset) or package == "datasets":
        raise DataError(
            f"a {type(loader).__name__} is a data set, and batches are wanted: DataLoader(data, batch_size=32, "
            "shuffle=True)"
        )


def classes_second(output: Tensor, target: Tensor) -> bool:
    """Whether an output is (b, classes, …) for targets (b, …); of as many tokens as classes nobody knows."""
    return target.shape == (len(output), *output.shape[2:]) and (output.ndim != 3 or len(set(output.shape[1:])) == 2)


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the highest output is the target's, else 0; of maps the share of pixels whose target is not -100, which
    cross-entropy ignores: (b, c, …), (b, …) -> (b,).

    Raises:
        DataError: outputs with the classes elsewhere than in their second dimension, or perhaps so.
    """
    if not classes_second(output, target):
        raise DataError(
            f"accuracy takes outputs (b, classes, …) and targets (b, …), not {tuple(output.shape)} and "
            f"{tuple(target.shape)}; give add_task problem='tokens' for outputs (b, t, classes), or other metrics="
        )
    right = (output.argmax(1) == target).float()
    if target.ndim == 1:
        return right
    counts = (target != IGNORED).float()
    return (right * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)
