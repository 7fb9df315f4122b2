"""A method is loaded on the base it was learned from, and on no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sidetuning as st
from conftest import conv_base, inputs
from sidetuning_bench.methods import METHODS, Recipe, Task


def test_a_base_that_prepares_otherwise_is_refused(tmp_path: Path) -> None:
    x, net = inputs("conv"), conv_base().net
    assert isinstance(x, torch.Tensor)
    plain, changed = st.Base(net, example=x), st.Base(net, example=x, mean=[0.5] * 3, std=[0.2] * 3)
    method = METHODS["features"](plain)
    method.learn(Task("pets", 3), [(x, torch.tensor([0, 1, 2, 0]))], Recipe(1), progress=False)
    method.save(tmp_path)
    METHODS["features"](plain).load(tmp_path)
    with pytest.raises(st.ArtifactError, match="prepared its inputs or picked its output otherwise"):
        METHODS["features"](changed).load(tmp_path)
