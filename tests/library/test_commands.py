"""What `train` keeps, refuses and says, and `evaluate` on the columns that a task was learned from."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sidetuning as st
from sidetuning.commands import evaluate, serve, train
from text_parts import write_encoder

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder of texts, and a table of two columns of texts and two of numbers."""
    root = tmp_path_factory.mktemp("commands")
    (root / "encoder").mkdir()
    write_encoder(root / "encoder")
    words = [(["red tower", "blue river"][i // 2 % 2], ["old tower", "new river"][i % 2]) for i in range(60)]
    rows = [f"{a} 1801,{b} 1802,{i % 5},{100.5 + i % 2 * 50 + i / 100}" for i, (a, b) in enumerate(words)]
    (root / "prices.csv").write_text("\n".join(["text,body,rating,price", *rows]))
    (root / "unsaid.csv").write_text("\n".join(["text,body,rating,cost", *rows]))
    return root


def learning(place: Path, out: Path) -> train.Settings:
    data, base = str(place / "prices.csv"), f"hf:{place / 'encoder'}"
    how = {"task": "price", "out": str(out), "side": "none", "quiet": True}
    return train.Settings(data, base=base, text=("body",), label=("price",), **how)  # type: ignore[arg-type]


def test_a_task_is_scored_on_the_columns_that_it_was_learned_from(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    train.train(dataclasses.replace(learning(place, tmp_path), data="prices.csv"))
    about = json.loads((tmp_path / "tasks/price/training.json").read_text())
    assert about["data"] == str(place / "prices.csv")
    assert about["columns"] == {"image": None, "text": ["body"], "label": ["price"], "problem": "numbers"}
    asked = evaluate.Settings(str(tmp_path), str(place / "prices.csv"), task="price", quiet=True)
    for model in (tmp_path, tmp_path / "tasks/price"):
        assert evaluate.evaluate(dataclasses.replace(asked, model=str(model)))[0].scores()["mae"] < 1
    with pytest.raises(st.DataError, match="answers with 'price', and the data have no such column"):
        evaluate.evaluate(dataclasses.replace(asked, data=str(place / "unsaid.csv")))
    with pytest.raises(st.TaskError, match="holds one task; give the model folder"):
        evaluate.evaluate(dataclasses.replace(asked, model=str(tmp_path / "tasks/price"), report=True))


def test_only_the_run_that_began_a_task_goes_on_without_replace(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, other = learning(place, tmp_path), {"label": ("rating",), "problem": "numbers"}

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sidetuning.report.add_to_report", stopped)
        train.train(settings)
    with pytest.raises(st.TaskError, match="has a task 'price' already"):
        train.train(dataclasses.replace(settings, **other))  # type: ignore[arg-type]
    train.train(settings)
    assert not (tmp_path / ".work").exists()
    before = (tmp_path / "tasks/price/side.safetensors").read_bytes()
    with pytest.raises(st.TaskError, match="only classes are balanced, and these are numbers"):
        train.train(dataclasses.replace(settings, **other, replace=True, balance=True))  # type: ignore[arg-type]
    with pytest.raises(st.TaskError, match="has a task 'price' already"):
        train.train(dataclasses.replace(settings, **other, balance=True))  # type: ignore[arg-type]
    assert (tmp_path / "tasks/price/side.safetensors").read_bytes() == before


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "a" / "0.png").write_bytes(b"broken")
    said: list[str] = []
    model, how = st.SideTuner(st.load_base("resnet44-cifar10")), {"side": "none", "progress": False}
    st.auto(model, "t", str(tmp_path), cache=tmp_path / "cache", say=said.append, **how)  # type: ignore[arg-type]
    assert any("left out of" in text and "a/0.png" in text for text in said)


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
@pytest.mark.parametrize("name", ["timeout", "wait", "max_body", "max_pixels", "watch"])
def test_limits_are_numbers(name: str, value: float) -> None:
    with pytest.raises(st.TaskError, match=f"--{name.replace('_', '-')} is from "):
        serve.limits_of(serve.Settings("model", **{name: value}))  # type: ignore[arg-type]
