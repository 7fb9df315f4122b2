"""`sidetuning transfer` on Doom, recorded cell by cell: `python benchmarks/transfer.py --data FOLDER`.

A cell that has its result is not run again. `--table` prints the tables from the results, `--report FILE` writes a page of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tyro
from tqdm import tqdm

from common import RESULTS, record
from sidetuning.charts import write_charts
from sidetuning.methods import METHODS
from sidetuning.results import RunResult
from sidetuning.scenarios import transfer


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
    known = {f.name for f in fields(RunResult)}
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("transfer-*.json"))]
    runs = [RunResult(**{k: v for k, v in content.items() if k in known}) for content in found]
    order = [*transfer.Settings.methods, *METHODS.names()]
    return sorted(runs, key=lambda run: (order.index(run.method), run.variant, run.seed))


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if not given.table:
        todo = [c for c in transfer.cells(given) if not (RESULTS / f"transfer-{c.folder.name}.json").exists()]
        with tqdm(total=len(todo), unit="run") as bar:
            for cell in todo:
                bar.set_description(cell.folder.name)
                result = asdict(transfer.one(cell, bar))
                result["settings"].pop("base_weights", None)
                record(f"transfer-{cell.folder.name}", result)
    print(transfer.tables(results(), transfer.Settings.targets, transfer.Settings.frames))
    if given.report is not None:
        charts = list(transfer.charts(results(), transfer.Settings.targets, transfer.Settings.frames))
        write_charts(charts, Path(given.report), title="Transfer from curvature", lead=transfer.lead(given.steps))
