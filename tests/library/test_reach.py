"""The networks that a callable runs, wherever it holds them."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import pytest
import torch
from torch import nn

import sidetuning as st
from sidetuning.reach import modules_of


class Step:
    __slots__ = ("net",)

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def transform(self, x: Any) -> Any:
        return self.net(x)


class Steps:
    """As scikit-learn's pipeline."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps

    def transform(self, x: Any) -> Any:
        for _, step in self.steps:
            x = step.transform(x)
        return x


class Words(dict):  # type: ignore[type-arg]
    pass


def kept(net: nn.Module) -> Any:
    found = Words()
    found.net = net  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    "hold",
    [
        lambda net: Steps([("net", Step(net))]).transform,
        lambda net: Step(net).transform,
        lambda net: lambda x, given=net: given(x),
        lambda net: partial_of({"a": deque([(net,)])}),
        lambda net: partial_of({net}),
        lambda net: partial_of(kept(net)),
    ],
)
def test_a_network_is_found_wherever_a_callable_holds_it(hold: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert modules_of(hold(net)) == [net]


def partial_of(value: Any) -> Any:
    return lambda x: (x, value)


def test_networks_within_a_pipeline_are_frozen_hashed_and_moved() -> None:
    nets = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    one, other = (st.Base(Steps([("net", Step(net))]).transform, example=torch.zeros(2, 4)) for net in nets)
    assert one.identity().sha256 != other.identity().sha256
    assert not any(parameter.requires_grad for net in nets for parameter in net.parameters())
    one.to(torch.float64)
    assert nets[0][0].weight.dtype == torch.float64


class Two:
    def __init__(self) -> None:
        self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

    def __call__(self, x: Any) -> Any:
        return self.second(self.first(x))


def test_networks_come_in_the_order_in_which_they_are_held() -> None:
    two = Two()
    assert modules_of(two) == [two.second, two.first]


def test_functions_that_call_each_other_are_walked_once() -> None:
    many = range(30)
    space: dict[str, Any] = {}
    exec("\n".join(f"def h{i}(x): return {' or '.join(f'h{k}(x)' for k in many)}" for i in many), space)
    started = time.monotonic()
    assert modules_of(space["h0"]) == [] and time.monotonic() - started < 3
