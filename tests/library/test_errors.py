"""Every mistake a user can make gives an error of the library that names it, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import sidetuning as st
from conftest import conv_base, inputs, map_base, mlp_base, sequence_base


def model_with(*tasks: str, merge: str = "alpha") -> st.SideTuner:
    model = st.SideTuner(mlp_base())
    for task in tasks:
        model.add_task(task, side="mlp", head=3, merge=merge)
    return model


def batch(label: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs("mlp"), torch.tensor([0, 1, 2, label])  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("parts", "near"),
    [
        ({"side": "mlpp"}, "side 'mlpp'.*'mlp'"),
        ({"merge": "alhpa"}, "merge 'alhpa'.*'alpha'"),
        ({"head": "linaer"}, "head 'linaer'.*'linear'"),
        ({"laterals": ["pest"]}, "task 'pest'.*'pets'"),
        ({"side_options": {"hiden": 3}}, "option of side 'mlp'.*'hiden'.*'hidden'"),
        ({"merge": "film", "merge_options": {"hiddn": 3}}, "option of merge 'film'.*'hiddn'.*'hidden'"),
        ({"head": "linear", "head_options": {"output": 3}}, "option of head 'linear'.*'output'.*'outputs'"),
        ({"side": "zzzzzz"}, "there is convolutional, copy, fcn3"),
    ],
)
def test_unknown_names_come_with_near_ones(parts: dict[str, Any], near: str) -> None:
    model = model_with("pets")
    with pytest.raises(st.UnknownNameError, match=near):
        model.add_task("new", **{"side": "mlp", "head": 3, **parts})
    assert model.tasks == ["pets"]


def test_unknown_tasks_bases_and_taps_come_with_near_ones() -> None:
    model = model_with("pets")
    for ask in (
        lambda: model(inputs("mlp"), "pet"),
        lambda: model(inputs("mlp"), tasks=["pets", "pet", "pets", "pets"]),
        lambda: model.forward_all(inputs("mlp"), tasks=["pet"]),
        lambda: model.remove_task("pet"),
        lambda: model.freeze_task("pet"),
        lambda: model.save_task("pet", "/nowhere"),
        lambda: st.fit(model, "pet", [batch()], progress=False),
        lambda: st.evaluate(model, "pet", [batch()]),
        lambda: st.distill(model, "pet", [batch()], steps=1, progress=False),
    ):
        with pytest.raises(st.UnknownNameError, match="did you mean 'pets'"):
            ask()
    with pytest.raises(st.UnknownNameError, match="'resnet44-cifar10'"):
        st.load_base("resnet44-cifar")
    with pytest.raises(st.UnknownNameError, match="timm"):
        st.load_base("tim:resnet18")
    with pytest.raises(st.UnknownNameError, match=r"tap 'embeding'.*'embedding'"):
        sequence_base(("embeding",))


def test_a_task_is_added_once() -> None:
    model = model_with("pets")
    before = model["pets"]
    with pytest.raises(st.TaskError, match="exists already"):
        model.add_task("pets", side="mlp", head=2)
    assert model["pets"] is before


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a b", "..", "keys", "pop", "train"])
def test_names_that_would_break_something_are_refused(name: str) -> None:
    model = model_with()
    with pytest.raises(st.TaskError, match="cannot be a task's name"):
        model.add_task(name, side="mlp", head=2)
    assert model.tasks == []


@pytest.mark.parametrize("name", ["classes-0-9", "a_b", "7", "größe"])
def test_other_names_are_fine(name: str) -> None:
    model = model_with(name)
    assert model(inputs("mlp"), name).shape == (4, 3)


def test_a_lateral_in_use_is_not_removed() -> None:
    model = model_with("old")
    model.add_task("new", side="mlp", head=2, laterals=["old"])
    with pytest.raises(st.TaskError, match="a lateral of new"):
        model.remove_task("old")
    assert model.tasks == ["old", "new"]
    model.remove_task("new")
    model.remove_task("old")
    assert model.tasks == []


def test_a_task_without_a_side_is_no_lateral() -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("fixed", side=None, merge="base-only", head=2)
    with pytest.raises(st.TaskError, match="no side"):
        model.add_task("new", side="mlp", head=2, laterals=["fixed"])


MISFITS = [nn.Linear(12, 15), nn.Linear(11, 16), nn.Linear(12, 1), nn.Unflatten(1, (3, 4))]


@pytest.mark.parametrize("parts", [{"head": nn.Linear(15, 2)}, *({"side": side} for side in MISFITS)])
def test_parts_that_do_not_fit_are_found_when_the_task_is_added(parts: dict[str, Any]) -> None:
    model = model_with()
    with pytest.raises(st.ShapeError):
        model.add_task("new", **{"side": "mlp", "head": 3, **parts})
    assert model.tasks == []


@pytest.mark.parametrize("side", ["fcn3", "fcn4", "fcn5", "fcn8"])
def test_a_convolutional_side_needs_images(side: str) -> None:
    with pytest.raises(st.ShapeError):
        model_with().add_task("new", side=side, head=2)


@pytest.mark.parametrize(
    ("make", "parts", "error", "match"),
    [
        (mlp_base, {"head": "span"}, st.TaskError, "span"),
        (mlp_base, {"head": "pixels"}, st.TaskError, "pixels"),
        (mlp_base, {"init": "distilled"}, st.TaskError, "no distilled weights"),
        (conv_base, {"side": "fcn4", "init": "distilled"}, st.TaskError, "no distilled weights"),
        (mlp_base, {"init": "xaviar"}, st.TaskError, "xaviar"),
        (mlp_base, {"init": Path("nowhere.safetensors")}, st.ArtifactError, "does not exist"),
        (mlp_base, {"side": "ladder"}, st.ShapeError, "taps"),
        (mlp_base, {"side": "fusion"}, st.ShapeError, "taps"),
        (mlp_base, {"side": None}, st.TaskError, "needs a side"),
        (mlp_base, {"merge": "film", "laterals": ["old"]}, st.TaskError, "reads no laterals"),
        (mlp_base, {"merge_options": {"init": 1.0}}, st.TaskError, r"\(0, 1\)"),
        (mlp_base, {"head": 0}, st.TaskError, "at least one output"),
        (mlp_base, {"side": nn.Linear(12, 16), "side_options": {"a": 1}}, st.TaskError, "registered side"),
        (mlp_base, {"side": 7}, st.TaskError, "not a int"),
        (map_base, {"side": "fcn4", "head": "span"}, st.TaskError, "span"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    make: Callable[[], st.Base], parts: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = st.SideTuner(make())
    model.add_task("old", side="copy", head=2)
    with pytest.raises(error, match=match):
        model.add_task("new", **{"side": "mlp", "head": 3, **parts})
    assert model.tasks == ["old"]


def test_a_forward_needs_exactly_one_way_to_name_tasks() -> None:
    model, x = model_with("pets"), inputs("mlp")
    for arguments in ({}, {"task": "pets", "tasks": ["pets"] * 4}):
        with pytest.raises(st.TaskError, match="name one task"):
            model(x, **arguments)
    with pytest.raises(st.ShapeError, match="one per sample"):
        model(x, tasks=["pets"])


def test_features_of_another_shape_are_refused() -> None:
    model = model_with("pets")
    for features in (torch.zeros(4, 15), st.Features(torch.zeros(4, 16, 1))):
        with pytest.raises(st.ShapeError, match="features given"):
            model(inputs("mlp"), "pets", features=features)
        with pytest.raises(st.ShapeError, match="features given"):
            model.forward_all(inputs("mlp"), features=features)


def test_a_base_is_wrapped_and_returns_one_code() -> None:
    with pytest.raises(st.TaskError, match="wrap it"):
        st.SideTuner(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(st.ShapeError, match="output="):
        st.Base(nn.LSTM(4, 4), example=torch.zeros(1, 2, 4))
    with pytest.raises(st.ShapeError, match=r"\(b, d\)"):
        st.Base(nn.Flatten(0), example=torch.zeros(1, 3))
    with pytest.raises(st.ShapeError, match="this base takes images"):
        conv_base()(torch.zeros(1, 5, 32, 32))


def test_a_frozen_task_is_not_trained() -> None:
    model = model_with("pets")
    model.freeze_task("pets")
    for train in (
        lambda: st.fit(model, "pets", [batch()], progress=False),
        lambda: st.distill(model, "pets", [batch()], steps=1, progress=False),
    ):
        with pytest.raises(st.TaskError, match="frozen"):
            train()
    model.freeze_task("pets", False)
    assert st.fit(model, "pets", [batch()], progress=False).steps == 1


def test_a_length_of_training_is_given_once() -> None:
    model = model_with("pets")
    with pytest.raises(st.TaskError, match="not both"):
        st.fit(model, "pets", [batch()], epochs=1, steps=1, progress=False)
    with pytest.raises(st.TaskError, match="steps="):
        st.fit(model, "pets", iter([batch()]), progress=False)


@pytest.mark.parametrize("label", [3, 99, -1])
def test_a_label_out_of_range_is_named_before_it_does_harm(label: int) -> None:
    model = model_with("pets")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(st.DataError, match=f"label {label} is out of range"):
        st.fit(model, "pets", [batch(label)], progress=False)
    with pytest.raises(st.DataError, match=f"label {label} is out of range"):
        st.evaluate(model, "pets", [batch(label)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_weights(value: float) -> None:
    model = model_with("pets")
    calls = 0
    seen: dict[str, torch.Tensor] = {}

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls < 3:
            return F.cross_entropy(output, target)
        seen.update({k: v.clone() for k, v in model.state_dict().items()})
        return F.cross_entropy(output, target) * value

    with pytest.raises(st.TrainingError, match="at step 2"):
        st.fit(model, "pets", [batch()], steps=9, loss=loss, progress=False)
    assert seen and all(torch.equal(v, seen[k]) and bool(v.isfinite().all()) for k, v in model.state_dict().items())


def test_batches_of_another_form_or_none_at_all_are_refused() -> None:
    model = model_with("pets")
    x, y = batch()
    for bad in ((x,), {"x": x}, x):
        with pytest.raises(st.DataError, match="labels"):
            st.fit(model, "pets", [bad], progress=False)
    with pytest.raises(st.TrainingError, match="no batch"):
        st.fit(model, "pets", [], steps=1, progress=False)
    with pytest.raises(st.TrainingError, match="no batch"):
        st.fit(model, "pets", iter([(x, y)]), steps=2, progress=False)
    with pytest.raises(st.DataError, match="no batch"):
        st.evaluate(model, "pets", [])


def test_only_a_side_that_is_there_can_be_distilled() -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("fixed", side=None, merge="base-only", head=2)
    with pytest.raises(st.TaskError, match="no side"):
        st.distill(model, "fixed", [batch()], steps=1, progress=False)


@pytest.mark.parametrize("learn", [st.fit, st.distill])
def test_what_another_task_reads_cannot_be_trained(learn: Any) -> None:
    model = model_with("pets")
    model.add_task("birds", side="mlp", head=2, laterals=["pets"], merge="mlp2")
    x, y = batch()
    before = model(x, "birds")
    with pytest.raises(st.TaskError, match="is a lateral of birds"):
        learn(model, "pets", [(x, y)], steps=1, progress=False)
    assert torch.equal(model(x, "birds"), before)


@pytest.mark.parametrize("learn", [st.fit, st.distill])
def test_a_data_set_is_no_loader(learn: Any) -> None:
    with pytest.raises(st.DataError, match="is a data set, and batches are wanted"):
        learn(model_with("pets"), "pets", TensorDataset(*batch()), steps=1, progress=False)


def test_every_error_is_of_the_library() -> None:
    errors = [st.UnknownNameError, st.ShapeError, st.TaskError, st.ArtifactError, st.CacheError, st.DataError]
    assert all(issubclass(error, st.SideTuningError) for error in [*errors, st.TrainingError])


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"side": "fcn4", "side_options": {"width": float("inf")}}, "a layer of inf channels cannot be built"),
    ({"side": "fcn4", "side_options": {"width": float("nan")}}, "a layer of nan channels"),
    ({"side": "fcn5", "side_options": {"width": -1.0}}, "a layer of -64 channels"),
    ({"side": "fcn4", "side_options": {"width": 1e9}}, r"a layer of 1\.6e\+10 channels"),
    ({"side": "fcn4", "side_options": {"width": "wide"}}, r"side 'fcn4' cannot be built with width='wide' \(TypeError"),
    ({"side": "mlp", "side_options": {"hidden": -3}}, r"side 'mlp' cannot be built with hidden=-3 \(RuntimeError"),
    ({"side": "mlp", "side_options": {"hidden": 2**62}}, "side 'mlp' cannot be built with hidden=4611686018427387904"),
    ({"side": "fusion", "side_options": {"shift": -1}}, "cannot be moved by -1 cells; give 0 to 16"),
    ({"side": "fusion", "side_options": {"shift": 10**9}}, "cannot be moved by 1000000000 cells"),
    (
        {"side": "mlp", "head_options": {"outputs": 1e400}, "head": "linear"},
        "'linear' cannot be built",
    ),
]


@pytest.mark.parametrize(("parts", "message"), PARTS)
def test_numbers_that_no_part_can_have_are_one_sentence(parts: dict[str, Any], message: str) -> None:
    model = st.SideTuner(conv_base(("0", "2")))
    with pytest.raises(st.ShapeError, match=message):
        model.add_task("a", **{"head": 2, **parts})
    assert model.tasks == []


@pytest.mark.parametrize("seed", [2**64, -(2**64), 0.5, "0", None])
def test_a_seed_that_torch_does_not_take_is_one_sentence(seed: Any) -> None:
    with pytest.raises(st.SideTuningError, match="a seed is a whole number of at most 64 bits, not"), st.seeded(seed):
        raise AssertionError
    with st.seeded(2**63 - 1):
        assert torch.rand(()).shape == ()
