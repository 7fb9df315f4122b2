"""LoRA (Hu et al., 2022) through peft: low-rank updates of every linear layer and convolution, one adapter per task."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import TaskError
from sidetuning.heads import run_head
from sidetuning_bench.methods.method import Method, Task, count
from sidetuning_bench.methods.trunk import Trunk


class LoRA(Method):
    """W x + (scale / rank) B A x, B zero at the start: every task starts from the base.

    Args:
        base: the base; a frozen copy of it is adapted, with its batch norms as they are.
        rank: of the updates.
        scale: peft's `lora_alpha`; twice the rank by default.

    Raises:
        ImportError: peft is not installed.
    """

    name: ClassVar[str] = "lora"

    def __init__(self, base: Base, rank: int = 8, scale: int | None = None) -> None:
        super().__init__(base, {"rank": rank, "scale": scale})
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("the method 'lora' needs peft: pip install 'sidetuning[lora]'") from error
        self.trunk = Trunk(base, frozen=True)
        targets = [n for n, m in self.trunk.layers().items() if adaptable(m)]
        if not targets:
            raise TaskError(
                "lora adapts linear layers and convolutions, and this base has none; use sidetune or features"
            )
        pattern = "|".join(re.escape(n) for n in targets)  # matched in full; a list would match ends of names too
        self._config = LoraConfig(r=rank, lora_alpha=scale or 2 * rank, target_modules=pattern, bias="none")
        self.heads = nn.ModuleDict()

    def add(self, task: Task) -> None:
        from peft import inject_adapter_in_model

        self.heads[task.name] = self.head(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a second adapter is added is the point
            inject_adapter_in_model(self._config, self.trunk.net, task.name)

    def remove(self, task: str) -> None:
        super().remove(task)
        for module in self._layers():
            if task in module.lora_A:
                module.set_adapter([other for other in module.lora_A if other != task])  # the active one is not deleted
                module.delete_adapter(task)

    def part(self, task: str) -> nn.Module:
        return nn.ModuleList([self.trunk, self.heads[task]])

    def trained(self, task: str) -> list[nn.Parameter]:
        return [*self._of(task).values(), *self.heads[task].parameters()]

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        for module in self._layers():  # peft keeps the active adapter as state: it is set before every use
            module.set_adapter(task)
        for name, parameter in self.trunk.named_parameters():  # which that froze again; `groups` says what is trained
            parameter.requires_grad_("lora_" in name)
        with no_fast_path():
            return run_head(self.heads[task], self.trunk(inputs), inputs)

    def _layers(self) -> list[Any]:
        from peft.tuners.lora import LoraLayer

        return [m for m in self.trunk.net.modules() if isinstance(m, LoraLayer)]

    def _of(self, task: str) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.trunk.named_parameters() if "lora_" in n and n.split(".")[-2] == task}

    def added(self, task: str) -> int:
        return count(self.heads[task]) + sum(p.numel() for p in self._of(task).values())

    def tensors(self) -> dict[str, Any]:
        return {k: v for k, v in super().tensors().items() if "lora_" in k or k.startswith("heads.")}


def adaptable(layer: nn.Module) -> bool:
    """Grouped convolutions are none of peft's; the output projection of `nn.MultiheadAttention` is read, not called."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1
    return type(layer) is not nn.modules.linear.NonDynamicallyQuantizableLinear


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """torch's fused transformer layer reads weights and would pass the adapters by."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
