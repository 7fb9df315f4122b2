"""Progressive networks (Rusu et al., 2016): a new column per task that hears the base and all earlier columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import KINDS, Base, Features, Input
from sidetuning.errors import TaskError
from sidetuning.heads import run_head
from sidetuning.merges import pointwise
from sidetuning_bench.methods.method import Method, Task, count
from sidetuning_bench.methods.trunk import Trunk


class PNN(Method):
    """Column k: h_i = layer_i(h_{i-1}) + U_i relu(V_i [s_1 g_1, …, s_k g_k]); g_j are the same taps of base and earlier columns.

    A column has the base's shape and random weights; what came before it is frozen. The cost of an answer grows with
    the number of tasks.

    Args:
        base: the base, the first column.
        taps: submodules of its network after which columns are joined; by default its own taps, or the stages
            (`nn.Sequential`) at the top of the network.

    Raises:
        TaskError: no taps are given and none are found.
    """

    name: ClassVar[str] = "pnn"

    def __init__(self, base: Base, taps: Sequence[str] = ()) -> None:
        super().__init__(base)
        if not taps:
            children = base.net.named_children() if isinstance(base.net, nn.Module) else ()
            taps = list(base.tap_shapes) or [n for n, m in children if isinstance(m, nn.Sequential)]
        if not taps:
            raise TaskError(
                "progressive networks join columns at taps, and this base has none: name submodules, taps=[…]"
            )
        self.options = {"taps": list(taps)}
        self.first = base.with_taps(taps)
        self.columns = nn.ModuleDict()
        self.heads = nn.ModuleDict()

    def add(self, task: Task) -> None:
        self.heads[task.name] = self.head(task)
        self.columns[task.name] = Column(self.first, sources=len(self.tasks) + 1)

    def part(self, task: str) -> nn.Module:
        return nn.ModuleList([self.columns[task], self.heads[task]])

    def output(self, inputs: Input, features: Features | None, task: str) -> Tensor:
        known = [self.first.encode(inputs).taps]
        for name, column in self.columns.items():
            if name == task:
                break
            with torch.no_grad():
                known.append(column(inputs, known).taps)
        code = self.columns[task](inputs, known).out
        return run_head(self.heads[task], code, inputs)

    def added(self, task: str) -> int:
        return count(self.part(task))


class Column(nn.Module):
    """A network of the base's shape with a lateral adapter at every tap. Returns code and taps, laterals included."""

    def __init__(self, base: Base, sources: int) -> None:
        super().__init__()
        self.trunk = Trunk(base, pretrained=False)
        self.laterals = nn.ModuleDict(
            {name.replace(".", "/"): Lateral(shape, sources) for name, shape in base.tap_shapes.items()}
        )

    def forward(self, inputs: Input, known: Sequence[dict[str, Tensor]]) -> Features:
        taps: dict[str, Tensor] = {}
        hooks = []
        for key, lateral in self.laterals.items():
            name = key.replace("/", ".")
            hook = self._join(lateral, [source[name] for source in known], taps, name)
            hooks.append(self.trunk.net.get_submodule(name).register_forward_hook(hook))
        try:
            return Features(self.trunk(inputs), taps)
        finally:
            for handle in hooks:
                handle.remove()

    def _join(
        self, lateral: nn.Module, sources: list[Tensor], taps: dict[str, Tensor], name: str
    ) -> Callable[..., Any]:
        select = self.trunk.select

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            own = output[0] if isinstance(output, (tuple, list)) else output  # transformers' layers return tuples
            joined = select.channels_first(own) + lateral(sources)
            taps[name] = joined
            if select.channels_last and joined.ndim == 4:
                joined = joined.permute(0, 2, 3, 1)
            return (joined, *output[1:]) if isinstance(output, (tuple, list)) else joined

        return hook


class Lateral(nn.Module):
    """U relu(V [s_1 g_1, …]): the sources, each with a learned scale, reduced to the width of one and mapped on.

    Args:
        shape: of a tap, without the batch.
        sources: how many columns are heard.
    """

    def __init__(self, shape: tuple[int, ...], sources: int) -> None:
        super().__init__()
        kind = KINDS[len(shape)]
        width = shape[-1] if kind == "sequence" else shape[0]
        self.dim = -1 if kind == "sequence" else 1
        self.scales = nn.Parameter(torch.full((sources,), 0.1))
        self.reduce = pointwise(kind, sources * width, width)
        self.expand = pointwise(kind, width, width, bias=False)

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        scaled = [scale * g for scale, g in zip(self.scales, sources, strict=True)]
        return self.expand(F.relu(self.reduce(torch.cat(scaled, self.dim))))
