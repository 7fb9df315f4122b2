"""A random expansion: the same everywhere, stored nowhere, shared by the tasks that read the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sidetuning as st
from conftest import BASES, TAPS, inputs
from sidetuning.expansion import Expansion, signs


def model_of(kind: str, *, taps: bool = True, **options: Any) -> st.SideTuner:
    model = st.SideTuner(BASES[kind](TAPS[kind] if taps else ()))
    for name in ("a", "b"):
        given = {"outputs": 3, "width": 50, **options}
        model.add_task(name, side=None, merge="base-only", head="random", head_options=given, problem="classes", seed=1)
    return model


def batch(kind: str, n: int = 24) -> Any:
    x, y = inputs(kind, n), torch.arange(n) % 3
    return (x, y) if isinstance(x, Tensor) else {**x, "labels": y}


FIRST = [0, 1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0]
SHA256 = "c0693e681d8bef7a"


def test_the_signs_are_what_they_were_in_every_version_and_on_every_platform() -> None:
    drawn = signs(7, 3, 40, 50)
    assert drawn.unique().tolist() == [-1.0, 1.0] and abs(float(signs(7, 4, 400, 500).mean())) < 0.01
    assert [int(bit) for bit in drawn.flatten()[:12] > 0] == FIRST
    bits = (drawn > 0).numpy().astype("u1").tobytes()
    assert hashlib.sha256(bits).hexdigest().startswith(SHA256)


@pytest.mark.parametrize("taps", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_it_is_solved_saved_and_answers_alike_alone_and_together(kind: str, taps: bool, tmp_path: Path) -> None:
    model = model_of(kind, taps=taps)
    x = inputs(kind, 24)
    for name in ("a", "b"):
        st.solve(model, name, [batch(kind)], progress=False)
    together = model.forward_all(x)
    for name in ("a", "b"):
        assert torch.equal(model(x, name), together[name])
        model.save_task(name, tmp_path / name)
    assert st.evaluate(model, "a", [batch(kind)])["accuracy"] > 0.5
    assert not [key for key in model["a"].state_dict() if "linear" not in key and "units" not in key]
    assert sum(p.numel() for p in model["a"].parameters()) == 3 * (50 + model.base.width + 1)
    loaded = st.SideTuner(BASES[kind](TAPS[kind] if taps else ()))
    loaded.load_task(tmp_path / "a")
    assert torch.equal(loaded(x, "a"), together["a"])


def test_tasks_of_one_key_expand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    whole = Expansion.__call__

    def counted(self: Expansion, *given: Any) -> Tensor:
        calls.append(self.width)
        return whole(self, *given)

    monkeypatch.setattr(Expansion, "__call__", counted)
    model = model_of("conv")
    options = {"outputs": 2, "width": 60, "seed": 5}
    model.add_task("other", side=None, merge="base-only", head="random", head_options=options)
    calls.clear()
    model.forward_all(inputs("conv", 5))
    assert calls == [50, 60]


def test_padding_does_not_count() -> None:
    model = model_of("sequence")
    x: Any = inputs("sequence", 6)
    mask = torch.ones_like(x["input_ids"])
    mask[:, -2:] = 0
    features = model.base({**x, "attention_mask": mask})
    other = features.each(lambda tensor: torch.where(mask.unsqueeze(-1) == 0, 99.0, tensor))
    head: Any = model["a"].head
    given = {**x, "attention_mask": mask}
    torch.testing.assert_close(head.expansion(given, features), head.expansion(given, other))


@pytest.mark.parametrize("kind", BASES)
def test_the_size_of_the_taps_does_not_matter(kind: str) -> None:
    """No data is needed to bring taps of any scale to one."""
    model = model_of(kind)
    x: Any = model.base.prepare(inputs(kind, 6))
    features = model.base.encode(x)
    head: Any = model["a"].head
    larger = features.each(lambda tensor: 50 * tensor)
    torch.testing.assert_close(head.expansion(x, features), head.expansion(x, larger), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", BASES)
def test_a_side_goes_on_where_it_ended(kind: str) -> None:
    model = st.SideTuner(BASES[kind](TAPS[kind]))
    options = {"outputs": 3, "width": 50}
    model.add_task("t", side="mlp", init="zero", head="random", head_options=options, problem="classes", seed=1)
    st.solve(model, "t", [batch(kind)], progress=False)
    solved = st.evaluate(model, "t", [batch(kind)])["loss"]
    result = st.fit(model, "t", [batch(kind)], steps=10, lr=1e-4, progress=False)
    assert result.losses[0] == pytest.approx(solved, rel=1e-5) and result.losses[-1] < solved


def test_other_widths_are_refused() -> None:
    options: list[dict[str, Any]] = [{"width": 1}, {"grid": 0}, {"seed": -1}]
    for wrong in options:
        with pytest.raises(st.TaskError, match="a random expansion has a feature"):
            model_of("conv", **wrong)


def test_features_without_its_taps_are_refused() -> None:
    model = model_of("conv")
    x = inputs("conv", 3)
    with pytest.raises(st.ShapeError, match="the task reads the tap"):
        model(x, "a", features=model.base(x).out)
