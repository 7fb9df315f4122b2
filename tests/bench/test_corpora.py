"""Texts of installed packages: what is taken of a file, and rows of tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from sidetuning_bench.language import corpora

CODE = '"""A long text. {}"""\n# A comment.\nX = 1\n\n\ndef f():\n    """A doc."""\n'


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages."""
    for name in ("numpy/core.py", "numpy/tests/test_core.py", "site-packages/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CODE.format("word " * 50 + name))
    (tmp_path / "numpy/broken.py").write_text("def")
    monkeypatch.setattr(corpora, "PACKAGES", tmp_path)
    monkeypatch.setattr(corpora, "STANDARD", tmp_path)
    return tmp_path


def test_prose_is_long_docstrings_and_python_has_none(packages: Path) -> None:
    (text,) = corpora.prose()
    assert text.startswith("A long text. word") and text.endswith("numpy/core.py")
    assert corpora.python() == ["X = 1\n\ndef f():\n    pass"]


def test_files_lose_their_comments_and_packed_ones_are_left_out(packages: Path) -> None:
    folder = packages / "mkdocs"
    folder.mkdir()
    (folder / "a.js").write_text("/* A\nlicence */\nlet x = 1;\n  // why\n")
    (folder / "b.min.js").write_text("x" * 500)
    (folder / "c.txt").write_text("text")
    assert [text.split() for text in corpora.files(["mkdocs"], [".js"])] == [["let", "x", "=", "1;"]]


def test_rows_hold_all_tokens_in_one_random_order() -> None:
    def letters(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text.removesuffix(corpora.END)] + [0])

    rows = corpora.tokens(letters, ["abc", "de", "fghij"], 4, seed=1)
    assert rows.shape == (3, 4) and rows.equal(corpora.tokens(letters, ["abc", "de", "fghij"], 4, seed=1))
    assert "".join(map(chr, rows.flatten().tolist())).replace("\0", "").isalpha()
