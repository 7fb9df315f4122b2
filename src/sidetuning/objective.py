"""What one step of training or evaluation asks of a task: its batch, its output, its loss, its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sidetuning.base import Features, Input
from sidetuning.errors import DataError

# (output, target) -> scalar
Loss = Callable[[Any, Tensor], Tensor]


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
        loss: `loss(output, target)`.
        penalty: a term that is added to the loss.
        precision: "bf16" runs the forward pass under bfloat16 autocast, and the loss in float32.
    """

    def __init__(
        self,
        part: nn.Module,
        model: TaskModel,
        task: str,
        loss: Loss,
        *,
        penalty: Callable[[], Tensor | float] = lambda: 0.0,
        precision: Literal["no", "bf16"] = "no",
    ) -> None:
        super().__init__()
        self.part, self.loss, self.penalty, self.precision = part, loss, penalty, precision
        # A tuple: torch would register the model.
        self._task = (model, task)

    def forward(self, batch: Any) -> Tensor:
        model, task = self._task
        x, features, y = unpack(batch)
        low = self.precision == "bf16"
        with torch.autocast(y.device.type, torch.bfloat16) if low else contextlib.nullcontext():
            output = model(x, task, features=features)
        output = output.float() if low else output
        check_labels(output, y)
        return self.loss(output, y) + self.penalty()


def parameter_groups(
    trained: Iterable[nn.Parameter], weight_decay: float, exempt: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser; vectors, scalars and those in `exempt` do not decay (original code)."""
    spared = {id(p) for p in exempt}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in trained:
        if p.requires_grad:
            groups[p.ndim > 1 and id(p) not in spared].append(p)
    return [{"params": ps, "weight_decay": weight_decay if decays else 0.0} for decays, ps in groups.items() if ps]


def unpack(batch: Any) -> tuple[Input, Features | None, Tensor]:
    """`(x, y)`, `(x, features or None, y)` or a mapping with "labels" to x, features or None, and y."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"a batch that is a mapping needs the key 'labels'; it has {', '.join(batch)}")
        return {k: v for k, v in batch.items() if k != "labels"}, None, batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise DataError("a batch is (x, y), (x, features, y) or a mapping with 'labels'")
    features = batch[1] if len(batch) == 3 else None
    if features is not None:
        features = Features(features) if isinstance(features, Tensor) else Features(*features)
    return batch[0], features, batch[-1]


def check_labels(output: Any, target: Tensor) -> None:
    """Class labels must have an output; on a GPU the loss itself would kill the process."""
    if isinstance(output, Tensor) and output.ndim == 2 and target.ndim == 1 and target.dtype == torch.int64:
        outputs = output.shape[1]
        # Cross-entropy ignores -100.
        wrong = target[((target < 0) | (target >= outputs)) & (target != -100)]
        if len(wrong):
            label = int(wrong.max())
            raise DataError(f"the label {label} is out of range: the head has {outputs} outputs, 0 … {outputs - 1}")


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the highest output is the target's, else 0; of maps the share of pixels whose target is not -100, which
    cross-entropy ignores: (b, c, …), (b, …) -> (b,)."""
    right = (output.argmax(1) == target).float()
    if target.ndim == 1:
        return right
    counts = (target != -100).float()
    return (right * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp(min=1)
