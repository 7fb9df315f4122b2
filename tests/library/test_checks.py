"""What is added to a model can be saved and loaded again, or is refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import l1_unstructured

import sidetuning as st
from conftest import TAPS, conv_base, inputs

X, Y = inputs("conv"), torch.arange(4) % 2


def model_with(side: Any, **options: Any) -> st.SideTuner:
    model = st.SideTuner(conv_base(TAPS["conv"]))
    model.add_task("t", side=side, head=2, **options)
    return model


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compile_part(part: str) -> Callable[[Any], None]:
    return lambda branch: setattr(branch, part, compiled(getattr(branch, part)))


def compile_layer(branch: Any) -> None:
    branch.side.conv2 = compiled(branch.side.conv2)


def nothing(branch: Any) -> None:
    return None


def own() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))


def normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(3 * 32 * 32, 16)))


@pytest.mark.parametrize(
    ("side", "change", "options"),
    [
        ("fcn4", compile_part("side"), {}),
        ("ladder", compile_part("side"), {}),
        ("fusion", compile_part("side"), {}),
        ("copy", compile_part("side"), {}),
        ("fcn4", compile_part("head"), {}),
        ("fcn4", compile_part("merge"), {"merge": "mlp2"}),
        ("fcn4", compile_part("merge"), {"init": "zero"}),
        ("fcn4", compile_layer, {}),
        ("fcn4", lambda branch: branch.side.compile(backend="eager"), {}),
        (own, nothing, {}),
        (normed, nothing, {}),
        (lambda: compiled(own()), nothing, {}),
        (lambda: compiled(own()), nothing, {"init": "low-energy"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_compiled_and_normed_parts_are_saved_and_loaded(
    side: Any, change: Callable[[Any], None], options: dict[str, Any], tmp_path: Path
) -> None:
    model = model_with(side if isinstance(side, str) else side(), **options)
    change(model["t"])
    st.fit(model, "t", [(X, Y)], steps=2, progress=False)
    model.save_task("t", tmp_path)
    again = st.SideTuner(conv_base(TAPS["conv"]))
    # A plain instance stands for a compiled one, too.
    given = None if isinstance(side, str) else normed() if side is normed else own()
    again.load_task(tmp_path, side=given)
    assert torch.allclose(again(X, "t"), model(X, "t"), atol=1e-6)


def replace_activation(branch: Any) -> None:
    branch.side.conv1[2] = nn.GELU()


@pytest.mark.parametrize(
    "change",
    [
        lambda branch: parametrizations.weight_norm(branch.side.conv1[0]),
        lambda branch: parametrizations.spectral_norm(branch.side.conv2[0]),
        lambda branch: l1_unstructured(branch.side.conv1[0], "weight", 0.3),
        lambda branch: setattr(branch, "head", nn.Linear(16, 2)),
        lambda branch: branch.side.register_buffer("seen", torch.zeros(())),
        replace_activation,
    ],
)
def test_a_registered_part_that_was_changed_is_not_saved(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = model_with("fcn4")
    change(model["t"])
    with pytest.raises(st.TaskError, match="task 't' was changed after it was built"):
        model.save_task("t", tmp_path / "t")
    assert not (tmp_path / "t").exists()


class Counting(nn.Module):
    """A state of its own that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = own()

    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


def sparse() -> nn.Module:
    net = own()
    net.register_buffer("mask", torch.eye(3).to_sparse())
    return net


@pytest.mark.parametrize("side", [Counting, sparse])
def test_parts_that_a_file_cannot_hold_are_refused_before_they_are_trained(side: Callable[[], nn.Module]) -> None:
    with pytest.raises(st.TaskError, match="that a task's file cannot hold"):
        model_with(side())


def test_a_copied_encoder_holds_nothing_dead(encoder: Path, tmp_path: Path) -> None:
    base = st.load_base(f"hf:{encoder}")
    assert any("pooler" in name for name, _ in base.net.named_parameters())  # type: ignore[attr-defined]
    model = st.SideTuner(base)
    model.add_task("t", side="copy", head=3)
    batch = {"input_ids": torch.arange(9)[None] % 5, "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    side = model["t"].side
    assert side is not None and torch.equal(side(**batch), base(batch).out)
    assert not any("pooler" in name for name in model["t"].state_dict())
    model(batch, "t").sum().backward()
    assert all(parameter.grad is not None for parameter in model["t"].parameters())
    model.save_task("t", tmp_path)
    assert torch.equal(st.load(tmp_path)(batch, "t"), model(batch, "t"))


class Experts(nn.Module):
    """Which expert is run depends on the input; what comes beside the code is not read."""

    def __init__(self, add: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.beside, self.add = nn.Linear(4, 4), add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            beside = self.beside(x)
        large = x.sum(1, keepdim=True) > 1
        out = torch.where(large, self.experts[1](x) if large.any() else x, self.experts[0](x))
        return out + beside if self.add else out


@pytest.mark.parametrize(("add", "kept"), [(False, False), (True, True)])
def test_only_what_changes_nothing_is_left_out_of_a_copy(add: bool, kept: bool) -> None:
    with st.seeded(0):
        net = Experts(add)
    model = st.SideTuner(st.Base(net, example=torch.zeros(1, 4)))
    model.add_task("t", side="copy", merge="side-only", head="identity")
    names = set(model["t"].state_dict())
    assert "side.net.experts.1.weight" in names and ("side.net.beside.weight" in names) == kept
    x = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])
    assert torch.equal(model(x, "t"), net(x))
