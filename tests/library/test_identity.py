"""One identity of a base: equal for equal bases, different for different ones."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sidetuning as st
from conftest import conv_net, inputs
from sidetuning.content import content_sha256, function_name
from sidetuning.reach import methods_of


def timm_base(**options: Any) -> st.Base:
    pytest.importorskip("timm")
    with st.seeded(0):
        return st.load_base("timm:resnet18", pretrained=False, **options)


def test_a_task_of_the_vector_is_refused_on_the_map_of_the_same_weights(tmp_path: Path) -> None:
    vector, channels = timm_base(), timm_base(output="map")
    assert vector.identity().sha256 == channels.identity().sha256 and vector.identity() != channels.identity()
    model = st.SideTuner(vector)
    model.add_task("pets", side=None, merge="base-only", head=3)
    model.save_task("pets", tmp_path)
    with pytest.raises(st.ArtifactError, match=r"it returned \(512,\), this base returns \(512, 7, 7\)"):
        st.SideTuner(channels).load_task(tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet44-cifar10", {"pretrained": False}),
        ("resnet44-cifar10", {"output": "map"}),
        ("resnet44-cifar10", {"revision": "v9"}),
        ("timm:resnet18", {"revision": "v9", "pretrained": False}),
        ("onnx:net.onnx", {"revision": "v9"}),
        ("onnx:net.onnx", {"pretrained": False}),
        ("onnx:net.onnx", {"weights": "other.safetensors"}),
    ],
)
def test_options_that_a_base_does_not_read_are_refused(name: str, options: dict[str, Any]) -> None:
    option = next(iter(options))
    with pytest.raises(st.UnknownNameError, match=f"{name} does not read {option}=; leave it out"):
        st.load_base(name, **options)


def test_what_changes_the_features_changes_the_identity() -> None:
    net, x = conv_net().eval(), inputs("conv")
    assert isinstance(x, torch.Tensor)
    norm: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.2] * 3}
    bases = [
        st.Base(net, example=x),
        st.Base(net, example=x, **norm),
        st.Base(net, example=x, mean=[0.5004] * 3, std=[0.2] * 3),
        st.Base(net, example=x, output=lambda out: 2 * out),
        st.Base(net, example=x, output=lambda out: 3 * out),
        st.Base(conv_net()[:5].eval(), example=x),
        st.Base(conv_net()[:5].eval(), example=x, channels_last=True),
    ]
    digests = [base.identity().digest() for base in bases]
    assert len(set(digests)) == len(bases)
    again = st.Base(net, example=x, **norm)
    assert again.identity() == bases[1].identity() and again.identity().digest() == digests[1]
    assert again.with_taps(["2"]).identity() == again.identity()


def test_files_of_the_first_version_are_compared_by_what_they_hold() -> None:
    net, x = conv_net().eval(), inputs("conv")
    assert isinstance(x, torch.Tensor)
    base = st.Base(net, example=x, mean=[0.4914] * 3, std=[0.2] * 3)
    known = base.identity()
    rounded = {**known.preparation, "mean": [0.491] * 3}
    assert known.difference({"sha256": known.sha256}) is None
    assert known.difference({"sha256": known.sha256, "output_shape": [16], "preparation": rounded}) is None
    assert known.difference(known.record()) is None
    assert "otherwise" in str(known.difference({**known.record(), "preparation": rounded}))
    assert "sha256" in str(known.difference({**known.record(), "sha256": "0" * 64}))


def test_weights_moved_in_place_are_seen() -> None:
    base = st.Base(nn.Linear(4, 3), example=torch.zeros(1, 4))
    first = base.identity()
    assert base.identity() == first
    with torch.no_grad():
        base.net.weight[0, 0] += 1  # type: ignore[attr-defined]
    second = base.identity()
    base.net.weight.data[0, 0] += 1  # type: ignore[attr-defined]
    assert len({first.sha256, second.sha256, base.identity().sha256}) == 3


class Scaled(nn.Module):
    """A plain attribute decides what it computes."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.linear(x)


def closure(factor: float) -> Any:
    def double(x: torch.Tensor) -> torch.Tensor:
        return factor * x

    return double


class Pipeline:
    """As scikit-learn's: a fitted object whose method is the network."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift


def pairs() -> list[tuple[Any, Any]]:
    with st.seeded(0):
        first, second = Scaled(1.0), Scaled(1.0)
        scaled = Scaled(2.0)
    scaled.load_state_dict(first.state_dict())
    return [
        (first.forward, second.forward),
        (partial(first), partial(second)),
        (first, scaled),
        (closure(2.0), closure(3.0)),
        (Pipeline(0.5).transform, Pipeline(1.5).transform),
        (lambda x: first(x), lambda x: second(x)),
    ]


@pytest.mark.parametrize("pair", range(6))
def test_different_things_never_share_an_identity(pair: int, tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(5, 4), torch.arange(5))
    one, other = (st.Base(net, example=torch.randn(1, 4)) for net in pairs()[pair])
    model = st.SideTuner(one)
    model.add_task("a", side=None, merge="base-only", head=2)
    model.save_task("a", tmp_path / "a")
    with pytest.raises(st.ArtifactError, match="another base"):
        st.SideTuner(other).load_task(tmp_path / "a")
    for base in (one, other):
        cached = st.cache_features(base, data, tmp_path / "cache", progress=False)
        assert torch.allclose(cached.__getitems__(range(5))[1].out, base(data.tensors[0]).out, atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_network_behind_a_callable_is_frozen_and_moves() -> None:
    for hold in (lambda net: net.forward, partial, lambda net: lambda x: net(x), lambda net: Holder(net)):
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        base = st.Base(hold(net), example=torch.randn(2, 4))
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        before = net[1].running_mean.clone()  # type: ignore[union-attr, operator]
        net.train()
        base(torch.randn(5, 4))
        assert torch.equal(net[1].running_mean, before) and not net.training  # type: ignore[arg-type]
        base.to(torch.float64)
        assert net[0].weight.dtype == torch.float64 and base.parameter_count() == 21


class Holder:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


def test_a_compiled_network_is_the_same_base() -> None:
    with st.seeded(0):
        net = Scaled(1.0)
    plain = st.Base(net, example=torch.zeros(1, 4)).identity()
    compiled = st.Base(torch.compile(net, backend="eager"), example=torch.zeros(1, 4)).identity()
    assert compiled.sha256 == plain.sha256 and plain.difference(compiled.record()) is None


def checkpoint(folder: Path, kind: str) -> str:
    """A checkpoint without a pooler, as those of masked language models and of image classifiers are."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "ViT":
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **small)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    else:
        config = getattr(transformers, f"{kind}Config")(vocab_size=100, **small)
        getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("kind", ["Roberta", "Bert", "ViT"])
def test_a_checkpoint_without_a_pooler_is_the_same_base_at_every_load(kind: str, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "net", kind)
    base = st.load_base(name)
    assert st.load_base(name).identity() == base.identity()
    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head=2)
    model.save_task("t", tmp_path / "t")
    assert st.load(tmp_path / "t").tasks == ["t"]
    with pytest.raises(st.UnknownNameError, match=r"holds no weights for pooler.*depends on"):
        st.load_base(name, output="pooler_output")


class Pick:
    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, out: torch.Tensor) -> torch.Tensor:
        return out[:, self.index : self.index + 2]


class Activated(nn.Module):
    """A function, a list and an unsaved buffer decide what it computes."""

    def __init__(self, function: Any = torch.relu, factors: Any = (1.0,), shift: float = 0.0) -> None:
        super().__init__()
        self.linear, self.function, self.factors = nn.Linear(4, 3), function, list(factors)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.function(self.linear(x)) * self.factors[0] + self.shift
        return out


def picked(index: int) -> Any:
    def pick(out: torch.Tensor) -> torch.Tensor:
        return out[:, index : index + 2]

    return pick


def default(index: int) -> Any:
    return lambda out, i=index: out[:, i : i + 2]


@pytest.mark.parametrize("choose", [Pick, picked, default, lambda i: partial(torch.narrow, dim=1, start=i, length=2)])
def test_what_picks_the_output_names_the_cache(choose: Any, tmp_path: Path) -> None:
    net, data = nn.Linear(4, 6), torch.utils.data.TensorDataset(torch.randn(5, 4), torch.arange(5))
    for index in (0, 2):
        base = st.Base(net, example=torch.zeros(1, 4), output=choose(index))
        cached = st.cache_features(base, data, tmp_path, progress=False)
        assert torch.allclose(cached.__getitems__(range(5))[1].out, base(data.tensors[0]).out, atol=1e-6)
        again = st.Base(net, example=torch.randn(3, 4), output=choose(index))
        assert again.identity() == base.identity() and again.structure() == base.structure()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("other", [{"function": torch.tanh}, {"factors": (2.0,)}, {"shift": 1.0}])
def test_what_a_module_holds_beside_weights_names_the_cache(other: dict[str, Any], tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(5, 4), torch.arange(5))
    first, second = Activated(), Activated(**other)
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        base = st.Base(net, example=torch.zeros(1, 4))
        cached = st.cache_features(base, data, tmp_path, progress=False)
        assert torch.allclose(cached.__getitems__(range(5))[1].out, base(data.tensors[0]).out, atol=1e-6)


def test_the_example_is_no_part_of_what_a_base_is(tmp_path: Path) -> None:
    with st.seeded(0):
        vector, image = nn.Linear(4, 3), conv_net()
    examples = [torch.randn(1, 4), torch.randn(7, 4), torch.full((1, 4), -3.0)]
    bases = [st.Base(vector, example=example) for example in examples]
    assert bases[0].identity() == bases[1].identity() == bases[2].identity()
    small, large = (st.Base(image, example=torch.rand(1, 3, size, size)) for size in (32, 64))
    assert small.identity().difference(large.identity().record()) is None
    assert large.with_example(torch.zeros(1, 3, 32, 32)).identity() == small.identity()
    whole = st.Base(image, example=torch.zeros(1, 3, 32, 32, dtype=torch.uint8), mean=[0.5] * 3, std=[0.2] * 3)
    share = st.Base(image, example=torch.rand(1, 3, 32, 32), mean=[0.5] * 3, std=[0.2] * 3)
    assert whole.identity().difference(share.identity().record()) is None


def test_outputs_that_are_no_numbers_are_the_same_base_too() -> None:
    root = st.Base(lambda x: x.sqrt(), example=torch.ones(1, 4))
    assert root.identity().difference(root.identity().record()) is None
    masked = st.Base(lambda x: x.masked_fill(x > 0, float("-inf")), example=torch.ones(1, 4))
    assert masked.identity() == masked.identity()


@pytest.mark.slow
def test_functions_have_one_name_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from sidetuning.content import content_sha256, function_name\n"
        "def pick(x, f): return x if f else None\n"
        "inner = lambda x: x in {'a', 'b', 'c', 'd'}\n"
        "print(function_name(partial(pick, f=inner)), function_name(inner), content_sha256({'a', 'b', 'c'}))\n"
    )
    found = {subprocess.check_output([sys.executable, str(script)], text=True) for _ in range(3)}
    assert len(found) == 1 and " at 0x" not in found.pop()


def seeded_linear(number: int) -> nn.Module:
    with st.seeded(number):
        return nn.Linear(3, 2)


def calling(number: int) -> Any:
    module = seeded_linear(number)
    return lambda x: module(x)


class Slotted:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


@pytest.mark.parametrize(
    "make",
    [
        range,
        np.int64,
        np.arange,
        lambda n: np.array([{"n": n}], dtype=object),
        slice,
        Slotted,
        lambda n: Path(str(n)),
        lambda n: re.compile(str(n)),
        lambda n: deque([n]),
        lambda n: partial(max, n),
        lambda n: torch.arange(5)[n:].__getitem__,
        seeded_linear,
        calling,
        lambda n: nn.CrossEntropyLoss(label_smoothing=n / 10),
        lambda n: nn.Dropout(n / 10),
    ],
)
def test_values_of_every_type_have_hashes_of_their_own(make: Callable[[int], Any]) -> None:
    for wrapped in (lambda value: value, lambda value: [value], lambda value: lambda x: (value, x)):
        first, again, other = (content_sha256(wrapped(make(n))) for n in (1, 1, 2))
        assert first == again != other


def test_modules_that_hold_each_other_have_a_hash() -> None:
    class Holds(nn.Module):
        def __init__(self, other: Any) -> None:
            super().__init__()
            self.call = lambda x: other[0](x)

    one: list[nn.Module] = []
    two = [Holds(one)]
    one.append(Holds(two))
    assert content_sha256(two[0]) == content_sha256(two[0])


SHIFT = 1.0


def shifted(out: torch.Tensor) -> torch.Tensor:
    return moved(out)


def moved(out: torch.Tensor) -> torch.Tensor:
    return out + SHIFT


def test_what_a_function_reads_of_its_module_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    first = function_name(shifted)
    assert function_name(shifted) == first
    monkeypatch.setitem(globals(), "SHIFT", 2.0)
    assert function_name(shifted) != first


BACKBONE = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def by_name(x: torch.Tensor) -> torch.Tensor:
    return encoded(x)


def encoded(x: torch.Tensor) -> torch.Tensor:
    return BACKBONE(x)


def test_the_network_that_a_function_knows_by_name_is_frozen_and_hashed() -> None:
    base = st.Base(by_name, example=torch.randn(2, 4))
    assert not BACKBONE.training and not any(p.requires_grad for p in BACKBONE.parameters())
    assert base.parameter_count() == sum(p.numel() for p in BACKBONE.parameters())
    before = base.identity().sha256
    with torch.no_grad():
        next(BACKBONE.parameters()).add_(1)
    assert base.identity().sha256 != before


def written(line: str, before: str = "") -> Any:
    """A function as somebody writes it in a script of their own, and edits it."""
    space: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(f"{before}\n{line}", space)
    return space["f"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return torch.relu(x)", "def f(x): return torch.tanh(x)"),
        ("def f(x): return 2 * x", "def f(x): return 3 * x"),
        ("def f(x): return [2 * y for y in x]", "def f(x): return [3 * y for y in x]"),
        (
            "def f(x): return torch.stack([torch.relu(y) for y in x])",
            "def f(x): return torch.stack([torch.tanh(y) for y in x])",
        ),
        ("@torch.no_grad()\ndef f(x): return torch.relu(x)", "@torch.no_grad()\ndef f(x): return torch.tanh(x)"),
        ("S = 1\n@torch.no_grad()\ndef f(x): return S * x", "S = 2\n@torch.no_grad()\ndef f(x): return S * x"),
        (
            "def g(x): return h(x)\ndef h(x): return 2 * x\ndef f(x): return g(x)",
            "def g(x): return h(x)\ndef h(x): return 3 * x\ndef f(x): return g(x)",
        ),
        (
            "class A:\n def __call__(self, x): return self.g(x)\n def g(self, x): return x\nf = A()",
            "class A:\n def __call__(self, x): return self.g(x)\n def g(self, x): return -x\nf = A()",
        ),
        (
            "class A(nn.Module):\n def forward(self, x): return self.g(x)\n def g(self, x): return x\nf = A()",
            "class A(nn.Module):\n def forward(self, x): return self.g(x)\n def g(self, x): return -x\nf = A()",
        ),
    ],
)
def test_what_a_function_does_tells_it_from_its_earlier_form(one: str, other: str) -> None:
    assert function_name(written(one)) == function_name(written(one)) != function_name(written(other))


def test_functions_that_change_or_call_each_other_keep_their_name() -> None:
    counts = written("count = 0\ndef f(x):\n global count\n count += 1\n return x")
    first = function_name(counts)
    counts(1)
    assert function_name(counts) == first
    lines = [f"def h{i}(x): return {' + '.join(f'h{j}(x)' for j in range(12))}" for i in range(12)]
    many = written("def f(x): return h0(x)", "\n".join(lines))
    assert function_name(many) == function_name(many)
    table = written("def g(x): return x\nTABLE = {g: 1, (1, 2): 2}\ndef f(x): return TABLE[x]")
    assert " at 0x" not in function_name(table) and function_name(table) == function_name(table)


def test_odd_functions_are_bases_too() -> None:
    made = written("def f(x): return x * 2")
    made.__module__ = None
    assert st.Base(made, example=torch.zeros(1, 3)).identity().sha256

    def later(x: torch.Tensor) -> torch.Tensor:
        return x * unfilled  # type: ignore[has-type]

    assert content_sha256(later)
    unfilled = 2.0
    held: set[Any] = set()

    class Holds:
        def __init__(self) -> None:
            self.others = held

    held.add(Holds())
    assert content_sha256(held)


HIDDEN = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def third(x: torch.Tensor) -> torch.Tensor:
    return HIDDEN(x)


@torch.no_grad()
def second(x: torch.Tensor) -> torch.Tensor:
    return third(x)


def first(x: torch.Tensor) -> torch.Tensor:
    return second(x)


LAZY: Any = None


def made(x: torch.Tensor) -> torch.Tensor:
    global LAZY
    LAZY = LAZY or nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    return LAZY(x)  # type: ignore[no-any-return]


def test_a_network_is_found_behind_any_number_of_functions() -> None:
    st.Base(first, example=torch.randn(2, 4))
    assert not HIDDEN.training and not any(p.requires_grad for p in HIDDEN.parameters())
    made(torch.randn(2, 4))
    base = st.Base(made, example=torch.randn(2, 4))
    assert not LAZY.training and base.parameter_count() == 15


CLASS = "class A:\n s = {}\n def __call__(self, x): return self.g(x) * self.s\n {}\n def g(self, x): return {}\nf = A()"
SLOTS = "from dataclasses import dataclass\n@dataclass(slots=True)\nclass A:\n n: int\n"
SLOTS += " def __call__(self, x): return {}\nf = A(1)"
CELLS = "def m(a, b):\n def f(x): return (a, b)\n return f\nf = m({})"
UNUSED = "class A:\n def __call__(self, x): return x\n def plot(self): return {}\nf = A()"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CLASS.format(1, "@torch.no_grad()", "x"), CLASS.format(1, "@torch.no_grad()", "-x")),
        (CLASS.format(1, "@property", "x"), CLASS.format(1, "@property", "-x")),
        (CLASS.format(1, "@staticmethod", "x"), CLASS.format(2, "@staticmethod", "x")),
        (SLOTS.format("x"), SLOTS.format("-x")),
        ("def f(a, b): return a - b", "def f(b, a): return b - a"),
        (CELLS.format("1, None"), CELLS.format("None, 1")),
        (
            "def m(n):\n def g(x): return n\n return g\na, b = m(2), m(3)\nh = [a, b, a]\ndef f(x): return h",
            "def m(n):\n def g(x): return n\n return g\na, b = m(2), m(3)\nh = [a, b, b]\ndef f(x): return h",
        ),
    ],
)
def test_what_a_class_says_of_its_objects_counts(one: str, other: str) -> None:
    assert function_name(written(one)) == function_name(written(one)) != function_name(written(other))


def test_methods_that_nobody_calls_do_not_count() -> None:
    assert function_name(written(UNUSED.format(1))) == function_name(written(UNUSED.format(2)))


def test_objects_that_hold_more_than_their_attributes_are_told_apart() -> None:
    pandas, image = pytest.importorskip("pandas"), pytest.importorskip("PIL.Image")

    class Queue(deque):  # type: ignore[type-arg]
        pass

    for make in (
        lambda n: pandas.DataFrame({"a": [1.0, n]}),
        lambda n: image.fromarray(np.full((4, 4, 3), n, np.uint8)),
        lambda n: Queue([n]),
    ):
        one, again, other = (content_sha256(make(n)) for n in (1, 1, 2))  # type: ignore[no-untyped-call]
        assert one == again != other


def test_packages_and_layers_without_values_have_a_hash() -> None:
    import torch.nn.functional as package

    lazy, meta = nn.LazyLinear(3), nn.Linear(3, 2, device="meta")
    named = lambda x: package.relu(x)  # noqa: E731
    before = content_sha256(named)
    assert content_sha256(lambda x: lazy(x)) and content_sha256(lambda x: meta(x))
    assert content_sha256(named) == before and len(content_sha256(package)) == 64


def test_modules_that_are_met_again_have_numbers_of_their_own() -> None:
    """A list of layers, one of which is named again: which one matters."""

    def named(again: int) -> Any:
        layers = [seeded_linear(k) for k in range(4)]
        nested = nn.Sequential(nn.Sequential(seeded_linear(9), seeded_linear(10)))
        return lambda x: (nested, layers, layers[again])

    assert len({content_sha256(named(k)) for k in range(4)}) == 4


def test_the_methods_of_a_class_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[type] = []

    def counted(kind: type, name: str) -> dict[str, Any]:
        asked.append(kind)
        return methods_of(kind, name)

    monkeypatch.setattr("sidetuning.content.methods_of", counted)
    st.Base(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), example=torch.zeros(1, 4)).structure()
    assert len(asked) == len(set(asked)) > 0


class Infinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(x), torch.full_like(x[:, :1], float("-inf"))], 1)


def test_a_base_whose_outputs_are_infinite_loads_its_own_tasks(tmp_path: Path) -> None:
    base, other = st.Base(Infinite(), example=torch.zeros(1, 4)), st.Base(Infinite(), example=torch.zeros(1, 4))
    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head=2)
    model.save_task("t", tmp_path)
    assert st.SideTuner(base).load_task(tmp_path)
    identity = base.identity()
    # As version 0.2.0 wrote it.
    assert identity.difference({**identity.record(), "probe": [float("inf")] * len(identity.probe)}) is None
    assert all(map(math.isfinite, identity.probe)) and identity.probe != other.identity().probe
