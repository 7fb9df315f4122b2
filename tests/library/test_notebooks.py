"""The notebooks run, and show what they gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.ipynb"))


def code(path: Path) -> list[dict[str, Any]]:
    """The cells of code."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_there_are_three_and_each_shows_its_results() -> None:
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = code(path)
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        assert sum(bool(cell["outputs"]) for cell in cells) >= 3 and path.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(code(path), 1):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), scope)
