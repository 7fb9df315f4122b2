"""Hashes of values: equal for equal values, others for others, however what tells them apart is held."""

from __future__ import annotations

import collections
import functools
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sidetuning.content import content_sha256, function_name, structure_sha256, weights_version


def written(text: str, number: int) -> Any:
    """What somebody writes in a script, and edits: `f`, with N for a number."""
    space: dict[str, Any] = {"torch": torch, "nn": nn, "partial": partial, "wraps": functools.wraps}
    exec(text.replace("N", str(number)), space)
    return space["f"]


DECORATED = """
def scaled(k):
    def decorate(method):
        @wraps(method)
        def inner(self, y): return method(self, y) * k
        return inner
    return decorate
class A:
    @scaled(N)
    def __call__(self, y): return y
f = A()
"""
CALLED = """
class A:
    def map(self, y): return self.inner(y)
    def inner(self, y): return y + N
a = A()
f = {}
"""
CHILD = """
class A{0}:
    def {1}(self, y): return y + N
class B(A):
    def {1}(self, y): return super().{1}(y)
f = B()
"""
HELD = "class A:\n keep = {}\n def __call__(self, y): return self.keep\nf = A()"
PRIVATE = (
    "class A(nn.Module):\n def __init__(self):\n  super().__init__()\n  {}\n def forward(self, x): return x\nf = A()"
)
WORDS = """
class A({0}):
    pass
f = A({1})
f.k = N
"""
SLOTS = """
class A:
    __slots__ = ("k",)
class B(A):
    pass
f = B()
f.k = N
"""
SCRIPTED = "def f(y):\n return y\nf.k = N"


@pytest.mark.parametrize(
    "text",
    [
        DECORATED,
        CALLED.format("a.map"),
        CALLED.format("lambda y: a.map(y)"),
        CALLED.format("lambda y: [each.map(y) for each in [a]]"),
        "class A:\n def __getitem__(self, y): return N\na = A()\nf = lambda y: a[y]",
        CHILD.format("", "__call__"),
        CHILD.format("(nn.Module)", "forward"),
        HELD.format("partial(max, N)"),
        HELD.format("partial(torch.add, other=N)"),
        HELD.format("{N}"),
        PRIVATE.format("self._size = (N, N)"),
        PRIVATE.format("self.part = nn.Module(); self.part.config = {'k': N}"),
        PRIVATE.format("self.register_forward_hook(lambda module, given, out: out * N)"),
        WORDS.format("dict", ""),
        WORDS.format("list", "[1]"),
        WORDS.format("int", "1"),
        SLOTS,
        SCRIPTED,
    ],
)
def test_what_is_edited_or_held_has_another_hash(text: str) -> None:
    one, again, other = (content_sha256(written(text, n)) for n in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(
    "make",
    [
        lambda n: collections.defaultdict(partial(int, n), {1: 2}),
        lambda n: np.ma.array([1, 2], mask=[0, n - 1]),
        lambda n: torch.Generator().manual_seed(n),
        lambda n: torch.tensor([1 + n * 1j]).conj(),
        lambda n: torch.tensor([1 + n * 1j]).conj().imag,
        lambda n: functools.reduce(lambda inner, _: [SimpleNamespace(inner=inner)], range(2000), n),
    ],
)
def test_values_differ_however_deep_and_odd(make: Any) -> None:
    one, again, other = (content_sha256(make(n)) for n in (1, 1, 2))
    assert one == again != other


def test_what_lies_within_itself_has_a_hash() -> None:
    one: list[Any] = [1]
    one.append(one)
    assert content_sha256(one) == content_sha256(one) != content_sha256([1, [1]])


def cached(factor: int) -> Any:
    @functools.lru_cache
    def times(x: int) -> int:
        return x * factor

    return times


@pytest.mark.parametrize("make", [cached, lambda n: np.vectorize(lambda x: x * n)])
def test_the_name_of_a_wrapped_function_tells_what_it_wraps(make: Any) -> None:
    assert function_name(make(1)) == function_name(make(1)) != function_name(make(2))
    assert function_name(np.add) == "add" and "#" not in function_name(torch.relu)


def test_what_is_read_of_another_file_of_ones_own_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    found = set()
    for n in (1, 2):
        (tmp_path / "own_helpers.py").write_text(f"def shifted(y):\n    return y + {'+'.join('1' * n)}\n")
        for text in (
            "from own_helpers import shifted\ndef f(y): return shifted(y)",
            "import own_helpers\ndef f(y): return own_helpers.shifted(y)",
        ):
            sys.modules.pop("own_helpers", None)
            monkeypatch.setattr(sys, "dont_write_bytecode", True)
            found.add(function_name(written(text, n)))
    assert len(found) == 4


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.last = nn.Linear(4, 3), 0, None
        self.config = SimpleNamespace(k=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = self.linear(x)
        return self.last  # type: ignore[return-value]


class Settings:
    """It has no text of its own."""


def test_what_a_pass_sets_and_where_objects_lie_are_no_part_of_a_structure() -> None:
    net, other = Counting(), Counting()
    net.config, other.config = Settings(), Settings()  # type: ignore[assignment]
    before = structure_sha256(net, [net])
    net(torch.zeros(1, 4))
    assert structure_sha256(net, [net]) == before == structure_sha256(other, [other])


def test_a_part_that_is_compiled_is_the_same_part() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    compiled = nn.Sequential(torch.compile(net[0], backend="eager"), net[1])  # type: ignore[call-overload]
    assert content_sha256(net) == content_sha256(compiled)


def test_numbers_that_change_places_are_another_version() -> None:
    net = nn.Linear(64, 512)
    net.register_buffer("unsaved", torch.ones(1), persistent=False)
    versions = [weights_version(net)]
    for rows in ((0, 1), (0, 32), (3, 500)):
        net.weight.data[list(rows)] = net.weight.data[list(rows[::-1])]
        versions.append(weights_version(net))
    net.unsaved.data.mul_(3)  # type: ignore[operator, union-attr]
    versions.append(weights_version(net))
    assert all(one != other for i, one in enumerate(versions) for other in versions[:i])
    assert versions[-1] == weights_version(net)
    shift = SimpleNamespace(number=1)
    first = weights_version(lambda x: shift.number * x, [])
    shift.number = 2
    assert weights_version(lambda x: shift.number * x, []) != first
