"""`icifar --recipe best`: its side, its shifts, its mirrored views, and the run as a whole on tiny data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sidetuning as st
from conftest import conv_base, inputs
from sidetuning.commands import predict
from sidetuning.errors import SideTuningError
from sidetuning.sides.fusion import Fusion, random_shift
from sidetuning_bench import icifar
from sidetuning_bench.cifar import load_images
from sidetuning_bench.options import FeaturesOptions, flat, with_values
from sidetuning_bench.sequence import with_recipe


def test_maps_move_together_and_zeros_come_in() -> None:
    large, small = torch.randn(6, 2, 16, 16), torch.randn(6, 3, 8, 8)
    with st.seeded(0):
        moves = torch.randint(-2, 3, (2, 6))
    with st.seeded(0):
        a, b = random_shift([large, small], 2)
    assert {abs(int(m)) for m in moves.flatten()} == {0, 1, 2}
    for i, (down, right) in enumerate(moves.T.tolist()):
        expected = F.pad(large, (2,) * 4)[i, :, 2 + down : 18 + down, 2 + right : 18 + right]
        assert torch.equal(a[i], expected)
        down, right = int(down / 2), int(right / 2)  # rounded towards none
        assert torch.equal(b[i], F.pad(small, (1,) * 4)[i, :, 1 + down : 9 + down, 1 + right : 9 + right])


def test_fusion_shifts_in_training_only_and_fits_the_paper_budget() -> None:
    side = Fusion(conv_base(("2", "4")), width=8, shift=2)
    features = conv_base(("2", "4"))(inputs("conv"))
    assert side({}, features).shape == (4, 16)
    side.eval()
    assert torch.equal(side({}, features), side({}, features))
    side.train()
    assert not torch.equal(side({}, features), side({}, features))
    base = st.load_base("resnet44-cifar10", taps=icifar.BEST["taps"])
    branch = st.SideTuner(base).add_task("t", side="fusion", merge="sum", head=10)
    assert sum(p.numel() for p in branch.parameters()) == 41_706 < 43_500


def test_the_recipe_sets_what_it_needs_and_refuses_what_contradicts_it() -> None:
    best = icifar.Settings(recipe="best")
    given = flat(with_recipe(with_values(best, {"seed": 3}), icifar.BEST))
    told = {"side": "fusion", "merge": "sum", "mirror": True, "samples": 140_000, "seed": 3}
    assert {name: given[name] for name in told} == told
    assert with_recipe(icifar.Settings(), icifar.BEST) == icifar.Settings()
    with pytest.raises(SideTuningError, match="sets --merge itself, to sum"):
        with_recipe(with_values(best, {"merge": "alpha"}), icifar.BEST)
    with pytest.raises(SideTuningError, match="--recipe best is side-tuning's"):
        with_recipe(with_values(best, {"method": FeaturesOptions()}), icifar.BEST)
    with pytest.raises(TypeError, match="has no setting stages"):
        with_values(icifar.Settings(), {"stages": 3})


@pytest.mark.slow
def test_a_run_answers_by_the_mean_over_mirror_images(tiny_cifar: Path, tmp_path: Path) -> None:
    values = {"data": str(tiny_cifar), "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache"), "tasks": 2}
    settings = with_values(icifar.Settings(), {**values, **icifar.BEST, "samples": 256, "progress": False})
    result = icifar.run(settings)
    assert result.matrix.forgetting == [0.0, 0.0]
    model = st.load(tmp_path / "run")
    test = load_images(str(tiny_cifar), "test")
    rows = (test.labels < 10).nonzero().flatten().tolist()
    images, labels = torch.stack([test[i][0] for i in rows]), test.labels[rows]
    with torch.no_grad():
        views = [model(x, "classes-0-9").softmax(1) for x in (images, images.flip(-1))]
    right = float(((views[0] + views[1]).argmax(1) == labels).float().mean())
    assert right == pytest.approx(result.accuracy[0][0], abs=1.5 / len(rows))  # features are cached in half precision
    assert not torch.equal(views[0], views[1])

    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    ((answer, _),) = predict.answered(predict.Settings(str(tmp_path / "run"), (str(tmp_path / "image.png"),)))
    assert answer.value == pytest.approx(float((views[0] + views[1])[0].max()) / 2, abs=1e-4)
    again = icifar.run(with_values(settings, {"out": str(tmp_path / "again")}))
    assert again.accuracy == result.accuracy


def test_a_network_of_its_own_sees_mirrored_and_cropped_images() -> None:
    images, labels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    plain, mirrored = icifar.views_of(icifar.Images(images, labels, view=None))
    assert isinstance(plain, icifar.Images)
    assert torch.equal(plain.__getitems__([2])[0], images[2:3])
    assert torch.equal(mirrored.__getitems__([2])[0], images[2:3].flip(-1))
    with st.seeded(0):
        x, _, y = icifar.Images(images, labels, view=None).__getitems__([0, 1, 2, 3])
    assert x.shape == images.shape and torch.equal(y, labels) and not torch.equal(x, images)
