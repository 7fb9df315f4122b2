"""The runner of grids: what is done is read, what is not is run in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidetuning.errors import SideTuningError
from sidetuning_bench.grid import Cell, cell_name, run


def work(settings: str) -> tuple[str, int]:
    """What the cells of this test do, in their processes."""
    if settings == "killed":
        os._exit(9)
    if settings == "wrong":
        raise SideTuningError("a wrong setting")
    return settings, os.getpid()


@pytest.mark.slow
def test_cells_run_apart_and_finished_ones_are_read(tmp_path: Path) -> None:
    cells = [Cell(name, tmp_path / name, name) for name in ("done", "new", "killed", "never")]
    found = run(cells, work, lambda cell: ("read", 0) if cell.name == "done" else None, progress=False)
    assert next(found) == (cells[0], ("read", 0))
    cell, (settings, process) = next(found)
    assert cell is cells[1] and settings == "new" and process != os.getpid()
    with pytest.raises(SideTuningError, match="killed, perhaps for want of memory; the same command resumes it"):
        next(found)


def test_an_error_of_a_cell_is_raised(tmp_path: Path) -> None:
    with pytest.raises(SideTuningError, match="a wrong setting"):
        list(run([Cell("a", tmp_path, "wrong")], work, lambda cell: None, progress=False))


def test_names_of_cells_are_names_of_folders() -> None:
    assert cell_name("sidetune", "data=10%, width=0.25", 1) == "sidetune-data-10-width-0.25-1"
