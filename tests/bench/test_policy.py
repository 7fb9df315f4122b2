"""The head of agents: extra numbers beside the code, and dropout."""

from __future__ import annotations

import pytest
import torch

import sidetuning as st
from conftest import map_base, sequence_base
from sidetuning.errors import ShapeError


def test_extra_numbers_reach_heads_alone() -> None:
    base = map_base()
    model = st.SideTuner(base)
    model.add_task("go", side="fcn4", head="policy", head_options={"actions": 4, "extra": 3})
    x, extra = torch.rand(5, 3, 32, 32), torch.randn(5, 3)
    with torch.no_grad():
        with_extra = model({"x": x, "extra": extra}, "go")
        assert with_extra.shape == (5, 4) and not torch.allclose(with_extra, model(x, "go"))
        assert torch.allclose(model({"x": x, "extra": torch.zeros(5, 3)}, "go"), model(x, "go"))
        mixed = model({"x": x, "extra": extra}, tasks=["go"] * 5)
        assert torch.allclose(torch.stack(mixed), with_extra, atol=1e-6)
        assert torch.allclose(model({"x": x, "extra": extra}, "go", features=base(x)), with_extra, atol=1e-6)
    with pytest.raises(ShapeError, match="3 extra numbers"):
        model({"x": x, "extra": torch.zeros(5, 2)}, "go")
    with pytest.raises(st.TaskError, match="at least two actions"):
        model.add_task("stay", side=None, merge="base-only", head="policy", head_options={"actions": 1})


def test_a_policy_does_not_read_texts_of_many_lengths() -> None:
    model = st.SideTuner(sequence_base())
    with pytest.raises(st.TaskError, match="those of texts have many lengths"):
        model.add_task("go", side="mlp", head="policy")


def test_dropout_drops_the_code_and_no_extra_numbers() -> None:
    head = st.HEADS.build("policy", map_base(), options={"extra": 3, "dropout": 0.99}).train()
    code, inputs = torch.randn(64, 16, 8, 8), {"extra": torch.randn(64, 3)}
    with torch.no_grad():
        # Almost all is dropped, each time another part.
        assert (head.code(code) == head.code(code)).float().mean() < 0.5
        assert torch.equal(head.given(inputs["extra"]), head.given(inputs["extra"]))
        assert torch.equal(head.eval()(code, inputs), head(code, inputs))
