"""Imitation and reinforcement learning in Doom, recorded: `python benchmarks/agents.py episodes|imitation|rl|speed …`.

A run that has its result is not run again, and one that was stopped goes on; `--table` prints the tables from the results.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar

import tyro

from common import RESULTS, read_results, record, recorded
from sidetuning_bench.agents import imitation, rl, worlds
from sidetuning_bench.charts import write_charts
from sidetuning_bench.continual import mean_and_error


@dataclass(frozen=True)
class Imitation(imitation.Settings):
    """Clones of the expert, and agents that learn nothing, recorded one by one as imitation-<method>-<trajectories>-<seed>.json."""

    out: str = "runs/benchmarks/imitation"
    """Folder of the runs."""
    table: bool = False
    """Run nothing: print the tables from the results."""
    report: str | None = None
    """Write the curves of the results to this file, too."""


@dataclass(frozen=True)
class Rl(rl.Settings):
    """Learning curves of PPO, recorded one by one as rl-<environment>-<method>-<seed>.json."""

    out: str = "runs/benchmarks/rl"
    """Folder of the runs; each environment has its own."""
    table: bool = False
    """Run nothing: print the table from the results."""
    report: str | None = None
    """Write the curves of the results to this file, too."""


@dataclass(frozen=True)
class Speed:
    """Steps per second and base passes of PPO, with the base's features computed once and in every pass, recorded as rl-speed.json."""

    steps: int = 4096
    """Of each run."""
    passes: tuple[int, ...] = (4, 10)
    """Over each rollout: those of rl, and stable-baselines3's default."""
    rounds: int = 3
    """Interleaved."""
    table: bool = False
    """Run nothing: print the table from the result."""


@dataclass(frozen=True)
class Episodes:
    """What the expert, the compass and chance come to where any way will do, and where ways wind, recorded as pointnav-episodes.json."""

    count: int = 100
    """Episodes of each."""
    split: str = "test"
    """Levels."""


NOTHING = "there are no results yet: run this without --table"
R = TypeVar("R", imitation.Result, rl.Result)
Command = (
    Annotated[Episodes, tyro.conf.subcommand("episodes")]
    | Annotated[Imitation, tyro.conf.subcommand("imitation")]
    | Annotated[Rl, tyro.conf.subcommand("rl")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
)


def run_episodes(s: Episodes) -> str:
    """Record, and the success and SPL of each."""
    from sidetuning_bench.doom.nav import WINDING, DoomPointNav, pointnav

    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, world in (("any", DoomPointNav(s.split)), (f"winding {WINDING}", pointnav(s.split, 64))):
        found[name] = {}
        for agent in imitation.BASELINES:
            outcomes = list(worlds.episodes(world, imitation.acts(agent, world), s.count, worlds.TEST_SEED))
            found[name][agent] = {"success": fmean(o.success for o in outcomes), "spl": fmean(o.spl for o in outcomes)}
        world.close()
    record("pointnav-episodes", {"split": s.split, "episodes": s.count, "seed": worlds.TEST_SEED, "found": found})
    return json.dumps(found, indent=2)


def run_imitation(s: Imitation) -> str:
    """Record what has no result yet; the tables of all results."""
    if not s.table:
        given = imitation.Settings(**own(s))
        steps, about = imitation.prepared(given)
        size = steps.rgb.shape[-1]
        for name in imitation.baselines(steps):
            if not recorded(f"imitation-{name}-0-0", given, imitation.FREE):
                record(f"imitation-{name}-0-0", asdict(imitation.baseline(given, name, size)))
        for cell in imitation.cells(given, size):
            if not recorded(name := f"imitation-{Path(cell.out).name}", cell, imitation.FREE):
                record(name, asdict(imitation.one(cell, steps, about)))
    results = in_order(
        read_results(imitation.Result, "imitation-*.json"), imitation.Settings.methods, imitation.BASELINES
    )
    if s.report is not None:
        charts = imitation.charts(results, s.trajectories)
        write_charts(charts, Path(s.report), title="Imitation", lead=imitation.lead(s))
    return imitation.table(results, s.trajectories)


def run_rl(s: Rl) -> str:
    """Record what has no result yet; the table of all results in this environment."""
    prefix = f"rl-{s.env}-".replace(":", "-")
    if not s.table:
        from sidetuning_bench.agents import ppo

        given = replace(rl.Settings(**own(s)), out=f"{s.out}/{s.env}")
        rl.check(given)
        rl.use_threads(s.threads)
        for cell in rl.cells(given):
            if not recorded(name := prefix + Path(cell.out).name, cell, rl.FREE):
                record(name, asdict(ppo.one(cell)))
    results = in_order(read_results(rl.Result, f"{prefix}*.json"), rl.METHODS)
    if s.report is not None:
        write_charts(rl.charts(results), Path(s.report), title=f"PPO in {s.env}", lead=rl.lead(s.env))
    return rl.table(results)


def own(settings: Any) -> dict[str, Any]:
    """What a scenario knows of a benchmark's settings."""
    return {k: v for k, v in asdict(settings).items() if k not in ("table", "report")}


def in_order(results: list[R], *names: Iterable[str]) -> list[R]:
    """By method, in the order of these, then others, then by seed; without any, the program ends."""
    if not results:
        sys.exit(NOTHING)
    order = [*chain(*names)]
    return sorted(results, key=lambda r: (order.index(r.method) if r.method in order else len(order), r.seed))


def run_speed(s: Speed) -> str:
    """Record the rounds, per number of passes; their table."""
    if not s.table:
        rl.use_threads(None)
        found: dict[str, Any] = {}
        for passes in s.passes:
            rounds: dict[str, list[dict[str, float]]] = {"once": [], "every pass": []}
            for _ in range(s.rounds):
                for name, rows in rounds.items():
                    rows.append(measure(s.steps, passes, cached=name == "once"))
            once, every = ({k: fmean(row[k] for row in rows) for k in rows[0]} for rows in rounds.values())
            found[str(passes)] = {
                **rounds,
                "steps per second, once / every pass": once["steps_per_second"] / every["steps_per_second"],
                "base passes, every pass / once": every["base_passes"] / once["base_passes"],
            }
        record("rl-speed", {"steps": s.steps, "passes": found})
    file = RESULTS / "rl-speed.json"
    if not file.exists():
        sys.exit(NOTHING)
    return speed_table(json.loads(file.read_text())["passes"])


def speed_table(found: dict[str, Any]) -> str:
    """In Markdown: numbers of passes as rows; what the base costs once, and in every pass."""
    text = (
        "| Passes over each rollout | Steps per second, base once | in every pass | ratio | Pictures, base once | in every pass | ratio |\n"
        f"|{' ---: |' * 7}\n"
    )
    for passes, rounds in found.items():
        ways = [rounds["once"], rounds["every pass"]]
        speeds = [mean_and_error([row["steps_per_second"] for row in rows]) for rows in ways]
        seen = [fmean(row["base_passes"] for row in rows) for rows in ways]
        faster, fewer = rounds["steps per second, once / every pass"], rounds["base passes, every pass / once"]
        cells = [passes, *(f"{mean:.0f} ± {error:.0f}" for mean, error in speeds), f"{faster:.1f}"]
        cells += [*(f"{n:,.0f}" for n in seen), f"{fewer:.1f}"]
        text += f"| {' | '.join(cells)} |\n"
    return text


def measure(steps: int, passes: int, cached: bool) -> dict[str, float]:
    """Steps per second and pictures that the base saw in one run of PPO."""
    from sidetuning_bench.agents import ppo

    cell = rl.Cell(method="sidetune", seed=0, out="", steps=steps, passes=passes, cached=cached, progress=False)
    env = ppo.training_env(cell)
    seen = 0

    def count(_module: Any, _inputs: Any, out: Any) -> None:
        nonlocal seen
        seen += len(out)

    try:
        agent = ppo.build(cell, env)
        base = env.base if cached else agent.policy.features_extractor.encoder  # type: ignore[attr-defined]
        hook = base.net.register_forward_hook(count)
        agent.learn(cell.rollout * cell.envs)  # starts the engines, on every level some of their time
        seen, before, started = 0, agent.num_timesteps, time.perf_counter()
        agent.learn(steps, reset_num_timesteps=False)
        seconds = time.perf_counter() - started
        hook.remove()
    finally:
        env.close()
    return {"steps_per_second": (agent.num_timesteps - before) / seconds, "base_passes": seen}


if __name__ == "__main__":
    settings = tyro.cli(Command, config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes))  # type: ignore[arg-type]
    match settings:
        case Episodes():
            print(run_episodes(settings))
        case Imitation():
            print(run_imitation(settings))
        case Rl():
            print(run_rl(settings))
        case Speed():
            print(run_speed(settings))
