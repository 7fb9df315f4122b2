"""Targets of dense tasks, and their units."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from sidetuning.errors import ShapeError
from sidetuning_bench.dense.targets import target, units
from sidetuning_bench.domains import encode, read, write
from taskonomy_parts import raw_values


def test_targets_are_in_the_ranges_of_the_original() -> None:
    ends = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    assert torch.allclose(target("rgb", ends), torch.tensor([[[-1, -0.6, 1.0]]]))
    deep = torch.tensor([[[0, 13107, 65535]]], dtype=torch.int32)
    assert torch.allclose(target("edge_texture", deep), torch.tensor([[[-1, -0.6, 1.0]]]))
    assert target("depth_zbuffer", deep).dtype == torch.float32
    ids = target("segment_semantic", torch.tensor([[17]], dtype=torch.uint8))
    assert ids.dtype == torch.int64 and ids.tolist() == [[17]]
    assert target("mask_valid", torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[0, 1]]
    with pytest.raises(
        ShapeError, match=r"target\('rgb', …\) takes the whole numbers that read\(\) gives, not torch.float32"
    ):
        target("rgb", torch.zeros(3, 2, 2))


def test_scores_become_probabilities_only_where_they_are_not() -> None:
    # The last sums to 1, too.
    logits = torch.tensor([[0.5, 0.5, 0.0], [2.0, 1.0, 0.0], [2.0, -2.0, 1.0]])
    expected = torch.stack([logits[0], logits[1].softmax(0), logits[2].softmax(0)])
    assert torch.allclose(target("class_object", logits), expected)
    assert torch.allclose(units("class_object", expected), expected)


def decoded(domain: str, values: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    write(path, domain, values)
    back = units(domain, target(domain, torch.from_numpy(read(path, domain))))
    return back.permute(1, 2, 0).numpy() if back.ndim == 3 and len(back) > 1 else back.squeeze(0).numpy()


def test_round_trips_stay_within_half_a_step(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.png"
    metres = rng.uniform(0, 125, (40, 40)).astype(np.float32)
    assert abs(decoded("depth_zbuffer", metres, path) - metres).max() <= 0.5 / 512 + 1e-4
    normal = rng.normal(size=(40, 40, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    back = decoded("normal", normal, path)
    assert abs(np.linalg.norm(back, axis=-1) - 1).max() < 1e-6
    assert np.degrees(np.arccos((back * normal).sum(-1).clip(-1, 1))).max() < 0.5
    bent = rng.uniform(-2, 2, (40, 40, 2)).astype(np.float32)
    assert abs(decoded("curvature", bent, path) - bent).max() <= 1 / 127 + 1e-6
    with Image.open(path) as image:
        assert image.mode == "RGB" and (np.array(image)[..., 2] == 127).all()
    unit = rng.random((40, 40)).astype(np.float32)
    assert abs(decoded("reshading", unit, path) - unit).max() <= 0.5 / 255 + 1e-6
    assert abs(decoded("keypoints3d", unit, path) - unit).max() <= 0.5 / 65535 + 1e-6
    picture = raw_values("rgb", rng)
    assert abs(decoded("rgb", picture, path) * 255 - picture).max() < 1e-3
    ids = raw_values("segment_semantic", rng).astype(np.int64)
    assert np.array_equal(decoded("segment_semantic", ids, path), ids)
    mask = rng.random((5, 5)) < 0.5
    assert np.array_equal(decoded("mask_valid", mask, path), mask)
    scores = rng.dirichlet(np.ones(7))
    write(tmp_path / "a.npy", "class_object", scores)
    assert np.allclose(target("class_object", torch.from_numpy(read(tmp_path / "a.npy", "class_object"))), scores)


def test_walls_are_exact_and_what_is_unknown_is_marked(tmp_path: Path) -> None:
    axes = np.array([[[0, 0, 1], [0, -1, 0], [1, 0, 0]]], float)
    assert encode("normal", axes).tolist() == [[[127, 127, 254], [127, 0, 127], [254, 127, 127]]]
    assert np.allclose(decoded("normal", axes, tmp_path / "a.png"), axes, atol=1e-6)
    assert encode("normal", np.full((1, 1, 3), np.nan)).tolist() == [[[127] * 3]]
    assert encode("curvature", np.array([[[0.0, 9.0]]])).tolist() == [[[127, 254, 127]]]
    assert abs(decoded("curvature", np.zeros((1, 1, 2)), tmp_path / "b.png")).max() < 1e-6
    depth = encode("depth_zbuffer", np.array([[np.inf, np.nan, 1000.0, -1.0, 2.0]]))
    assert depth.dtype == np.uint16 and depth.tolist() == [[65535, 65535, 64499, 0, 1024]]
    assert encode("mask_valid", np.array([[True, False]])).tolist() == [[255, 0]]
    # Times 512 is beyond float16.
    assert encode("depth_euclidean", np.array([[70.0]], np.float16)).tolist() == [[35840]]


def test_a_prediction_keeps_its_gradient_and_its_errors() -> None:
    prediction = torch.full((2, 1, 2, 2), 1.5, requires_grad=True)
    metres = units("depth_zbuffer", prediction)
    assert math.isclose(metres[0, 0, 0, 0].item(), 2.5 / 2 * 65535 / 512, rel_tol=1e-6)
    metres.sum().backward()
    assert prediction.grad is not None and (prediction.grad > 0).all()
    assert units("normal", torch.rand(2, 3, 4, 4)).norm(dim=1).sub(1).abs().max() < 1e-6
    assert units(
        "curvature", target("curvature", torch.tensor([[[254]], [[0]]], dtype=torch.uint8))
    ).flatten().tolist() == [2, -2]
    assert units("segment_semantic", torch.tensor([[3]])).tolist() == [[3]]
