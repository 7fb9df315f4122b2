"""A saved task that several tests share, and its edited texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse
from safetensors.torch import save

import sidetuning as st
from conftest import mlp_base
from sidetuning.files import signed


def scrambled(model: st.SideTuner, task: str) -> None:
    """Weights that no initialisation gives."""
    with st.seeded(7), torch.no_grad():
        for p in model[task].parameters():
            p.add_(torch.randn_like(p) * 0.1)


def saved(path: Path) -> st.SideTuner:
    model = st.SideTuner(mlp_base())
    model.add_task("pets", side="mlp", head=3, labels=["cat", "dog", "fish"])
    scrambled(model, "pets")
    model.save_task("pets", path, metrics={"accuracy": 0.875})
    return model


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another text in both files, with its right checksum, as somebody who knows how would write it."""
    config = json.loads((path / "side.json").read_text())
    tensors = parse((path / "side.safetensors").read_bytes())
    change(config)
    config = signed(config)
    text = json.dumps(config)
    (path / "side.json").write_text(text)
    (path / "side.safetensors").write_bytes(save(tensors, metadata={"format": "pt", "sidetuning": text}))
