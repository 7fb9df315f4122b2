"""Parameter superposition (Cheung et al., 2019) with binary contexts: many networks in one set of weights."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sidetuning.base import Base, Input
from sidetuning_bench.methods.finetune import FineTune
from sidetuning_bench.methods.method import count
from sidetuning_bench.methods.recipe import Task


class PSP(FineTune):
    """Every task sees each convolution and linear layer through its own random signs, W * c_k.

    A context c_k has a sign for every input of a layer, (1, in, kh, kw) or (1, in); in a grouped convolution for the
    inputs of every group, (out, in / groups, kh, kw), alike for the outputs of a group. What one task learns looks like
    noise to the others. The pretrained weights are folded with the first context, W = W_0 * c_0, so that the first task
    starts from the base as it is. Biases and the scales of norms are shared.

    The shared weights move on while later tasks are learned. The noise that an earlier task sees then changes the mean
    and variance of its activations, so statistics of batch norms from its training are wrong by the end.

    Args:
        base: the base; its copy is tuned.
        seed: seed of the contexts; they are drawn again rather than stored.
        statistics: statistics of batch norms after training: "batch" takes those of the batch, so an answer depends on
            the others in the batch, which should be many and of one task; "task" stores running ones of every task.
    """

    name: ClassVar[str] = "psp"

    def __init__(self, base: Base, seed: int = 0, statistics: Literal["batch", "task"] = "batch") -> None:
        super().__init__(base)
        self.options = {"seed": seed, "statistics": statistics}
        if statistics == "batch":
            for layer in self.trunk.modules():
                if isinstance(layer, _BatchNorm):
                    layer.track_running_stats = False
                    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        self.statistics = nn.ModuleDict()
        self._contexts: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, context in self.contexts(0).items():
                weight = self.trunk.get_parameter(name)
                weight.mul_(context.to(weight.device))

    def contexts(self, index: int) -> dict[str, Tensor]:
        """The signs of the task at a position in the sequence, by the name of the weight that they multiply."""
        signs = {}
        for i, (name, layer) in enumerate(self.trunk.layers().items()):
            generator = torch.Generator().manual_seed((int(self.options["seed"]) * 1009 + index) * 10_007 + i)
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            drawn = torch.randint(0, 2, (groups, *layer.weight.shape[1:]), generator=generator).float() * 2 - 1
            repeats = 1 if groups == 1 else len(layer.weight) // groups
            signs[f"net.{name}.weight"] = drawn.repeat_interleave(repeats, 0)
        return signs

    def add(self, task: Task) -> None:
        super().add(task)
        device = next(self.trunk.parameters()).device
        self._contexts[task.name] = {n: signs.to(device) for n, signs in self.contexts(len(self.tasks)).items()}
        self.statistics[task.name] = Statistics(self.trunk)

    def part(self, task: str) -> nn.Module:
        return nn.ModuleList([self.trunk, self.heads[task], self.statistics[task]])

    def code(self, inputs: Input, task: str) -> Tensor:
        signs, statistics = self._contexts[task], cast(Statistics, self.statistics[task])
        seen = {name: superpose(self.trunk.get_parameter(name), context) for name, context in signs.items()}
        return self.trunk.view({**seen, **statistics.tensors()})(inputs)

    def added(self, task: str) -> int:
        return count(self.heads[task]) + count(self.statistics[task])


def superpose(weight: Tensor, context: Tensor) -> Tensor:
    """The weight that a task sees: (out, in, …) * (1, in, …)."""
    # No copy where the context lies there already.
    return weight * context.to(weight.device)


class Statistics(nn.Module):
    """A copy of a module's buffers: the running statistics of one task."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Names of buffers hold no dots.
        self.names = {name.replace(".", "/"): name for name, _ in module.named_buffers()}
        for key, name in self.names.items():
            self.register_buffer(key, module.get_buffer(name).clone())

    def tensors(self) -> dict[str, Tensor]:
        """The buffers under their names in the module."""
        return {name: self.get_buffer(key) for key, name in self.names.items()}
