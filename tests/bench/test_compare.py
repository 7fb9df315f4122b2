"""`sidetuning compare`: the grids, cells that are not run twice, and what is written."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sidetuning as st
from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning_bench import compare, icifar
from sidetuning_bench.cifar import load_images
from sidetuning_bench.continual import AccuracyMatrix, average_rank, forward_transfer, mean_and_error, rigidity
from sidetuning_bench.methods import METHODS
from sidetuning_bench.options import FeaturesOptions, FineTuneOptions, ImageTraining, with_values
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run

CLI = [sys.executable, "-m", "sidetuning_bench"]


def settings(data: Path, out: Path, *methods: str) -> compare.Settings:
    given = on_icifar(methods=methods, tasks=2)
    return with_values(given, {"data": str(data), "samples": 128, "out": str(out), "cache": str(out / "cache")})


def on_icifar(**values: object) -> compare.Settings:
    """A comparison on iCIFAR with one seed, and these settings by flat name."""
    return with_values(compare.Settings(compare.OnIcifar()), {"seeds": 1, **values})


def run_settings(data: Path, out: Path, **values: object) -> icifar.Settings:
    """A small run on iCIFAR, with these settings by flat name."""
    given = {"data": str(data), "out": str(out), "tasks": 2, "samples": 64, "batch": 32, "progress": False}
    return with_values(icifar.Settings(), {**given, **values})


def children(group: int) -> list[int]:
    """Processes of a process group that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are counted in /proc")
def test_a_killed_grid_goes_on_and_finished_cells_stay(tiny_cifar: Path, tmp_path: Path) -> None:
    given = settings(tiny_cifar, tmp_path / "grid", "features", "independent", "finetune")
    command = [*CLI, "compare", "icifar", "--methods", *given.methods, "--seeds", "1", "--samples", "128"]
    command += ["--tasks", "2", "--data", str(tiny_cifar), "--out", given.run.out, "--cache", given.shared.cache]

    first = tmp_path / "grid/features-0/result.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not first.exists():
        time.sleep(0.1)
    assert process.poll() is None, "the grid was done before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while children(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not children(process.pid), "a cell's process outlived the grid"
    written = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == written
    assert "finetune" in done.stdout and "report.html" in done.stdout

    table = (tmp_path / "grid/table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(given.methods)
    html = (tmp_path / "grid/report.html").read_text()
    assert "classes-10-19" in html and "finetune" in html
    runs = {m: RunResult.load(tmp_path / f"grid/{m}-0/result.json") for m in given.methods}
    assert all(r.peak_memory_mb and r.peak_memory_mb > 100 and len(r.seconds) == 2 for r in runs.values())
    assert runs["features"].matrix.forgetting == [0.0, 0.0]
    assert runs["independent"].shared_parameters == 0 < runs["finetune"].shared_parameters
    # the first task of both is the same network
    assert runs["finetune"].accuracy[0] == runs["independent"].accuracy[0]
    filled = {r.method: r.alone for r in compare.add_alone(list(runs.values()))}
    assert filled["finetune"] == runs["independent"].matrix.learned
    assert filled["features"] == runs["features"].matrix.learned


def test_what_a_task_learned_first_amounts_to_is_found_in_the_right_run() -> None:
    def run(method: str, variant: str, learned: float, **settings: bool) -> RunResult:
        return RunResult(method, variant, 0, ["a"], [[learned]], None, [None], [1], 1, [1.0], 0.0, None, settings)

    runs = [
        run("independent", "", 0.9),
        run("ewc", "", 0.5),
        run("psp", "", 0.6),
        run("psp", compare.ALONE, 0.8),
        run("pnn", "", 0.7),
        run("sidetune", "merge=alpha", 0.4),
        run("sidetune", "merge=alpha, dense", 0.3, dense=True),
        run("features", "", 0.2),
    ]
    filled = {(r.method, r.variant): r.alone for r in compare.add_alone(runs)}
    assert filled == {
        ("independent", ""): [0.9],
        ("ewc", ""): [0.9],
        ("psp", ""): [0.8],
        ("pnn", ""): None,
        ("sidetune", "merge=alpha"): [0.4],
        ("sidetune", "merge=alpha, dense"): [0.4],
        ("features", ""): [0.2],
    }
    given = on_icifar(methods=("psp", "features"))
    cells = [(c.folder.name, getattr(c.settings, "alone", None)) for c in compare.cells(given)]
    assert cells == [("psp-0", False), ("psp-alone-0", True), ("features-0", False)]


@pytest.mark.slow
def test_alone_is_the_first_task_of_every_order(tiny_cifar: Path, tmp_path: Path) -> None:
    """A task learned `alone` is learned as in a run in which it comes first."""

    def common(folder: str, **values: object) -> icifar.Settings:
        return run_settings(tiny_cifar, tmp_path / folder, method=FineTuneOptions(), cache=str(tmp_path), **values)

    alone = icifar.run(common("alone", alone=True))
    seed = next(s for s in range(9) if icifar.task_order(common("order", order=s)) == [1, 0])
    other = icifar.run(common("order", order=seed))
    label = icifar.run(common("label"))
    assert other.tasks == ["classes-10-19", "classes-0-9"]
    assert alone.matrix.learned == [label.matrix.learned[0], other.matrix.learned[0]]
    again = icifar.run(common("alone", alone=True))
    assert again.accuracy == alone.accuracy
    with pytest.raises(SideTuningError, match="other settings"):
        icifar.run(common("alone"))


def test_a_run_goes_on_with_its_own_data_alone(tiny_cifar: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    moved, other = shutil.copytree(tiny_cifar, tmp_path / "moved"), shutil.copytree(tiny_cifar, tmp_path / "other")
    for file in other.glob("train*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.slice(0, len(table) - 1), file)
    given = run_settings(tiny_cifar, tmp_path / "run", tasks=1, method=FeaturesOptions())
    first = icifar.run(given)
    assert icifar.run(replace(given, data=str(moved))).accuracy == first.accuracy
    with pytest.raises(SideTuningError, match="a run of another data; choose another folder"):
        icifar.run(replace(given, data=str(other)))
    for name, value in (("clip", -1.0), ("weight_decay", -0.1), ("share", 2.0)):
        with pytest.raises(SideTuningError, match=f"--{name.replace('_', '-')}"):
            icifar.run(with_values(given, {"out": str(tmp_path / "wrong"), name: value}))
    # Of three steps, at which torch's schedule divides by zero.
    scheduler = ImageTraining(schedule="one-cycle").recipe(3, seed=0, rise=0.25).scheduler
    assert scheduler is not None
    assert scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1), 3) is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ewc", "independent"])
@pytest.mark.parametrize("moment", ["append", "save", "done"])
def test_a_run_that_ends_while_a_task_is_written(
    method: str, moment: str, tiny_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the row of metrics, the saved tasks and the end of the resume file, at the second task."""
    options = icifar.METHODS[method]
    few = {"samples": 32, "batch": 8, "share": 0.2}
    given = run_settings(tiny_cifar, tmp_path / "run", method=options, alone=method == "independent", **few)
    whole = icifar.run(with_values(given, {"out": str(tmp_path / "whole")}))
    owner = METHODS[method] if moment == "save" else Run
    real, calls = getattr(owner, moment), []

    def ends(self: object, *args: object, **named: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, ends)
        with pytest.raises(KeyboardInterrupt):
            icifar.run(given)
    resumed = icifar.run(given)
    assert resumed.accuracy == whole.accuracy
    names = [json.loads(line)["task"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert names == resumed.tasks
    assert list((tmp_path / "run/resume").iterdir()) == []
    tensors = [sorted(f.name for f in (tmp_path / run / "tasks").rglob("*.safetensors")) for run in ("run", "whole")]
    assert tensors[0] == tensors[1]  # named by their content


@pytest.mark.slow
def test_every_grid_names_its_cells_apart_and_builds() -> None:
    for grid in compare.GRIDS:
        cells = list(compare.cells(on_icifar(grid=grid, seeds=2)))
        folders = [cell.folder for cell in cells]
        assert len(cells) > 3 and len(set(folders)) == len(folders), grid
        keys = {(cell.settings.method.name, cell.variant, cell.settings.run.seed) for cell in cells}
        assert len(keys) == len(cells), grid
        compare.dry_run(cells)  # an unknown side, merge or start is an error here
    every = {cell.settings.method.name for cell in compare.cells(on_icifar())}
    assert every == set(METHODS.names())


def test_precision_is_for_methods_that_train_whole_networks() -> None:
    given = on_icifar(methods=("sidetune", "finetune"), precision="bf16")
    assert [cell.settings.training.precision for cell in compare.cells(given)] == ["no", "bf16"]


def test_an_unknown_method_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'finetune'"):
        compare.run(settings(tmp_path, tmp_path / "out", "fine-tune"))
    assert not (tmp_path / "out").exists()


def test_share_takes_the_same_part_of_every_class(tiny_cifar: Path) -> None:
    data = icifar.Images(*load_images(str(tiny_cifar), "train").tensors(), view=0)
    loader = icifar.task_loader(data, 1, 100, shuffle=False, share=0.25)
    ((x, features, y),) = list(loader)
    assert features is None and len(x) == 30
    assert y.bincount().tolist() == [3] * 10


def test_measures_by_hand() -> None:
    # two methods, three tasks: ranks 1 2 1.5 and 2 1 1.5
    assert average_rank({"a": [0.9, 0.5, 0.7], "b": [0.8, 0.6, 0.7]}) == {"a": 1.5, "b": 1.5}
    assert average_rank({"a": [3.0], "b": [2.0], "c": [1.0]}) == {"a": 1.0, "b": 2.0, "c": 3.0}
    # One of the later two doubles.
    assert rigidity([0.3, 0.2, 0.1], [0.1, 0.1, 0.1]) == pytest.approx(0.5 * 0.6931, abs=1e-4)
    assert rigidity([0.5], [0.1]) == 0.0
    assert forward_transfer([0.9, 0.8, 0.7], [0.7, 0.7, 0.7]) == pytest.approx(0.05)  # of the later two
    assert forward_transfer([0.9], [0.7]) == 0.0
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2.0 and error == pytest.approx(1 / 3**0.5)
    assert mean_and_error([4.0]) == (4.0, 0.0)
    with pytest.raises(ValueError, match="give one for each task"):
        rigidity([0.5], [])
    nothing: list[dict[str, list[float]]] = [{}, {"a": []}]
    for empty in nothing:
        with pytest.raises(ValueError, match="give one for each task"):
            average_rank(empty)
    with pytest.raises(ValueError, match="learn a task first"):
        _ = AccuracyMatrix(["a"]).average


def test_the_report_of_a_grid_needs_no_finished_seed(tmp_path: Path) -> None:
    """Written after every cell, so that an interrupted grid has one."""
    run = RunResult(
        method="sidetune",
        variant="",
        seed=0,
        tasks=["a", "b"],
        accuracy=[[0.5], [0.5, 0.6]],
        alone=None,
        alphas=[None, None],
        parameters=[10, 10],
        shared_parameters=100,
        seconds=[1.0, 1.0],
        base_seconds=2.0,
        peak_memory_mb=None,
        settings={},
    )
    compare.finish(settings(tmp_path, tmp_path, "sidetune"), [run])
    assert "sidetune" in (tmp_path / "table.md").read_text()
    assert json.loads(json.dumps((tmp_path / "report.html").read_text())).startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"grid": "merge", "methods": ("ewc",)}, "--grid merge is about side-tuning alone; leave --methods out"),
        ({"methods": ("features",), "ewc_coefficient": 3.0}, "--ewc-coefficient is of ewc"),
        ({"grid": "init", "init": "xavier"}, "--grid init tries all starts"),
    ],
)
def test_what_a_grid_does_not_read_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(SideTuningError, match=told):
        list(compare.cells(on_icifar(**given)))
    list(compare.cells(on_icifar(methods=("ewc",), ewc_coefficient=3.0)))


def test_what_a_run_is_of_is_told_bit_by_bit(tmp_path: Path) -> None:
    """Squad tells its data and then its tokenizer, transfer each target when it comes to it."""
    run = Run(tmp_path / "run", "icifar", run_settings(tmp_path, tmp_path / "run"))
    run.belongs(data="a")
    run.belongs(tokenizer="b")
    with pytest.raises(SideTuningError, match="holds a run of another tokenizer"):
        run.belongs(tokenizer="c")


def test_what_a_side_does_not_read_is_refused() -> None:
    settings = with_values(icifar.Settings(), {"side_shift": 2})
    with pytest.raises(SideTuningError, match="--side-shift is of the side fusion; leave it out"):
        settings.method.arguments(st.load_base("resnet44-cifar10"), 0)
