"""The grids of `sidetuning compare icifar`, recorded cell by cell: `python benchmarks/compare.py icifar --data FOLDER --grid methods`.

A cell that has its result is not run again. `--table` prints the table of a grid from the results, `--report FILE` writes a page of them.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from common import read_results, record, recorded, unread
from sidetuning_bench import compare
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult, gaps_table, markdown, measures_table, summary_table

PRIVATE = ("base_weights",)  # a path of the machine


@dataclass(frozen=True)
class Settings(compare.Settings):
    """Run and record a grid."""

    out: str = "runs/benchmarks/compare"
    """Folder of the cells' runs."""
    table: bool = False
    """Run nothing: print the table of the grid from the results, of --methods alone where these are given."""
    report: str | None = None
    """Write a report of the results to this file, too."""
    cells: tuple[str, ...] = ()
    """Run these of the grid's cells alone, as their result files end: pnn-1 pnn-alone-0."""


def name(settings: Settings, cell: compare.Cell) -> str:
    """The result file of a cell."""
    return f"{prefix(settings.scenario, settings.grid)}-{cell.folder.name}"


def prefix(scenario: str, grid: str) -> str:
    """What the names of a grid's result files start with."""
    return f"compare-{grid}" if scenario == "icifar" else f"compare-{scenario}-{grid}"


def done(settings: Settings, cell: compare.Cell) -> bool:
    """Whether the cell has its result."""
    free = {*cell.scenario.FREE, *PRIVATE, "seed", *unread(cell)} | (
        {"precision"} if settings.scenario == "icifar" else set()
    )
    return recorded(name(settings, cell), cell.settings, free)


def run(settings: Settings) -> None:
    """Run and record the cells that have no result yet."""
    grid = {cell.folder.name: cell for cell in compare.cells(settings)}
    if unknown := set(settings.cells) - set(grid):
        sys.exit(f"the grid has no cells {', '.join(sorted(unknown))}; it has {', '.join(grid)}")
    todo = [cell for name in settings.cells or grid if not done(settings, cell := grid[name])]
    with tqdm(total=sum(cell.tasks for cell in todo), unit="task") as bar:
        for cell in todo:
            bar.set_description(cell.folder.name)
            result = replace(compare.one(cell, bar), variant=cell.variant)
            public = {k: v for k, v in result.settings.items() if k not in PRIVATE}
            record(name(settings, cell), asdict(replace(result, settings=public)))


def galleries(settings: Settings, run: RunResult) -> Path | None:
    """The pictures of a recorded run, where its folder is still there."""
    folder = Path(settings.out) / compare.folder_name(run.method, run.variant, run.seed) / "gallery"
    return folder if folder.is_dir() else None


def results(grid: str, scenario: Literal["icifar", "itaskonomy"] = "icifar") -> list[RunResult]:
    """All recorded runs of a grid, in the grid's order."""
    runs = read_results(RunResult, f"{prefix(scenario, grid)}-*.json")
    found = {(run.method, run.variant, run.seed): run for run in runs}
    for what in ("data", "base"):
        if len({run.settings.get("fingerprints", {}).get(what, "") for run in found.values()} - {""}) > 1:
            sys.exit(
                f"the results of {prefix(scenario, grid)} are of more than one {what}; move those of the other away"
            )
    cells = compare.cells(compare.Settings(scenario, grid=grid, seeds=9))  # type: ignore[arg-type]
    order = [(c.settings.method, c.variant, c.settings.seed) for c in cells]
    return compare.add_alone([found[key] for key in order if key in found])


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if not given.table:
        run(given)
    found = [r for r in results(given.grid, given.scenario) if r.method in (given.methods or compare.ALL)]
    print(markdown(summary_table(found)))
    if found[0].measures is not None:
        print(measures_table(found))
        print(gaps_table(found))
    if given.report is not None:
        folders = [galleries(given, run) for run in found]
        write_report(found, Path(given.report), title=compare.title(given), galleries=folders if any(folders) else ())
