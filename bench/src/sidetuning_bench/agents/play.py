"""`sidetuning bench play RUN`: films of what a trained agent does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sidetuning.errors import SideTuningError
from sidetuning_bench.agents.films import film
from sidetuning_bench.agents.policies import load_player
from sidetuning_bench.charts import write_charts


@dataclass(frozen=True)
class Settings:
    """Film an agent in test episodes, with a map of its way (blue) and of the expert's (orange, dotted)."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of one run of imitation or rl, such as runs/imitation/sidetune-500-0."""
    episodes: int = 3
    """Number of episodes."""
    out: str | None = None
    """Folder of the films; RUN/play by default."""


def main(settings: Settings) -> None:
    """Film, and print where the films are."""
    out = Path(settings.out) if settings.out else Path(settings.run) / "play"
    if settings.episodes < 1:
        raise SideTuningError(f"--episodes {settings.episodes}: give at least one")
    films = film(load_player(settings.run), settings.episodes, out)
    for k, episode in enumerate(films):
        print(f"episode {k}: {episode.caption}")
    report = write_charts((), out / "report.html", title=f"{films[0].title} at play", films=films)
    print(f"films: {out}/episode-*.mp4; page: {report}")
