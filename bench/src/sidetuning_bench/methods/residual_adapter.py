"""Parallel residual adapters (Rebuffi et al., 2018): a 1x1 convolution beside every larger one of a frozen base."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from sidetuning.base import Base, Features, Input
from sidetuning.errors import TaskError
from sidetuning.heads import run_head
from sidetuning_bench.methods.method import Method, Task, count
from sidetuning_bench.methods.trunk import Trunk


class ResidualAdapter(Method):
    """y = W * x + A_k * x, A_k 1x1 and zero at the start, and batch norms of its own for every task.

    Args:
        base: the base; a frozen copy of it is adapted.

    Raises:
        TaskError: the base has no convolution larger than 1x1 (use lora then).
    """

    name: ClassVar[str] = "residual-adapter"

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.trunk = Trunk(base, frozen=True)
        self.convolutions = {
            n: m for n, m in self.trunk.layers().items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
        }
        if not self.convolutions:
            raise TaskError(
                "residual adapters sit beside convolutions larger than 1x1, and this base has none; use lora"
            )
        self.adapters = nn.ModuleDict()
        self.heads = nn.ModuleDict()

    def add(self, task: Task) -> None:
        self.heads[task.name] = self.head(task)
        self.adapters[task.name] = Adapters(self.convolutions, self.trunk)

    def part(self, task: str) -> nn.Module:
        return nn.ModuleList([self.adapters[task], self.heads[task]])

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        adapters = self.adapters[task]
        assert isinstance(adapters, Adapters)
        handles = [m.register_forward_hook(adapters.beside(n)) for n, m in self.convolutions.items()]
        norms = {name: module for name, module in self.trunk.named_modules() if name in adapters.norm_names}
        for module in norms.values():
            module.train(adapters.training)
        try:
            code = functional_call(self.trunk, adapters.norm_tensors(), (inputs,))
        finally:
            for module in norms.values():
                module.eval()
            for handle in handles:
                handle.remove()
        return run_head(self.heads[task], code, inputs)

    def added(self, task: str) -> int:
        return count(self.part(task))

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().tensors().items() if not k.startswith("trunk.")}


class Adapters(nn.Module):
    """The 1x1 convolutions and the batch norms of one task."""

    def __init__(self, convolutions: dict[str, nn.Conv2d], trunk: nn.Module) -> None:
        super().__init__()
        self.beside_conv = nn.ModuleDict()
        for name, conv in convolutions.items():
            adapter = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=False)
            nn.init.zeros_(adapter.weight)
            self.beside_conv[name.replace(".", "/")] = adapter
        self.norms = nn.ModuleDict()
        self.norm_names = []
        for name, module in trunk.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                own = copy.deepcopy(module).requires_grad_(True)
                self.norms[name.replace(".", "/")] = own
                self.norm_names.append(name)

    def norm_tensors(self) -> dict[str, Tensor]:
        """Scales and running statistics under their names in the trunk."""
        tensors = {}
        for name in self.norm_names:
            norm = self.norms[name.replace(".", "/")]
            for key, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
                tensors[f"{name}.{key}"] = tensor
        return tensors

    def beside(self, name: str) -> Any:
        """A forward hook that adds the adapter's output to a convolution's."""
        adapter = self.beside_conv[name.replace(".", "/")]

        def hook(conv: nn.Conv2d, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # What a stride would skip is left out before. A 1x1 convolution with a stride, channels last, of fewer than 8 channels
            # corrupts memory when it learns (oneDNN issue 6035, AVX2): that is a stem's, whose input is an image.
            x = args[0][..., :: conv.stride[0], :: conv.stride[1]]
            extra = adapter(x)
            if extra.shape != output.shape:  # a convolution that does not pad: the middle of what the adapter sees
                top, left = [(a - b) // 2 for a, b in zip(extra.shape[-2:], output.shape[-2:], strict=True)]
                extra = extra[..., top : top + output.shape[-2], left : left + output.shape[-1]]
            return output + extra

        return hook
