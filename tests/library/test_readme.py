"""The Python of README and docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "out/pets/side.json").exists()


def test_the_stream_of_tasks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/methods.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(compile(block, "docs/methods.md", "exec"), scope)
    assert len(scope["matrix"].rows) == 2 and scope["matrix"].forgetting == [0.0, 0.0]


def test_the_readme_runs_with_an_encoder_of_texts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=6
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "built", "it", "?", "did", ".", "i"]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path)
    (block,) = re.findall(r"```py\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    name = "google-bert/bert-base-uncased"
    assert block.count(name) == 2
    scope: dict[str, Any] = {}
    exec(compile(block.replace(name, str(tmp_path)), "README.md", "exec"), scope)
    assert scope["span"].shape == (1, 10, 2) and scope["topic"].shape == (1, 4)
