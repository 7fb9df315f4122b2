"""Imitation and reinforcement learning in Doom, recorded: `python benchmarks/agents.py imitation|rl|speed …`.

A run that was stopped goes on; `--table` prints the tables from the recorded results.
"""

from __future__ import annotations

import json
import time
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


@dataclass(frozen=True)
class Speed:
    """Steps per second and base passes of PPO, with the base's features computed once and in every pass, recorded as rl-speed.json."""

    steps: int = 4096
    """Of each run."""
    passes: int = 10
    """Over each rollout; ten is stable-baselines3's default."""
    rounds: int = 3
    """Interleaved."""


Command = (
    Annotated[Imitation, tyro.conf.subcommand("imitation")]
    | Annotated[Rl, tyro.conf.subcommand("rl")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
)


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


def run_speed(s: Speed) -> str:
    """Record, and what was measured."""
    from sidetuning.scenarios import ppo

    found: dict[str, list[dict[str, float]]] = {"once": [], "every pass": []}
    for _ in range(s.rounds):
        for name, rows in found.items():
            cell = rl.Cell(
                method="sidetune", seed=0, out="", steps=s.steps, passes=s.passes, cached=name == "once", progress=False
            )
            env = ppo.training_env(cell)
            try:
                agent = ppo.build(cell, env)
                seen = [0]
                base = env.base if name == "once" else agent.policy.features_extractor.encoder  # type: ignore[attr-defined]
                hook = base.net.register_forward_hook(
                    lambda _m, _i, out, seen=seen: seen.__setitem__(0, seen[0] + len(out))
                )
                agent.learn(cell.rollout * cell.envs)  # starts the engines, on every level some of their time
                seen[0], started = 0, time.perf_counter()
                agent.learn(s.steps, reset_num_timesteps=False)
                rows.append({"steps_per_second": s.steps / (time.perf_counter() - started), "base_passes": seen[0]})
                hook.remove()
            finally:
                env.close()
    record("rl-speed", {"steps": s.steps, "passes": s.passes, **found})
    return json.dumps(found, indent=2)


if __name__ == "__main__":
    settings = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes))  # type: ignore[arg-type]
    if isinstance(settings, Speed):
        print(run_speed(settings))
    else:
        print(run_imitation(settings) if isinstance(settings, Imitation) else run_rl(settings))
