"""Make a published number, or its table: `python bench/records/run.py NAME [--help] [--table] [--report FILE] …`.

A run that has its result is not run again, and one that was stopped resumes. `--table` prints the tables of the
documents from the results in `results/`. Without a name it lists the records.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import tyro

from record import Record
from sidetuning.cli import guarded
from sidetuning.registry import Registry

RECORDS: Registry[Record] = Registry(
    "record",
    {
        "icifar": "image_grids:ICIFAR",
        "compare": "image_grids:COMPARE",
        "transfer": "image_grids:TRANSFER",
        "ewc-coefficient": "choices:EWC_COEFFICIENT",
        "itaskonomy-settings": "choices:ITASKONOMY_SETTINGS",
        "rooms": "rooms:ROOMS_RECORD",
        "batch-statistics": "batch_statistics:BATCH_STATISTICS",
        "dense-constants": "dense_constants:DENSE_CONSTANTS",
        "step-cost": "step_cost:STEP_COST",
        "many-tasks": "many_tasks:MANY_TASKS",
        "processes": "processes:PROCESSES",
        "squad": "text_grid:SQUAD",
        "squad-cost": "text_step_cost:SQUAD_COST",
        "campaign": "campaign:CAMPAIGN",
        "doom": "doom_frames:DOOM",
        "contact-sheet": "doom_frames:CONTACT_SHEET",
        "imitation": "agent_grids:IMITATION",
        "rl": "agent_grids:RL",
        "rl-speed": "agent_worlds:RL_SPEED",
        "pointnav-episodes": "agent_worlds:EPISODES",
        "zoo": "zoo:ZOO",
        "serving": "serving:SERVING",
        "serving-churn": "serving_churn:SERVING_CHURN",
        "own-data": "own_data:OWN_DATA",
        "peers": "peers:PEERS",
        "gpu": "gpu:GPU",
        "five-jobs": "five_jobs:FIVE_JOBS",
        "generators": "generators:GENERATORS",
        "engines": "engines:ENGINES",
        "closed-form": "closed_form:CLOSED_FORM",
        "route-kinds": "closed_form:ROUTE_KINDS",
    },
)


@dataclass(frozen=True)
class Show:
    """What is shown of a record."""

    table: bool = False
    """Run nothing: print the tables of the results."""
    report: Path | None = None
    """Write a page of the results to this file, too."""


def main(arguments: list[str]) -> None:
    """Run the record that the first argument names, and print its table."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nRecords: {', '.join(RECORDS.names())}")
        return
    name, *rest = arguments
    record = RECORDS[name]
    parts = [("settings", type(record.settings), field(default=record.settings)), ("show", Show, field(default=Show()))]
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
    given: Any = tyro.cli(
        make_dataclass("Given", parts),
        prog=f"run.py {name}",
        description=record.settings.__doc__,
        args=rest,
        config=config,
    )
    if not given.show.table:
        record.run(given.settings)
    if record.table is not None:
        print(record.table(given.settings))
    if record.report is not None and given.show.report is not None:
        record.report(given.settings, given.show.report)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
