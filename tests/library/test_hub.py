"""Models and tasks on the Hub: what comes back is bitwise what was pushed, and nothing of this machine goes there."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sidetuning as st
from conftest import inputs, mlp_base, network
from sidetuning import artifacts
from sidetuning.cli import main
from sidetuning.hub import task_table
from task_parts import edit, saved


class FakeHub:
    """As much of HfApi as `push` and `pull` need, on a folder: a folder per repository and branch."""

    root: Path
    private: dict[str, bool]

    def __init__(self, token: str | None = None) -> None:
        pass

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private[repo] = private

    def create_branch(self, repo: str, *, branch: str, exist_ok: bool) -> None:
        assert repo in self.private and exist_ok
        (self.root / repo / branch).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        revision: str | None,
        path_in_repo: str | None,
        delete_patterns: list[str],
    ) -> None:
        assert repo_id in self.private and (revision is None or (self.root / repo_id / revision).exists())
        target = self.root / repo_id / (revision or "main") / (path_in_repo or "")
        for file in [file for file in target.rglob("*") if file.is_file()]:
            if any(fnmatch.fnmatch(str(file.relative_to(target)), pattern) for pattern in delete_patterns):
                file.unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)

    @classmethod
    def download(cls, repo: str, *, revision: str | None, token: str | None, allow_patterns: list[str]) -> str:
        """What `snapshot_download` does, into another folder."""
        source = cls.root / repo / (revision or "main")
        if not source.exists():
            raise FileNotFoundError(repo)
        target = cls.root / "cache" / repo / (revision or "main")
        for file in source.rglob("*"):
            name = file.relative_to(source)
            if file.is_file() and any(fnmatch.fnmatch(str(name), pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    FakeHub.root, FakeHub.private = tmp_path / "hub", {}
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub.download)
    return FakeHub


def test_paths_of_this_machine_do_not_go_to_the_hub(hub: type[FakeHub], tmp_path: Path) -> None:
    weights = tmp_path / "mine.safetensors"
    base = st.load_base("resnet44-cifar10")
    save_file(network(base).state_dict(), weights)
    model = st.SideTuner(st.load_base("resnet44-cifar10", weights=weights))
    model.add_task("pets", side=None, merge="base-only", head=3)
    model.save_task("pets", tmp_path / "task")
    assert str(tmp_path) in (tmp_path / "task" / "side.json").read_text()
    st.push(tmp_path / "task", "someone/pets")
    folder = st.pull("someone/pets")
    assert str(tmp_path) not in (folder / "side.json").read_text() + (folder / "README.md").read_text()
    with pytest.raises(st.ArtifactError, match="base=base"):
        st.load(folder)
    assert st.load(folder, base=base).tasks == ["pets"]


def test_a_task_goes_to_the_hub_and_back(hub: type[FakeHub], tmp_path: Path) -> None:
    model = saved(tmp_path / "task")
    (tmp_path / "task" / "secret.txt").write_text("not for the Hub")
    assert st.push(tmp_path / "task", "someone/pets", private=True) == "https://huggingface.co/someone/pets"
    assert hub.private == {"someone/pets": True}
    folder = st.pull("someone/pets")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "side.json", "side.safetensors"]
    other = st.load(folder, base=mlp_base())
    assert torch.equal(other(inputs("mlp"), "pets"), model(inputs("mlp"), "pets"))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    front, body = card[4:].split("\n---\n", 1)
    assert "library_name: sidetuning" in front.splitlines()
    assert 'st.pull("someone/pets")' in body and "| accuracy | 0.875 |" in body and "`mlp`" in body


def test_a_hub_that_refuses_is_one_sentence(
    hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "task")

    def no(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(hub, "upload_folder", no)
    with pytest.raises(st.ArtifactError, match="did not take someone/pets"):
        st.push(tmp_path / "task", "someone/pets")
    with pytest.raises(st.ArtifactError, match="could not be read from the Hub"):
        st.pull("someone/else")


def test_what_is_no_task_is_not_pushed_wherever_a_link_points(hub: type[FakeHub], tmp_path: Path) -> None:
    saved(tmp_path / "task")
    secret = tmp_path / "secret"
    secret.write_text("not for the Hub")
    (tmp_path / "task" / "side.safetensors").unlink()
    (tmp_path / "task" / "side.safetensors").symlink_to(secret)
    with pytest.raises(st.ArtifactError, match="not a safetensors file"):
        st.push(tmp_path / "task", "someone/pets")
    assert hub.private == {}


def test_half_a_task_is_not_pushed(hub: type[FakeHub], tmp_path: Path) -> None:
    saved(tmp_path / "task")
    (tmp_path / "task" / "side.safetensors").unlink()
    with pytest.raises(st.ArtifactError, match=r"side\.safetensors is missing"):
        st.push(tmp_path / "task", "someone/pets")
    assert hub.private == {}


LOCAL = ["/home/me/bert", "C:\\me\\bert", "~/bert", "../bert", "a/b/c", "file:bert"]


@pytest.mark.parametrize("name", [*(f"hf:{path}" for path in LOCAL), "onnx:net.onnx", "onnx:/home/me/net.onnx"])
def test_a_path_of_this_machine_is_not_published(name: str, hub: type[FakeHub], tmp_path: Path) -> None:
    saved(tmp_path / "task")
    edit(tmp_path / "task", lambda c: c["base"].update(spec={"name": name, "options": {}, "revision": None}))
    st.push(tmp_path / "task", "someone/pets")
    folder = st.pull("someone/pets")
    assert artifacts.read_task(folder)[0]["base"]["spec"] is None
    assert not [file for file in folder.iterdir() if name.encode() in file.read_bytes()]


@pytest.mark.parametrize("path", ["/home/me/w.bin", "D:/me/w.bin", "~/w.bin"])
def test_a_part_with_a_path_of_this_machine_is_not_published(path: str, hub: type[FakeHub], tmp_path: Path) -> None:
    saved(tmp_path / "task")
    edit(tmp_path / "task", lambda c: c["parts"]["side"][1].update(weights=[path]))
    with pytest.raises(st.ArtifactError, match=r"names .*w\.bin, a path of this machine"):
        st.push(tmp_path / "task", "someone/pets")
    assert hub.private == {}


def test_names_on_the_hub_are_published(hub: type[FakeHub], tmp_path: Path) -> None:
    saved(tmp_path / "task")
    spec = {"name": "hf:someone/bert", "options": {"taps": ["encoder.layer.1"]}, "revision": "main"}
    edit(tmp_path / "task", lambda c: c["base"].update(spec=spec))
    st.push(tmp_path / "task", "someone/pets")
    assert artifacts.read_task(st.pull("someone/pets"))[0]["base"]["spec"] == spec


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("SIDETUNING_NETWORK") != "1", reason="set SIDETUNING_NETWORK=1 to ask the Hub")
def test_a_repository_that_does_not_exist_is_one_sentence() -> None:
    with pytest.raises(st.ArtifactError, match="could not be read from the Hub"):
        st.pull("sidetuning-tests/there-is-no-such-repository")


def three_tasks(path: Path) -> st.SideTuner:
    """A model folder: "cars" reads the side of "pets", and "tags" is alone."""
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("pets", side="mlp", head=2, labels=["cat|dog", "bird"], seed=0)
    model.add_task("cars", side="mlp", merge="sum", head=3, laterals=["pets"], seed=1)
    model.add_task("tags", side=None, merge="base-only", head=2, problem="labels", seed=2)
    for task in model.tasks:
        model.save_task(task, path / "tasks" / task, metrics={"accuracy": 0.5})
    return model


def test_a_model_folder_goes_to_the_hub_and_back_by_the_commands(
    hub: type[FakeHub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = three_tasks(tmp_path / "model")
    (tmp_path / "model/tasks/pets/secret.txt").write_text("not for the Hub")
    command = ["push", str(tmp_path / "model"), "you/pets", "--revision", "v1", "--subfolder", "models/a"]
    main([*command, "--licence", "mit"])
    assert capsys.readouterr().out == "https://huggingface.co/you/pets\n"
    sent = {str(f.relative_to(hub.root)) for f in hub.root.rglob("*") if f.is_file()}
    folder = "you/pets/v1/models/a"
    pairs = [f"{folder}/tasks/{task}/side.{end}" for task in model.tasks for end in ("json", "safetensors")]
    assert sent == {f"{folder}/README.md", *pairs}
    card = (hub.root / folder / "README.md").read_text()
    assert "license: mit" in card and "- accuracy" in card and "cat\\|dog, bird" in card and "## tags" in card
    main(["pull", "you/pets", "--out", str(tmp_path / "mine"), "--revision", "v1", "--subfolder", "models/a"])
    x = torch.rand(2, 3, 32, 32)
    again = st.load(tmp_path / "mine")
    assert all(torch.equal(again(x, task), model(x, task)) for task in model.tasks)
    assert "secret.txt" not in {file.name for file in (tmp_path / "mine").rglob("*")}
    with pytest.raises(SystemExit, match="1"):
        main(["pull", "you/pets", "--out", str(tmp_path / "other")])
    assert "could not be read from the Hub" in capsys.readouterr().err


def test_one_task_of_a_model_is_pushed_and_pulled_into_a_folder_of_others(
    hub: type[FakeHub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three_tasks(tmp_path / "model")
    main(["push", str(tmp_path / "model"), "you/tags", "--task", "tags", "--quiet"])
    assert {f.name for f in (hub.root / "you/tags/main").iterdir()} == {"README.md", "side.json", "side.safetensors"}
    main(["push", str(tmp_path / "model"), "you/all", "--quiet"])
    main(["pull", "you/all", "--task", "pets", "--out", str(tmp_path / "mine"), "--quiet"])
    main(["pull", "you/tags", "--out", str(tmp_path / "mine"), "--quiet"])
    assert st.load(tmp_path / "mine").tasks == ["pets", "tags"] and not capsys.readouterr().out
    saved(tmp_path / "vectors")
    st.push(tmp_path / "vectors", "you/vectors")
    for arguments, match in (
        (["push", str(tmp_path / "model"), "you/cars", "--task", "cars"], "'cars' reads the side of pets"),
        (["push", str(tmp_path / "model"), "you/cars", "--task", "tag"], "did you mean 'tags'"),
        (["push", str(tmp_path / "model"), "you/cars", "--subfolder", "../x"], "'../x' is no folder of a repository"),
        (["pull", "you/all", "--subfolder", "no", "--out", str(tmp_path / "mine")], "you/all/no holds no task"),
        (["pull", "you/all", "--task", "cars", "--out", str(tmp_path / "mine")], "'cars' reads the side of pets"),
        (["pull", "you/tags", "--out", str(tmp_path / "mine")], "'tags' exists already"),
        (["pull", "you/vectors", "--out", str(tmp_path / "mine")], "exists already|another base"),
        (["pull", "you/tags", "--out", str(tmp_path / "vectors")], "is the folder of one task"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(arguments)
        assert re.search(match, capsys.readouterr().err)
    assert "you/cars" not in hub.private


def code_of(card: str) -> str:
    """The code of a model card."""
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("weights", [False, True])
def test_the_code_of_a_card_runs(
    weights: bool, hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(network(st.load_base("resnet44-cifar10")).state_dict(), "weights.safetensors")
    options: dict[str, Any] = {"weights": tmp_path / "weights.safetensors"} if weights else {}
    model = st.SideTuner(st.load_base("resnet44-cifar10", **options))
    model.add_task("pets", side=None, merge="base-only", head=3, seed=0)
    model.save_task("pets", "task")
    st.push("task", "you/pets", revision="v2")
    Image.new("RGB", (40, 50), (200, 30, 30)).save("photo.jpg")
    known: dict[str, Any] = {}
    card = (hub.root / "you/pets/v2/README.md").read_text()
    exec(code_of(card), known)
    assert known["answers"] == model.predict("photo.jpg")["pets"] and "pipeline_tag: image-classification" in card


def test_the_code_of_a_card_runs_with_a_network_of_ones_own(hub: type[FakeHub], tmp_path: Path) -> None:
    model = saved(tmp_path / "task")
    st.push(tmp_path / "task", "you/pets")
    x = inputs("mlp")
    known = {"x": x, "network": network(model.base)}
    exec(code_of((hub.root / "you/pets/main/README.md").read_text()), known)
    assert torch.equal(known["y"], model(x, "pets"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:someone/bert", "someone/bert"),
        ("timm:resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("timm:resnet50", None),
        ("resnet44-cifar10", None),
    ],
)
def test_a_card_names_the_base_on_the_hub(name: str, expected: str | None, hub: type[FakeHub], tmp_path: Path) -> None:
    saved(tmp_path / "task")
    spec: dict[str, Any] = {"name": name, "options": {}, "revision": None}
    edit(tmp_path / "task", lambda c: c["base"].update(spec=spec))
    st.push(tmp_path / "task", "you/pets")
    card = (hub.root / "you/pets/main/README.md").read_text()
    assert ("base_model:" in card) == (expected is not None) and (expected or "") in card


def test_a_model_takes_the_place_of_a_single_task_and_the_other_way_round(hub: type[FakeHub], tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    for name in ("a", "b"):
        model.add_task(name, side=None, merge="base-only", head=2)
    model.save(tmp_path / "model")
    for task, expected in (("a", ["a"]), (None, ["a", "b"]), ("b", ["b"])):
        st.push(tmp_path / "model", "me/pets", task=task)
        shutil.rmtree(hub.root / "cache", ignore_errors=True)
        assert sorted(st.load(st.pull("me/pets")).tasks) == expected


def test_a_card_shows_metrics_of_any_kind() -> None:
    config = {"task": "t", "parts": {"merge": ["sum", {}], "head": ["linear", {}]}}
    assert "| f1 | high |" in task_table({**config, "metrics": {"f1": "high"}})
    assert "| merge |" in task_table({**config, "metrics": None})
