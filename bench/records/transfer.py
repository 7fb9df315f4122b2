"""`sidetuning transfer` on Doom, recorded cell by cell: `python benchmarks/transfer.py --data FOLDER`.

A cell that has its result is not run again. `--table` prints the tables from the results, `--report FILE` writes a page of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from common import read_results, record, recorded, unread
from sidetuning_bench.charts import write_charts
from sidetuning_bench.dense import itaskonomy, transfer
from sidetuning_bench.methods import METHODS
from sidetuning_bench.results import RunResult


@dataclass(frozen=True)
class Settings(transfer.Settings):
    """Run and record."""

    out: str = "runs/benchmarks/transfer"
    """Folder of the cells' runs."""
    table: bool = False
    """Run nothing: print the tables from the results."""
    report: str | None = None
    """Write the curves of the results to this file, too."""


def results() -> list[RunResult]:
    """All that are recorded, in the order of methods."""
    runs = read_results(RunResult, "transfer-*.json")
    order = [*transfer.Settings.methods, *METHODS.names()]
    return sorted(runs, key=lambda run: (order.index(run.method), run.variant, run.seed))


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if not given.table:
        free = {*itaskonomy.FREE, "base_weights"}
        todo = [
            c for c in transfer.cells(given) if not recorded(f"transfer-{c.folder.name}", c.settings, free | unread(c))
        ]
        with tqdm(total=len(todo), unit="run") as bar:
            for cell in todo:
                bar.set_description(cell.folder.name)
                result = asdict(transfer.one(cell, bar))
                result["settings"].pop("base_weights", None)
                record(f"transfer-{cell.folder.name}", result)
    print(transfer.tables(results(), given.targets, given.frames))
    if given.report is not None:
        charts = list(transfer.charts(results(), given.targets, given.frames))
        write_charts(charts, Path(given.report), title="Transfer from curvature", lead=transfer.lead(given.steps))
