"""What is learned and how: the task and the recipe of training, the same for every method of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from sidetuning.objective import Loss

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Attributes:
        name: name of letters, digits, "-" and "_".
        head: number of outputs of a linear classifier, or the name of a registered head.
        loss: `loss(output, target)`.
        labels: names of the classes.
        seed: seed for the task's initial weights.
        head_options: arguments of a registered head, JSON values.
    """

    name: str
    head: int | str
    loss: Loss = F.cross_entropy
    labels: list[str] | None = None
    seed: int = 0
    head_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimiser steps per task.
        lr: learning rate.
        weight_decay: weight decay of matrices and kernels; scalars, biases, norms and merges get none.
        clip: largest gradient norm, None for no limit.
        optimizer: called as `optimizer(groups, lr=lr)`.
        scheduler: called with the optimiser and the number of its steps; stepped after every step.
        seed: seed for the order of the batches.
        precision: "bf16" runs forward passes under bfloat16 autocast.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"


def one_cycle(lr: float, rise: float) -> Callable[[Optimizer, int], LRScheduler]:
    """A recipe's schedule: a warm-up to the rate `lr` over the fraction `rise` of the steps, a cosine to almost 0."""

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        # torch divides by zero where the warm-up is a single step, so it has two at least.
        share = min(1.0, max(rise, 2 / (steps + 1)))
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps + 1, pct_start=share, cycle_momentum=False
        )

    return schedule
