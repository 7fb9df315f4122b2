"""`sidetuning play RUN`: what an agent of imitation or rl does, as films with a map of its way beside that of the expert."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sidetuning.errors import SideTuningError
from sidetuning.files import atomic_write
from sidetuning_bench.agents.outcomes import Outcome
from sidetuning_bench.agents.worlds import TEST_SEED, Act, Policy, drawing, episodes, make_world, map_base
from sidetuning_bench.charts import Film, write_charts
from sidetuning_bench.runs import writable

HEIGHT = 256  # of a film; what the agent sees is on its left, the map on its right
COLOURS = {
    "floor": (238, 238, 234),
    "wall": (96, 102, 110),
    "agent": (0, 114, 178),
    "expert": (213, 94, 0),
    "goal": (0, 158, 115),
}
Way = list[tuple[float, float]]


@dataclass(frozen=True)
class Settings:
    """Film an agent in test episodes, with a map of its way (blue) and of the expert's (orange, dotted)."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of one run of imitation or rl, such as runs/imitation/sidetune-500-0."""
    episodes: int = 3
    """How many."""
    out: str | None = None
    """Folder of the films; RUN/play by default."""


@dataclass(frozen=True)
class Player:
    """A trained agent and where it was trained.

    Attributes:
        name: of its method.
        env: name of the environment.
        split: of the scenes.
        size: of the pictures.
        policy: what it would do.
        seed: of its moves, as in the tests of its run.
    """

    name: str
    env: str
    split: str
    size: int
    policy: Policy
    seed: int


def load_player(folder: str | Path) -> Player:
    """The agent of a finished run.

    Raises:
        SideTuningError: the folder holds no finished run of imitation or rl.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "run.json").read_text())
        scenario, settings = content["scenario"], content["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise SideTuningError(
            f"{folder} holds no run ({error}); give the folder of one run of imitation or rl"
        ) from error
    if scenario == "imitation-run":
        from sidetuning_bench.agents import imitation
        from sidetuning_bench.methods import load_method

        method = load_method(folder / "tasks", map_base(settings["base"], settings["base_weights"], settings["size"]))
        policy = imitation.policy_of(method)
        s = settings
        return Player(s["method"], s["env"], s["test_split"], s["size"], policy, s["seed"])
    if scenario == "rl-run":
        from sidetuning_bench.agents import ppo

        c, learned = ppo.load_policy(folder)
        return Player(c.method, c.env, c.test_split, c.size, ppo.policy_of(learned), c.seed)
    raise SideTuningError(
        f"{folder} holds a run of {scenario}; give the folder of one run of imitation or rl, such as {folder}/sidetune-0"
    )


def film(player: Player, count: int, out: Path) -> list[Film]:
    """Write `episode-<k>.mp4` and `.png` for the first test episodes, and return them.

    Raises:
        SideTuningError: the folder cannot be written.
    """
    writable(out)
    world = make_world(player.env, player.split, player.size)
    act = drawing(world, player.policy, player.seed)
    films = []
    try:
        for k in range(count):
            seed = TEST_SEED + k
            expert = walk(world, lambda _: world.expert(), seed)[1] if hasattr(world, "expert") else []
            outcome, _, frames = walk(world, act, seed, expert, filmed=True)
            name = out / f"episode-{k}"
            write_film(frames, name.with_suffix(".mp4"), world.metadata["render_fps"])
            with atomic_write(name.with_suffix(".png")) as temporary:
                Image.fromarray(frames[-1]).save(temporary, "PNG")
            what = "" if outcome.success is None else "success, " if outcome.success else "no success, "
            caption = f"{what}{outcome.steps} steps, reward {outcome.reward:.1f}"
            films.append(Film(player.name, caption, name.with_suffix(".mp4")))
    finally:
        world.close()
    return films


def walk(
    world: Any, act: Act, seed: int, expert: Way | None = None, filmed: bool = False
) -> tuple[Outcome, Way, list[NDArray[np.uint8]]]:
    """Run one episode; returns what it came to, the way on the map, and the pictures of a film."""
    way: Way = []
    frames: list[NDArray[np.uint8]] = []

    def watch(world: Any) -> None:
        if hasattr(world, "grid"):
            way.append((world.world.x, world.world.y))
        if filmed:
            frames.append(picture(world, way, expert or []))

    return next(episodes(world, act, 1, seed, watch)), way, frames


def picture(world: Any, way: Way, expert: Way) -> NDArray[np.uint8]:
    """What the agent sees, and the map beside it where there is one. (HEIGHT, w, 3)"""
    seen = Image.fromarray(world.render()).resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
    if not hasattr(world, "grid"):
        return np.asarray(seen)
    both = Image.new("RGB", (2 * HEIGHT, HEIGHT), COLOURS["floor"])
    both.paste(seen, (0, 0))
    both.paste(map_of(world, way, expert), (HEIGHT, 0))
    return np.asarray(both)


def map_of(world: Any, way: Way, expert: Way) -> Image.Image:
    """The part of the map around both ways, north up, with start, goal and the agent's direction."""
    grid = world.grid
    goals = [world.episode.goal] if hasattr(world, "expert") else []
    around = np.array([*way, *expert, *goals, world.episode.start])
    middle = (around.min(0) + around.max(0)) / 2
    scale = HEIGHT / max(float(np.ptp(around, axis=0).max()) + 256, 640)  # pixels per map unit

    def place(x: float, y: float) -> tuple[float, float]:
        return HEIGHT / 2 + (x - middle[0]) * scale, HEIGHT / 2 - (y - middle[1]) * scale

    axis = (np.arange(HEIGHT) + 0.5 - HEIGHT / 2) / scale
    columns = ((middle[0] + axis - grid.low[0]) // grid.cell).astype(int)
    rows = ((middle[1] - axis - grid.low[1]) // grid.cell).astype(int)
    wide, high = grid.floor.shape
    inside = ((columns >= 0) & (columns < wide))[None] & ((rows >= 0) & (rows < high))[:, None]
    floor = grid.floor[columns.clip(0, wide - 1)[None], rows.clip(0, high - 1)[:, None]] & inside
    pixels = np.where(floor[..., None], np.array(COLOURS["floor"]), np.array(COLOURS["wall"])).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for x, y in (place(*p) for p in expert):
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=COLOURS["expert"])
    if len(way) > 1:
        draw.line([place(*p) for p in way], fill=COLOURS["agent"], width=3)
    for x, y in (place(*goal) for goal in goals):
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), outline=COLOURS["goal"], width=3)
    x, y = place(world.world.x, world.world.y)
    angle = np.radians(world.world.yaw)
    nose = [
        (x + 9 * np.cos(angle + a) * r, y - 9 * np.sin(angle + a) * r) for a, r in ((0, 1), (2.5, 0.8), (-2.5, 0.8))
    ]
    draw.polygon(nose, fill=COLOURS["agent"])
    return image


def write_film(frames: Sequence[NDArray[np.uint8]], path: Path, rate: int) -> None:
    """Write frames (h, w, 3) as H.264, which every browser plays."""
    try:
        import av
    except ImportError as error:
        raise SideTuningError("films need av; type: pip install 'sidetuning[agents]'") from error
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "26", "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def main(settings: Settings) -> None:
    """Film, and say where the films are."""
    s = settings
    out = Path(s.out) if s.out else Path(s.run) / "play"
    if s.episodes < 1:
        raise SideTuningError(f"--episodes {s.episodes}: give at least one")
    films = film(load_player(s.run), s.episodes, out)
    for k, one in enumerate(films):
        print(f"episode {k}: {one.caption}")
    report = write_charts((), out / "report.html", title=f"{films[0].title} at play", films=films)
    print(f"films: {out}/episode-*.mp4; page: {report}")
