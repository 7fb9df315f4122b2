"""What one network for all tasks would have lost is measured on a copy; the model itself keeps everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sidetuning as st
from conftest import mlp_base
from data_parts import stages_base, write_digits
from sidetuning.automatic import auto
from sidetuning.data import load
from sidetuning.forgetting import would_forget
from sidetuning.scoring import score
from text_parts import tagged, write_rows


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("digits")
    return write_digits(root / "a", (0, 1, 7), 40), write_digits(root / "b", (3, 4, 8), 40)


def learned(folder: Path) -> tuple[st.SideTuner, st.data.TaskData]:
    """A model that has learned a task, of a side on a tap and one without, from the digits of a folder."""
    data = load(folder)
    model = st.SideTuner(stages_base().with_taps(["two"]))
    rows = data.splits["train"]
    assert model.base.transform is not None
    loader = [(model.base.transform.batch(rows.sources), rows.targets)]
    for name, side in (("side", "fusion"), ("head", None)):
        merge = "alpha" if side else "base-only"
        model.add_task(name, side=side, merge=merge, head=3, labels=data.names, problem="classes", seed=0)
        model[name].transform = model.base.transform
    st.fit(model, "side", loader, steps=150, lr=0.03, progress=False)
    st.solve(model, "head", loader, progress=False)
    return model, data


@pytest.mark.slow
def test_the_other_tasks_are_asked_on_a_copy_that_was_fine_tuned(digits: tuple[Path, Path]) -> None:
    model, data = learned(digits[0])
    new, rows = load(digits[1]), data.splits["validation"]
    x = torch.rand(4, 3, 32, 32)
    outputs, identity = model.forward_all(x), model.base.identity()
    new.splits["train"] = new.splits["train"].take(range(64))
    others = {"side": rows, "head": rows}
    found = would_forget(model, new, others, seconds=60, lr=1e-2, progress=False)
    assert found["steps"] == 40
    assert [row["task"] for row in found["tasks"]] == ["side", "head"]
    for row in found["tasks"]:
        scores = st.evaluate(model, row["task"], [rows.batch(model.base, range(len(rows)))])
        assert row["before"] == pytest.approx(scores["accuracy"]) and row["rows"] == len(rows)
        assert row["before"] > 0.8 and row["after"] < row["before"] - 0.1
    after = model.forward_all(x)
    assert model.base.identity() == identity and all(torch.equal(outputs[name], after[name]) for name in outputs)
    # Nothing is lost where nothing is learned.
    still = would_forget(model, new, others, seconds=60, lr=1e-12, progress=False)
    assert all(row["before"] == row["after"] for row in still["tasks"])


def test_tasks_of_words_are_fine_tuned_and_asked_too(text_base: st.Base, tmp_path: Path) -> None:
    data, model = load(write_rows(tmp_path / "a.jsonl", tagged(60))), st.SideTuner(text_base)
    rows = data.splits["validation"]
    auto(model, "ner", data, cache=tmp_path, side="none", progress=False)
    found = would_forget(model, data, {"ner": rows}, seconds=60, progress=False)
    (lost,) = found["tasks"]
    assert lost["before"] == pytest.approx(score(model, "ner", rows, progress=False).scores()["accuracy"])
    assert lost["before"] != lost["after"] and lost["rows"] == len(rows) and found["steps"] == 40


def test_a_base_that_cannot_be_trained_is_refused(digits: tuple[Path, Path]) -> None:
    data = load(digits[0])
    net = mlp_base().net
    model = st.SideTuner(st.Base(lambda x: net(x), example=torch.zeros(1, 12)))
    with pytest.raises(st.TaskError, match="forgetting would have been is not known: the copy side"):
        would_forget(model, data, {}, seconds=1, progress=False)
