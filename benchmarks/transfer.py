"""`sidetuning transfer` on Doom, recorded as transfer.json: `python benchmarks/transfer.py --data FOLDER`; `--table` prints the tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

import tyro

from common import RESULTS, record
from sidetuning.results import RunResult
from sidetuning.scenarios import transfer


@dataclass(frozen=True)
class Settings(transfer.Settings):
    """Run and record."""

    out: str = "runs/benchmarks/transfer"
    """Folder of the runs."""
    table: bool = False
    """Only print the tables."""


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if not given.table:
        found = transfer.run(transfer.Settings(**{k: v for k, v in asdict(given).items() if k != "table"}))
        rows = [asdict(r) for r in found]
        for row in rows:
            row["settings"].pop("base_weights", None)
        record("transfer", {"results": rows, "targets": given.targets, "frames": given.frames})
    content = json.loads((RESULTS / "transfer.json").read_text())
    known = {f.name for f in fields(RunResult)}
    results = [RunResult(**{k: v for k, v in row.items() if k in known}) for row in content["results"]]
    print(transfer.tables(results, content["targets"], content["frames"]))
