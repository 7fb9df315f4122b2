"""Imitation (paper, section 4.3): visual navigation by behaviour cloning of a shortest-path expert, from few and many trajectories."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sidetuning.artifacts import write_json, write_text
from sidetuning.base import Base, Features, Observation
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.charts import COLOURS, Chart, Line, Point, write_charts
from sidetuning.continual import mean_and_error
from sidetuning.data.trajectories import COMPASS, Steps, extra_of, read_steps
from sidetuning.errors import DataError, SideTuningError, UnknownNameError
from sidetuning.methods import METHODS, Method, Recipe, Task
from sidetuning.registry import unknown
from sidetuning.results import Estimate, number_text
from sidetuning.scenarios.play import film, load_player
from sidetuning.scenarios.runs import WITH_SIDES, Run, above_zero, at_least_one, not_twice, read_result, side_options
from sidetuning.scenarios.worlds import TEST_SEED, Outcome, episodes, expert_of, make_world, map_base, wilson

TASK = "navigate"
STOP = 0  # Habitat's first action
EXPERTS = ("expert", "random")  # rows that learn nothing
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


@dataclass(frozen=True)
class Result:
    """What a clone (or the expert, or a random agent) came to on the test episodes.

    Attributes:
        success, spl, reward: means over the episodes.
        intervals: 95 % of success and SPL (Wilson) and of reward (mean ± 1.96 standard errors), over the episodes.
        accuracy: share of held-out steps at which the clone does what the expert did; None for those that learn nothing.
        frames: of the trajectories that it learned from.
        added: parameters that were trained.
        seconds: of training, without the base's features.
    """

    method: str
    trajectories: int
    seed: int
    episodes: int
    success: float
    spl: float
    reward: float
    intervals: dict[str, tuple[float, float]]
    steps: float
    accuracy: float | None = None
    frames: int = 0
    added: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)


class Moves(Dataset[Any]):
    """Batches of `(Observation, features or None, action)`."""

    def __init__(self, steps: Steps, features: CachedFeatures | None) -> None:
        self.steps, self.features = steps, features

    def __len__(self) -> int:
        return len(self.steps)

    def __getitems__(self, rows: Sequence[int]) -> tuple[Observation, Features | None, Tensor]:
        at = list(rows)
        known = None if self.features is None else self.features.__getitems__(at)[1]
        return Observation(self.steps.rgb[at], self.steps.extra[at]), known, self.steps.actions[at]


def cells(settings: Settings, size: int) -> Iterator[Cell]:
    """The runs, seed by seed, with pictures of a size."""
    s = settings
    shared = {f.name: getattr(s, f.name) for f in fields(Learning)}
    for seed in range(s.seeds):
        for count in s.trajectories:
            for method in s.methods:
                out = str(Path(s.out) / f"{method}-{count}-{seed}")
                yield Cell(method=method, trajectories=count, seed=seed, size=size, out=out, **shared)


def run(settings: Settings) -> list[Result]:
    """Run the cells that have no result yet, and the expert and a random agent, and write `table.md` and `report.html`."""
    s = settings
    for method in s.methods:
        if method not in METHODS:
            raise UnknownNameError(unknown("method", method, METHODS.names(), verb="registered"))
    at_least_one(s, "steps", "batch", "test_episodes", "seeds")
    above_zero(s, "lr", "side_width")
    not_twice(s, "methods", "trajectories")
    if min(s.trajectories, default=0) < 1:
        raise SideTuningError("--trajectories must be numbers of 1 or more")
    if len(s.methods) + len(EXPERTS) > COLOURS:
        raise SideTuningError(f"--methods: at most {COLOURS - len(EXPERTS)} fit into one comparison")
    folder = Run(s.out, "imitation", s, free=(*FREE, "seeds", "methods", "trajectories"))
    steps = read_steps(s.data)
    folder.belongs(data=steps.fingerprint())
    most = max(s.trajectories)
    if most > len(steps.starts) - 1:
        raise DataError(f"{s.data} has {len(steps.starts) - 1} trajectories, not {most}; collect more")
    size = steps.rgb.shape[-1]
    check_world(s, steps, size)
    results = [baseline(s, name, size) for name in EXPERTS]
    for cell in tqdm(list(cells(s, size)), unit="run", dynamic_ncols=True, disable=not s.progress):
        results.append(one(cell, steps))
        write_text(Path(s.out) / "table.md", table(results, s.trajectories))
    films = [
        f
        for method in s.methods
        for f in film(load_player(Path(s.out) / f"{method}-{most}-0"), 2, Path(s.out) / "play" / method)
    ]
    write_charts(
        charts(results, s.trajectories), Path(s.out) / "report.html", title="Imitation", lead=lead(s), films=films
    )
    return results


def lead(settings: Settings) -> str:
    """What the report is about."""
    s = settings
    spl = f"SPL: success weighted by how short the way was. {s.test_episodes} episodes that no trajectory shows"
    if s.env == "doom-home":
        return f"An agent learns by imitation to find the armour of ViZDoom's my_way_home, the one map there is. {spl}."
    return (
        "An agent learns by imitation to walk to a point that its compass tells. Success: it stops near the point. "
        f"{spl}, in other scenes ({s.test_split})."
    )


def check_world(settings: Settings, steps: Steps, size: int) -> None:
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
    world = make_world(settings.env, settings.test_split, size)
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


def baseline(settings: Settings, name: str, size: int) -> Result:
    """The expert, or an agent that acts at random."""
    s = settings
    file = Path(s.out) / f"{name}.json"
    if file.exists():
        return read_result(Result, file)  # type: ignore[no-any-return]
    world = make_world(s.env, s.test_split, size)
    rng = np.random.default_rng(0)
    try:
        act = (lambda _: world.expert()) if name == "expert" else (lambda _: int(rng.integers(world.action_space.n)))
        result = summarise(name, 0, 0, list(episodes(world, act, s.test_episodes, TEST_SEED)))
    finally:
        world.close()
    write_json(file, asdict(result))
    return result


def one(cell: Cell, steps: Steps) -> Result:
    """The result of a cell: read where it is there, else learned and tested."""
    c = cell
    folder = Run(c.out, "imitation-run", c, free=FREE)
    file = folder.folder / "result.json"
    if file.exists():
        return read_result(Result, file)  # type: ignore[no-any-return]
    method = build_method(c)
    features = cached(method.base, steps, c) if method.uses_features else None
    order = torch.randperm(len(steps.starts) - 1, generator=torch.Generator().manual_seed(c.seed)).tolist()
    held_out = steps.of(order[c.trajectories :][:50]) if len(order) > c.trajectories else None
    rows = steps.of(order[: c.trajectories])
    loader = loader_over(Moves(steps, features), batch_size=c.batch, indices=rows)
    task = Task(TASK, "policy", seed=c.seed, head_options={"actions": 4, "extra": steps.extra.shape[1]})
    recipe = Recipe(
        c.steps, c.lr, c.weight_decay, 1.0, optimizer=torch.optim.AdamW, scheduler=one_cycle(c.lr), seed=c.seed, precision=c.precision
    )  # fmt: skip
    learned = method.learn(task, loader, recipe, resume=folder.resume(TASK), save_every=10.0, progress=c.progress)
    method.save(folder.tasks())
    accuracy = None if held_out is None else agreement(method, Moves(steps, features), held_out)
    world = make_world(c.env, c.test_split, c.size)
    try:
        outcomes = list(episodes(world, actor(method, c.seed), c.test_episodes, TEST_SEED))
    finally:
        world.close()
    result = replace(
        summarise(c.method, c.trajectories, c.seed, outcomes), accuracy=accuracy, frames=len(rows), added=method.added(TASK),
        seconds=learned.seconds, settings={k: v for k, v in asdict(c).items() if k not in FREE},
    )  # fmt: skip
    write_json(file, asdict(result))
    folder.done(TASK)
    return result


def one_cycle(lr: float) -> Callable[..., Any]:
    """A warm-up over a tenth of the steps, and a cosine down to almost 0."""

    def schedule(optimizer: Any, steps: int) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, total_steps=steps + 1, pct_start=min(1.0, max(0.1, 2 / (steps + 1))), cycle_momentum=False
        )

    return schedule


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


def actor(method: Method, seed: int) -> Callable[[dict[str, Any]], int]:
    """A policy that draws its moves, since one that always takes the likeliest may turn left and right for ever.

    It stops only where that is the likeliest action, since nothing takes a stop back.
    """
    generator, device = torch.Generator().manual_seed(seed), method.base.device

    @torch.no_grad()
    def act(observation: dict[str, Any]) -> int:
        rgb = torch.from_numpy(observation["rgb"]).permute(2, 0, 1)[None]
        extra = extra_of({k: v[None] for k, v in observation.items()}, 1)
        scores = method(Observation(rgb.to(device), extra.to(device)), TASK)[0].float().cpu()
        if scores.argmax() == STOP:
            return STOP
        scores[STOP] = -torch.inf
        return int(torch.multinomial(scores.softmax(0), 1, generator=generator))

    return act


def summarise(method: str, trajectories: int, seed: int, outcomes: Sequence[Outcome]) -> Result:
    """Means over episodes, and their intervals."""
    n = len(outcomes)
    success = sum(o.success or 0.0 for o in outcomes)
    spl, reward = ([float(getattr(o, name) or 0.0) for o in outcomes] for name in ("spl", "reward"))
    intervals = {"success": wilson(success, n), "spl": wilson(sum(spl), n), "reward": normal(reward)}
    steps = sum(o.steps for o in outcomes) / n
    return Result(method, trajectories, seed, n, success / n, sum(spl) / n, sum(reward) / n, intervals, steps)


def normal(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean."""
    mean, error = mean_and_error(values)
    return mean - 1.96 * error, mean + 1.96 * error


def runs_of(results: Sequence[Result], method: str, count: int) -> list[Result]:
    """Those of a method with so many trajectories, one per seed."""
    return [r for r in results if r.method == method and r.trajectories in (count, 0)]


def table(results: Sequence[Result], counts: Sequence[int]) -> str:
    """Success in %, SPL in % and reward in Markdown: methods as rows, numbers of trajectories as columns.

    A cell has mean and standard error over seeds, and in brackets the 95 % interval over the episodes, its ends averaged over seeds.
    """
    text = ""
    methods = list(dict.fromkeys(r.method for r in results))
    for name, title, scale in (("success", "Success, %", 100), ("spl", "SPL, %", 100), ("reward", "Reward", 1)):
        text += f"| {title} | " + " | ".join(f"{n:,} trajectories" for n in counts) + " |\n"
        text += "| --- |" + " ---: |" * len(counts) + "\n"
        for method in sorted(methods, key=lambda m: m in EXPERTS):
            row = []
            for n in counts:
                runs = runs_of(results, method, n)
                text_of = number_text(
                    Estimate(*mean_and_error([scale * getattr(r, name) for r in runs])) if runs else None
                )
                ends = [sum(scale * r.intervals[name][k] for r in runs) / max(1, len(runs)) for k in (0, 1)]
                row.append(f"{text_of} [{number_text(ends[0])}, {number_text(ends[1])}]" if runs else text_of)
            text += f"| {method} | " + " | ".join(row) + " |\n"
        text += "\n"
    return text


def charts(results: Sequence[Result], counts: Sequence[int]) -> list[Chart]:
    """Success and SPL over the number of trajectories."""
    methods = sorted(dict.fromkeys(r.method for r in results), key=lambda m: m in EXPERTS)
    made = []
    for name, title in (("success", "Success"), ("spl", "SPL")):
        lines = []
        for method in methods:
            found = {n: [100 * getattr(r, name) for r in runs_of(results, method, n)] for n in counts}
            lines.append(Line(method, [Point(n, *mean_and_error(v), len(v)) for n, v in found.items() if v]))
        made.append(Chart(title, "trajectories", f"{title}, %", lines, log_x=True, note="Higher is better."))
    return made


def main(settings: Settings) -> None:
    """Run and print the tables."""
    from rich.console import Console
    from rich.markdown import Markdown

    results = run(settings)
    console = Console()
    console.print(Markdown(table(results, settings.trajectories)))
    console.print(f"tables: {settings.out}/table.md; report: {settings.out}/report.html", highlight=False)
