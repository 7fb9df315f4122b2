"""A served folder: one base pass for all tasks, and tasks that come, change and go without a wrong answer."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sidetuning as st
from conftest import conv_base
from sidetuning import folder
from sidetuning.loading import load
from sidetuning.predicting import Answer
from sidetuning.problems import PROBLEMS, Classes
from sidetuning.serving import served as served_module
from sidetuning.serving.served import Moment, Served, reply
from sidetuning.transforms import ImageTransform

PICTURES = list(np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8))


def model_folder(path: Path) -> st.SideTuner:
    """Four tasks: one reads another's side, one was trained at another size, one reads a tap."""
    model = st.SideTuner(conv_base())
    model.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    model.add_task("late", side="fcn4", merge="sum", head=3, laterals=["kind"], seed=1)
    model.add_task("small", side=None, merge="base-only", head=2, problem="labels", seed=2)
    model.add_task("tapped", side="fusion", taps=["2"], head=1, problem="numbers", seed=3)
    model["small"].transform = ImageTransform((16, 16))
    model.save(path)
    return model


def ask(moment: Moment, sources: list[Any], tasks: list[str], top: int | None = None) -> list[dict[str, Any]]:
    """Each source's answers."""
    queries = moment.queries(sources, tasks, top)
    replies = iter(reply([query for each in queries for query in each]))
    return [{task: a for _ in each for task, a in next(replies).answers.items()} for each in queries]


def same(found: Any, expected: Any) -> bool:
    """Whether answers agree but for rounding, which depends on what shares a batch."""
    return [a.label for a in found] == [a.label for a in expected] and all(
        a.value == pytest.approx(b.value, abs=1e-5) for a, b in zip(found, expected, strict=True)
    )


def test_answers_are_those_of_the_model_whatever_shares_the_batch(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    moment = Served(tmp_path, base=conv_base()).moment
    expected = model.predict(PICTURES)
    for tasks in (model.tasks, ["late"], ["small", "kind"]):
        found = ask(moment, PICTURES, tasks)
        assert all(same(found[i][task], expected[task][i]) for i in range(4) for task in tasks)
    assert [len(found["kind"]) for found in ask(moment, PICTURES, ["kind"], top=1)] == [1] * 4


def test_queries_for_all_tasks_share_a_pass_for_each_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path)
    moment = Served(tmp_path, base=conv_base()).moment
    passes: list[int] = []
    encode = st.Base.encode

    def counted(self: st.Base, inputs: Any) -> st.Features:
        passes.append(len(inputs))
        return encode(self, inputs)

    monkeypatch.setattr(st.Base, "encode", counted)
    asked = [[task] for task in model.tasks] + [model.tasks]
    queries = [query for i, tasks in enumerate(asked) for query in moment.queries([PICTURES[i % 4]], tasks, None)[0]]
    replies = reply(queries)
    # Three tasks and all of them at one size, one and all of them at the other.
    assert sorted(passes) == [2, 4]
    assert [len(each.answers) for each in replies] == [1, 1, 1, 1, 3, 1]
    assert all(set(each.side_seconds) == set(each.answers) for each in replies)


def test_tasks_that_come_change_and_go_are_taken_over(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    told: list[Any] = []
    served = Served(tmp_path, base=conv_base(), told=told.append)
    before = served.moment
    assert not served.refresh() and served.moment is before
    model.add_task("new", side=None, merge="base-only", head=2, seed=4)
    model.save(tmp_path)
    assert served.refresh() and set(served.moment.branches) == {*before.branches, "new"}
    # Branches that did not change are not built again.
    assert all(served.moment.branches[task] is before.branches[task] for task in before.branches)
    folder.remove(tmp_path, "tapped")
    assert served.refresh() and "tapped" not in served.moment.branches and not served.moment.base.tap_shapes
    # Who asked before is answered as it was then.
    assert same(ask(before, PICTURES[:1], ["tapped"])[0]["tapped"], model.predict(PICTURES[:1])["tapped"][0])
    with torch.no_grad():
        model["new"].head.linear.bias += 5.0  # type: ignore[union-attr, operator]
    model.save(tmp_path)
    assert served.refresh() and served.moment.versions["new"] != before.versions.get("new")
    assert same(ask(served.moment, PICTURES[:1], ["new"])[0]["new"], model.predict(PICTURES[:1])["new"][0])
    assert [sorted(names) for names in told][-1] == ["kind", "late", "new", "small", "tapped"]


def test_a_lateral_that_changed_alone_is_not_taken_over_until_all_fit(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    served = Served(tmp_path, base=conv_base())
    before = served.moment
    other = st.SideTuner(conv_base())
    other.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=9)
    other.save_task("kind", tmp_path / "tasks/kind")
    assert served.refresh() and served.moment is before and "another task 'kind'" in str(served.error)
    # Another change must not take over what was refused.
    model.add_task("new", side=None, merge="base-only", head=2, seed=4)
    model.save_task("new", tmp_path / "tasks/new")
    assert served.refresh() and served.moment is before
    other.add_task("late", side="fcn4", merge="sum", head=3, laterals=["kind"], seed=8)
    other.save_task("late", tmp_path / "tasks/late")
    assert served.refresh() and served.error is None
    expected = other.predict(PICTURES[:1])
    found = ask(served.moment, PICTURES[:1], ["kind", "late"])[0]
    assert all(same(found[task], expected[task][0]) for task in found)


def test_a_damaged_or_empty_folder_leaves_what_was_served(tmp_path: Path) -> None:
    model = model_folder(tmp_path)
    told: list[Any] = []
    served = Served(tmp_path, base=conv_base(), told=told.append)
    before = served.moment
    (tmp_path / "tasks/small/side.safetensors").write_bytes(b"half")
    assert served.refresh() and served.moment is before and isinstance(told[-1], st.ArtifactError)
    shutil.rmtree(tmp_path / "tasks")
    assert served.refresh() and served.moment is before and "no task any more" in str(served.error)
    model.save(tmp_path)
    assert served.refresh() and served.error is None and set(served.moment.branches) == set(before.branches)


def test_a_folder_that_cannot_be_read_for_a_moment_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path)
    told: list[Any] = []
    served = Served(tmp_path, base=conv_base(), told=told.append)

    def broken(path: Path) -> list[Path]:
        raise OSError(5, "Input/output error")

    thread = served.watch(0.01)
    with monkeypatch.context() as patch:
        patch.setattr(served_module, "task_folders", broken)
        until(lambda: served.error is not None)
        time.sleep(0.05)
        # Told once, however often it is met.
        assert "Input/output error" in str(served.error) and len(told) == 1 and served.moment.branches
    until(lambda: served.error is None)
    model.remove_task("tapped")
    model.save(tmp_path)
    until(lambda: "tapped" not in served.moment.branches)
    served.close()
    thread.join(10)


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_only_engines_of_the_processor_keep_a_model_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path)
    moved: list[Any] = []

    def passed(model: Any) -> Any:
        moved.append(model)
        return model

    monkeypatch.setattr(served_module, "on_device", passed)
    monkeypatch.setattr(served_module, "load", lambda path, base, **how: load(path, base=conv_base(), **how))
    monkeypatch.setattr(served_module, "with_engine", lambda base, engine: base)
    for engine, count in (("onnxruntime", 0), ("openvino", 0), ("folded", 1), (None, 2)):
        Served(tmp_path, engine=engine)
        assert len(moved) == count


def test_tasks_that_write_are_asked_only_where_they_are_named() -> None:
    branches: Any = {"sea": SimpleNamespace(problem=PROBLEMS["next"]()), "mood": SimpleNamespace(problem=Classes())}
    assert Moment(conv_base(), branches, {}).asked() == ["mood"]
    assert Moment(conv_base(), {"sea": branches["sea"]}, {}).asked() == ["sea"]


@pytest.mark.parametrize("function", ["load", "read_task"])
def test_a_folder_that_changes_while_it_is_read_first_gives_each_answer_its_own_version(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_folder(tmp_path)
    asked = ["small"]
    # By version, what the task answers.
    expected = {served_version(tmp_path / "tasks/small"): model.predict(PICTURES[:1], asked)["small"][0]}
    own = getattr(served_module, function)

    def changing(path: Path, **options: Any) -> Any:
        found = own(path, **options)
        if len(expected) == 1 and path.name in ("small", tmp_path.name):
            with torch.no_grad():
                model["small"].head.linear.bias += 5.0  # type: ignore[union-attr, operator]
            model.save(tmp_path)
            expected[served_version(tmp_path / "tasks/small")] = model.predict(PICTURES[:1], asked)["small"][0]
        return found

    monkeypatch.setattr(served_module, function, changing)
    served = Served(tmp_path, base=conv_base())
    for _ in range(2):
        version = served.moment.versions["small"]
        assert same(ask(served.moment, PICTURES[:1], asked)[0]["small"], expected[version])
        served.refresh()
    assert version == list(expected)[-1] and len(expected) == 2


def test_a_source_of_another_kind_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path)
    moment = Served(tmp_path, base=conv_base()).moment
    with pytest.raises(st.DataError, match="this model reads images, not a text"):
        moment.queries(["a text"], ["kind"], None)


@pytest.mark.slow
def test_while_tasks_come_and_go_no_answer_is_wrong(tmp_path: Path) -> None:
    # Each version of a task answers its own number, by its bias alone.
    numbers: dict[str, float] = {}
    model = st.SideTuner(conv_base())

    def save(task: str, number: float) -> None:
        if task in model:
            model.remove_task(task)
        branch = model.add_task(task, side=None, merge="base-only", head=1, problem="numbers", seed=0)
        with torch.no_grad():
            branch.head.linear.weight.zero_()  # type: ignore[union-attr, operator]
            branch.head.linear.bias.fill_(number)  # type: ignore[union-attr, operator]
        model.save_task(task, tmp_path / "tasks" / task)
        numbers[served_version(tmp_path / "tasks" / task)] = number

    for i in range(3):
        save(f"t{i}", float(i))
    served = Served(tmp_path, base=conv_base())
    served.watch(0.005)
    stop, seen = threading.Event(), list[tuple[str, Any]]()

    def client() -> None:
        while not stop.is_set():
            moment = served.moment
            for task, found in ask(moment, PICTURES[:2], list(moment.branches))[0].items():
                seen.append((moment.versions[task], found))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(40):
        save(f"t{step % 4}", float(100 + step))
        if step % 5 == 4:
            folder.remove(tmp_path, f"t{step % 3}")
            save(f"t{step % 3}", float(200 + step))
    stop.set()
    for thread in threads:
        thread.join()
    served.close()
    assert not [found for sha256, found in seen if found != [Answer("0", numbers[sha256])]]
    assert len(seen) > 100 and len({sha256 for sha256, _ in seen}) > 10


def served_version(path: Path) -> str:
    """The first digits of a task's hash."""
    found = folder.saved_tasks(path)
    return str(next(iter(found.values()))[1][0]["tensors_sha256"][:12])
