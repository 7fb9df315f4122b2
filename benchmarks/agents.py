"""Imitation and reinforcement learning in Doom, recorded: `python benchmarks/agents.py imitation|rl …`.

A run that was stopped goes on; `--table` prints the tables from the recorded results.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import tyro

from common import RESULTS, record
from sidetuning.scenarios import imitation, rl


@dataclass(frozen=True)
class Imitation(imitation.Settings):
    """Clones of the expert, recorded as imitation.json."""

    out: str = "runs/benchmarks/imitation"
    """Folder of the runs."""
    table: bool = False
    """Only print the tables."""


@dataclass(frozen=True)
class Rl(rl.Settings):
    """Learning curves of PPO, recorded as rl-<environment>.json."""

    out: str = "runs/benchmarks/rl"
    """Folder of the runs; each environment has its own."""
    table: bool = False
    """Only print the table."""


Command = Annotated[Imitation, tyro.conf.subcommand("imitation")] | Annotated[Rl, tyro.conf.subcommand("rl")]


def run_imitation(s: Imitation) -> str:
    """Record, and the tables."""
    file = RESULTS / "imitation.json"
    if not s.table:
        given = imitation.Settings(**{k: v for k, v in asdict(s).items() if k != "table"})
        record("imitation", {"results": [asdict(r) for r in imitation.run(given)], "trajectories": s.trajectories})
    content = json.loads(file.read_text())
    return imitation.table([imitation.Result(**r) for r in content["results"]], content["trajectories"])


def run_rl(s: Rl) -> str:
    """Record, and the table."""
    name = f"rl-{s.env}".replace(":", "-")
    if not s.table:
        given = rl.Settings(**{k: v for k, v in asdict(s).items() if k != "table"})
        results = rl.run(replace(given, out=f"{s.out}/{s.env}"))
        record(name, {"results": [asdict(r) for r in results]})
    content = json.loads((RESULTS / f"{name}.json").read_text())
    return rl.table([rl.Result(**r) for r in content["results"]])


if __name__ == "__main__":
    settings = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes))  # type: ignore[arg-type]
    print(run_imitation(settings) if isinstance(settings, Imitation) else run_rl(settings))
