"""The examples run."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = {"two_tasks", "cached_features", "own_module", "onnx_without_torch", "guards"}


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples import their pictures as scripts do, from their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_every_example_is_known_and_short() -> None:
    files = {file.stem: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.py")}
    assert set(files) == SCRIPTS | {"pictures"}
    assert max(text.count("\n") for text in files.values()) <= 90
    # The library and torch are all that they need.
    assert not [name for name, text in files.items() if "sidetuning_bench" in text or "sidetuning." in text]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_tasks", "cached_features"])
def test_examples_of_two_tasks(name: str) -> None:
    accuracy = importlib.import_module(name).main(samples=32, epochs=1)
    assert set(accuracy) == {"shape", "colour"} and all(0 <= value <= 1 for value in accuracy.values())


def test_the_example_of_own_modules_learns() -> None:
    assert importlib.import_module("own_module").main(samples=300, epochs=6) > 0.9


def test_the_example_of_guards_judges_what_is_written() -> None:
    pytest.importorskip("transformers")
    assert importlib.import_module("guards").main(guards=4, steps=60) > 0.9
