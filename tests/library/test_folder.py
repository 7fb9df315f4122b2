"""Tasks of a model folder are listed, renamed and removed; the others do not change, whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sidetuning as st
from conftest import inputs, mlp_base
from sidetuning import folder
from sidetuning.cli import main
from sidetuning.files import held_folder


def model_folder(path: Path) -> st.SideTuner:
    """Three tasks, of which "cars" reads the side of "pets"."""
    model = st.SideTuner(mlp_base())
    model.add_task("pets", side="mlp", head=3, labels=["cat", "dog", "fish"], seed=0)
    model.add_task("cars", side="mlp", merge="sum", head=2, laterals=["pets"], seed=1)
    model.add_task("age", side=None, merge="base-only", head=1, problem="numbers", seed=2)
    for task in model.tasks:
        model.save_task(task, path / "tasks" / task, metrics={"accuracy": 0.5} if task == "pets" else {})
    return model


def outputs(path: Path) -> dict[str, torch.Tensor]:
    return st.load(path, base=mlp_base()).forward_all(inputs("mlp"))


def test_list_and_info_tell_what_the_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_folder(tmp_path)
    main(["list", str(tmp_path), "--json"])
    found = {task["task"]: task for task in json.loads(capsys.readouterr().out)}
    assert set(found) == set(model.tasks)
    assert found["pets"]["labels"] == ["cat", "dog", "fish"] and found["pets"]["metrics"] == {"accuracy": 0.5}
    assert found["cars"]["laterals"] == ["pets"] and found["age"]["problem"] == "numbers"
    sizes = {task.task: task.total for task in model.summary().tasks}
    assert {name: task["parameters"] for name, task in found.items()} == sizes
    main(["list", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "accuracy 0.5" in shown and " kB " in shown
    main(["info", str(tmp_path), "--task", "pets"])
    shown = capsys.readouterr().out
    assert "cat, dog, fish" in shown and "base sha256" in shown and "cars" not in shown
    main(["info", str(tmp_path / "tasks/age"), "--json"])
    assert [task["task"] for task in json.loads(capsys.readouterr().out)] == ["age"]


def test_a_removed_task_leaves_nothing_and_the_others_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_folder(tmp_path)
    (tmp_path / ".work/age").mkdir(parents=True)
    for place in ("report.html", "tasks/age/report.json", ".work/age/rows"):
        (tmp_path / place).write_text("about age")
    before = outputs(tmp_path)
    main(["remove", str(tmp_path), "age"])
    assert "report.html was deleted too" in capsys.readouterr().out
    (tmp_path / ".work").rmdir()
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {"tasks", "pets", "cars"}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"about age" in file.read_bytes()]
    after = outputs(tmp_path)
    assert set(after) == {"pets", "cars"} and all(torch.equal(after[task], before[task]) for task in after)


def test_a_lateral_is_not_removed_before_its_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_folder(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(["remove", str(tmp_path), "pets"])
    assert "task 'pets' is a lateral of cars; remove those first" in capsys.readouterr().err
    assert len(outputs(tmp_path)) == 3
    with pytest.raises(st.UnknownNameError, match="did you mean 'pets'"):
        folder.remove(tmp_path, "pest")
    with pytest.raises(st.ArtifactError, match="is no model folder"):
        folder.remove(tmp_path / "tasks/pets", "pets")


def test_a_renamed_task_and_its_users_give_what_they_gave(tmp_path: Path) -> None:
    model_folder(tmp_path)
    (tmp_path / "tasks/pets/report.json").write_text('{"task": "pets", "scores": {}}')
    before = outputs(tmp_path)
    main(["rename", str(tmp_path), "pets", "animals"])
    after = outputs(tmp_path)
    assert list(after) == ["age", "animals", "cars"] and torch.equal(after["animals"], before["pets"])
    assert torch.equal(after["cars"], before["cars"])
    assert json.loads((tmp_path / "tasks/animals/report.json").read_text()) == {"task": "animals", "scores": {}}
    assert not (tmp_path / "tasks/pets").exists()
    for new, match in (("cars", "exists already"), ("a/b", "cannot be a task's name"), ("animals", "exists already")):
        with pytest.raises(st.TaskError, match=match):
            folder.rename(tmp_path, "animals", new)


@pytest.mark.parametrize("calls", range(1, 9))
def test_a_rename_that_is_interrupted_leaves_a_folder_that_loads(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_folder(tmp_path)
    before, left = outputs(tmp_path), [calls]

    def stopping(owner: object, name: str) -> None:
        own = getattr(owner, name)

        def call(*given: Any) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return own(*given)

        monkeypatch.setattr(owner, name, call)

    # The new task is written, moved, its user is told, the old one moved.
    stopping(folder, "write_files")
    stopping(Path, "replace")
    with pytest.raises(KeyboardInterrupt):
        folder.rename(tmp_path, "pets", "animals")
    after = outputs(tmp_path)
    assert torch.equal(after["cars"], before["cars"]) and torch.equal(after["pets"], before["pets"])


def test_a_removal_that_is_interrupted_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        folder.remove(tmp_path, "age")
    assert set(outputs(tmp_path)) == {"pets", "cars"}
    folder.rename(tmp_path, "cars", "lorries")
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_a_folder_that_another_process_works_in_is_left_alone(tmp_path: Path) -> None:
    model_folder(tmp_path)
    with held_folder(tmp_path), pytest.raises(st.ArtifactError, match="another process works in"):
        folder.remove(tmp_path, "age")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(st.ArtifactError, match="gone does not exist; give the folder"):
        st.load(tmp_path / "gone")
    with pytest.raises(st.ArtifactError, match="holds no saved task"):
        st.load(tmp_path)


def test_two_folders_of_one_task_are_both_named(tmp_path: Path) -> None:
    model_folder(tmp_path)
    shutil.copytree(tmp_path / "tasks/pets", tmp_path / "tasks/pets-old")
    for use in (folder.described, lambda path: folder.remove(path, "age")):
        with pytest.raises(st.ArtifactError, match=r"pets and .*pets-old both hold the task 'pets'; move one"):
            use(tmp_path)
    shutil.rmtree(tmp_path / "tasks/pets-old")
    assert len(folder.described(tmp_path)) == 3


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    model = st.SideTuner(mlp_base())
    with pytest.raises(st.TaskError, match="up to 200 letters"):
        model.add_task("a" * 201, side=None, merge="base-only", head=2)
    model.add_task("a" * 200, side=None, merge="base-only", head=2)
    model.save(tmp_path)
    assert st.load(tmp_path, base=mlp_base()).tasks == ["a" * 200]
