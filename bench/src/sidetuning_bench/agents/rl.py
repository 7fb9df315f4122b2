"""Reinforcement learning (paper, section 4.3): PPO in Doom with a side-tuned, a fixed, a fine-tuned and no pretrained encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning.files import write_text
from sidetuning.registry import unknown
from sidetuning_bench.agents.outcomes import Scores, mean_text
from sidetuning_bench.agents.play import film, load_player
from sidetuning_bench.agents.worlds import HOME, make_world
from sidetuning_bench.charts import Chart, Line, Point, write_charts
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.results import Estimate, number_text
from sidetuning_bench.runs import Run, above_zero, absolute, at_least_one, not_twice

METHODS = ("sidetune", "features", "finetune", "scratch")
RECENT = 100  # episodes that a point of a learning curve averages
FREE = ("out", "progress", "threads")  # of a cell
SAVE_EVERY = 2  # rollouts between two saves


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What all runs of a comparison share."""

    env: str = "doom-home"
    """doom-home (an eased my_way_home of ViZDoom), doom-pointnav, doom-explore, or habitat:CONFIG."""
    steps: int = 100_000
    """Steps of the environments, all together."""
    base: str = "resnet-doom-curvature"
    """Base network; of timm:… the last map."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    side: str = "fcn5"
    """Side network."""
    side_width: float = 0.25
    """Of the sides fcn5 and copy: fraction of the channels."""
    merge: str = "alpha"
    """How base and side are fused."""
    init: str | None = "distilled"
    """How sides start."""
    size: int = 64
    """Width and height of the pictures."""
    envs: int = 8
    """Environments side by side."""
    rollout: int = 256
    """Steps of each between two updates."""
    batch: int = 256
    """Steps per gradient step."""
    passes: int = 4
    """Over each rollout."""
    lr: float = 2.5e-4
    """Learning rate."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    reward_scale: float = 0.1
    """What rewards are multiplied with for learning; those reported are not."""
    cached: bool = True
    """Compute the base's features once per step of the environment, not in every pass (sidetune and features)."""
    test_episodes: int = 100
    """Unseen episodes that every agent is tested on at the end."""
    test_split: str = "test"
    """Scenes of these episodes."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the networks that finetune and scratch train, when acting and when learning."""
    threads: int | None = None
    """Of torch; by default OMP_NUM_THREADS, else 1: runs side by side do not take each other's cores."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True, kw_only=True)
class Settings(Learning):
    """Learn to walk in Doom by PPO (stable-baselines3) with four encoders; the same command run again goes on where it stopped."""

    out: str = "runs/rl"
    """Folder of the runs."""
    methods: tuple[str, ...] = METHODS
    """sidetune; features, the base alone; finetune, a tuned copy of the base; scratch, the side alone from random weights."""
    seeds: int = 3
    """Runs of every method, with seeds 0, 1, …"""


@dataclass(frozen=True, kw_only=True)
class Cell(Learning):
    """One run: a method and a seed."""

    method: str
    seed: int
    out: str


@dataclass(frozen=True, kw_only=True)
class Result(Scores):
    """A learning curve and what the agent came to.

    Attributes:
        curve: rows of steps, mean reward, success and SPL of the last episodes, and seconds so far.
        added: parameters that were trained.
        alpha: the base's weight in the merge at the end.
        base_passes: pictures that the base has seen; None where it was run in every pass.
        steps_per_second: of training, the updates included.
        resumed: how often training was stopped and gone on with from a save.
        settings: of the run.
    """

    method: str
    seed: int
    env: str
    curve: list[dict[str, float]]
    added: int
    alpha: float | None
    base_passes: int | None
    steps_per_second: float
    resumed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def cells(settings: Settings) -> Iterator[Cell]:
    """The runs, seed by seed."""
    s = settings
    shared = {f.name: getattr(s, f.name) for f in fields(Learning)} | {"base_weights": absolute(s.base_weights)}
    for seed in range(s.seeds):
        for method in s.methods:
            yield Cell(method=method, seed=seed, out=str(Path(s.out) / f"{method}-{seed}"), **shared)


def run(settings: Settings) -> list[Result]:
    """Run the cells that have no result yet, and write `table.md` and `report.html`."""
    s = settings
    check(s)
    try:
        from sidetuning_bench.agents.ppo import one, try_extractors
    except ModuleNotFoundError as error:
        raise ImportError(f"rl needs {error.name}; type: pip install 'sidetuning[agents]'") from error
    use_threads(s.threads)
    world = make_world(s.env, s.test_split, s.size)  # what cannot be tested is not learned
    try:
        try_extractors({c.method: c for c in cells(s)}.values(), world)
    finally:
        world.close()
    Run(s.out, "rl", s, free=(*FREE, "seeds", "methods"))
    results = []
    for cell in tqdm(list(cells(s)), unit="run", dynamic_ncols=True, disable=not s.progress):
        results.append(one(cell))
        write_text(Path(s.out) / "table.md", table(results))
        if made := charts(results):  # none where no episode ended
            write_charts(made, Path(s.out) / "report.html", title=f"PPO in {s.env}", lead=lead(s.env))
    films = [
        f
        for method in s.methods
        for f in film(load_player(Path(s.out) / f"{method}-0"), 2, Path(s.out) / "play" / method)
    ]
    write_charts(charts(results), Path(s.out) / "report.html", title=f"PPO in {s.env}", lead=lead(s.env), films=films)
    return results


def check(settings: Settings) -> None:
    """Whether a user's settings can be.

    Raises:
        SideTuningError: they cannot.
    """
    s = settings
    for method in s.methods:
        if method not in METHODS:
            raise UnknownNameError(unknown("method", method, METHODS, verb="one of rl's"))
    at_least_one(s, "steps", "test_episodes", "seeds", "envs", "rollout", "passes", "threads", "size")
    above_zero(s, "lr", "reward_scale", "side_width")
    not_twice(s, "methods")
    if s.batch < 2:
        raise SideTuningError(f"--batch must be 2 or more, not {s.batch}: PPO normalises over it")
    if s.envs * s.rollout < 2:
        raise SideTuningError("--envs and --rollout: give at least two steps between updates")
    if s.test_split == "train" and s.env != "doom-home":
        raise SideTuningError("--test-split train: agents learn in these scenes; give val or test")


def use_threads(threads: int | None) -> None:
    """So many threads of torch, from here on; None for one, unless OMP_NUM_THREADS says how many."""
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)


SCRATCH = "scratch is the side alone, from random weights (in imitation it is a network of the base's shape)."


def lead(env: str) -> str:
    """What the report is about."""
    what = "Agents learn by PPO. All have the same policy on top of their features; what differs is where the features come from: "
    return f"{what}{SCRATCH} {HOME if env == 'doom-home' else ''}".strip()


def table(results: Sequence[Result]) -> str:
    """Methods as columns, in Markdown: what they came to on the test episodes, mean and standard error over seeds, and intervals."""
    tests = {"Success, %": ("success", 100.0), "SPL, %": ("spl", 100.0), "Reward": ("reward", 1.0)}
    others: dict[str, tuple[Callable[[Result], float | None], int]] = {  # with decimals
        "Success while learning, %": (lambda r: learning_success(r.curve), 1),
        "At its end, %": (lambda r: learning_success(r.curve[-1:]), 1),
        "Parameters trained": (lambda r: r.added, 0),
        "Steps per second": (lambda r: r.steps_per_second, 0),
    }
    runs = {method: [r for r in results if r.method == method] for method in dict.fromkeys(r.method for r in results)}
    rows = {name: [mean_text(of, *what) for of in runs.values()] for name, what in tests.items()}
    for name, (value, decimals) in others.items():
        found = [[v for r in of if (v := value(r)) is not None] for of in runs.values()]
        rows[name] = [number_text(Estimate(*mean_and_error(f)) if f else None, decimals) for f in found]
    rows["Seeds"] = [str(len(of)) for of in runs.values()]
    text = f"| | {' | '.join(runs)} |\n| --- |{' ---: |' * len(runs)}\n"
    text += "".join(f"| {name} | {' | '.join(row)} |\n" for name, row in rows.items())
    text += (
        "\nMean ± standard error over seeds and, in brackets, the 95 % interval of the mean over the test episodes (bootstrap; "
        f"of one run Wilson's, of its reward 1.96 standard errors). Success while learning is the mean of the learning curve. {SCRATCH}\n"
    )
    return text + (f"\n{HOME}\n" if results[0].env == "doom-home" else "")


def learning_success(curve: Sequence[dict[str, float]]) -> float | None:
    """The mean of a learning curve's success in percent from its first episode on, the higher the sooner it was learned; None
    where there is none."""
    found = [100 * row["success"] for row in curve if "success" in row]
    return sum(found) / len(found) if found else None


def charts(results: Sequence[Result]) -> list[Chart]:
    """Learning curves: success where the environment has it, and reward."""
    made = []
    for name, title, scale in (("success", "Success, %", 100.0), ("reward", "Reward of an episode", 1.0)):
        lines = []
        for method in dict.fromkeys(r.method for r in results):
            curves = [r.curve for r in results if r.method == method]
            runs = [{int(row["steps"]): scale * row[name] for row in curve if name in row} for curve in curves]
            steps = [s for s in runs[0] if all(s in r for r in runs)]
            points = [Point(s, *mean_and_error([r[s] for r in runs]), len(runs)) for s in steps]
            lines.append(Line(method, points))
        note = f"Mean of the last {RECENT} episodes while learning. Higher is better."
        if any(line.points for line in lines):
            made.append(Chart(title.partition(",")[0], "steps of the environments", title, lines, note=note))
    return made


def main(settings: Settings) -> None:
    """Run and print the table."""
    from rich.console import Console
    from rich.markdown import Markdown

    results = run(settings)
    console = Console()
    console.print(Markdown(table(results)))
    console.print(f"table: {settings.out}/table.md; report: {settings.out}/report.html", highlight=False)
