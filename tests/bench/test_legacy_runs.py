"""Methods, trajectories and runs of version 0.1.0 are read, and the same commands go on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from legacy_cases import ROOT, base_of, copied, differing, equal, hashes, input_of, names, read
from sidetuning.cli import main
from sidetuning_bench import icifar
from sidetuning_bench.methods import METHODS, Recipe, Task, load_method

RUNS = [name for name in names("runs") if name not in ("icifar-interrupted", "imitation", "rl")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", names("methods"))
def test_methods(name: str) -> None:
    if "lora" in name:
        pytest.importorskip("peft")
    about, expected = read(ROOT / "methods" / name)
    method = load_method(ROOT / "methods" / name / about["folder"], base_of(about["base"]))
    assert list(method.tasks) == about["tasks"]
    with torch.no_grad():
        outputs = {task: method(input_of(expected), task) for task in method.tasks}
    assert not differing(outputs, expected, "output/")


@pytest.mark.parametrize("name", ["method-boosting", "method-ewc"])
def test_learning_resumes(name: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, f"resume/{name}") / "resume" / name
    about, expected = read(folder)
    base = base_of(about["base"])
    if about["saved"]:
        method = load_method(folder / about["saved"], base)
    else:
        method = METHODS.build(about["method"], base, options=about["options"])
    loader = DataLoader(TensorDataset(expected["x"], expected["y"]), batch_size=5, shuffle=True)
    task, recipe = Task("cars", 3, F.cross_entropy, seed=1), Recipe(**about["recipe"])
    result = method.learn(task, loader, recipe, resume=folder / "resume.pt", save_every=0.0, progress=False)
    assert not differing(method.state_dict(), expected, "final/")
    assert equal(torch.tensor(result.losses), torch.tensor(about["losses"]))


@pytest.mark.parametrize("name", RUNS)
def test_runs_answer_as_they_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = ROOT / "runs" / name
    about, expected = read(folder)
    if "methods" in about:
        cells = about.get("cells", [""])
        methods: dict[str, Any] = {
            cell: load_method(folder / about["methods"].replace("CELL", cell), base_of(about["base"])) for cell in cells
        }
    else:
        cells, methods = [""], {"": st.load(folder / "run")}
    with torch.no_grad():
        outputs = {
            f"{cell}/{task}".strip("/"): methods[cell](input_of(expected), task)
            for cell in cells
            for task in methods[cell].tasks
        }
    assert not differing(outputs, expected, "output/")


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_found_done(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(tmp_path, "data", "caches", f"runs/{name}"))
    about, _ = read(tmp_path / "runs" / name)
    before = hashes(tmp_path / "runs" / name / "run")
    main(["bench", *about["command"].split()])
    after = hashes(tmp_path / "runs" / name / "run")
    # Reports and tables are made again from the results.
    changed = {file for file in before | after if before.get(file) != after.get(file)}
    assert not [file for file in changed if Path(file).suffix not in (".html", ".md")]


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied(tmp_path, "data", "runs/icifar-interrupted"))
    folder = tmp_path / "runs/icifar-interrupted"
    about, expected = read(folder)
    main(["bench", *about["command"].split()])
    model = st.load(folder / "run")
    assert not differing({task: model(expected["x"], task) for task in model.tasks}, expected, "output/")
    result = json.loads((folder / "run/result.json").read_text())
    assert result["alphas"] == pytest.approx(about["finished"]["alphas"], abs=1e-5)


def test_the_report_reads_runs_of_every_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenarios = [name for name in names("runs") if name != "icifar-interrupted"]
    monkeypatch.chdir(copied(tmp_path, *(f"runs/{name}" for name in scenarios)))
    for name in scenarios:
        # Runs of a transfer are of different frames, and each has a page of its own.
        run = "run/class_object-2-features-0" if name == "transfer" else "run"
        main(["bench", "report", f"runs/{name}/{run}", "--out", f"{name}.html"])
        assert "<table" in Path(f"{name}.html").read_text(), name


def test_the_cache_of_mirrored_images_is_found(tmp_path: Path) -> None:
    folder = copied(tmp_path, "caches/images-mirrored") / "caches/images-mirrored"
    about, expected = read(folder)
    data, given = TensorDataset(expected["data.x"], expected["data.y"]), about["arguments"]
    base = base_of(about["base"])
    cached = st.cache_features(base, data, folder, augment=icifar.mirror, progress=False, **given)
    assert cached.folder.name == about["key"]
