"""Dense numbers are learned in units of the training labels by all methods; older runs keep the files' range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sidetuning.errors import SideTuningError
from sidetuning_bench import compare
from sidetuning_bench.dense import itaskonomy, transfer
from sidetuning_bench.dense.itaskonomy import Settings
from sidetuning_bench.dense.targets import target
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.dense.tasks import Regression, dense_task
from sidetuning_bench.domains import path_of, write
from sidetuning_bench.methods import load_method
from sidetuning_bench.options import with_values
from sidetuning_bench.report_runs import report

SIZE = 64


def room(root: Path, near: float, far: float, count: int = 96) -> Path:
    """Smooth depths from `near` to `far` metres, and pictures whose grey is the depth."""
    rng = torch.Generator().manual_seed(0)
    for building, frames in (("a", count), ("b", 16)):
        for i in range(frames):
            grey = F.interpolate(torch.rand(1, 1, 4, 4, generator=rng), SIZE, mode="bicubic")[0, 0].clamp(0, 1).numpy()
            write(path_of(root, "depth_zbuffer", building, i, 0), "depth_zbuffer", near + grey * (far - near))
            picture = np.repeat((255 * grey).astype(np.uint8)[..., None], 3, 2)
            write(path_of(root, "rgb", building, i, 0), "rgb", picture)
    (root / "splits.csv").write_text("id,train,val,test\na,1,0,0\nb,0,0,1\n")
    return root


def settings_of(root: Path, out: Path, **values: Any) -> Settings:
    given = {"tasks": ("depth_zbuffer",), "batch": 16, "pictures": 0, "progress": False, "init": None}
    if "method" in values:
        values["method"] = itaskonomy.METHODS[values["method"]]
        del given["init"]
    folders = {"data": str(root), "out": str(out / "run"), "cache": str(out / "cache")}
    return with_values(Settings(), {**given, **folders, **values})


@pytest.mark.slow
@pytest.mark.parametrize(("near", "far"), [(1, 4), (10, 120), (0.5, 1)])
def test_depths_of_rooms_and_of_halls_are_learned(near: float, far: float, tmp_path: Path) -> None:
    root = room(tmp_path / "data", near, far)
    scores = {}
    for name, values in (("mlp2", {"init": "distilled"}), ("features", {"method": "features"})):
        result = itaskonomy.run(settings_of(root, tmp_path / name, epochs=8, **values))
        scores[name] = result.matrix.final[0]
    # 0.5 is the best constant.
    assert scores["mlp2"] > 0.65 and scores["features"] > 0.55, scores


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return room(tmp_path_factory.mktemp("room"), 1, 4, count=16)


def test_units_are_those_of_the_valid_labels(small: Path) -> None:
    frames = Taskonomy(small, ("rgb", "depth_zbuffer"), "train", None)
    task = dense_task("depth_zbuffer", frames).measured(frames)
    assert isinstance(task, Regression) and task.units is not None
    depth = target("depth_zbuffer", frames.tensors("depth_zbuffer"))
    assert task.units[0][0] == pytest.approx(float(depth.median()), abs=1e-4)
    assert task.units[1][0] == pytest.approx(float(depth.std()), rel=0.2)
    # The loss is that of numbers around 0 of size 1, and an exact answer has none.
    y = task.labels(frames.tensors("depth_zbuffer"), frames.tensors("mask"))
    assert task.loss(depth, y) == 0
    assert task.loss(depth + task.units[1][0], y) == pytest.approx(1, rel=1e-3)
    assert set(dense_task("depth_zbuffer", frames).head[1]) == {"channels", "hidden"}


@pytest.mark.parametrize("method", ["features", "finetune", "independent", "ewc", "piggyback", "boosting"])
def test_every_method_starts_at_the_median_of_the_labels(method: str, small: Path, tmp_path: Path) -> None:
    given = settings_of(small, tmp_path, method=method, epochs=1.0, lr=1e-9)
    result = itaskonomy.run(given)
    # Nothing is learned at this rate: the answer is within the spread of the labels, not in the middle of 128 m.
    assert result.values is not None and result.values[0][0] < 2
    saved = load_method(tmp_path / "run/tasks", itaskonomy.map_base(given, itaskonomy.frames_of(given)[0]))
    x = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    assert ((saved(x, "depth_zbuffer") + 1) * 64 - 2.5).abs().max() < 4


def old(settings: Settings, **changes: Any) -> None:
    """Finish a run, and leave it as it was written before there was a choice of units."""
    itaskonomy.run(with_values(settings, {"units": "range", **changes}))
    for name in ("run.json", "result.json"):
        file = Path(settings.run.out) / name
        content = json.loads(file.read_text())
        # Nor had it checksums.
        del content["settings"]["units"], content["sha256"]
        file.write_text(json.dumps({**content, **({"format_version": 1} if name == "run.json" else {})}))


@pytest.mark.slow
def test_a_run_that_is_older_than_the_choice_is_found_and_not_mixed(small: Path, tmp_path: Path) -> None:
    given = settings_of(small, tmp_path / "old", epochs=1.0)
    old(given, merge="alpha")
    before = (Path(given.run.out) / "result.json").read_bytes()
    assert itaskonomy.run(given).values == json.loads(before)["values"]
    assert (Path(given.run.out) / "result.json").read_bytes() == before
    with pytest.raises(SideTuningError, match=r"units 'range' \(now 'labels'\)"):
        itaskonomy.run(with_values(given, {"units": "labels", "merge": "alpha"}))
    new = settings_of(small, tmp_path / "new", epochs=1.0)
    assert itaskonomy.run(new).settings["units"] == "labels"
    page = report([given.run.out, new.run.out], tmp_path / "both.html").read_text()
    assert "units=range" in page and "units=labels" in page


def test_the_units_of_a_grid_are_those_of_all_its_runs(small: Path, tmp_path: Path) -> None:
    on = compare.OnITaskonomy(source=itaskonomy.FrameOptions(data=str(small), units="range"))
    cells = list(compare.cells(with_values(compare.Settings(on), {"seeds": 1})))
    assert {cell.settings.source.units for cell in cells} == {"range"}  # type: ignore[union-attr]
    given = transfer.Settings(source=itaskonomy.FrameOptions(units="labels"))
    assert {cell.settings.source.units for cell in transfer.cells(given)} == {"labels"}
