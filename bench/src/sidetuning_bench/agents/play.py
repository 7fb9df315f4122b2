"""`sidetuning bench play RUN`: films of what a trained agent of imitation or rl does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sidetuning.errors import SideTuningError
from sidetuning.files import atomic_write
from sidetuning.terminal import say
from sidetuning_bench.agents import cloning
from sidetuning_bench.agents.outcomes import Outcome
from sidetuning_bench.agents.worlds import TEST_SEED, Act, Player, drawing, episodes, make_world, map_base
from sidetuning_bench.charts import Film, write_charts
from sidetuning_bench.methods import load_method
from sidetuning_bench.options import Count, check, with_values
from sidetuning_bench.report_runs import content_of
from sidetuning_bench.runs import writable

# Pixels of a film; what the agent sees is on the left, the map on the right.
HEIGHT = 256
FLOOR, WALL, AGENT, EXPERT, GOAL = (238, 238, 234), (96, 102, 110), (0, 114, 178), (213, 94, 0), (0, 158, 115)
# Positions on the map, in its units.
Way = list[tuple[float, float]]


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
    if content_of(folder, ("imitation-run", "rl-run"))["scenario"] == "imitation-run":
        settings = content_of(folder, ("imitation-run",), partial(with_values, cloning.Settings()))["settings"]
        agent = settings.clone.agent
        base = map_base(agent.base, agent.base_weights, settings.size)
        return cloning.player(settings, load_method(Path(folder) / "tasks", base))
    # stable-baselines3 is needed for agents of rl alone.
    from sidetuning_bench.agents import ppo

    return ppo.player(*ppo.load_policy(folder))


def film(player: Player, count: int, out: Path) -> list[Film]:
    """Write `episode-<k>.mp4`, and its last picture as `episode-<k>.png`, for the first `count` test episodes.

    Raises:
        SideTuningError: the folder cannot be written.
    """
    writable(out)
    films = []
    with closing(make_world(player.env, player.split, player.size)) as world:
        act = drawing(world, player.policy, player.seed)
        for k in range(count):
            seed, file = TEST_SEED + k, out / f"episode-{k}.mp4"
            expert = walk(world, lambda _: world.expert(), seed)[1] if hasattr(world, "expert") else []
            outcome, _, frames = walk(world, act, seed, expert, filmed=True)
            write_film(frames, file, world.metadata["render_fps"])
            with atomic_write(file.with_suffix(".png")) as temporary:
                Image.fromarray(frames[-1]).save(temporary, "PNG")
            success = "" if outcome.success is None else "success, " if outcome.success else "no success, "
            films.append(Film(player.name, f"{success}{outcome.steps} steps, reward {outcome.reward:.1f}", file))
    return films


def film_all(runs: Mapping[str, Path], out: Path) -> list[Film]:
    """Two films of the agent of each run, in a folder by its name."""
    return [one for name, run in runs.items() for one in film(load_player(run), 2, out / "play" / name)]


def walk(
    world: Any, act: Act, seed: int, expert: Way | None = None, filmed: bool = False
) -> tuple[Outcome, Way, list[NDArray[np.uint8]]]:
    """Run one episode: its outcome, the way on the map and, where it is filmed, the pictures."""
    way: Way = []
    frames: list[NDArray[np.uint8]] = []

    def watch(world: Any) -> None:
        if hasattr(world, "grid"):
            way.append((world.world.x, world.world.y))
        if filmed:
            frames.append(picture(world, way, expert or []))

    return next(episodes(world, act, 1, seed, watch)), way, frames


def picture(world: Any, way: Way, expert: Way) -> NDArray[np.uint8]:
    """What the agent sees, and the map beside it where there is one, (HEIGHT, w, 3)."""
    seen = Image.fromarray(world.render()).resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
    if not hasattr(world, "grid"):
        return np.asarray(seen)
    return np.concatenate([np.asarray(seen), np.asarray(map_of(world, way, expert))], 1)


def map_of(world: Any, way: Way, expert: Way) -> Image.Image:
    """The part of the map around both ways, north up: the agent's way and direction, the expert's way, and the goal."""
    grid = world.grid
    goals = [world.episode.goal] if hasattr(world, "expert") else []
    around = np.array([*way, *expert, *goals, world.episode.start])
    middle = (around.min(0) + around.max(0)) / 2
    # Pixels per map unit; at least 640 units are shown.
    scale = HEIGHT / max(float(np.ptp(around, axis=0).max()) + 256, 640)

    def place(x: float, y: float) -> tuple[float, float]:
        return HEIGHT / 2 + (x - middle[0]) * scale, HEIGHT / 2 - (y - middle[1]) * scale

    axis = (np.arange(HEIGHT) + 0.5 - HEIGHT / 2) / scale
    columns = ((middle[0] + axis - grid.low[0]) // grid.cell).astype(int)
    rows = ((middle[1] - axis - grid.low[1]) // grid.cell).astype(int)
    wide, high = grid.floor.shape
    inside = ((columns >= 0) & (columns < wide))[None] & ((rows >= 0) & (rows < high))[:, None]
    floor = grid.floor[columns.clip(0, wide - 1)[None], rows.clip(0, high - 1)[:, None]] & inside
    image = Image.fromarray(np.where(floor[..., None], np.array(FLOOR), np.array(WALL)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y in (place(*position) for position in expert):
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=EXPERT)
    if len(way) > 1:
        draw.line([place(*position) for position in way], fill=AGENT, width=3)
    for x, y in (place(*goal) for goal in goals):
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), outline=GOAL, width=3)
    x, y = place(world.world.x, world.world.y)
    angle = np.radians(world.world.yaw)
    # An arrow: its tip, and two corners behind.
    corners = ((0, 9.0), (2.5, 7.2), (-2.5, 7.2))
    draw.polygon([(x + r * np.cos(angle + a), y - r * np.sin(angle + a)) for a, r in corners], fill=AGENT)
    return image


def write_film(frames: Sequence[NDArray[np.uint8]], path: Path, rate: int) -> None:
    """Write frames (h, w, 3) as H.264, which every browser plays, `rate` of them per second."""
    try:
        import av
    except ImportError as error:
        raise SideTuningError("films need av; type: pip install 'sidetuning-bench[agents]'") from error
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "26", "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def main(settings: Settings) -> None:
    """Film, and print where the films are."""
    out = Path(settings.out) if settings.out else Path(settings.run) / "play"
    check(settings)
    films = film(load_player(settings.run), settings.episodes, out)
    for k, episode in enumerate(films):
        say(f"episode {k}: {episode.caption}")
    report = write_charts((), out / "report.html", title=f"{films[0].title} at play", films=films)
    say(f"films: {out}/episode-*.mp4; page: {report}")
