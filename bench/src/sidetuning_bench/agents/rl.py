"""Reinforcement learning (paper, section 4.3): PPO with a side-tuned, fixed, fine-tuned or no pretrained encoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sidetuning.errors import SideTuningError
from sidetuning.files import write_text
from sidetuning_bench import grid
from sidetuning_bench.agents import curves
from sidetuning_bench.agents.curves import METHODS, PPOOptions, Result, charts, table
from sidetuning_bench.agents.play import film_all
from sidetuning_bench.agents.worlds import HOME, make_world
from sidetuning_bench.charts import write_charts
from sidetuning_bench.grid import Cell
from sidetuning_bench.options import GridOptions, Names, check, with_values
from sidetuning_bench.runs import Run, absolute, read_result


@dataclass(frozen=True)
class Settings:
    """Learn to navigate by PPO (stable-baselines3) with up to five encoders; the same command resumes."""

    methods: Names = METHODS
    """Methods: sidetune; features, the base alone; finetune, a tuned copy of the base; scratch, a network of the base's
    shape from random weights, whose batch norms only scale; side-only, the side alone from random weights."""
    ppo: PPOOptions = field(default=PPOOptions())
    run: GridOptions = field(default=GridOptions(out="runs/rl"))


def cells(settings: Settings) -> Iterator[Cell[curves.Settings]]:
    """The runs, seed by seed."""
    options = with_values(settings.ppo, {"base_weights": absolute(settings.ppo.agent.base_weights)})
    rollouts = -(-options.steps // (options.envs * options.rollout))
    for seed in range(settings.run.seeds):
        for method in settings.methods:
            folder = Path(settings.run.out) / f"{method}-{seed}"
            yield Cell(folder.name, folder, curves.Settings(method, seed, str(folder), options), size=rollouts)


finished = partial(grid.result_of, scenario="rl-run", read=partial(read_result, Result), free=curves.FREE)


def run(settings: Settings) -> list[Result]:
    """Run the cells that have no result yet, and write `table.md` and `report.html`."""
    check_settings(settings)
    try:
        from sidetuning_bench.agents import ppo
    except ModuleNotFoundError as error:
        raise ImportError(f"rl needs {error.name}; type: pip install 'sidetuning-bench[agents]'") from error
    options, out = settings.ppo, Path(settings.run.out)
    env, todo = options.agent.env, list(cells(settings))
    # An agent that cannot be tested should not learn.
    with closing(make_world(env, options.agent.test_split, options.size)) as world:
        ppo.try_extractors({cell.settings.method: cell.settings for cell in todo}.values(), world)
    Run(out, "rl", settings, free=(*curves.FREE, "seeds", "methods"))
    results = []
    for _, result in grid.run(todo, ppo.run, finished, unit="rollout", progress=settings.run.progress):
        results.append(result)
        write_text(out / "table.md", table(results))
    films = film_all({method: out / f"{method}-0" for method in settings.methods}, out)
    write_charts(charts(results), out / "report.html", title=f"PPO in {env}", lead=lead(env), films=films)
    return results


def check_settings(settings: Settings) -> None:
    """Check a user's settings.

    Raises:
        SideTuningError: a setting is impossible, or agents would be tested where they learn.
    """
    check(settings)
    options = settings.ppo
    if options.envs * options.rollout < 2:
        raise SideTuningError("--envs and --rollout: give at least two steps between updates")
    if options.agent.test_split == "train" and options.agent.env != "doom-home":
        raise SideTuningError("--test-split train: agents learn in these scenes; give val or test")


def lead(env: str) -> str:
    """First sentences of the report."""
    text = "Agents learn by PPO. All have the same policy on top of features, which come from different encoders."
    return text + (f" {HOME}" if env == "doom-home" else "")


def main(settings: Settings) -> None:
    """Run and print the table."""
    grid.print_tables(table(run(settings)), settings.run.out)
