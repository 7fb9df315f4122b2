"""Tasks come and go: their taps with them, their types as the model's, and a thousand load in one reading."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sidetuning as st
from conftest import BASES, TAPS, conv_base, in_threads, inputs, mlp_base
from sidetuning import artifacts, loading
from sidetuning.base import Base


def passes_of(base: st.Base) -> list[int]:
    passes: list[int] = []
    base.net.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[attr-defined]
    return passes


@pytest.mark.parametrize("kind", BASES)
def test_a_removed_task_takes_its_taps_away(kind: str) -> None:
    first, second = TAPS[kind]
    model = st.SideTuner(BASES[kind]())
    x, passes = inputs(kind), passes_of(model.base)
    model.add_task("plain", side="mlp", head=2)
    for name, taps in (("one", [first]), ("both", [first, second])):
        model.add_task(name, side="ladder", head=2, taps=taps)
    expected = {name: model(x, name) for name in model.tasks}
    passes.clear()
    model.remove_task("both")
    assert list(model.base.tap_shapes) == [first] and not passes
    assert torch.equal(model(x, "one"), expected["one"]) and torch.equal(model(x, "plain"), expected["plain"])
    model.remove_task("one")
    assert not model.base.tap_shapes and not model.base(x).taps
    assert torch.equal(model(x, "plain"), expected["plain"])
    model.add_task("one", side="ladder", head=2, taps=[first])
    assert list(model.base.tap_shapes) == [first]


def test_taps_that_a_base_came_with_stay() -> None:
    model = st.SideTuner(conv_base(("2",)))
    model.add_task("t", side="ladder", head=2, taps=["2", "4"])
    model.remove_task("t")
    assert list(model.base.tap_shapes) == ["2"]
    model.add_task("t", side="fusion", head=2)
    assert model["t"].taps == ("2",)


def test_threads_that_add_and_remove_tasks_lose_no_tap() -> None:
    model = st.SideTuner(conv_base())
    errors: list[Exception] = []
    x = inputs("conv")

    def change(i: int) -> None:
        try:
            for k in range(8):
                model.add_task(f"t{i}", side="ladder", head=2, taps=[TAPS["conv"][(i + k) % 2]])
                model(x, f"t{i}")
                model.remove_task(f"t{i}")
            model.add_task(f"t{i}", side="ladder", head=2, taps=[TAPS["conv"][i % 2]])
        except Exception as error:
            errors.append(error)

    in_threads(change)
    assert not errors and set(model.base.tap_shapes) == set(TAPS["conv"])
    assert set(model.forward_all(x)) == {"t0", "t1", "t2", "t3"}
    assert copy.deepcopy(model).tasks == model.tasks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tasks_that_are_added_later_are_of_the_models_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = st.SideTuner(conv_base(TAPS["conv"]))
    model.add_task("before", side="fcn4", head=2)
    model.save_task("before", tmp_path / "before")
    model.to(dtype)
    x = inputs("conv")
    for side in ("fcn4", "mlp", "ladder", "fusion", "copy"):
        branch = model.add_task(side, side=side, merge="mlp2", head=2)
        assert all(parameter.dtype == dtype for parameter in branch.parameters())
        assert model(x, side).dtype == dtype
    model.save_task("mlp", tmp_path / "after")
    with pytest.raises(st.ArtifactError, match="another base"):
        model.load_task(tmp_path / "before", name="again")
    model.load_task(tmp_path / "before", name="again", any_base=True)
    assert torch.allclose(model(x, "again"), model(x, "before"))
    other = st.SideTuner(conv_base(TAPS["conv"]).to(dtype))
    other.load_task(tmp_path / "after")
    assert torch.equal(other(x, "mlp"), model(x, "mlp"))


def test_weights_of_another_type_are_not_rounded_in_silence(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("t", side=None, merge="base-only", head=2)
    model["t"].double()
    model.save_task("t", tmp_path)
    again = st.SideTuner(mlp_base())
    with pytest.raises(st.ArtifactError, match="pass any_base=True to round them"):
        again.load_task(tmp_path)
    again.load_task(tmp_path, any_base=True)
    assert again(inputs("mlp"), "t").dtype == torch.float32


def test_many_tasks_are_read_once_and_compared_with_one_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = st.SideTuner(mlp_base())
    for i in range(1, 12):
        model.add_task(f"t{i}", side="mlp", head=2)
    model.add_task("t0", side="mlp", merge="sum", head=2, laterals=["t11"])
    for name in model.tasks:
        model.save_task(name, tmp_path / name)
    read: list[Any] = []
    asked: list[int] = []
    read_task, identity = artifacts.read_task, Base.identity

    def reading(path: Any) -> Any:
        read.append(path)
        return read_task(path)

    def asking(base: Base) -> Any:
        asked.append(1)
        return identity(base)

    monkeypatch.setattr(loading, "read_task", reading)
    monkeypatch.setattr(Base, "identity", asking)
    again = st.load(tmp_path, base=mlp_base())
    assert len(read) == 12 == len(again) and len(asked) == 1
    x = inputs("mlp")
    for name, out in model.forward_all(x).items():
        assert torch.equal(again(x, name), out)


def test_each_of_many_tasks_is_checked(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    for i in range(3):
        model.add_task(f"t{i}", side="mlp", head=2)
        model.save_task(f"t{i}", tmp_path / f"t{i}")
    with st.seeded(5):
        stranger = st.SideTuner(st.Base(nn.Linear(12, 16), example=torch.zeros(1, 12)))
    stranger.add_task("t1", side="mlp", head=2)
    stranger.save_task("t1", tmp_path / "t1")
    with pytest.raises(st.ArtifactError, match="t1 was trained on another base"):
        st.load(tmp_path, base=mlp_base())


def test_a_copied_model_is_changed_alone() -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("t", side="mlp", head=2)
    other = copy.deepcopy(model)
    other.remove_task("t")
    other.add_task("u", side="mlp", head=2)
    assert model.tasks == ["t"] and other.tasks == ["u"]


def test_weights_that_were_put_in_the_place_of_others_are_seen() -> None:
    net = nn.Linear(4, 3)
    base = st.Base(net, example=torch.zeros(1, 4))
    assert base.dtype == torch.float32
    net.weight = nn.Parameter(net.weight.detach().double(), requires_grad=False)
    net.bias = nn.Parameter(net.bias.detach().double(), requires_grad=False)
    # The network computes in its new type; sides are given theirs.
    x = torch.rand(2, 4)
    assert base.dtype == torch.float64 and torch.equal(base(x).out, net(x.double()).float())
    net.float()
    assert base.dtype == torch.float32


def test_the_package_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "sidetuning", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"sidetuning {st.__version__}\n"


def test_a_copy_of_a_model_knows_whose_modules_are_whose() -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("a", side="mlp", head=2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(st.TaskError, match="is also that of task 'a'"):
            copied.add_task("b", side=copied["a"].side, head=2)
        copied.add_task("b", side="mlp", head=2)
