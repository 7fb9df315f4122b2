"""One runner for grids of runs: compare, transfer, imitation, rl and the published records use it.

    cells = [Cell("pets-0", Path("runs/grid/pets-0"), settings), …]     # what varies
    for cell, result in run(cells, scenario.run, finished):             # one cell after another
        results.append(result)                                          # write a table of those so far, …

`work` (here `scenario.run`) is a function of a module, called with a cell's settings in a process of its own, so that
its peak memory is its own. It writes its result into the cell's folder, and resumes where it was stopped.
`finished(cell)` reads that result, or returns None: then the cell is run. A cell's process ends with its parent, even
if that was killed.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from sidetuning.errors import SideTuningError
from sidetuning.terminal import say, say_markdown
from sidetuning_bench.options import FREE
from sidetuning_bench.runs import Run, end_with_parent

S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)
R = TypeVar("R")


@dataclass(frozen=True)
class Cell(Generic[S_co]):
    """One run of a grid.

    Attributes:
        name: tells it from the grid's other runs, and names its folder and its result.
        folder: where it runs.
        settings: what it is run with.
        variant: tells it from other runs of its method, such as "merge=alpha".
        size: how many rows its metrics.jsonl has at the end, for the progress bar.
    """

    name: str
    folder: Path
    settings: S_co
    variant: str = ""
    size: int = 1


def cell_name(*parts: object) -> str:
    """A cell's name, of what tells it from the others."""
    return re.sub(r"[^\w.]+", "-", " ".join(map(str, parts)).replace("%", ""))


def result_of(cell: Cell[Any], scenario: str, read: Callable[[Path], R], free: tuple[str, ...] = FREE) -> R | None:
    """The result of a cell that is done, None of another; a run with other settings is refused."""
    file = cell.folder / "result.json"
    if not file.exists():
        return None
    Run(cell.folder, scenario, cell.settings, free=free)
    return read(file)


def run(
    cells: Iterable[Cell[S]],
    work: Callable[[S], R],
    finished: Callable[[Cell[S]], R | None],
    *,
    unit: str = "run",
    progress: bool = True,
) -> Iterator[tuple[Cell[S], R]]:
    """Give every cell with its result, one after another: read where it is there, else run.

    Args:
        cells: the runs.
        work: runs the settings of a cell.
        finished: reads the result of a cell that is done; None where there is none.
        unit: of the progress bar.
        progress: show one.

    Raises:
        SideTuningError: a cell failed, or its process was killed; the others' results stay.
    """
    todo = list(cells)
    with tqdm(total=sum(c.size for c in todo), unit=unit, dynamic_ncols=True, disable=not progress) as bar:
        for cell in todo:
            bar.set_description(cell.name)
            end = bar.n + cell.size
            result = finished(cell)
            if result is None:
                result = run_apart(cell, work, bar)
            bar.update(end - bar.n)
            yield cell, result


def run_apart(cell: Cell[S], work: Callable[[S], R], bar: tqdm[Any]) -> R:
    """Run one cell in a process of its own."""
    metrics, start = cell.folder / "metrics.jsonl", bar.n
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, end_with_parent) as pool:
        future = pool.submit(work, cell.settings)
        try:
            while not future.done():
                time.sleep(0.2)
                learned = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                bar.update(start + min(learned, cell.size) - bar.n)
            return future.result()
        except KeyboardInterrupt:
            # The interrupt may have been sent to this process alone.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise SideTuningError(
                f"the run in {cell.folder} was killed, perhaps for want of memory; the same command resumes it"
            ) from error


def print_tables(text: str, folder: str) -> None:
    """Print the tables of a grid, which are in Markdown, and where they lie with the report."""
    say_markdown(text, 120)
    say(f"table: {folder}/table.md; report: {folder}/report.html")
