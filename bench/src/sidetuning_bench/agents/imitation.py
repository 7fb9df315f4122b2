"""Imitation (paper, section 4.3): visual navigation by behaviour cloning of a shortest-path expert, from few and many trajectories."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sidetuning.base import Base, Features, Input
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.errors import DataError, SideTuningError, UnknownNameError
from sidetuning.files import write_json, write_text
from sidetuning.registry import unknown
from sidetuning.sides.fusion import random_shift
from sidetuning_bench.agents.outcomes import Scores, difference_text, mean_text, scores
from sidetuning_bench.agents.play import film, load_player
from sidetuning_bench.agents.trajectories import COMPASS, Steps, extra_of, read_steps
from sidetuning_bench.agents.worlds import (
    HOME,
    TEST_SEED,
    Act,
    Policy,
    at_random,
    by_compass,
    drawing,
    episodes,
    expert_of,
    make_world,
    map_base,
)
from sidetuning_bench.charts import COLOURS, Chart, Line, Point, write_charts
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.methods.recipe import one_cycle
from sidetuning_bench.runs import (
    WITH_SIDES,
    Run,
    above_zero,
    absolute,
    at_least_one,
    not_twice,
    read_result,
    side_options,
)

TASK = "navigate"
BASELINES = {  # rows that learn nothing; compass only where the environment has one
    "expert": "knows the shortest way",
    "compass": "does not see: it turns towards the goal and goes ahead",
    "random": "moves at random and never stops",
}
HELD_OUT = 50  # trajectories for the accuracy, at most a tenth of all
MEASURES = (("success", "Success, %", 100.0), ("spl", "SPL, %", 100.0), ("reward", "Reward", 1.0))
SCRATCH = "scratch trains a network of the base's shape from random weights (in rl it is the side alone)."
NOTE = (
    "Mean ± standard error over seeds and, in brackets, the 95 % interval of the mean over the episodes (bootstrap; of one run Wilson's, "
    f"of its reward 1.96 standard errors). {SCRATCH}"
)
FREE = ("data", "out", "cache", "progress")


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What all runs of a comparison share."""

    data: str = "runs/trajectories/doom-pointnav-v0"
    """Trajectories, as collect-trajectories writes them."""
    env: str = "doom-pointnav"
    """Where the clones are tested: doom-pointnav, doom-home, or habitat:CONFIG."""
    steps: int = 1500
    """Optimiser steps of every run, so that few trajectories are seen often."""
    batch: int = 64
    """Frames per step."""
    lr: float = 1e-3
    """Learning rate at its peak; one cycle."""
    weight_decay: float = 1e-4
    """Of matrices; merges, norms and biases have none."""
    dropout: float = 0.7
    """Of the code that the policy reads, so that few trajectories are not learned by heart."""
    shift: int = 8
    """Pixels by which the pictures that a side or a whole network learns from are moved at random, for the same reason."""
    test_episodes: int = 100
    """Unseen episodes that every clone is tested on."""
    test_split: str = "test"
    """Scenes of these episodes."""
    base: str = "resnet-doom-curvature"
    """Base network."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    side: str = "fcn5"
    """Side network."""
    side_width: float = 0.25
    """Of the sides fcn5 and copy: fraction of the channels."""
    init: str | None = "distilled"
    """How sides start."""
    merge: str = "alpha"
    """How base and side are fused."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Settings(Learning):
    """Clone a navigating expert with side-tuning, fixed features, fine-tuning and from scratch, from few and many trajectories."""

    out: str = "runs/imitation"
    """Folder of the runs; the same command run again goes on where it stopped."""
    methods: tuple[str, ...] = ("sidetune", "features", "finetune", "scratch")
    """Methods; finetune tunes a copy of the base, scratch trains one from random weights."""
    trajectories: tuple[int, ...] = (5, 20, 100, 500)
    """How many trajectories to learn from; each seed draws others."""
    seeds: int = 3
    """Runs of every cell, with seeds 0, 1, …"""


@dataclass(frozen=True, kw_only=True)
class Cell(Learning):
    """One run: a method, so many trajectories, a seed; pictures of a size."""

    method: str
    trajectories: int
    seed: int
    size: int
    out: str


@dataclass(frozen=True, kw_only=True)
class Result(Scores):
    """What a clone, or a baseline that learns nothing, came to on the test episodes.

    Attributes:
        accuracy: share of held-out steps at which the clone does what the expert did; None where nothing is held out, and of
            baselines.
        frames: of the trajectories that it learned from.
        added: parameters that were trained.
        seconds: of training, without the base's features.
        settings: of the run.
        data: of the trajectories: fingerprint, number of episodes, and the settings that they were collected with.
    """

    method: str
    trajectories: int
    seed: int
    accuracy: float | None = None
    frames: int = 0
    added: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


class Moves(Dataset[Any]):
    """Batches of `({"x": picture, "extra": numbers}, features or None, action)`; pictures are moved at random by up to `shift` pixels (Kostrikov et al., 2020),
    and zeros come in; the cached features stay those of the pictures as they were."""

    def __init__(self, steps: Steps, features: CachedFeatures | None, shift: int = 0) -> None:
        self.steps, self.features, self.shift = steps, features, shift

    def __len__(self) -> int:
        return len(self.steps)

    def __getitems__(self, rows: Sequence[int]) -> tuple[Input, Features | None, Tensor]:
        at = list(rows)
        known = None if self.features is None else self.features.__getitems__(at)[1]
        rgb = self.steps.rgb[at]
        seen = random_shift([rgb], self.shift)[0] if self.shift else rgb
        return {"x": seen, "extra": self.steps.extra[at]}, known, self.steps.actions[at]


def cells(settings: Settings, size: int) -> Iterator[Cell]:
    """The runs, seed by seed, with pictures of a size."""
    s = settings
    shared = {f.name: getattr(s, f.name) for f in fields(Learning)} | {"base_weights": absolute(s.base_weights)}
    for seed in range(s.seeds):
        for count in s.trajectories:
            for method in s.methods:
                out = str(Path(s.out) / f"{method}-{count}-{seed}")
                yield Cell(method=method, trajectories=count, seed=seed, size=size, out=out, **shared)


def run(settings: Settings) -> list[Result]:
    """Run the cells that have no result yet, and the baselines, and write `table.md` and `report.html`."""
    s = settings
    steps, data = prepared(s)
    folder = Run(s.out, "imitation", s, free=(*FREE, "seeds", "methods", "trajectories"))
    folder.belongs(data=data["fingerprint"])
    size = steps.rgb.shape[-1]
    results = [baseline(s, name, size) for name in baselines(steps)]
    for cell in tqdm(list(cells(s, size)), unit="run", dynamic_ncols=True, disable=not s.progress):
        results.append(one(cell, steps, data))
        write_text(Path(s.out) / "table.md", table(results, s.trajectories))
    films = [
        f
        for method in s.methods
        for f in film(load_player(Path(s.out) / f"{method}-{max(s.trajectories)}-0"), 2, Path(s.out) / "play" / method)
    ]
    write_charts(
        charts(results, s.trajectories), Path(s.out) / "report.html", title="Imitation", lead=lead(s), films=films
    )
    return results


def prepared(settings: Settings) -> tuple[Steps, dict[str, Any]]:
    """The trajectories and what `about` says of them, once it is sure that all runs can be made.

    Raises:
        SideTuningError: a setting that cannot be, too few trajectories, or another environment than theirs.
    """
    s = settings
    for method in s.methods:
        if method not in METHODS:
            raise UnknownNameError(unknown("method", method, METHODS.names(), verb="registered"))
    at_least_one(s, "steps", "batch", "test_episodes", "seeds")
    above_zero(s, "lr", "side_width")
    not_twice(s, "methods", "trajectories")
    if s.shift < 0:
        raise SideTuningError(f"--shift must be 0 or more, not {s.shift}")
    if not 0 <= s.dropout < 1:
        raise SideTuningError(f"--dropout must be at least 0 and below 1, not {s.dropout}")
    if min(s.trajectories, default=0) < 1:
        raise SideTuningError("--trajectories must be numbers of 1 or more")
    if len(s.methods) + 1 > COLOURS:  # and the expert
        raise SideTuningError(f"--methods: at most {COLOURS - 1} fit into one comparison")
    steps = read_steps(s.data)
    if s.shift >= (size := steps.rgb.shape[-1]):
        raise SideTuningError(f"--shift must be below the {size} pixels of the pictures, not {s.shift}")
    data = about(s.data, steps)
    most, have = max(s.trajectories), data["episodes"]
    if most + held_out(have) > have:
        raise DataError(
            f"{s.data} has {have} trajectories, of which {held_out(have)} are held out, and so not {most} to learn from; collect more"
        )
    for cell in {c.method: c for c in cells(s, size)}.values():
        build_method(cell).add(Task("dry-run", "identity"))
    check_world(s, steps)
    return steps, data


def lead(settings: Settings) -> str:
    """What the report is about."""
    s = settings
    spl = f"SPL: success weighted by how short the way was. {s.test_episodes} episodes that no trajectory shows"
    if s.env == "doom-home":
        return f"An agent learns by imitation to find the armour of my_way_home. {HOME} {SCRATCH} {spl}."
    return (
        "An agent learns by imitation to walk to a point that its compass tells. Success: it stops near the point. "
        f"{spl}, in other scenes ({s.test_split}). {SCRATCH}"
    )


def check_world(settings: Settings, steps: Steps) -> None:
    """What the clones are tested in must have an expert, and be what they learned from, in other scenes."""
    collected = Path(settings.data) / "run.json"
    if collected.exists():  # ours; of other data sets nothing is known
        was = json.loads(collected.read_text())["settings"]
        if not settings.env.startswith("habitat:") and was["env"] != settings.env:
            raise DataError(f"{settings.data} was collected in {was['env']}; give --env {was['env']}")
        if was["split"] == settings.test_split and settings.env != "doom-home":
            raise DataError(
                f"{settings.data} was collected in the scenes of '{was['split']}'; give another --test-split than these"
            )
    world = make_world(settings.env, settings.test_split, steps.rgb.shape[-1])
    try:
        expert_of(world, settings.env)
        compass = COMPASS in world.observation_space.spaces
    finally:
        world.close()
    if compass != (steps.extra.shape[1] > 0):
        raise DataError(
            f"{settings.data} was collected {'without' if compass else 'with'} a compass, and {settings.env} has "
            f"{'one' if compass else 'none'}: give the --env that it was collected in"
        )


def baselines(steps: Steps) -> list[str]:
    """Those of BASELINES that can be where such steps are from."""
    return [name for name in BASELINES if name != "compass" or steps.extra.shape[1]]


def baseline(settings: Settings, name: str, size: int) -> Result:
    """One that learns nothing: the expert, one that follows its compass, one that moves at random."""
    s = settings
    file = Path(s.out) / f"{name}.json"
    if file.exists():
        return read_result(Result, file)  # type: ignore[no-any-return]
    world = make_world(s.env, s.test_split, size)
    try:
        outcomes = list(episodes(world, acts(name, world), s.test_episodes, TEST_SEED))
    finally:
        world.close()
    settings_of = {"env": s.env, "test_split": s.test_split, "test_episodes": s.test_episodes, "size": size}
    result = Result(method=name, trajectories=0, seed=0, settings=settings_of, **scores(outcomes))
    write_json(file, asdict(result))
    return result


def acts(name: str, world: Any) -> Act:
    """How one of BASELINES acts."""
    known: dict[str, Callable[[Any], Act]] = {
        "expert": lambda world: lambda _: world.expert(), "compass": by_compass, "random": at_random,
    }  # fmt: skip
    return known[name](world)


def about(folder: str, steps: Steps) -> dict[str, Any]:
    """What trajectories are: their fingerprint and number, and the settings that they were collected with, where these are known."""
    collected = Path(folder) / "run.json"
    settings = json.loads(collected.read_text())["settings"] if collected.exists() else {}
    return {"fingerprint": steps.fingerprint(), "episodes": len(steps.starts) - 1, **settings}


def held_out(have: int) -> int:
    """How many of so many trajectories are kept for the accuracy."""
    return min(HELD_OUT, have // 10)


def split(have: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the trajectories to learn from, and of those held out: the first and the last ones of an order that the seed draws.

    So more trajectories contain the fewer, and what is held out is the same for all counts.
    """
    order = torch.randperm(have, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:count], order[have - held_out(have) :]


def one(cell: Cell, steps: Steps, data: dict[str, Any]) -> Result:
    """The result of a cell, with what `about` says of the data: read where it is there, else learned and tested."""
    c = cell
    folder = Run(c.out, "imitation-run", c, free=FREE)
    file = folder.folder / "result.json"
    if file.exists():
        return read_result(Result, file)  # type: ignore[no-any-return]
    method = build_method(c)
    features = cached(method.base, steps, c) if method.uses_features else None
    learned_from, kept = split(len(steps.starts) - 1, c.trajectories, c.seed)
    rows = steps.of(learned_from)
    looks = c.method in WITH_SIDES or not method.uses_features  # what sees the code alone needs no other pictures
    loader = loader_over(Moves(steps, features, c.shift if looks else 0), batch_size=c.batch, indices=rows)
    task = Task(
        TASK, "policy", seed=c.seed, head_options={"actions": 4, "extra": steps.extra.shape[1], "dropout": c.dropout}
    )
    recipe = Recipe(
        c.steps, c.lr, c.weight_decay, 1.0, optimizer=torch.optim.AdamW, scheduler=one_cycle(c.lr, 0.1), seed=c.seed, precision=c.precision
    )  # fmt: skip
    learned = method.learn(task, loader, recipe, resume=folder.resume(TASK), save_every=10.0, progress=c.progress)
    method.save(folder.tasks())
    accuracy = agreement(method, Moves(steps, features), steps.of(kept)) if kept else None
    world = make_world(c.env, c.test_split, c.size)
    try:
        outcomes = list(episodes(world, drawing(world, policy_of(method), c.seed), c.test_episodes, TEST_SEED))
    finally:
        world.close()
    result = Result(
        method=c.method, trajectories=c.trajectories, seed=c.seed, accuracy=accuracy, frames=len(rows),
        added=sum(p.numel() for p in method.trained(TASK)), seconds=learned.seconds,
        settings={k: v for k, v in asdict(c).items() if k not in FREE}, data=data, **scores(outcomes),
    )  # fmt: skip
    write_json(file, asdict(result))
    folder.done(TASK)
    return result


def build_method(cell: Cell) -> Method:
    """The method that a cell names, without its task."""
    c = cell
    base = map_base(c.base, c.base_weights, c.size)
    side: dict[str, Any] = {
        "side": c.side, "merge": c.merge, "init": c.init, "side_options": side_options(c.side, c.side_width),
    }  # fmt: skip
    return METHODS.build(c.method, base, options=side if c.method in WITH_SIDES else {})


def cached(base: Base, steps: Steps, cell: Cell) -> CachedFeatures:
    """The base's features of all frames."""
    return cache_features(base, steps, Path(cell.cache).expanduser(), progress=cell.progress)  # type: ignore[arg-type]


@torch.no_grad()
def agreement(method: Method, moves: Moves, rows: Tensor) -> float:
    """The share of steps at which the most likely action is the expert's."""
    from accelerate.utils import send_to_device

    right = 0
    for batch in loader_over(moves, batch_size=256, shuffle=False, indices=rows):
        x, features, y = send_to_device(batch, method.base.device)
        right += int((method(x, TASK, features=features).argmax(1) == y).sum())
    return right / len(rows)


def policy_of(method: Method) -> Policy:
    """What a clone would do. The base is folded once, for it runs at every step."""
    base = method.base.folded()

    @torch.no_grad()
    def policy(observation: dict[str, Any]) -> Tensor:
        rgb = torch.from_numpy(observation["rgb"]).permute(2, 0, 1)[None].to(base.device)
        extra = extra_of({k: v[None] for k, v in observation.items()}, 1).to(base.device)
        features = base(rgb) if method.uses_features else None
        return method({"x": rgb, "extra": extra}, TASK, features=features)[0].float().softmax(0).cpu()

    return policy


def runs_of(results: Sequence[Result], method: str, count: int) -> list[Result]:
    """Those of a method with so many trajectories, one per seed."""
    return [r for r in results if r.method == method and r.trajectories in (count, 0)]


def table(results: Sequence[Result], counts: Sequence[int]) -> str:
    """Success in %, SPL in % and reward in Markdown, then differences: methods as rows, numbers of trajectories as columns."""
    methods = rows_of(results)
    text = ""
    for name, title, scale in MEASURES:
        text += head(title, counts)
        for method in methods:
            row = [mean_text(runs_of(results, method, n), name, scale) for n in counts]
            text += f"| {method} | " + " | ".join(row) + " |\n"
        text += "\n"
    text += " ".join([NOTE, *(f"{name} {what}." for name, what in BASELINES.items() if name in methods)]) + "\n"
    if "sidetune" in methods:
        for name, title, scale in MEASURES[:2]:
            text += "\n" + head(f"{title.partition(',')[0]} less that of sidetune, points", counts)
            for method in (m for m in methods if m != "sidetune"):
                pairs = [(runs_of(results, method, n), runs_of(results, "sidetune", n)) for n in counts]
                text += f"| {method} | " + " | ".join(difference_text(*pair, name, scale) for pair in pairs) + " |\n"
        text += "\nDifferences are paired: in the same episodes, ± standard error over seeds, and the 95 % bootstrap interval over episodes.\n"
    env = next((r.settings["env"] for r in results), "")
    return text + (f"\n{HOME}\n" if env == "doom-home" else "")


def head(title: str, counts: Sequence[int]) -> str:
    """The first two lines of a table."""
    return f"| {' | '.join([title, *(f'{n:,} trajectories' for n in counts)])} |\n| --- |{' ---: |' * len(counts)}\n"


def rows_of(results: Sequence[Result]) -> list[str]:
    """Names of all rows: those that learned first."""
    return sorted(dict.fromkeys(r.method for r in results), key=lambda m: m in BASELINES)


def charts(results: Sequence[Result], counts: Sequence[int]) -> list[Chart]:
    """Success and SPL over the number of trajectories; of the baselines the expert, and the compass where there is a colour left."""
    methods = [m for m in rows_of(results) if m != "random"][:COLOURS]
    made = []
    for name, title, scale in MEASURES[:2]:
        lines = []
        for method in methods:
            found = {
                n: [scale * v for r in runs_of(results, method, n) if (v := getattr(r, name)) is not None]
                for n in counts
            }
            lines.append(Line(method, [Point(n, *mean_and_error(v), len(v)) for n, v in found.items() if v]))
        if any(line.points for line in lines):  # none where the environment has no such measure
            made.append(
                Chart(title.partition(",")[0], "trajectories", title, lines, log_x=True, note="Higher is better.")
            )
    return made


def main(settings: Settings) -> None:
    """Run and print the tables."""
    from rich.console import Console
    from rich.markdown import Markdown

    results = run(settings)
    console = Console()
    console.print(Markdown(table(results, settings.trajectories)))
    console.print(f"tables: {settings.out}/table.md; report: {settings.out}/report.html", highlight=False)
