"""The side that copies the base's top layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sidetuning as st
from text_parts import Lines


@pytest.mark.parametrize(("tap", "layers"), [("embeddings", 3), ("encoder.layer.0", 2), ("encoder.layer.1", 1)])
def test_the_top_starts_as_the_base(encoder: Path, tap: str, layers: int) -> None:
    base = st.load_base(f"hf:{encoder}", taps=[tap])
    model = st.SideTuner(base)
    branch = model.add_task("qa", side="top", head="identity")
    batch = Lines().batch([0, 4, 9])
    features, real = base(batch), batch["attention_mask"] > 0
    assert torch.equal(branch.side_output(batch, features)[real], features.out[real])
    layer = sum(p.numel() for p in base.net.encoder.layer[0].parameters())
    assert sum(p.numel() for p in branch.side.parameters()) == layers * layer  # no table of embeddings, no pooler
    before = base.identity().sha256
    st.fit(model, "qa", [{**batch, "labels": features.out}], steps=2, lr=0.1, loss=lambda out, y: (out - y - 1).square().mean(), progress=False)  # fmt: skip
    assert base.identity().sha256 == before and torch.equal(base(batch).out, features.out)
    assert not torch.equal(branch.side_output(batch, features)[real], features.out[real])
