"""Elastic weight consolidation (Kirkpatrick et al., 2017; the running form of Schwarz et al., 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.base import Base, Input
from sidetuning.errors import TrainingError
from sidetuning.inputs import take_rows
from sidetuning.objective import unpack
from sidetuning_bench.methods.finetune import FineTune
from sidetuning_bench.methods.recipe import Task


class EWC(FineTune):
    """Fine-tuning that pays for moving weights that earlier tasks need.

    After task k: F_k = mean over samples of (d log p(y|x) / d w)^2, the diagonal Fisher from per-sample gradients; in
    tasks other than classification, the task's own loss stands for -log p. The loss of later tasks has `coefficient`
    * sum_k F_k (w - w_k)^2, without the paper's 1/2. Up to a constant that sum is the one quadratic F (w - c)^2 with
    F = sum_k F_k and c = sum_k F_k w_k / F, so two vectors are stored, however many tasks there are.

    Args:
        base: the base; its copy is tuned.
        coefficient: factor of the penalty: small ones forget, large ones stop learning. (The original has 1e4, for a
            smaller F.)
        samples: number of samples from which the Fisher is estimated.
        labels: y of a classifier's Fisher: drawn from the model's own answer (the Fisher information), or the data's
            (the empirical one).
        running: None sums the penalties; a number g has one, F = g F + F_k around the newest weights.
    """

    name: ClassVar[str] = "ewc"

    def __init__(
        self,
        base: Base,
        coefficient: float = 100.0,
        samples: int = 500,
        labels: Literal["model", "data"] = "model",
        running: float | None = None,
    ) -> None:
        super().__init__(base)
        self.options = {"coefficient": coefficient, "samples": samples, "labels": labels, "running": running}
        size = sum(p.numel() for p in self.trunk.parameters())
        self.precision: Tensor
        self.centre: Tensor
        self.register_buffer("precision", torch.zeros(size))
        self.register_buffer("centre", torch.zeros(size))

    def penalty(self) -> Tensor | float:
        # The first task has no earlier weights to stay at.
        if len(self.tasks) < 2:
            return 0.0
        distance = flat(self.trunk.parameters()) - self.centre
        return float(self.options["coefficient"]) * (self.precision * distance**2).sum()

    def learned(self, task: Task, loader: Iterable[Any]) -> None:
        fisher = self.fisher(task, loader)
        weights = flat(self.trunk.parameters()).detach()
        if self.options["running"] is not None:
            self.precision.mul_(self.options["running"]).add_(fisher)
            self.centre.copy_(weights)
            return
        total = self.precision + fisher
        moved = (self.precision * self.centre + fisher * weights) / total.clamp(min=torch.finfo(total.dtype).tiny)
        self.centre.copy_(torch.where(total > 0, moved, weights))
        self.precision.copy_(total)

    def fisher(self, task: Task, loader: Iterable[Any]) -> Tensor:
        """The diagonal Fisher of the network's current weights, as one vector."""
        parameters = list(self.trunk.parameters())
        total = torch.zeros_like(self.precision)
        self.eval()
        n = 0
        for x, y in islice(self._samples(loader), int(self.options["samples"])):
            output = self(x, task.name)
            classes = output.ndim == 2 and output.shape[1] > 1 and y.ndim == 1 and y.dtype == torch.int64
            if self.options["labels"] == "model" and classes:
                drawn = torch.multinomial(output.detach().softmax(1), 1).squeeze(1)
                loss = F.cross_entropy(output, drawn)
            else:
                loss = task.loss(output, y)
            total += flat(torch.autograd.grad(loss, parameters, materialize_grads=True)) ** 2
            n += 1
        if n == 0:
            raise TrainingError("EWC's Fisher saw no sample: give a loader that can be read again, and samples > 0")
        return total / n

    def _samples(self, loader: Iterable[Any]) -> Iterator[tuple[Input, Tensor]]:
        """Single samples: the square of a batch's mean gradient would be another quantity."""
        from accelerate.utils import send_to_device

        for batch in loader:
            x, _, y = unpack(send_to_device(batch, self.centre.device))
            for row in range(len(y)):
                yield take_rows(x, torch.tensor([row])), y[row : row + 1]

    def shared(self) -> int:
        return super().shared() + 2 * len(self.precision)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements as one vector, whatever the memory layout."""
    return torch.cat([t.reshape(-1) for t in tensors])
