"""What version 0.2.0 wrote and 0.1.0 did not is read, and gives what that version made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import TensorDataset

import sidetuning as st
from legacy_cases import equal, hashes
from sidetuning.report import write_report

ROOT = Path(__file__).parents[1] / "legacy/0.2.0"
EXPECTED = load_file(ROOT / "expected.safetensors")


pytestmark = pytest.mark.usefixtures("one_thread")


def same(found: Tensor, name: str) -> bool:
    """Whether a tensor is what 0.2.0 made."""
    return equal(found, EXPECTED[name], ROOT)


def test_a_model_folder_with_sums_and_routes() -> None:
    model = st.load(ROOT / "model")
    x = EXPECTED["x"]
    outputs = model.forward_all(x)
    assert len(outputs) == 3 and all(same(output, f"output/{name}") for name, output in outputs.items())
    assert same(model.route(x).probabilities, "route")
    assert model["tags"].labels == ["left", "right"] and model["age"].units is not None
    st.update(model, "solved", [(EXPECTED["update.x"], EXPECTED["update.y"])], progress=False)
    assert same(model(x, "solved"), "updated")


def test_the_folder_of_a_trained_task_and_its_report(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "own", tmp_path / "own"))
    model = st.load(folder)
    assert same(model(EXPECTED["x"], "digits"), "own")
    page = write_report(folder, model).read_text()
    assert "random head, closed form ✓" in page and "Calibration" in page


def test_a_cache_and_a_sweep_are_found_and_not_made_again(tmp_path: Path) -> None:
    for name in ("cache", "sweep"):
        shutil.copytree(ROOT / name, tmp_path / name)
    before = hashes(tmp_path)
    base = st.load_base("resnet44-cifar10", taps=("layer3",))
    data = TensorDataset(EXPECTED["data.x"], EXPECTED["data.y"])
    cached = st.cache_features(base, data, tmp_path / "cache", progress=False)
    some = [
        st.Candidate("solved", {"side": None, "merge": "base-only", "head": 2}, solve=True),
        st.Candidate("side", {"side": "fusion", "head": 2, "seed": 0}, fit={"steps": 2}),
    ]
    swept = st.sweep(base, cached, some, validation=cached, out=tmp_path / "sweep", progress=False)
    for trial in swept.trials:
        assert same(torch.tensor(trial.scores["loss"]), f"loss/{trial.name}")
    after = hashes(tmp_path)
    assert before == {name: after[name] for name in before}


def test_tasks_that_write() -> None:
    pytest.importorskip("transformers")
    base = st.load_base(f"hf:{ROOT / 'decoder'}", taps=["h.0", "h.1", "h.2"])
    model = st.load(ROOT / "writer", base=base)
    ids = EXPECTED["ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert len(model.tasks) == 3
    for task in model.tasks:
        assert same(model(inputs, task), f"logits/{task}")
        assert torch.equal(model.generate(inputs, task, max_new_tokens=6, do_sample=False), EXPECTED[f"written/{task}"])
