"""Merge operators R(x) = merge(B(x), S(x)): the paper's (section 3.2), for vectors, maps and sequences alike.

A merge is called as `merge(base, side, laterals)`, all of the base's shape, and returns that shape. The dense variants
take the detached side outputs of earlier tasks as `laterals` (paper, section 3.4); `laterals=n` at construction says
how many. None of a merge's parameters gets weight decay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Kind
from sidetuning.errors import TaskError
from sidetuning.registry import Registry
from sidetuning.sides.fit import BatchNorm


class Merge(nn.Module):
    """A merge of the code of the base with that of the side.

    Args:
        kind: "vector", "sequence" or "map".
        width: channels of the code.
        laterals: how many earlier tasks' sides it reads.

    Attributes:
        uses_side: False where the side output is ignored; no side is built then.
        takes_laterals: whether it has a variant with laterals.

    Raises:
        TaskError: laterals for a merge that has no such variant.
    """

    uses_side = True
    takes_laterals = False

    def __init__(self, kind: Kind, width: int, laterals: int = 0) -> None:
        super().__init__()
        if laterals and not self.takes_laterals:
            raise TaskError(f"merge {type(self).__name__} reads no laterals: use one of {', '.join(lateral_merges())}")

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        """R(x) from the outputs of `base`, `side` and, detached, earlier sides, `laterals`; all of one shape."""
        raise NotImplementedError


MERGES: Registry[Callable[..., Merge]] = Registry("merge")


def lateral_merges() -> list[str]:
    """Names of the merges that take laterals."""
    found: dict[str, object] = {name: MERGES[name] for name in MERGES.names()}
    merges = {name: entry for name, entry in found.items() if isinstance(entry, type) and issubclass(entry, Merge)}
    return [name for name, merge in merges.items() if merge.takes_laterals]


@MERGES.register("base-only")
class BaseOnly(Merge):
    """R = B: fixed features."""

    uses_side = False

    def forward(self, base: Tensor, side: Tensor | None, laterals: Sequence[Tensor] = ()) -> Tensor:
        return base


@MERGES.register("side-only")
class SideOnly(Merge):
    """R = S: an independent network per task."""

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        return side


@MERGES.register("sum")
class Sum(Merge):
    """R = B + S (+ laterals)."""

    takes_laterals = True

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        return functools.reduce(torch.add, laterals, base + side)


@MERGES.register("product")
class Product(Merge):
    """R = B * S (* laterals), element by element."""

    takes_laterals = True

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        return functools.reduce(torch.mul, laterals, base * side)


@MERGES.register("fixed")
class Fixed(Merge):
    """R = B/2 + S/2."""

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        return 0.5 * base + 0.5 * side


@MERGES.register("alpha")
class Alpha(Merge):
    """R = a B + (1-a) S with a = sigmoid(alpha), the paper's default; with laterals a softmax over B, laterals and S.

    Args:
        init: a at the start, in (0, 1), by default that of equal weights; laterals and side share the rest.
    """

    takes_laterals = True

    def __init__(self, kind: Kind, width: int, laterals: int = 0, init: float | None = None) -> None:
        super().__init__(kind, width, laterals)
        share = 1 / (laterals + 2) if init is None else init
        if not 0 < share < 1:
            raise TaskError(f"alpha's init is the weight of the base and must lie in (0, 1), not {init}")
        self.alpha = nn.Parameter(torch.zeros(laterals + 2) if laterals else torch.tensor(share).logit())
        if laterals and init is not None:
            self.alpha.data[0] = math.log(share / (1 - share) * (laterals + 1))

    @property
    def weights(self) -> Tensor:
        """The weights of base, laterals in order, and side: (laterals + 2,), summing to 1."""
        if self.alpha.ndim:
            return self.alpha.softmax(0)
        a = self.alpha.sigmoid()
        return torch.stack([a, 1 - a])

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        if not self.alpha.ndim:
            # The same numbers, at half the cost for a small code.
            a = self.alpha.sigmoid()
            return a * base + (1 - a) * side
        parts = [base, *laterals, side]
        return functools.reduce(torch.add, [w * part for w, part in zip(self.weights, parts, strict=True)])


@MERGES.register("film")
class FiLM(Merge):
    """R = B * (m(S) + S) + (p(S) + S): the side scales and shifts the base through a hidden layer.

    Args:
        hidden: width of the hidden layer.
    """

    def __init__(self, kind: Kind, width: int, laterals: int = 0, hidden: int = 64) -> None:
        super().__init__(kind, width, laterals)
        self.base_layer = nn.Sequential(pointwise(kind, width, hidden, bias=False), _norm(kind, hidden), nn.ReLU())
        self.mult_head = pointwise(kind, hidden, width)
        self.add_head = pointwise(kind, hidden, width)

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        hidden = self.base_layer(side)
        return base * (self.mult_head(hidden) + side) + self.add_head(hidden) + side


@MERGES.register("mlp")
class MLP(Merge):
    """R = net(B) + S (+ net_i(lateral_i))."""

    takes_laterals = True

    def __init__(self, kind: Kind, width: int, laterals: int = 0) -> None:
        super().__init__(kind, width, laterals)
        self.base_net = _net(kind, width)
        self.side_net: nn.Module = nn.Identity()
        self.lateral_nets = nn.ModuleList(_net(kind, width) for _ in range(laterals))

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        merged: Tensor = self.base_net(base) + self.side_net(side)
        for net, lateral in zip(self.lateral_nets, laterals, strict=True):
            merged = merged + net(lateral)
        return merged


@MERGES.register("mlp-hidden")
class MLPHidden(MLP):
    """R = ReLU(net(B) + S (+ net_i(lateral_i)))."""

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        return F.relu(super().forward(base, side, laterals))


@MERGES.register("mlp2")
class MLP2(MLP):
    """R = net(B) + net'(S) (+ net_i(lateral_i)): the merge of the paper's iCIFAR."""

    def __init__(self, kind: Kind, width: int, laterals: int = 0) -> None:
        super().__init__(kind, width, laterals)
        self.side_net = _net(kind, width)


@MERGES.register("res-mlp")
class ResMLP2(MLP):
    """R = net(B) + S + net'(S) (+ net_i(lateral_i))."""

    def __init__(self, kind: Kind, width: int, laterals: int = 0) -> None:
        super().__init__(kind, width, laterals)
        self.side_net = _Residual(_net(kind, width))


@MERGES.register("concat")
class Concat(Merge):
    """R = transfer([B, S]): two layers (3x3 convolutions on maps), each with ReLU, from twice the width back to it."""

    def __init__(self, kind: Kind, width: int, laterals: int = 0) -> None:
        super().__init__(kind, width, laterals)
        self.dim = -1 if kind == "sequence" else 1
        if kind == "map":
            first: nn.Module = nn.Conv2d(2 * width, width, 3, padding=1)
            second: nn.Module = nn.Conv2d(width, width, 3, padding=1)
        else:
            first, second = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.transfer = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        merged: Tensor = self.transfer(torch.cat([base, side], self.dim))
        return merged


class Gated(nn.Module):
    """R = B + g (merge(B, S) - B), g = tanh(100 p), p = 0 at the start: any merge, starting exactly at B.

    Every parameter learns as soon as g has moved, and g moves in the first step. An optimiser such as Adam moves p by
    the learning rate in a step; without the factor the gate would stay all but closed for hundreds of steps.
    """

    def __init__(self, merge: nn.Module) -> None:
        super().__init__()
        self.merge = merge
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, base: Tensor, side: Tensor | None, laterals: Sequence[Tensor] = ()) -> Tensor:
        merged: Tensor = self.merge(base, side, laterals)
        return base + torch.tanh(100 * self.gate) * (merged - base)


class GroupNorm(nn.Module):
    """The paper's normalisation of the merged code: group norm without parameters, per token on sequences.

    Uses 8 groups, or as many as divide the width; of vectors and tokens a group holds two numbers at least, since one
    alone would always be 0.

    Raises:
        TaskError: vectors or tokens of width 1.
    """

    def __init__(self, kind: Kind, width: int, groups: int = 8) -> None:
        super().__init__()
        self.kind = kind
        if width == 1 and kind != "map":
            raise TaskError("prenorm would make every code of width 1 the same; leave it out")
        most = groups if kind == "map" else min(groups, width // 2)
        self.groups = max(g for g in range(1, most + 1) if width % g == 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "sequence":
            return F.group_norm(x.flatten(0, 1), self.groups).view_as(x)
        return F.group_norm(x, self.groups)

    def extra_repr(self) -> str:
        return f"{self.groups} groups"


def pointwise(kind: Kind, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    """A layer that mixes channels only: 1x1 convolution on maps, linear on vectors and tokens."""
    return nn.Conv2d(inputs, outputs, 1, bias=bias) if kind == "map" else nn.Linear(inputs, outputs, bias=bias)


def _net(kind: Kind, width: int) -> nn.Sequential:
    """The two-layer net of the MLP merges, as the original has it for vectors and for maps."""
    if kind == "map":
        layers = [_Scale(0.9), pointwise(kind, width, width, bias=False), _norm(kind, width), nn.ReLU()]
        return nn.Sequential(*layers, pointwise(kind, width, width, bias=False))
    return nn.Sequential(nn.Linear(width, width), _norm(kind, width), nn.ReLU(), nn.Linear(width, width))


def _norm(kind: Kind, width: int) -> nn.Module:
    if kind == "map":
        return nn.GroupNorm(2 if width % 2 == 0 else 1, width)
    # On sequences a batch norm would mix tokens and padding.
    return BatchNorm(width) if kind == "vector" else nn.LayerNorm(width)


class _Scale(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([start]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Residual(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)
