"""Numbers are learned in the units of their targets, and answered in them: metres, years, a hundredth of a range."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import sidetuning as st
from conftest import mlp_base
from sidetuning.heads import Linear
from sidetuning.units import units_of


def rows(n: int = 256) -> tuple[Tensor, Tensor]:
    """Inputs, and two numbers of each: a depth in a hundredth of [-1, 1], and a height in thousands."""
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    return x, torch.stack([x[:, 0] * 0.01 - 0.97, x[:, 1] * 1e3 + 5e4], 1)


def loader(x: Tensor, y: Tensor, batch: int = 32) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)


def build(head: Any = 2, problem: str | None = "numbers", **options: Any) -> st.SideTuner:
    model = st.SideTuner(mlp_base())
    model.add_task("t", side="mlp", merge="sum", head=head, problem=problem, seed=0, **options)
    return model


def fit(model: st.SideTuner, data: Iterable[Any], **options: Any) -> Any:
    return st.fit(model, "t", data, **{"lr": 1e-2, "progress": False, **options})


def test_channels_of_any_units_are_learned_alike_and_answered_in_their_own() -> None:
    x, y = rows()
    model = build()
    fit(model, loader(x, y), epochs=20)
    units = units_in(model)
    assert torch.allclose(units[0], y.median(0).values, rtol=1e-2)
    assert torch.allclose(units[1], y.std(0), rtol=0.15)
    with torch.no_grad():
        errors = model(x, "t") - y
    assert (errors.abs().mean(0) / y.std(0)).max() < 0.25
    scores = st.evaluate(model, "t", loader(x, y))
    # The metric is in the targets' units, the loss in units of their scale.
    assert scores["mae"] == pytest.approx(float(errors.abs().mean()), rel=1e-3)
    assert scores["loss"] == pytest.approx(float((errors / units[1]).square().mean()), rel=1e-3)


def units_in(model: st.SideTuner) -> Tensor:
    """The units of a task that has some."""
    units = model["t"].units
    assert units is not None
    return units


class Decoded(nn.Module):
    """A base that shows a picture in half of its size."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2).repeat(1, 8, 1, 1)


@pytest.mark.parametrize("near, far", [(1, 4), (10, 120), (1e-3, 4e-3), (1e4, 4e4)])
def test_depths_of_rooms_and_of_halls_are_learned(near: float, far: float) -> None:
    """In a file whose whole range of 128 m is -1 … 1."""
    picture = F.interpolate(torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 16, mode="bicubic")
    picture = picture.clamp(0, 1)
    depth = (near + picture * (far - near)) / 64 - 1
    model = st.SideTuner(st.Base(Decoded(), example=torch.zeros(1, 1, 16, 16)))
    model.add_task("t", side=None, merge="base-only", head="pixels", problem="pixels", seed=0)
    fit(model, loader(picture, depth, 8), epochs=8)
    error = (model(picture, "t") - depth).abs().mean()
    assert error < 0.3 * (depth - depth.median()).abs().mean()


def test_the_same_numbers_in_other_units_are_learned_the_same() -> None:
    x, y = rows()
    outputs = []
    for factor, shift in ((1.0, 0.0), (1024.0, 0.0), (2.0**-10, 1.0)):
        model = build(1)
        fit(model, loader(x, y[:, :1] * factor + shift), epochs=3)
        outputs.append((model(x, "t") - shift) / factor)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_targets_that_are_ignored_odd_or_constant() -> None:
    x, y = rows()
    y[::3, 0] = torch.nan
    y[5, 1] = 1e12
    y = torch.cat([y, torch.full((len(y), 1), 7.0), torch.full((len(y), 1), torch.nan)], 1)
    model = build(4)
    fit(model, loader(x, y), steps=1)
    centre, scale = (row.tolist() for row in units_in(model))
    assert centre == pytest.approx([-0.97, 5e4, 7, 0], rel=5e-3)
    assert scale == pytest.approx([0.01, 1e3, 1, 1], rel=0.2)
    assert model(x, "t").isfinite().all()


def test_whole_numbers_and_columns() -> None:
    x, _ = rows()
    ages = torch.randint(20, 60, (len(x),), generator=torch.Generator().manual_seed(1))
    for target in (ages, ages[:, None], ages.double(), ages.to(torch.int32)):
        model = build(1)
        fit(model, loader(x, target), steps=1)
        assert abs(float(units_in(model)[0]) - 40) < 3


def test_few_numbers_that_are_not_zero_have_a_scale() -> None:
    """An edge is zero nearly everywhere: its middle 90 % have no width."""
    values = np.zeros((1, 1000))
    values[0, :20] = 5
    centre, scale = units_of(values).flatten().tolist()
    assert centre == 0 and scale == pytest.approx(0.7)
    assert units_of(np.empty((1, 0))).tolist() == [[0], [1]]


def test_numbers_that_float32_does_not_tell_apart_are_refused() -> None:
    x, _ = rows()
    seconds = torch.randint(1_700_000_000, 1_700_000_600, (len(x),))
    model = build(1)
    with pytest.raises(st.DataError, match=r"within about .* of 17000.*: subtract 17000"):
        fit(model, loader(x, seconds))
    assert model["t"].units is None
    fit(model, loader(x, seconds - 1_700_000_000))


def test_units_stay_when_a_task_is_fitted_again() -> None:
    x, y = rows()
    model = build()
    fit(model, loader(x, y))
    before = units_in(model).clone()
    fit(model, loader(x, 3 * y + 5))
    assert torch.equal(units_in(model), before)


def test_a_task_that_was_trained_without_units_keeps_none() -> None:
    model = build()
    model["t"].passes = 1
    x, y = rows()
    fit(model, loader(x, y), lr=1e-6)
    assert model["t"].units is None


@pytest.mark.parametrize("how", ["as it is", "copied", "saved", "fresh"])
def test_a_loop_of_ones_own_is_not_undone(how: str, tmp_path: Path) -> None:
    x, y = rows()
    model = build()
    if how != "fresh":
        optimizer = torch.optim.Adam(model["t"].parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(model(x, "t"), y).backward()
            optimizer.step()
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "saved":
        model.save_task("t", tmp_path)
        model = st.SideTuner(model.base)
        model.load_task(tmp_path)
    elif how == "fresh":
        model = copy.deepcopy(model).double().float()
    before = model(x, "t")
    fit(model, loader(x, y), steps=1, lr=1e-6)
    assert (model["t"].units is None) == (how != "fresh")
    assert torch.allclose(model(x, "t"), before, atol=0.1) == (how != "fresh")


def test_units_are_saved_with_the_task_and_shown(tmp_path: Path) -> None:
    x, y = rows()
    model = build()
    fit(model, loader(x, y))
    model.save_task("t", tmp_path)
    options = json.loads((tmp_path / "side.json").read_text())["parts"]["head"][1]
    assert options["centre"] == pytest.approx([-0.97, 5e4], rel=1e-2) and len(options["scale"]) == 2
    again = st.SideTuner(model.base)
    again.load_task(tmp_path)
    assert torch.equal(again(x, "t"), model(x, "t"))
    again.save_task("t", tmp_path / "again")
    assert (tmp_path / "again/side.safetensors").read_bytes() == (tmp_path / "side.safetensors").read_bytes()
    text = (tmp_path / "side.json").read_text()
    (tmp_path / "side.json").write_text(text.replace('"centre"', '"Centre"'))
    with pytest.raises(st.ArtifactError, match="was changed"):
        again.load_task(tmp_path, name="u")


def test_units_travel_with_the_weights() -> None:
    x, y = rows()
    model = build()
    fit(model, loader(x, y))
    expected = model(x, "t")
    again = build()
    again.load_state_dict(model.state_dict())
    copies = [again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert torch.equal(other(x, "t"), expected)
    file = io.BytesIO()
    torch.save(build().state_dict(), file)
    file.seek(0)
    # Weights of a task without units are no weights of this one.
    with pytest.raises(RuntimeError, match=r"size mismatch for branches\.t\.head\.units"):
        build().load_state_dict({**model.state_dict(), "branches.t.head.units": torch.ones(2, 3)})
    with pytest.raises(RuntimeError, match="units"):
        model.load_state_dict(torch.load(file, weights_only=True))


def test_units_are_no_parameters() -> None:
    x, y = rows()
    model = build()
    count = sum(p.numel() for p in model["t"].parameters())
    fit(model, loader(x, y))
    assert sum(p.numel() for p in model["t"].parameters()) == count
    assert "units" not in " ".join(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_answers_in_the_same_units(dtype: torch.dtype) -> None:
    x, y = rows()
    model = build()
    fit(model, loader(x, y), epochs=5)
    expected = model(x, "t")
    answer = model.to(dtype)(x.to(dtype), "t")
    assert answer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half precision rounds numbers around 0; it would round 50,000 by 16, and -0.97 by more than a tenth of its spread.
    assert ((answer - expected).abs() / y.std(0)).max() < 0.05


def test_given_units_are_used_and_wrong_ones_refused() -> None:
    x, y = rows()
    model = build(head_options={"centre": 40, "scale": [12, 3]})
    fit(model, loader(x, y), steps=1)
    assert units_in(model).tolist() == [[40, 40], [12, 3]]
    wrong: list[dict[str, Any]] = [
        {"centre": 1},
        {"centre": 0, "scale": 0},
        {"centre": [1, 2, 3], "scale": 1},
        {"centre": "middle", "scale": 1},
        {"centre": float("nan"), "scale": 1},
    ]
    for options in wrong:
        with pytest.raises(st.TaskError, match=r"centre and scale|scale is positive"):
            build(head_options=options)


def test_a_head_of_ones_own_and_a_frozen_one_are_left_alone() -> None:
    x, y = rows()
    for head in (nn.Sequential(nn.Linear(16, 2), nn.Softplus()), nn.Linear(16, 2), Linear("vector", 16, 2)):
        model = build(head)
        fit(model, loader(x, y), steps=1)
        assert model["t"].units is None
    model = build()
    model["t"].head.requires_grad_(False)
    fit(model, loader(x, y), steps=1)
    assert model["t"].units is None


def test_classes_and_losses_without_a_problem_have_no_units() -> None:
    x, y = rows()
    model = build(3, problem=None)
    fit(model, loader(x, torch.arange(len(x)) % 3))
    assert model["t"].units is None
    model = build(2, problem=None)
    fit(model, loader(x, y), loss=F.mse_loss)
    assert model["t"].units is None


def test_a_loss_of_ones_own_sees_the_targets_units() -> None:
    x, y = rows()
    seen = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append((output.detach().median(0).values, target))
        return F.l1_loss(output, target)

    fit(build(), loader(x, y), steps=1, loss=loss)
    output, target = seen[0]
    assert torch.allclose(output, y.median(0).values, atol=3e3) and float(target[:, 1].min()) > 4e4


class Stream(IterableDataset[Any]):
    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Any:
        return zip(*self.tensors, strict=True)


LOADERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "batches": lambda x, y: list(zip(x.split(32), y.split(32), strict=True)),
    "iterator": lambda x, y: iter(list(zip(x.split(32), y.split(32), strict=True))),
    "stream": lambda x, y: DataLoader(Stream(x, y), batch_size=32),
    "mappings": lambda x, y: DataLoader(
        [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],  # type: ignore[arg-type]
        batch_size=32,
    ),
    "single rows": lambda x, y: DataLoader(TensorDataset(x, y), batch_sampler=[[i] for i in range(len(x))]),
    "unbatched": lambda x, y: DataLoader(
        list(zip(x.split(32), y.split(32), strict=True)),  # type: ignore[arg-type]
        batch_size=None,
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_labels_of_every_loader_are_read_and_none_is_lost(kind: str) -> None:
    x, y = rows()
    model, given = build(), LOADERS[kind](x, y)
    result = fit(model, given, steps=8)
    assert len(result.losses) == 8
    assert torch.allclose(units_in(model)[0], y.median(0).values, rtol=1e-2)


def test_an_order_without_end_and_sorted_labels() -> None:
    x, y = rows()

    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield from ([i, (i + 7) % 256] for i in range(256))

    model = build()
    fit(model, DataLoader(TensorDataset(x, y), batch_sampler=Endless()), steps=2)  # type: ignore[arg-type]
    assert model["t"].units is not None
    order = y[:, 1].argsort()
    model = build()
    fit(
        model,
        DataLoader(TensorDataset(x[order].repeat_interleave(40, 0), y[order].repeat_interleave(40, 0)), batch_size=4),
        steps=1,
        epochs=None,
    )
    assert float(units_in(model)[0, 1]) == pytest.approx(float(y[:, 1].median()), rel=0.01)


def test_a_task_that_was_saved_before_it_learned_is_measured_as_it_would_have_been(tmp_path: Path) -> None:
    x, y = rows()
    model = build()
    model.save_task("t", tmp_path)
    loaded = st.SideTuner(mlp_base())
    loaded.load_task(tmp_path)
    for one in (model, loaded):
        fit(one, DataLoader(TensorDataset(x, y), batch_size=32))
    assert torch.equal(units_in(model), units_in(loaded))
    # What learned is no more what was built, whoever taught it.
    model = build()
    with torch.no_grad():
        next(model["t"].head.parameters()).add_(1.0)
    model.save_task("t", tmp_path)
    loaded = st.SideTuner(mlp_base())
    assert loaded.load_task(tmp_path) and json.loads((tmp_path / "side.json").read_text())["fresh"] is False
    fit(loaded, DataLoader(TensorDataset(x, y), batch_size=32))
    assert loaded["t"].units is None


def test_a_fit_that_is_refused_leaves_no_units(tmp_path: Path) -> None:
    x, y = rows()
    for data, error in (
        (loader(x, y[:, :1]), "takes as many numbers"),
        (loader(x, torch.full_like(y, torch.inf)), "inf|nan"),
    ):
        model = build()
        with pytest.raises((st.DataError, st.TrainingError), match=error):
            fit(model, data)
        assert model["t"].units is None
    model = build()
    with pytest.raises(st.DataError, match="no batches"):
        fit(model, [])
    assert model["t"].units is None
    with pytest.raises(st.DataError, match="real numbers"):
        fit(model, loader(x, y.to(torch.complex64)))
    (tmp_path / "resume.pt").write_bytes(b"nothing")
    model = build()
    with pytest.raises(st.TrainingError, match="cannot be read"):
        fit(model, loader(x, y), resume=tmp_path / "resume.pt")
    assert model["t"].units is None


def test_a_run_resumes_bitwise_in_its_units(tmp_path: Path) -> None:
    x, y = rows()

    class StopAt(st.Callback):
        def on_step(self, step: int, loss: float) -> None:
            if step == 6:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"epochs": 2, "resume": tmp_path / "r", "save_every": 0.0}
    expected = build()
    fit(expected, loader(x, y), epochs=2, loss=F.l1_loss)
    with pytest.raises(KeyboardInterrupt):
        fit(build(), loader(x, y), loss=F.l1_loss, callbacks=[StopAt()], **options)
    model = build()
    fit(model, loader(x, y), loss=F.l1_loss, **options)
    states = [m["t"].state_dict() for m in (model, expected)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1]) and "head.units" in states[0]


def test_labels_are_read_from_a_cache_and_a_base_that_trains_stays(tmp_path: Path) -> None:
    x, y = rows()
    model = build()
    cached = st.cache_features(model.base, TensorDataset(x, y), tmp_path, progress=False)
    model.train()
    fit(model, st.loader_over(cached, batch_size=32))
    direct = build()
    fit(direct, loader(x, y))
    assert torch.equal(units_in(model), units_in(direct))
