"""What a NaN, an interruption or a file that somebody wrote by hand must not break."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sidetuning as st
from conftest import conv_base, inputs
from sidetuning.files import signed, write_json


@pytest.fixture
def model() -> st.SideTuner:
    model = st.SideTuner(conv_base())
    model.add_task("a", side="mlp", merge="mlp2", head=3)
    return model


def test_a_nan_leaves_weights_and_running_statistics_as_they_were(model: st.SideTuner) -> None:
    before = {k: v.clone() for k, v in model["a"].state_dict().items()}
    x = torch.full((4, 3, 32, 32), float("nan"))
    with pytest.raises(st.TrainingError, match="loss is nan at step 0"):
        st.fit(model, "a", [(x, torch.tensor([0, 1, 2, 0]))], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model["a"].state_dict().items())
    assert not model["a"].training


def test_an_interrupted_fit_leaves_the_branch_in_evaluation_mode(model: st.SideTuner) -> None:
    def interrupt(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        st.fit(model, "a", [(inputs("conv"), torch.zeros(4).long())], loss=interrupt, progress=False)
    assert not model["a"].training


@pytest.mark.parametrize("name", ["training", "_modules", "_parameters", "pop", "", "a b"])
def test_names_that_torch_needs_are_refused(model: st.SideTuner, name: str) -> None:
    with pytest.raises(st.TaskError, match="cannot be a task's name"):
        model.add_task(name, side="mlp", head=2)


BY_HAND = [("merge", None), ("laterals", None), ("laterals", 5), ("init", "/etc/passwd"), ("prenorm", "yes")]
SIDES = [("side", ["mlp", "x"]), ("side", ["mlp", {"hidden": "a"}])]


@pytest.mark.parametrize(("field", "value"), [*BY_HAND, *SIDES, ("colour", "red")])
def test_parts_written_by_hand_are_refused(model: st.SideTuner, tmp_path: Path, field: str, value: Any) -> None:
    model.save_task("a", tmp_path)
    config = json.loads((tmp_path / "side.json").read_text())
    config["parts"][field] = value
    (tmp_path / "side.json").write_text(json.dumps(config))
    with pytest.raises(st.ArtifactError, match=r"side\.json"):
        model.load_task(tmp_path, name="b")
    assert model.tasks == ["a"]


@pytest.mark.parametrize("spec", ["x", 5, {"options": {}}, {"name": "resnet44-cifar10", "options": {"colour": 1}}])
def test_a_base_spec_written_by_hand_is_refused(model: st.SideTuner, tmp_path: Path, spec: Any) -> None:
    model.save_task("a", tmp_path)
    config = json.loads((tmp_path / "side.json").read_text())
    config["base"]["spec"] = spec
    (tmp_path / "side.json").write_text(json.dumps(config))
    with pytest.raises(st.ArtifactError):
        st.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format_version": 9}'])
def test_a_damaged_cache_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(st.CacheError, match="delete"):
        st.CachedFeatures(tmp_path)


def test_ignored_labels_are_fine_and_negative_ones_are_not(model: st.SideTuner) -> None:
    x = inputs("conv")
    st.fit(model, "a", [(x, torch.tensor([0, -100, 2, 1]))], progress=False)
    with pytest.raises(st.DataError, match="label -5 is out of range"):
        st.fit(model, "a", [(x, torch.tensor([0, -100, -5, 1]))], progress=False)


def small_cache(folder: Path) -> st.CachedFeatures:
    with st.seeded(0):
        data = torch.utils.data.TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8))
    return st.cache_features(conv_base(), data, folder, progress=False)


FIELDS: list[tuple[str, Any, str]] = [
    ("x", {"shape": [2], "dtype": "O"}, "no valid field 'dtype'"),
    ("x", {"shape": [2], "dtype": "V8"}, "no valid field 'dtype'"),
    ("x", {"shape": [2], "dtype": [["a", "O"]]}, "no valid field 'dtype'"),
    ("x", {"shape": [-1], "dtype": "float32"}, "a shape of no array"),
    ("x", {"shape": [2**62, 2**62], "dtype": "float32"}, "a shape of no array"),
    ("x", {"shape": 5, "dtype": "float32"}, "no valid field 'shape'"),
    ("../secret", {"shape": [2], "dtype": "float32"}, "secret is missing"),
    ("/dev/zero", {"shape": [0], "dtype": "float32"}, "zero is missing"),
]


@pytest.mark.parametrize(("name", "field", "message"), FIELDS)
def test_a_cache_has_numbers_alone_in_its_own_folder(name: str, field: Any, message: str, tmp_path: Path) -> None:
    folder = small_cache(tmp_path).folder
    meta = json.loads((folder / "meta.json").read_text())
    meta["fields"][name] = field
    # As somebody who knows the format would write it.
    write_json(folder / "meta.json", signed(meta))
    if name == "x":
        (folder / "x").write_bytes(b"A" * 128)
    (tmp_path / "secret").write_bytes(b"A" * 64)
    with pytest.raises(st.CacheError, match=f"{message}.*; delete|{message} and cache again|{message}; delete"):
        st.CachedFeatures(folder)


@pytest.mark.parametrize("value", [{"samples": 0}, {"views": -1}, {"samples": "8"}, {"fields": {}}, {"fields": []}])
def test_a_cache_without_features_is_refused(value: dict[str, Any], tmp_path: Path) -> None:
    folder = small_cache(tmp_path).folder
    meta = json.loads((folder / "meta.json").read_text())
    write_json(folder / "meta.json", signed({**meta, **value}))
    with pytest.raises(st.CacheError, match="delete"):
        st.CachedFeatures(folder)


@pytest.mark.parametrize("name", ["x", "out", "y"])
def test_a_cache_that_is_cut_while_it_is_open_does_not_end_the_process(name: str, tmp_path: Path) -> None:
    cache = small_cache(tmp_path)
    with (cache.folder / name).open("r+b") as file:
        file.truncate(0)
    with pytest.raises(st.CacheError, match=f"{name} was cut; delete"):
        cache.__getitems__([0, 7])


def test_a_resume_file_of_an_older_version_is_checked_too(model: st.SideTuner, tmp_path: Path) -> None:
    file = tmp_path / "resume.pt"
    # An archive, as torch.save writes it.
    torch.save({"position": {"losses": [0.5] * 99}}, file)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(st.TrainingError, match="cannot be read as a resume file"):
        st.fit(model, "a", [(inputs("conv"), torch.tensor([0, 1, 2, 0]))], resume=file, progress=False)


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_what_is_no_file_is_refused(model: st.SideTuner, tmp_path: Path, kind: str) -> None:
    model.save_task("a", tmp_path / "task")
    for name in ("task/side.safetensors", "task/side.json", "resume.pt"):
        file = tmp_path / name
        file.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero" if kind == "device" else file.name)
        with pytest.raises((st.ArtifactError, st.TrainingError)):
            if name == "resume.pt":
                st.fit(model, "a", [(inputs("conv"), torch.tensor([0, 1, 2, 0]))], resume=file, progress=False)
            else:
                model.load_task(tmp_path / "task", name="b")


def test_a_task_is_loaded_in_the_type_in_which_it_was_saved(tmp_path: Path) -> None:
    model = st.SideTuner(conv_base()).to(torch.float64)
    model.add_task("a", side="mlp", head=3)
    st.fit(model, "a", [(inputs("conv"), torch.tensor([0, 1, 2, 0]))], progress=False)
    model.save_task("a", tmp_path)
    fresh = st.SideTuner(conv_base()).to(torch.float64)
    fresh.load_task(tmp_path)
    assert all(torch.equal(v, fresh["a"].state_dict()[k]) for k, v in model["a"].state_dict().items())


def test_a_message_is_one_line() -> None:
    error = st.DataError("file 'a\x1b[31m' is damaged (first\n  second\r\nthird); " + "x" * 5000 + "; fetch it again")
    assert str(error).startswith("file 'a [31m' is damaged (first second third)")
    assert len(str(error)) < 1300 and str(error).endswith("; fetch it again")


@pytest.mark.parametrize("kind", ["sparse", "loop", "folder"])
def test_weights_that_are_no_file_of_weights_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "w.safetensors"
    if kind == "sparse":
        with file.open("wb") as opened:
            opened.truncate(1 << 40)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file.name)
    with pytest.raises(st.ArtifactError, match="not a readable safetensors file"):
        st.load_base("resnet44-cifar10", weights=file)
