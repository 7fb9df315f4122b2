"""Outputs equal those of the original authors' code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sidetuning as st
from conftest import GOLDEN
from sidetuning.bases.resnet_cifar import resnet44
from sidetuning.merges import GroupNorm
from sidetuning.sides.initialise import load_weights

NAMES = {
    "Summation": "sum",
    "Product": "product",
    "Alpha": "alpha",
    "FiLM": "film",
    "MLP": "mlp",
    "MLP2": "mlp2",
    "ResMLP2": "res-mlp",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Small ones, for everybody."""
    return load_file(GOLDEN)


@pytest.fixture
def large(shared: Path) -> dict[str, Tensor]:
    """Those with whole networks or images."""
    return load_file(shared / "reference" / "golden.safetensors")


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=0)


def merge_with(
    golden: dict[str, Tensor], prefix: str, name: str, kind: str, width: int, laterals: int = 0
) -> nn.Module:
    """A merge with the original's weights, whose names differ in two places."""
    merge = st.MERGES[name](kind, width, laterals).eval()
    state = {k.removeprefix(f"{prefix}/state/"): v for k, v in golden.items() if k.startswith(f"{prefix}/state/")}
    state = {k.replace("alphas", "alpha").removeprefix("film."): v for k, v in state.items()}
    merge.load_state_dict(state)
    return merge


def test_resnet44_and_fcn4(large: dict[str, Tensor], shared: Path) -> None:
    base = st.load_base("resnet44-cifar10", weights=shared / "weights" / "resnet44-cifar10.safetensors")
    assert close(base.encode(large["cifar/images"]).out, large["cifar/base"])
    assert close(base.folded().encode(large["cifar/images"]).out, large["cifar/base"])
    side = st.SIDES["fcn4"](base)
    load_weights(side, shared / "weights" / "fcn4-cifar10-distilled.safetensors", "fcn4")
    assert close(side(large["cifar/images"]), large["cifar/side"])
    assert sum(p.numel() for p in resnet44().parameters()) == 657_936
    assert sum(p.numel() for p in side.parameters()) == 25_904


def test_fcn5(large: dict[str, Tensor]) -> None:
    images = large["fcn5/images"]
    base = st.Base(lambda x: torch.zeros(len(x), 8, 4, 4), example=images)
    side = st.SIDES["fcn5"](base)
    side.load_state_dict({k.removeprefix("fcn5/state/"): v.float() for k, v in large.items() if "fcn5/state" in k})
    assert close(side(images), large["fcn5/out"])
    assert sum(p.numel() for p in side.parameters()) == 921_376


def test_fcn8_has_the_original_number_of_parameters() -> None:
    base = st.Base(lambda x: torch.zeros(len(x), 8, 4, 4), example=torch.zeros(1, 3, 64, 64))
    assert sum(p.numel() for p in st.SIDES["fcn8"](base).parameters()) == 3_361_440


@pytest.mark.parametrize("original", ["Summation", "Product", "Alpha", "MLP", "MLP2", "ResMLP2"])
def test_merges_of_vectors(golden: dict[str, Tensor], original: str) -> None:
    extras = [golden["merge/extra0"], golden["merge/extra1"]] if original in ("Summation", "Product") else []
    merge = merge_with(golden, f"merge/{original}", NAMES[original], "vector", 64, len(extras))
    assert close(merge(golden["cifar/base"], golden["cifar/side"], extras), golden[f"merge/{original}/out"])


def test_dense_alpha(golden: dict[str, Tensor]) -> None:
    merge = merge_with(golden, "merge/Alpha_dense", "alpha", "vector", 64, laterals=2)
    laterals = [golden["merge/extra0"], golden["merge/extra1"]]
    assert close(merge(golden["cifar/base"], golden["cifar/side"], laterals), golden["merge/Alpha_dense/out"])


@pytest.mark.parametrize("original", ["Alpha", "FiLM", "MLP", "MLP2"])
def test_merges_of_maps(golden: dict[str, Tensor], original: str) -> None:
    merge = merge_with(golden, f"map/{original}", NAMES[original], "map", 8)
    assert close(merge(golden["map/base"], golden["map/side"]), golden[f"map/{original}/out"])


def test_prenormalisation(golden: dict[str, Tensor]) -> None:
    assert close(GroupNorm("map", 8)(golden["map/base"]), golden["map/groupnorm_base"])
