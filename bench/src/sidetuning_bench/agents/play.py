"""`sidetuning bench play RUN`: films of what a trained agent of imitation or rl does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sidetuning.errors import SideTuningError
from sidetuning.terminal import say
from sidetuning_bench.agents import cloning
from sidetuning_bench.agents.films import film
from sidetuning_bench.agents.worlds import Player, map_base
from sidetuning_bench.charts import write_charts
from sidetuning_bench.methods import load_method
from sidetuning_bench.options import Count, check, with_values
from sidetuning_bench.runs import read_run

GIVE = "give the folder of one run of imitation or rl"


@dataclass(frozen=True)
class Settings:
    """Film an agent in test episodes, with a map of its way (blue) and of the expert's (orange, dotted)."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of one run of imitation or rl, such as runs/imitation/sidetune-500-0."""
    episodes: Count = 3
    """Number of episodes."""
    out: str | None = None
    """Folder of the films; RUN/play by default."""


def load_player(folder: str | Path) -> Player:
    """Load the agent of a finished run.

    Raises:
        SideTuningError: the folder holds no finished run of imitation or rl.
    """
    folder = Path(folder)
    content = read_run(folder)
    scenario, saved = content["scenario"], content["settings"]
    if scenario == "imitation-run":
        settings = with_values(cloning.Settings(), saved)
        agent = settings.clone.agent
        base = map_base(agent.base, agent.base_weights, settings.size)
        return cloning.player(settings, load_method(folder / "tasks", base))
    if scenario == "rl-run":
        # stable-baselines3 is needed for agents of rl alone.
        from sidetuning_bench.agents import ppo

        return ppo.player(*ppo.load_policy(folder))
    raise SideTuningError(f"{folder} holds a run of {scenario}; {GIVE}, such as {folder}/sidetune-0")


def main(settings: Settings) -> None:
    """Film, and print where the films are."""
    out = Path(settings.out) if settings.out else Path(settings.run) / "play"
    check(settings)
    films = film(load_player(settings.run), settings.episodes, out)
    for k, episode in enumerate(films):
        say(f"episode {k}: {episode.caption}")
    report = write_charts((), out / "report.html", title=f"{films[0].title} at play", films=films)
    say(f"films: {out}/episode-*.mp4; page: {report}")
