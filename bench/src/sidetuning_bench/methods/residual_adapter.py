"""Parallel residual adapters (Rebuffi et al., 2018): a 1x1 convolution beside every larger one of a frozen base."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning.errors import TaskError
from sidetuning_bench.methods.method import Method
from sidetuning_bench.methods.recipe import Task
from sidetuning_bench.methods.trunk import Trunk


class ResidualAdapter(Method):
    """y = W * x + A_k * x, A_k 1x1 and zero at the start, and own batch norms for every task.

    Args:
        base: the base; a frozen copy of it is adapted.

    Raises:
        TaskError: the base has no convolution larger than 1x1 (use lora then).
    """

    name: ClassVar[str] = "residual-adapter"

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunk = Trunk(base, frozen=True)
        self.adapters = nn.ModuleDict()
        if not convolutions(self.trunk):
            raise TaskError("residual adapters need convolutions larger than 1x1, and this base has none; use lora")

    def add(self, task: Task) -> None:
        super().add(task)
        self.adapters[task.name] = Adapters(self.trunk)

    def tuned(self, task: str) -> Adapters:
        return cast(Adapters, self.adapters[task])

    def code(self, inputs: Input, task: str) -> Tensor:
        return self.tuned(task).around(self.trunk)(inputs)

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().tensors().items() if not k.startswith("trunk.")}


def convolutions(trunk: Trunk) -> dict[str, nn.Conv2d]:
    """The convolutions larger than 1x1, by name in the trunk's network."""
    return {n: m for n, m in trunk.layers().items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}


class Adapters(nn.Module):
    """The 1x1 convolutions and the batch norms of one task, by the names of their places in the trunk, "/" for "."."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.beside_conv, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for name, conv in convolutions(trunk).items():
            adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=False)
            nn.init.zeros_(adapter.weight)
            self.beside_conv[name.replace(".", "/")] = adapter
        for name, module in trunk.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                self.norms[name.replace(".", "/")] = copy.deepcopy(module).requires_grad_(True)

    def around(self, trunk: Trunk) -> Trunk:
        """A view of the trunk with the adapters beside its convolutions, and these norms instead of its own."""
        tensors = {}
        for key, norm in self.norms.items():
            for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                tensors[f"{key.replace('/', '.')}.{name}"] = tensor
        view = trunk.view(tensors)
        for key, norm in self.norms.items():
            view.get_submodule(key.replace("/", ".")).training = norm.training
        for key, adapter in self.beside_conv.items():
            view.net.get_submodule(key.replace("/", ".")).register_forward_hook(beside(adapter))
        return view


def beside(adapter: nn.Module) -> Any:
    """A forward hook that adds the adapter's output to a convolution's."""

    def hook(conv: nn.Conv2d, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Pixels that the stride skips are left out first. A stem's adapter with a stride, channels last and of fewer
        # than 8 channels, would corrupt memory when it learns (oneDNN issue 6035, AVX2).
        x = args[0][..., :: conv.stride[0], :: conv.stride[1]]
        extra = adapter(x)
        if extra.shape != output.shape:
            # A convolution that does not pad: the middle of what the adapter gives.
            top, left = [(a - b) // 2 for a, b in zip(extra.shape[-2:], output.shape[-2:], strict=True)]
            extra = extra[..., top : top + output.shape[-2], left : left + output.shape[-1]]
        return output + extra

    return hook
