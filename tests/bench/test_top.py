"""The side that copies the base's top layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sidetuning as st
from conftest import network, side_of, side_output
from text_parts import Lines


@pytest.mark.parametrize(("tap", "layers"), [("embeddings", 3), ("encoder.layer.0", 2), ("encoder.layer.1", 1)])
def test_the_top_starts_as_the_base(encoder: Path, tap: str, layers: int) -> None:
    base = st.load_base(f"hf:{encoder}", taps=[tap])
    model = st.SideTuner(base)
    branch = model.add_task("qa", side="top", head="identity")
    batch = Lines().batch([0, 4, 9])
    features, real = base(batch), batch["attention_mask"] > 0
    assert torch.equal(side_output(branch, batch, features)[real], features.out[real])
    layer = sum(p.numel() for p in network(base).get_submodule("encoder.layer.0").parameters())
    # No table of embeddings, no pooler.
    assert sum(p.numel() for p in side_of(branch).parameters()) == layers * layer
    before = base.identity().sha256
    data = [{**batch, "labels": features.out}]
    st.fit(model, "qa", data, steps=2, lr=0.1, loss=lambda out, y: (out - y - 1).square().mean(), progress=False)
    assert base.identity().sha256 == before and torch.equal(base(batch).out, features.out)
    assert not torch.equal(side_output(branch, batch, features)[real], features.out[real])
