"""The Python of README and docs runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "out/pets/side.json").exists()


# Names of weights that must be downloaded, and what takes their place here.
STAND_INS = {"timm:resnet18": "resnet44-cifar10"}
PAGES = {
    page.relative_to(DOCS).as_posix(): text
    for page in sorted(DOCS.rglob("*.md"))
    if "```python\n" in (text := page.read_text(encoding="utf-8"))
}
# Pages that need more than the library import much.
MARKED = [pytest.param(page, marks=pytest.mark.slow if "importorskip" in PAGES[page] else ()) for page in PAGES]


@pytest.mark.parametrize("page", MARKED)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES[page]
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    # What a page needs and does not show stands in a comment, <!-- setup … -->.
    blocks = re.findall(r"^(?:```python|<!-- setup)\n(.*?)^(?:```|-->)", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)


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
    assert block.count(name) == 1
    scope: dict[str, Any] = {}
    exec(compile(block.replace(name, str(tmp_path)), "README.md", "exec"), scope)
    assert scope["span"].shape == (1, 10, 2) and scope["topic"].shape == (1, 4)
