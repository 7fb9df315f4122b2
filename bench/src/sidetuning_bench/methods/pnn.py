"""Progressive networks (Rusu et al., 2016): a new column per task, which reads from the base and all columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import KINDS, Base, Features, Input
from sidetuning.errors import TaskError
from sidetuning.merges import pointwise
from sidetuning.outputs import channels_first
from sidetuning_bench.methods.method import Method
from sidetuning_bench.methods.recipe import Task
from sidetuning_bench.methods.trunk import Trunk


class PNN(Method):
    """Column k: h_i = layer_i(h_{i-1}) + U_i relu(V_i [s_1 g_1, …, s_k g_k]).

    g_j are the same taps of the base and of earlier columns. A column has the base's shape and random weights;
    everything before it is frozen. The cost of an answer grows with the number of tasks.

    Args:
        base: the base, the first column.
        taps: submodules of its network after which columns are joined; by default its own taps, or the stages
            (`nn.Sequential`) at the top of the network.

    Raises:
        TaskError: no taps are given and none are found.
    """

    name: ClassVar[str] = "pnn"

    def __init__(self, base: Base, taps: Sequence[str] = ()) -> None:
        if not taps:
            children = base.net.named_children() if isinstance(base.net, nn.Module) else ()
            taps = list(base.tap_shapes) or [n for n, m in children if isinstance(m, nn.Sequential)]
        if not taps:
            raise TaskError("progressive networks join columns at taps; this base has none: name submodules, taps=[…]")
        super().__init__(base, {"taps": list(taps)})
        self.first = base.with_taps(taps)
        self.columns = nn.ModuleDict()

    def add(self, task: Task) -> None:
        super().add(task)
        self.columns[task.name] = Column(self.first, sources=len(self.tasks) + 1)

    def tuned(self, task: str) -> nn.Module:
        return self.columns[task]

    def code(self, inputs: Input, task: str) -> Tensor:
        earlier = [self.first.encode(inputs).taps]
        for name, column in self.columns.items():
            if name == task:
                break
            with torch.no_grad():
                earlier.append(column(inputs, earlier).taps)
        return self.columns[task](inputs, earlier).out


class Column(nn.Module):
    """A network of the base's shape with a lateral adapter at every tap. Returns code and taps, laterals included."""

    def __init__(self, base: Base, sources: int) -> None:
        super().__init__()
        self.trunk = Trunk(base, pretrained=False)
        # Names of modules hold no dots.
        self.laterals = nn.ModuleDict(
            {name.replace(".", "/"): Lateral(shape, sources) for name, shape in base.tap_shapes.items()}
        )
        self.layouts = base.layouts

    def forward(self, inputs: Input, earlier: Sequence[dict[str, Tensor]]) -> Features:
        taps: dict[str, Tensor] = {}
        view = self.trunk.view({})
        for key, lateral in self.laterals.items():
            name = key.replace("/", ".")
            hook = self._join(lateral, [column[name] for column in earlier], taps, name)
            view.net.get_submodule(name).register_forward_hook(hook)
        return Features(view(inputs), taps)

    def _join(
        self, lateral: nn.Module, sources: list[Tensor], taps: dict[str, Tensor], name: str
    ) -> Callable[..., Any]:
        layout = self.layouts.get(name)

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            # The layers of transformers return tuples.
            several = isinstance(output, (tuple, list))
            taps[name] = joined = channels_first(output[0] if several else output, layout) + lateral(sources)
            if layout == "nhwc":
                joined = joined.permute(0, 2, 3, 1)
            return (joined, *output[1:]) if several else joined

        return hook


class Lateral(nn.Module):
    """U relu(V [s_1 g_1, …]): the sources, each with a learned scale, reduced to the width of one and mapped on.

    Args:
        shape: shape of a tap, without the batch.
        sources: how many columns it reads from.
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
