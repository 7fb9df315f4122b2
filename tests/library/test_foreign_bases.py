"""Networks that are no plain modules: quantised, scripted, traced, exported, or not in memory."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sidetuning as st

# Of torch's own old and new ways to say the same.
pytestmark = pytest.mark.filterwarnings("ignore")


def plain(shift: float = 0.0) -> nn.Sequential:
    with st.seeded(0):
        net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16)).eval()
    with torch.no_grad():
        net[2].weight.add_(shift)  # type: ignore[operator, union-attr]
    return net


def half_weights(shift: float = 0.0) -> Any:
    return torch.ao.quantization.quantize_dynamic(plain(shift), {nn.Linear}, dtype=torch.float16)


def whole_weights(shift: float = 0.0) -> Any:
    import torch.ao.quantization as quantization

    steps = (quantization.QuantStub(), nn.Sequential(*plain(shift)[:2], nn.Linear(24, 4)), quantization.DeQuantStub())
    with st.seeded(1):
        steps[1][2].reset_parameters()  # type: ignore[operator]
        net: Any = nn.Sequential(*steps).eval()
        net.qconfig = quantization.get_default_qconfig("fbgemm")
        prepared = quantization.prepare(net)
        prepared(torch.rand(9, 12) + shift)
    return quantization.convert(prepared)


def traced(shift: float = 0.0) -> Any:
    return torch.jit.trace(plain(shift), torch.zeros(1, 12))


def scripted(shift: float = 0.0) -> Any:
    return torch.jit.script(plain(shift))


def frozen(shift: float = 0.0) -> Any:
    return torch.jit.freeze(torch.jit.script(plain(shift)))


def exported(shift: float = 0.0) -> Any:
    shapes = ({0: torch.export.Dim.AUTO},)
    return torch.export.export(plain(shift), (torch.zeros(2, 12),), dynamic_shapes=shapes).module()


def compiled(shift: float = 0.0) -> Any:
    return torch.compile(plain(shift), backend="eager")


def quantised_buffer(shift: float = 0.0) -> Any:
    net = plain()
    per_channel = torch.quantize_per_channel(torch.ones(2, 3) + shift, torch.ones(2), torch.zeros(2), 0, torch.qint8)
    net.register_buffer("table", per_channel)
    net.register_buffer("other", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return net


KINDS = [half_weights, whole_weights, traced, scripted, frozen, exported, compiled, quantised_buffer]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_they_work_completely(kind: Callable[..., Any], tmp_path: Path) -> None:
    x, y = torch.rand(4, 12), torch.arange(4) % 2
    net = kind()
    model = st.SideTuner(st.Base(net, example=torch.zeros(1, 12)))
    model.add_task("t", side="mlp", head=2, seed=0)
    st.fit(model, "t", [(x, y)], steps=2, progress=False)
    with torch.no_grad():
        assert torch.allclose(model.base(x).out, net(x), atol=1e-6)
    st.cache_features(model.base, torch.utils.data.TensorDataset(x, y), tmp_path / "cache", progress=False)
    assert str(model.summary()) and repr(model) and torch.equal(copy.deepcopy(model)(x, "t"), model(x, "t"))
    model.save_task("t", tmp_path / "t")
    torch.save({"x": x, "out": model(x, "t").detach()}, tmp_path / "x.pt")
    script = (
        "import sys, torch, sidetuning as st, test_foreign_bases as kinds\n"
        f"base = st.Base(kinds.{kind.__name__}(), example=torch.zeros(1, 12))\n"
        f"model, saved = st.load('{tmp_path / 't'}', base=base), torch.load('{tmp_path / 'x.pt'}')\n"
        "assert torch.equal(model(saved['x'], 't'), saved['out'])\n"
        "print(base.identity().digest(), base.structure())"
    )
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [model.base.identity().digest(), model.base.structure()], done.stderr[-2000:]
    other = st.Base(kind(0.5), example=torch.zeros(1, 12)).identity()
    assert other.sha256 != model.base.identity().sha256


@pytest.mark.parametrize(
    "kind", [half_weights, whole_weights, traced, scripted, frozen], ids=lambda kind: kind.__name__
)
def test_what_cannot_be_trained_is_not_copied(kind: Callable[..., Any]) -> None:
    model = st.SideTuner(st.Base(kind(), example=torch.zeros(1, 12)))
    with pytest.raises(st.SideTuningError, match=r"cannot be copied|cannot hold"):
        model.add_task("t", side="copy", head=2)


def dynamic() -> Any:
    # The range of a whole batch decides how each sample is rounded.
    return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)


def offloaded(tmp_path: Path) -> Any:
    from accelerate import disk_offload

    net = plain()
    disk_offload(net, str(tmp_path), execution_device=torch.device("cpu"))
    return net


def on_meta() -> Any:
    with torch.device("meta"):
        return plain()


def fixed() -> Any:
    return torch.export.export(plain(), (torch.zeros(2, 12),)).module()


def test_what_cannot_be_a_base_is_refused_when_it_is_built(tmp_path: Path) -> None:
    cases: list[tuple[Any, int, str]] = [
        (dynamic(), 1, "when another one is in its batch"),
        (offloaded(tmp_path), 1, "not in memory"),
        (on_meta(), 1, "not in memory"),
        (nn.LazyLinear(16), 1, "not initialised yet"),
        (fixed(), 1, "does not run on its example"),
        (fixed(), 2, "does not take one sample alone"),
        (torch.export.export(plain(), (torch.zeros(2, 12),)), 2, "does not run on its example"),
    ]
    for net, rows, sentence in cases:
        with pytest.raises(st.ShapeError, match=sentence):
            st.Base(net, example=torch.zeros(rows, 12))


class Two(Tensor):
    """A tensor that is made of two, as those of quantisation packages are."""

    one: Tensor
    two: Tensor

    @staticmethod
    def __new__(cls, one: Tensor, two: Tensor) -> Two:
        wrapper: Two = Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)  # type: ignore[attr-defined]
        wrapper.one, wrapper.two = one, two
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["one", "two"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].one, args[0].two)
        unwrapped = [a.one + a.two if isinstance(a, Two) else a for a in args]
        return func(*unwrapped, **(kwargs or {}))


def test_tensors_of_other_packages_are_hashed_by_what_they_hold(tmp_path: Path) -> None:
    def base(two: float) -> st.Base:
        net = nn.Linear(12, 16)
        with torch.no_grad():
            net.bias.zero_()
        weight = torch.arange(192.0).view(16, 12) / 100
        net.weight = nn.Parameter(Two(weight, torch.full((16, 12), two)), requires_grad=False)
        return st.Base(net, example=torch.zeros(1, 12))

    first = base(1.0)
    assert first.identity().sha256 == base(1.0).identity().sha256 != base(2.0).identity().sha256
    model = st.SideTuner(first)
    model.add_task("t", side="mlp", head=2)
    model.save_task("t", tmp_path)
    assert st.load(tmp_path, base=base(1.0)).tasks == ["t"]
    with pytest.raises(st.ArtifactError, match="another base"):
        st.load(tmp_path, base=base(2.0))
    with pytest.raises(st.ShapeError, match="cannot be copied"):
        model.add_task("copy", side="copy", head=2)


@pytest.mark.parametrize("name", ["factor", "_factor"])
def test_numbers_that_a_module_keeps_to_itself_name_the_cache(name: str) -> None:
    def structure(value: Any) -> str:
        net = plain()
        setattr(net, name, value)
        return st.Base(net, example=torch.zeros(1, 12)).structure()

    assert structure(1.0) == structure(1.0) != structure(2.0)
    assert structure(torch.ones(2)) != structure(torch.zeros(2))
