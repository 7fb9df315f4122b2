"""Dense tasks: losses and measures on cases worked out by hand, and whole runs on a folder in Taskonomy's layout."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sidetuning.errors import DataError, SideTuningError, UnknownNameError
from sidetuning.loading import load_base
from sidetuning_bench import compare, grid
from sidetuning_bench.continual import AccuracyMatrix
from sidetuning_bench.dense import itaskonomy, transfer
from sidetuning_bench.dense.itaskonomy import Settings
from sidetuning_bench.dense.resnet_map import ResNetMap
from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.dense.tasks import IGNORED, ORDER, Categories, Regression, Segmentation, dense_task
from sidetuning_bench.options import check, with_values
from sidetuning_bench.results import RunResult

MASK = torch.tensor([[[True, True], [True, False]]])


def regression(domain: str, channels: int, squared: bool = False) -> Regression:
    return Regression(domain, channels, "", squared)


def test_l1_counts_valid_pixels_alone() -> None:
    task = regression("reshading", 1)
    raw = torch.tensor([[[[0, 255], [0, 0]]]], dtype=torch.uint8)  # targets -1, 1, -1, -1
    y = task.labels(raw, MASK)
    output = torch.zeros(1, 1, 2, 2)
    output[0, 0, 1, 1] = 100  # invalid
    assert task.loss(output, y) == pytest.approx(1)
    assert task.loss(output + 1, y) == pytest.approx((2 + 0 + 2) / 3)
    assert task.value(task.tally(output, y)) == pytest.approx(0.5)  # in 0 … 1
    image = regression("edge_texture", 1)  # of the picture, not of the mesh: valid everywhere
    assert image.labels(raw.int(), MASK)[:, -1].all()


def test_curvature_is_squared_and_averaged_over_both_channels() -> None:
    task = regression("principal_curvature", 2, squared=True)
    raw = torch.full((1, 2, 2, 2), 127, dtype=torch.uint8)
    output = torch.full((1, 2, 2, 2), -1 / 255)  # what 127 is
    output[:, 0] += 0.5
    y = task.labels(raw, MASK)
    assert task.loss(output, y) == pytest.approx(0.125, rel=1e-5)
    zero = torch.full((1, 2, 2, 2), -1 / 255)
    assert task.value(task.tally(zero, y)) == pytest.approx(0, abs=1e-6)
    half = zero + torch.tensor([127 / 127.5, 0]).view(1, 2, 1, 1) / 2  # off by 1 of 2 in one channel of two
    assert task.value(task.tally(half, y)) == pytest.approx(0.5**0.5, rel=1e-3)


def test_holes_of_a_depth_are_left_out_whatever_the_mask_says() -> None:
    raw = torch.tensor([[1024, 2048], [65535, 64500]]).view(1, 1, 2, 2)
    for domain in ("depth_euclidean", "depth_zbuffer"):
        y = regression(domain, 1).labels(raw, torch.ones(1, 2, 2, dtype=torch.bool))
        assert y[0, -1].tolist() == [[1, 1], [0, 0]]


def test_constant_answers_of_classes_and_categories() -> None:
    classes = Segmentation("segment_semantic", 3, "")
    y = torch.tensor([[[2, 2], [1, IGNORED]]])
    assert classes.constant(y).argmax(1).item() == 2
    categories = Categories("class_object", 3, "")
    y = torch.tensor([[0.5, 0.5, 0.0]] * 6 + [[1.0, 0.0, 0.0]] * 4 + [[0.0, 0.0, 1.0]])
    guess = categories.constant(y)  # {0, 1}: 16 of 20 hits, 6 + 10 of 17; {0} alone: 10 hits of 11 and of 17
    assert (guess > -1).tolist() == [[True, True, False]]
    assert categories.value(categories.tally(guess.expand(len(y), -1), y)) == pytest.approx(2 * 16 / (22 + 17))


def test_units_of_depth_and_normals() -> None:
    depth = regression("depth_euclidean", 1)
    raw = torch.full((1, 1, 2, 2), 512 * 3, dtype=torch.int32)  # three metres
    y = depth.labels(raw, MASK)
    five = torch.full((1, 1, 2, 2), 2 * 512 * 5 / 65535 - 1)
    assert depth.value(depth.tally(five, y)) == pytest.approx(2, abs=1e-3)
    normal = regression("normal", 3)
    raw = torch.tensor([127, 127, 254], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)  # (0, 0, 1)
    slanted = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert normal.value(normal.tally(slanted, normal.labels(raw, MASK))) == pytest.approx(45, abs=0.5)


def test_the_score_of_an_error() -> None:
    task = regression("reshading", 1)
    raw = torch.tensor([[[[0, 255], [255, 255]]]], dtype=torch.uint8)
    y = task.labels(raw, torch.ones_like(MASK))
    assert task.constant(y).item() == 1  # the median
    constant = task.value(task.tally(task.constant(y).expand(1, 1, 2, 2), y))
    assert constant == pytest.approx(0.25)
    perfect, same, worse = (task.score(torch.tensor([e, 1.0]), constant) for e in (0.0, 0.25, 0.75))
    assert perfect.score == 1 and same.score == 0.5 and worse.score == 0.25 and worse.value == 0.75


def test_segmentation_leaves_out_what_is_uncertain() -> None:
    task = Segmentation("segment_semantic", 4, "")
    raw = torch.tensor([[[0, 1], [2, 2]]], dtype=torch.uint8)
    y = task.labels(raw, MASK)
    assert y.tolist() == [[[IGNORED, 1], [2, 2]]]
    output = torch.zeros(1, 4, 2, 2)
    output[0, 1, 0, 1] = output[0, 2, 1, 0] = output[0, 1, 1, 1] = 5  # right, right, wrong: 1 for 2
    assert task.value(task.tally(output, y)) == pytest.approx((1 / 2 + 1 / 2) / 2)  # class 3 does not occur
    certain = -math.log(math.exp(5) / (math.exp(5) + 3))
    assert task.loss(output, y) == pytest.approx((2 * certain + certain + 5) / 3, rel=1e-5)


def test_categories_are_compared_as_sets() -> None:
    task = Categories("class_object", 4, "")
    y = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1.0]])
    output = torch.log(torch.tensor([[0.6, 0.2, 0.2, 1e-9], [0.1, 1e-9, 0.5, 0.4]]))
    # truth {0, 1}, {3}; guesses {0}, {2, 3}: two right, one too many, one missing
    assert task.tally(output, y).tolist() == [2, 1, 1]
    assert task.value(task.tally(output, y)) == pytest.approx(2 / 3)


def test_pictures_of_every_task() -> None:
    for task in (regression("principal_curvature", 2), regression("depth_zbuffer", 1), regression("normal", 3)):
        picture = task.picture(torch.rand(2, task.outputs, 8, 8))
        assert picture.shape == (2, 3, 8, 8) and picture.dtype == torch.uint8
    depth = regression("depth_zbuffer", 1)
    near, far = (depth.picture(torch.full((1, 1, 1, 1), 2 * 512 * m / 65535 - 1)).max() for m in (1.0, 32.0))
    assert near < far
    ids = torch.tensor([[[0, 3]]])
    assert Segmentation("segment_semantic", 4, "").picture(ids).shape == (1, 3, 1, 2)


SIZE = 64


def save(root: Path, domain: str, building: str, point: int, array: np.ndarray[Any, Any], suffix: str = "") -> None:
    folder = root / domain / building
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"point_{point}_view_0_domain_{suffix or domain}.png"
    Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def taskonomy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames as Taskonomy stores them, written without the library: a bright square, and labels that follow it."""
    root = tmp_path_factory.mktemp("taskonomy")
    rng = np.random.default_rng(0)
    for building, count in (("almena", 24), ("hanson", 8), ("ihlen", 8)):
        for point in range(count):
            rgb = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
            top, left = rng.integers(0, SIZE - 32, 2)
            inside = np.zeros((SIZE, SIZE), bool)
            inside[top : top + 32, left : left + 32] = True
            rgb[inside] = (230, 200, 40)
            save(root, "rgb", building, point, rgb)
            grey = np.where(inside, 220, 40).astype(np.uint8)
            save(root, "reshading", building, point, np.repeat(grey[..., None], 3, -1))
            normal = np.where(inside[..., None], (127, 127, 254), (254, 127, 127)).astype(np.uint8)
            save(root, "normal", building, point, normal)
            curvature = np.where(inside[..., None], (190, 127, 127), (127, 127, 127)).astype(np.uint8)
            save(root, "principal_curvature", building, point, curvature)
            depth = np.where(inside, 1024, 40000).astype(np.uint16)
            depth[:4] = 65535  # nothing there
            save(root, "depth_zbuffer", building, point, depth)
            save(root, "edge_texture", building, point, np.where(inside, 60000, 300).astype(np.uint16))
            save(root, "segment_semantic", building, point, np.where(inside, 5, 1).astype(np.uint8), "segmentsemantic")
            (root / "class_object" / building).mkdir(parents=True, exist_ok=True)
            scores = np.where(np.arange(1000) == (3 if left > 16 else 700), 9.0, 0.0)
            np.save(root / "class_object" / building / f"point_{point}_view_0_domain_class_object.npy", scores)
    (root / "splits.csv").write_bytes(b"id,train,val,test\ralmena,1,0,0\rhanson,0,1,0\rihlen,0,0,1\r")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base that was not trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "base.safetensors"
    save_file({k: v for k, v in ResNetMap().state_dict().items() if v.is_floating_point()}, path)
    return str(path)


TASKS = ("curvature", "segment_semantic", "reshading", "edge_texture", "depth_zbuffer", "normal", "class_object", "rgb")


@pytest.fixture
def settings(taskonomy_folder: Path, weights: str, tmp_path: Path) -> Settings:
    given = Settings(tasks=TASKS, base_weights=weights, epochs=20, pictures=2)
    folders = {"data": str(taskonomy_folder), "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    return changed(given, **folders, init=None, batch=8, lr=3e-3, progress=False)


def changed(settings: Settings, **values: Any) -> Settings:
    """Settings with other values, by flat name; a method is given by its name."""
    if "method" in values:
        values["method"] = itaskonomy.METHODS[values["method"]]
    return with_values(settings, values)


@pytest.mark.slow
def test_a_folder_of_taskonomy_trains(settings: Settings, tmp_path: Path) -> None:
    result = itaskonomy.run(settings)
    assert result.tasks == list(TASKS) and result.measures is not None and result.values is not None
    assert result.matrix.forgetting == [0.0] * len(TASKS)
    at = dict(zip(TASKS, result.matrix.final, strict=True))
    assert at["segment_semantic"] > 0.75 and at["reshading"] > 0.6 and at["normal"] > 0.55, at
    assert result.measures[TASKS.index("normal")] == "mean angle, °"
    names = {p.name for p in (tmp_path / "run" / "gallery").iterdir()}
    assert {"input.png", "normal.truth.png", "normal.learned.png", "normal.end.png"} <= names
    assert not any(n.startswith("class_object") for n in names)
    with Image.open(tmp_path / "run" / "gallery" / "normal.end.png") as strip:
        assert strip.size == (2 * SIZE, SIZE)
    again = itaskonomy.run(settings)  # all is there already
    assert again.accuracy == result.accuracy and again.values == result.values


@pytest.mark.slow
def test_a_side_on_inner_maps_learns_at_either_schedule(settings: Settings) -> None:
    one = changed(settings, tasks=("reshading",), recipe="best")
    constant = itaskonomy.run(one)
    assert constant.settings["side"] == "fusion" and constant.settings["merge"] == "mlp2"
    cycle = itaskonomy.run(changed(one, schedule="one-cycle", out=settings.run.out + "2"))
    assert min(constant.matrix.final[0], cycle.matrix.final[0]) > 0.52  # 0.5 is the best constant guess
    assert constant.values != cycle.values and constant.parameters == cycle.parameters
    with pytest.raises(SideTuningError, match="sets --merge itself, to mlp2"):
        itaskonomy.run(changed(one, merge="film"))


def test_a_comparison_has_the_best_recipe_beside_the_papers_side() -> None:
    found = {
        cell.variant: cell.settings
        for cell in compare.cells(on(compare.OnITaskonomy(), methods=("sidetune",), batch=16))
    }
    assert list(found) == ["", "recipe=best"] and {s.training.batch for s in found.values()} == {16}
    paper: Any = found[""].method
    best: Any = found["recipe=best"].method
    assert (paper.side, best.side, best.taps) == ("fcn5", "fusion", ("layer2", "layer3"))
    assert [c.variant for c in compare.cells(on(compare.OnIcifar(), methods=("sidetune",)))] == [""]


def on(scenario: Any, **values: Any) -> compare.Settings:
    """A comparison with one seed, and these settings by flat name."""
    return with_values(compare.Settings(scenario), {"seeds": 1, **values})


@pytest.mark.slow
def test_fine_tuning_forgets_and_side_tuning_does_not(settings: Settings) -> None:
    two = changed(settings, tasks=("reshading", "normal"), method="finetune", epochs=4)
    result = itaskonomy.run(two)
    assert isinstance(result.matrix, AccuracyMatrix)
    assert abs(result.matrix.forgetting[0]) > 1e-3
    assert result.parameters[1] < result.shared_parameters / 10


@pytest.mark.slow
def test_a_run_goes_on_after_a_kill_and_ends_the_same(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sidetuning_bench.__main__ import main

    few = ["--tasks", "curvature", "normal", "--epochs", "4", "--batch", "8", "--init", "None", "--no-progress"]
    assert settings.base_weights is not None
    given = [
        "itaskonomy",
        "--data",
        settings.source.data,
        "--base-weights",
        settings.base_weights,
        "--cache",
        settings.run.cache,
        *few,
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main([*given, "--out", str(whole)])
    code = (  # dies when the second task has begun
        "import os, sys\nfrom sidetuning_bench.methods import sidetune\nadd = sidetune.SideTune.add\n"
        "def dying(self, task):\n    if task.name == 'normal':\n        os._exit(9)\n    add(self, task)\n"
        "sidetune.SideTune.add = dying\nfrom sidetuning_bench.__main__ import main\nmain(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *given, "--out", str(broken)], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert len((broken / "metrics.jsonl").read_text().splitlines()) == 1
    main([*given, "--out", str(broken)])
    first, second = (RunResult.load(p / "result.json") for p in (whole, broken))
    page = (whole / "report.html").read_text()
    assert (
        "<h1>iTaskonomy: sidetune</h1>" in page and page.count("data:image/") >= 8
    )  # input, truth, two moments, two tasks
    other = RunResult.load(broken / "result.json")
    replace(other, settings={**other.settings, "merge": "alpha"}).save(broken / "result.json")
    main(["report", str(whole), str(broken), "--out", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    assert "<h1>iTaskonomy: 2 runs</h1>" in page and "merge=alpha" in page and "merge=mlp2" in page
    for wrong, message in (([tmp_path], "holds no run"), ([whole, whole], "seed 0")):
        with pytest.raises(SystemExit):
            main(["report", *map(str, wrong)])
        assert message in capsys.readouterr().err
    assert first.accuracy == second.accuracy and first.values == second.values
    for name in ("normal.end.png", "curvature.learned.png"):
        assert (whole / "gallery" / name).read_bytes() == (broken / "gallery" / name).read_bytes()


def test_a_distilled_side_of_another_width_is_told_which_one_ships(settings: Settings) -> None:
    packaged = changed(settings, base_weights=None, init="distilled", tasks=("rgb",), side_width=0.5)
    message = r"built with the options \{'width': 0.25, 'signed': True\}, not \{'width': 0.5, 'signed': True\}"
    with pytest.raises(SideTuningError, match=message):
        itaskonomy.run(packaged)


def test_errors_name_what_is_wrong(settings: Settings, taskonomy_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="normals"):
        itaskonomy.run(changed(settings, tasks=("normals",)))
    with pytest.raises(DataError, match="keypoints2d"):
        itaskonomy.run(changed(settings, tasks=("keypoints2d",), out=settings.run.out + "2"))
    for name, value, message in (
        ("batch", 0, "--batch must be 1"),
        ("frames", 0, "--frames must be 1"),
        ("epochs", 0.0, "--epochs must be above 0"),
        ("lr", -1e-3, "--lr must be above 0"),
        ("clip", float("nan"), "--clip must be above 0"),
        ("tasks", (), "--tasks must name something"),
        ("tasks", ("rgb", "rgb"), "nothing twice"),
        ("weight_decay", -1.0, "--weight-decay must be 0 or more"),
    ):
        with pytest.raises(SideTuningError, match=message):
            itaskonomy.run(changed(settings, **{name: value}))
    with pytest.raises(TypeError, match="no setting merge"):
        changed(settings, method="finetune", merge="mlp2")
    (tmp_path / "both.csv").write_text("id,train,val,test\nalmena,1,0,1\n")
    with pytest.raises(DataError, match="has almena for training and for testing"):
        itaskonomy.run(changed(settings, subset=str(tmp_path / "both.csv"), out=settings.run.out + "6"))
    with pytest.raises(DataError, match="frames of this, not 5000"):
        itaskonomy.run(changed(settings, frames=5000, out=settings.run.out + "3"))
    with pytest.raises(SideTuningError, match="need a map"):
        itaskonomy.run(changed(settings, base="resnet44-cifar10", base_weights=None, out=settings.run.out + "4"))
    with pytest.raises(SideTuningError, match="other settings"):
        folder = settings.run.out + "5"
        one = changed(settings, tasks=("rgb",), out=folder, epochs=1)
        itaskonomy.run(one)
        itaskonomy.run(changed(one, epochs=2))
    other = shutil.copytree(taskonomy_folder, tmp_path / "other")
    for picture in (other / "rgb").rglob("*_rgb.png"):
        picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(SideTuningError, match="a run of another data"):
        itaskonomy.run(changed(one, data=str(other)))


def test_the_paper_has_twelve_tasks_in_this_order() -> None:
    assert len(ORDER) == 12 and ORDER[0] == "curvature" and ORDER[-1] == "rgb"
    given = Settings(order=3)
    assert itaskonomy.ordered(given) != list(ORDER) and sorted(itaskonomy.ordered(given)) == sorted(ORDER)
    with pytest.raises(UnknownNameError):
        dense_task("segment_semantics", None)  # type: ignore[arg-type]


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run cells here: a process of its own for each takes seconds to start."""
    monkeypatch.setattr(grid, "run_apart", lambda cell, work, bar: work(cell.settings))


@pytest.mark.slow
def test_compare_runs_dense_tasks_too(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    folders = {"data": settings.source.data, "out": str(tmp_path / "grid"), "cache": settings.run.cache}
    given = on(
        compare.OnITaskonomy(epochs=1),
        methods=("features", "finetune"),
        tasks=2,
        base_weights=settings.base_weights,
        init=None,
        **folders,
    )
    results = compare.run(given)
    assert [r.method for r in results] == ["features", "finetune"] and results[0].tasks == [
        "curvature",
        "segment_semantic",
    ]
    assert (tmp_path / "grid" / "report.html").exists() and "finetune" in (tmp_path / "grid" / "table.md").read_text()
    with pytest.raises(SideTuningError, match="one of icifar's"):
        compare.run(with_values(given, {"grid": "data"}))


def test_transfer_draws_frames_anew_for_every_seed_and_knows_the_papers_side_and_the_best(settings: Settings) -> None:
    methods = ("sidetune", "sidetune-copy", "sidetune-best")
    given = transfer.Settings(targets=("normal",), frames=(4, 8), methods=methods)
    given = with_values(given, {"data": settings.source.data, "seeds": 2})
    few, copied, best, more = [c.settings for c in transfer.cells(given)][:4]
    side: Any = best.method
    assert (side.name, best.recipe, side.side, side.merge) == ("sidetune", "best", "fusion", "mlp2")
    side = copied.method
    first: Any = few.method
    assert (first.side, side.side, side.side_width, side.init, side.name) == (
        "fcn5",
        "copy",
        1.0,
        None,
        "sidetune",
    )
    drawn = [itaskonomy.frames_of(c.settings)[0].frames for c in transfer.cells(given)]
    # Fewer are among the more; seeds differ.
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3][:4] and drawn[0] != drawn[6]
    assert few.epochs * 4 == more.epochs * 8 == 400 * 16


@pytest.mark.slow
def test_frames_that_do_not_fit_into_memory_are_read_batch_by_batch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = changed(settings, tasks=("normal", "segment_semantic"), method="finetune", epochs=1)
    held = itaskonomy.run(few)
    monkeypatch.setattr(itaskonomy, "IN_MEMORY", 0)
    monkeypatch.setattr(Taskonomy, "tensors", all_at_once_is_an_error(Taskonomy.tensors))
    read = itaskonomy.run(changed(few, out=settings.run.out + "-read"))
    assert read.accuracy == held.accuracy and read.values == held.values


def all_at_once_is_an_error(tensors: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Taskonomy, domain: str, progress: bool = False, rows: Any = None) -> Any:
        assert rows is not None
        return tensors(self, domain, progress, rows)

    return checked


def test_a_frame_of_which_no_class_is_known_adds_nothing() -> None:
    task = Segmentation("segment_semantic", 4, "")
    output = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = task.labels(torch.tensor([0, 2]).view(2, 1, 1).expand(2, 3, 3), torch.ones(2, 3, 3))
    loss = task.loss(output, y)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(output[1:], y[1:]).item())
    unknown = task.loss(output[:1], y[:1])  # as EWC takes it, frame by frame
    unknown.backward()
    assert output.grad is not None
    assert unknown == 0 and torch.equal(output.grad, torch.zeros_like(output))


def plain(settings: Any, **values: Any) -> Any:
    """Settings with other values, by flat name."""
    return with_values(settings, values)


@pytest.mark.slow
def test_transfer_makes_a_table(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    given = transfer.Settings(targets=("normal",), frames=(4, 16), methods=("features", "scratch"), steps=6)
    folders = {"data": settings.source.data, "out": str(tmp_path / "transfer"), "cache": settings.run.cache}
    given = with_values(given, {**folders, "seeds": 2, "base_weights": settings.base_weights, "init": None})
    results = transfer.run(given)
    assert len(results) == 8 and {r.variant for r in results} == {"normal, 4 frames", "normal, 16 frames"}
    table = (tmp_path / "transfer" / "table.md").read_text()
    assert "| curvature → normal: mean angle, ° | 4 frames | 16 frames |" in table and table.count("±") == 4
    curves = json.loads((tmp_path / "transfer" / "curves.json").read_text())["normal"]
    values = [
        r.values[0][0] for r in results if r.values and r.method == "scratch" and r.variant == "normal, 16 frames"
    ]
    assert curves["scratch"][1][0] == pytest.approx(sum(values) / 2) and curves["scratch"][1][2] == 2
    with pytest.raises(DataError, match="frames of this, not 5000"):  # before anything is learned
        transfer.run(plain(given, out=str(tmp_path / "many"), frames=(4, 5000)))
    assert not list((tmp_path / "many").glob("normal*"))
    with pytest.raises(UnknownNameError, match="sidetune-copi"):
        transfer.run(plain(given, methods=("sidetune-copi",)))
    with pytest.raises(SideTuningError, match="--frames must be 1 or more, not 0"):
        transfer.run(plain(given, frames=(0, 4)))
    with pytest.raises(SideTuningError, match="--frames must name something, and nothing twice"):
        transfer.run(plain(given, frames=(4, 4)))
    other = shutil.copytree(settings.source.data, tmp_path / "other")
    for picture in (other / "normal").rglob("*_normal.png"):
        picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(SideTuningError, match="a run of another data of normal"):
        transfer.run(plain(given, data=str(other)))
    page = (tmp_path / "transfer" / "report.html").read_text()
    assert f"{sum(values) / 2:.1f} ±" in page and page.count("<svg class=") >= 2 and "Lower is better." in page


def test_transfer_compares_methods_on_the_same_frames() -> None:
    """Side-tuning has errors of 20 and 24, fine-tuning of 21 and 27, and a third seed that side-tuning has not."""

    def run(method: str, seed: int, error: float) -> RunResult:
        return RunResult(
            method,
            "normal, 4 frames",
            seed,
            ["normal"],
            [[0.5]],
            None,
            [None],
            [1],
            1,
            [1.0],
            0.0,
            None,
            {},
            [[error]],
            ["mean angle, °"],
        )

    runs = [
        run("sidetune", 0, 20.0),
        run("sidetune", 1, 24.0),
        *(run("finetune", k, e) for k, e in enumerate((21.0, 27.0, 99.0))),
    ]
    (difference,) = transfer.differences(runs, "normal", (4,), "finetune")
    assert difference == pytest.approx((2.0, 1.0))  # 1 and 3
    assert "| finetune less sidetune | 2.0 ± 1.0 |" in transfer.tables(runs, ("normal",), (4,))
    assert "less" not in transfer.tables(runs[2:], ("normal",), (4,))


@pytest.mark.slow
def test_what_cannot_be_forgotten_is_measured_when_learned_and_at_the_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    evaluate = itaskonomy.evaluate

    def noted(method: Any, name: str, *given: Any) -> Any:
        asked.append(name)
        return evaluate(method, name, *given)

    monkeypatch.setattr(itaskonomy, "evaluate", noted)
    three = changed(settings, tasks=("reshading", "normal", "rgb"), epochs=1)
    result = itaskonomy.run(changed(three, method="features"))
    assert asked == ["reshading", "normal", "reshading", "normal", "rgb"]
    assert result.matrix.rows[1][0] == result.matrix.rows[0][0]
    asked.clear()
    itaskonomy.run(changed(three, method="finetune", out=settings.run.out + "-tuned"))
    assert len(asked) == 6


def test_settings_can_be_chosen_on_validation_buildings(settings: Settings) -> None:
    tested = itaskonomy.frames_of(changed(settings, test_split="val"))[1]
    assert {f[0] for f in tested.frames}.isdisjoint(f[0] for f in itaskonomy.frames_of(settings)[1].frames)


def test_a_comparison_gives_each_method_the_settings_that_it_reads() -> None:
    given = on(compare.OnITaskonomy(), merge="mlp2", lr=3e-4, ewc_coefficient=1e4)
    cells: dict[str, Any] = {cell.settings.method.name: cell.settings for cell in compare.cells(given)}
    for cell in cells.values():
        check(cell)
    assert {cell.training.lr for cell in cells.values()} == {3e-4}
    assert (cells["sidetune"].method.merge, cells["ewc"].method.coefficient) == ("mlp2", 1e4)
    rates = {c.settings.method.name: c.settings.training.lr for c in compare.cells(plain(given, lr=None))}
    assert (rates["sidetune"], rates["independent"], rates["ewc"], rates["scratch"]) == (1e-3, 3e-4, 3e-4, 1e-3)


def test_every_part_of_the_default_comparisons_can_be_built() -> None:
    compare.dry_run(list(compare.cells(on(compare.OnITaskonomy()))))
    compare.dry_run(list(compare.cells(on(compare.OnIcifar()))))
    base = compare.dry_run(list(transfer.cells(plain(transfer.Settings(), seeds=1))))
    assert base.identity().sha256 == load_base("resnet-doom-curvature").identity().sha256  # which a comparison keeps


@pytest.mark.slow
def test_the_release_trains_at_its_size_and_at_another(weights: str, tmp_path: Path) -> None:
    """Twelve domains written as the release has them: 512 pixels, the split with its CR line ends, no masks."""
    from test_taskonomy import TINY

    from taskonomy_parts import SUFFIX, file_of, put, raw_values

    root, rng = tmp_path / "release", np.random.default_rng(0)
    for domain in SUFFIX:
        if domain not in ("point_info", "mask_valid", "segment_unsup25d", "class_scene"):
            for building, points in (("hanson", 2), ("merom", 1), ("ihlen", 1), ("tansboro", 1)):
                for point in range(points):
                    put(file_of(root, domain, building, point), raw_values(domain, rng, 512))
    (root / "splits").mkdir()
    (root / "splits/train_val_test_tiny.csv").write_bytes(TINY)
    given = changed(
        Settings(base_weights=weights, epochs=1, pictures=1),
        data=str(root),
        subset="tiny",
        out=str(tmp_path / "small"),
        cache=str(tmp_path / "cache"),
        init=None,
        batch=2,
        size=64,
        progress=False,
    )
    result = itaskonomy.run(given)
    assert result.tasks == list(ORDER) and all(math.isfinite(v) for row in result.values or [] for v in row)
    assert [f[0] for f in itaskonomy.frames_of(given)[0].frames] == [
        "hanson",
        "hanson",
        "merom",
    ]  # not the broken tansboro
    whole = changed(given, size=None, tasks=("segment_semantic", "depth_zbuffer"), out=str(tmp_path / "whole"))
    assert itaskonomy.run(whole).matrix.forgetting == [0.0, 0.0]
    with Image.open(tmp_path / "whole/gallery/depth_zbuffer.end.png") as strip:
        assert strip.size == (512, 512)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["independent", "scratch", "ewc", "psp", "pnn"])
def test_other_methods_learn_dense_tasks(settings: Settings, method: str) -> None:
    two = changed(settings, tasks=("segment_semantic", "normal"), method=method, epochs=1)
    result = itaskonomy.run(two)
    assert all(0 < v < 1 for v in result.matrix.final) and all(
        math.isfinite(v) for row in result.values or [] for v in row
    )
    assert result.parameters[1] > 0 and (method in ("ewc", "psp") or result.matrix.forgetting == [0.0, 0.0])
