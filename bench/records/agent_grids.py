"""Imitation and reinforcement learning in Doom, run by run: imitation-<method>-<trajectories>-<seed>.json and
rl-<environment>-<method>-<seed>.json."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from record import Record, read_results, recorded, run_cells, write
from sidetuning_bench.agents import cloning, curves, imitation, rl
from sidetuning_bench.charts import write_charts
from sidetuning_bench.options import with_values

R = TypeVar("R", cloning.Result, curves.Result)


def in_order(results: list[R], names: Sequence[str]) -> list[R]:
    """By method, in the order of these names, then by seed; without any, the program ends."""
    if not results:
        sys.exit("there are no results yet: run this without --table")
    order = {name: i for i, name in enumerate(names)}
    return sorted(results, key=lambda result: (order.get(result.method, len(order)), result.seed))


def run_imitation(given: imitation.Settings) -> None:
    """Record baselines and clones."""
    steps, _ = imitation.prepared(given)
    size, agent = steps.rgb.shape[-1], given.clone.agent
    told = {"env": agent.env, "test_split": agent.test_split, "test_episodes": agent.test_episodes, "size": size}
    for name in imitation.baselines(steps):
        if not recorded(f"imitation-{name}-0-0", told):
            write(f"imitation-{name}-0-0", asdict(imitation.baseline(given, name, size)))
    cells = imitation.cells(given, size)
    run_cells(
        cells,
        cloning.run,
        imitation.finished,
        lambda cell: f"imitation-{cell.name}",
        lambda cell, result: asdict(result),
    )


def imitated() -> list[cloning.Result]:
    """All recorded results of imitation."""
    names = [*imitation.Settings.methods, *imitation.BASELINES]
    return in_order(read_results(cloning.Result, "imitation-*.json"), names)


def report_imitation(given: imitation.Settings, file: Path) -> None:
    """Write a page of the curves."""
    shown = imitation.charts(imitated(), given.trajectories)
    write_charts(shown, file, title="Imitation", lead=imitation.lead(given))


def in_env(given: rl.Settings) -> str:
    """The start of the names of the results in an environment."""
    return f"rl-{given.ppo.agent.env}-".replace(":", "-")


def run_rl(given: rl.Settings) -> None:
    """Record the learning curves in one environment."""
    from sidetuning_bench.agents import ppo

    rl.check_settings(given)
    cells = rl.cells(with_values(given, {"out": f"{given.run.out}/{given.ppo.agent.env}"}))
    run_cells(
        cells, ppo.run, rl.finished, lambda cell: f"{in_env(given)}{cell.name}", lambda cell, result: asdict(result)
    )


def learned(given: rl.Settings) -> list[curves.Result]:
    """All recorded results in one environment."""
    return in_order(read_results(curves.Result, f"{in_env(given)}*.json"), curves.METHODS)


def report_rl(given: rl.Settings, file: Path) -> None:
    """Write a page of the curves."""
    env = given.ppo.agent.env
    write_charts(curves.charts(learned(given)), file, title=f"PPO in {env}", lead=rl.lead(env))


IMITATION = Record(
    with_values(imitation.Settings(), {"out": "runs/records/imitation"}),
    run_imitation,
    lambda given: imitation.table(imitated(), given.trajectories),
    report_imitation,
)
RL = Record(
    with_values(rl.Settings(), {"out": "runs/records/rl"}),
    run_rl,
    lambda given: curves.table(learned(given)),
    report_rl,
)
