"""A folder of many tasks is opened without reading them, and answers as if all were in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sidetuning as st
from conftest import in_threads, mlp_base
from sidetuning import artifacts, tuner
from sidetuning.files import read_json

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
MANY = [f"t{i:02}" for i in range(12)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder, model = tmp_path_factory.mktemp("model"), st.SideTuner(mlp_base())
    for i, name in enumerate(MANY):
        model.add_task(name, side="mlp", merge="sum", head=3, laterals=["t00"] if name == "t11" else [], seed=i)
        model.save_task(name, folder / name)
    return folder, model.forward_all(X)


def opened(folder: Path, most: int) -> st.SideTuner:
    return st.load(folder, base=mlp_base(), max_tasks_in_memory=most)


@pytest.mark.parametrize("most", [1, 3, 50])
def test_answers_are_those_of_a_model_in_memory(saved: Any, most: int) -> None:
    folder, expected = saved
    model = opened(folder, most)
    assert model.tasks == MANY and len(model) == 12 and "t05" in model and list(model) == MANY
    assert not len(model.branches)
    for name in ("t07", "t11", "t07", "t00"):
        assert torch.equal(model(X, name), expected[name])
    all_at_once = model.forward_all(X)
    assert list(all_at_once) == MANY
    assert all(torch.equal(all_at_once[name], expected[name]) for name in MANY)
    mixed = ["t03", "t11", "t03", "t09", "t00"]
    for i, (name, out) in enumerate(zip(mixed, model(X, tasks=mixed), strict=True)):
        torch.testing.assert_close(out, expected[name][i])
    # The lateral stays beside those that were used last.
    assert len(model.branches) <= most + 1


def test_a_lateral_of_a_task_on_disk_is_neither_trained_nor_removed(saved: Any) -> None:
    model = opened(saved[0], 1)
    with pytest.raises(st.TaskError, match="lateral of t11"):
        st.fit(model, "t00", [(X, torch.arange(5) % 3)], progress=False)
    with pytest.raises(st.TaskError, match="lateral of t11"):
        model.remove_task("t00")
    model.remove_task("t11")
    model.remove_task("t00")


def test_removing_a_task_does_not_read_all_others_again(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path, *given: Any) -> Any:
        read.append(path)
        return read_json(path, *given)

    monkeypatch.setattr("sidetuning.shelf.read_json", counted)
    model = opened(saved[0], 1)
    for name in MANY[1:6]:
        model.remove_task(name)
    assert len(read) == len(MANY)


def test_the_most_used_stay(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved
    reads: list[str] = []

    def counted(path: Any) -> Any:
        reads.append(Path(path).name)
        return artifacts.read_task(path)

    monkeypatch.setattr(tuner, "read_task", counted)
    model = opened(folder, 2)
    for name in ("t01", "t02", "t01", "t03", "t01", "t02"):
        model(X, name)
    assert reads == ["t01", "t02", "t03", "t02"]
    assert set(model.branches) == {"t01", "t02"}


def test_what_was_changed_stays_until_it_is_saved(saved: Any) -> None:
    folder, expected = saved
    model = opened(folder, 1)
    with torch.no_grad():
        model["t01"].head.linear.bias += 1  # type: ignore[union-attr, operator]
    model["t02"].labels = ["a", "b", "c"]
    model(X, "t03")
    model(X, "t04")
    torch.testing.assert_close(model(X, "t01"), expected["t01"] + 1)
    assert model["t02"].labels == ["a", "b", "c"]
    assert {"t01", "t02"} <= set(model.branches)


def test_tasks_come_and_go(saved: Any) -> None:
    folder, expected = saved
    model = opened(folder, 2)
    with pytest.raises(st.TaskError, match="'t03' exists already"):
        model.add_task("t03", side=None, merge="base-only", head=2)
    model.add_task("new", side=None, merge="base-only", head=2)
    model.remove_task("t03")
    assert model.tasks == [*(name for name in MANY if name != "t03"), "new"]
    with pytest.raises(st.UnknownNameError, match="t03"):
        model(X, "t03")
    assert torch.equal(model(X, "t04"), expected["t04"]) and "new" in model.forward_all(X)
    with pytest.raises(st.TaskError, match="1 or more, not 0"):
        opened(folder, 0)


def test_a_damaged_task_is_told_when_it_is_asked_for(saved: Any, tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    for name in ("good", "bad"):
        model.add_task(name, side=None, merge="base-only", head=2)
        model.save_task(name, tmp_path / name)
    (tmp_path / "bad" / "side.safetensors").write_bytes(b"nothing")
    lazy = opened(tmp_path, 2)
    with pytest.raises(st.ArtifactError, match="truncated"):
        lazy(X, "bad")
    assert lazy(X, "good").shape == (5, 2)


def test_threads_get_the_right_answers(saved: Any) -> None:
    folder, expected = saved
    model, wrong = opened(folder, 2), list[str]()

    def ask(seed: int) -> None:
        order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(seed)).tolist()
        for i in order * 3:
            if not torch.equal(model(X, MANY[i]), expected[MANY[i]]):
                wrong.append(MANY[i])

    in_threads(ask)
    assert not wrong


def test_a_folder_is_saved_as_the_model_is(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    for name in ("a", "b", "c"):
        model.add_task(name, side=None, merge="base-only", head=2, labels=["x", "y"])
    model.save(tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("side.json")}
    # Another model has its own task of the name.
    other = st.SideTuner(mlp_base())
    other.add_task("b", side=None, merge="base-only", head=2, seed=9)
    other.save_task("b", tmp_path / "elsewhere" / "tasks" / "b")
    with torch.no_grad():
        # What was trained since it was saved is the same task.
        model["b"].head.linear.bias += 1  # type: ignore[union-attr, operator]
    model.remove_task("b")
    model["c"].labels = ["x", "z"]
    model.save(tmp_path)
    model.save(tmp_path / "elsewhere")
    again = st.load(tmp_path, base=mlp_base())
    assert set(again.tasks) == {"a", "c"} and again["c"].labels == ["x", "z"]
    assert (tmp_path / "tasks" / "a" / "side.json").stat().st_mtime_ns == stamps[tmp_path / "tasks" / "a" / "side.json"]
    assert not (tmp_path / "tasks" / "b").exists()
    assert set(st.load(tmp_path / "elsewhere", base=mlp_base()).tasks) == {"a", "b", "c"}


@pytest.mark.parametrize("most", [None, 1])
def test_a_task_that_was_loaded_and_changed_leaves_its_folder(tmp_path: Path, most: int | None) -> None:
    model = st.SideTuner(mlp_base())
    for name in ("a", "b"):
        model.add_task(name, side=None, merge="base-only", head=2)
    model.save(tmp_path)
    again = st.load(tmp_path, base=mlp_base(), max_tasks_in_memory=most)
    with torch.no_grad():
        again["a"].head.linear.bias += 1  # type: ignore[union-attr, operator]
    again.remove_task("a")
    again.save(tmp_path)
    assert [folder.name for folder in (tmp_path / "tasks").iterdir()] == ["b"]


def test_labels_that_were_changed_in_place_stay(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    for name in ("a", "b", "c"):
        model.add_task(name, side=None, merge="base-only", head=2, labels=["x", "y"])
    model.save(tmp_path)
    again = opened(tmp_path, 1)
    labels = again["a"].labels
    assert labels is not None
    labels[0] = "cat"
    assert again["b"].labels == again["c"].labels == ["x", "y"]
    assert again["a"].labels == ["cat", "y"]


def test_a_task_that_was_read_in_inference_mode_goes_on(saved: Any) -> None:
    folder, expected = saved
    model = opened(folder, 2)
    with torch.inference_mode():
        model(X, "t01")
    for name in ("t01", "t02", "t03", "t01"):
        assert torch.equal(model(X, name), expected[name])


def test_weights_that_were_written_through_data_stay(saved: Any) -> None:
    model = opened(saved[0], 1)
    next(model["t01"].parameters()).data.mul_(100)
    expected = model(X, "t01")
    for other in ("t02", "t03"):
        model(X, other)
    assert torch.equal(model(X, "t01"), expected)


def test_a_task_that_is_learned_stays_in_memory(saved: Any) -> None:
    """Others are asked meanwhile: labels that another task makes, or a server's questions."""
    model, plain = opened(saved[0], 1), opened(saved[0], 50)

    class Asking:
        def __iter__(self) -> Any:
            for name in ("t01", "t02"):
                model(X, name)
                yield X, torch.arange(5) % 3

    for one in (model, plain):
        st.solve(one, "t05", Asking(), progress=False)
    assert not torch.equal(plain(X, "t05"), saved[1]["t05"])
    for name in ("t03", "t04"):
        model(X, name)
    assert torch.equal(model(X, "t05"), plain(X, "t05"))
