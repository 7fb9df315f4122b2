"""Piggyback (Mallya et al., 2018): a binary mask over the frozen base's weights per task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning_bench.methods.method import Method, count
from sidetuning_bench.methods.recipe import Task
from sidetuning_bench.methods.trunk import Trunk

# The paper starts masks at 0.01, cuts at 0.005 and trains them with Adam at 1e-4. Adam does not see the size
# of the gradient, so ten times all three is the same training, at the learning rate of the other methods.
START, THRESHOLD = 0.1, 0.05


class Piggyback(Method):
    """Every convolution and linear layer is used as W * (m > 0.05); m is trained by the straight-through gradient.

    Only the bits of m are stored once a task is learned. Batch norms are the base's.

    Args:
        base: the base; a frozen copy of it is masked.
    """

    name: ClassVar[str] = "piggyback"

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunk = Trunk(base, frozen=True)
        self.masks = nn.ModuleDict()

    def add(self, task: Task) -> None:
        super().add(task)
        self.masks[task.name] = Masks({f"net.{n}.weight": m.weight for n, m in self.trunk.layers().items()})

    def tuned(self, task: str) -> Masks:
        return cast(Masks, self.masks[task])

    def code(self, inputs: Input, task: str) -> Tensor:
        masks = self.tuned(task).binary()
        return self.trunk.view({name: self.trunk.get_parameter(name) * mask for name, mask in masks.items()})(inputs)

    def learned(self, task: Task, loader: Iterable[Any]) -> None:
        self.tuned(task.name).settle()

    def rebuild(self, task: Task) -> None:
        self.add(task)
        self.learned(task, ())

    def added(self, task: str) -> int:
        """The head, and the bits of the masks, 32 to a number."""
        return count(self.heads[task]) + -(-self.tuned(task).bits // 32)

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().tensors().items() if not k.startswith("trunk.")}


class Masks(nn.Module):
    """A mask per weight: real numbers while they are trained, booleans once `settle` was called."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        # Names of parameters hold no dots.
        self.names = {name.replace(".", "/"): name for name in weights}
        self.bits = sum(w.numel() for w in weights.values())
        for key, name in self.names.items():
            self.register_parameter(key, nn.Parameter(torch.full_like(weights[name], START)))

    def binary(self) -> dict[str, Tensor]:
        """The masks by the name of their weight, 0 or 1, with a gradient that ignores the cut."""
        masks = {}
        for key, name in self.names.items():
            m = getattr(self, key)
            masks[name] = m if m.dtype == torch.bool else (m > THRESHOLD).to(m.dtype) + (m - m.detach())
        return masks

    def settle(self) -> None:
        """Replace the real numbers by their bits."""
        for key in self.names:
            bits = getattr(self, key).detach() > THRESHOLD
            delattr(self, key)
            self.register_buffer(key, bits)
