"""LoRA (Hu et al., 2022) through peft: low-rank updates of every linear layer and convolution, one adapter per task."""

from __future__ import annotations

import re
import warnings
from typing import Any, ClassVar

from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning.errors import TaskError
from sidetuning_bench.methods.method import Method, count
from sidetuning_bench.methods.recipe import Task
from sidetuning_bench.methods.trunk import Trunk


class LoRA(Method):
    """W x + (scale / rank) B A x with B = 0 at the start, so every task starts from the base.

    Args:
        base: the base; a frozen copy of it is adapted, and its batch norms stay as they are.
        rank: rank of the updates.
        scale: peft's `lora_alpha`; twice the rank by default.

    Raises:
        ImportError: peft is not installed.
        TaskError: the base has no layer to adapt.
    """

    name: ClassVar[str] = "lora"

    def __init__(self, base: Base, rank: int = 8, scale: int | None = None) -> None:
        super().__init__(base, {"rank": rank, "scale": scale})
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ImportError("the method 'lora' needs peft: pip install 'sidetuning-bench[lora]'") from error
        self.trunk = Trunk(base, frozen=True)
        targets = [n for n, m in self.trunk.layers().items() if adaptable(m)]
        if not targets:
            raise TaskError("lora adapts linear layers and convolutions, and this base has none; use sidetune")
        # peft matches a pattern against whole names; of a list it would match the ends of names too.
        pattern = "|".join(re.escape(name) for name in targets)
        self._config = LoraConfig(r=rank, lora_alpha=scale or 2 * rank, target_modules=pattern, bias="none")

    def add(self, task: Task) -> None:
        from peft import inject_adapter_in_model

        super().add(task)
        with warnings.catch_warnings():
            # peft warns of a second adapter, which is the point.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(self._config, self.trunk.net, task.name)
        self._require_gradients()

    def remove(self, task: str) -> None:
        super().remove(task)
        for module in lora_layers(self.trunk):
            if task in module.lora_A:
                # peft complains when the active adapter is deleted.
                module.set_adapter([other for other in module.lora_A if other != task])
                module.delete_adapter(task)
        self._require_gradients()

    def _require_gradients(self) -> None:
        """Undo peft's choice, which freezes all adapters but the active one: `trained` decides."""
        for name, parameter in self.trunk.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def tuned(self, task: str) -> Trunk:
        return self.trunk

    def trained(self, task: str) -> list[nn.Parameter]:
        return [*self._of(task).values(), *self.heads[task].parameters()]

    def code(self, inputs: Input, task: str) -> Tensor:
        view = self.trunk.view({})
        for layer in lora_layers(view):
            # `set_adapter` would freeze the other tasks' adapters, which the view shares with the trunk.
            layer._active_adapter = task
        for module in view.modules():
            # torch's fused layers read weights and would pass the adapters by. In training mode they are not used; the
            # dropouts of a transformer layer are modules of their own, that of attention is a number.
            if isinstance(module, nn.TransformerEncoderLayer):
                module.training = True
            elif isinstance(module, nn.MultiheadAttention):
                module.training, module.dropout = True, 0.0
        return view(inputs)

    def _of(self, task: str) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.trunk.named_parameters() if "lora_" in n and n.split(".")[-2] == task}

    def added(self, task: str) -> int:
        return count(self.heads[task]) + sum(p.numel() for p in self._of(task).values())

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in super().tensors().items() if "lora_" in k or k.startswith("heads.")}


def lora_layers(net: nn.Module) -> list[Any]:
    """peft's layers in a network."""
    from peft.tuners.lora import LoraLayer

    return [module for module in net.modules() if isinstance(module, LoraLayer)]


def adaptable(layer: nn.Module) -> bool:
    """peft adapts no grouped convolutions; the output projection of `nn.MultiheadAttention` is read, not called."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1
    return type(layer) is not nn.modules.linear.NonDynamicallyQuantizableLinear
