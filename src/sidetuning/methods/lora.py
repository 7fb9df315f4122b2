"""LoRA (Hu et al., 2022) through peft: low-rank updates of every linear layer and convolution, one adapter per task."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.branch import decode
from sidetuning.methods.method import Method, Task, count
from sidetuning.methods.trunk import Trunk


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
        super().__init__(base, rank=rank, scale=scale)
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("the method 'lora' needs peft: pip install 'sidetuning[lora]'") from error
        self.trunk = Trunk(base, frozen=True)
        targets = [n for n, m in self.trunk.layers().items() if not (isinstance(m, nn.Conv2d) and m.groups > 1)]
        self._config = LoraConfig(r=rank, lora_alpha=scale or 2 * rank, target_modules=targets, bias="none")
        self.heads = nn.ModuleDict()

    def add(self, task: Task) -> None:
        from peft import inject_adapter_in_model

        self.heads[task.name] = self.head(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a second adapter is added is the point
            inject_adapter_in_model(self._config, self.trunk.net, task.name)
        self._activate(task.name)

    def part(self, task: str) -> nn.Module:
        self._activate(task)
        return nn.ModuleList([self.trunk, self.heads[task]])

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        self._activate(task)
        return decode(self.heads[task], self.trunk(inputs), inputs)

    def _activate(self, task: str) -> None:
        """peft's layers keep the active adapter as state; it is set before every use, so that none is left over."""
        from peft.tuners.lora import LoraLayer

        for module in self.trunk.net.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter(task)
                for name, parameter in module.named_parameters():  # a new adapter leaves the earlier ones trainable
                    parameter.requires_grad_("lora_" in name and name.split(".")[1] == task)

    def _of(self, task: str) -> dict[str, Tensor]:
        return {n: p for n, p in self.trunk.named_parameters() if "lora_" in n and n.split(".")[-2] == task}

    def added(self, task: str) -> int:
        return count(self.heads[task]) + sum(p.numel() for p in self._of(task).values())

    def tensors(self) -> dict[str, Any]:
        return {k: v for k, v in super().tensors().items() if "lora_" in k or k.startswith("heads.")}
