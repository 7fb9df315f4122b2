"""Learning curves: the settings and the result of one run of PPO, and tables and charts of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from sidetuning_bench.agents.outcomes import MEASURES, Scores, mean_text
from sidetuning_bench.agents.worlds import HOME, AgentOptions
from sidetuning_bench.charts import Chart, Line, Point
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.options import Count, Pixels, Positive, Rule, SideOptions, Workers
from sidetuning_bench.report_runs import FAMILIES, Family, scaled
from sidetuning_bench.results import estimate, number_text
from sidetuning_bench.runs import read_result

METHODS = ("sidetune", "features", "finetune", "scratch", "side-only")
# Settings that may differ when a run resumes.
FREE = ("out", "progress", "threads")
# Episodes that a point of a learning curve averages.
RECENT = 100
NOTE = (
    "Mean ± standard error over seeds and, in brackets, the 95 % interval of the mean over the test episodes "
    "(bootstrap; of one run Wilson's, of its reward 1.96 standard errors). Success while learning is the mean of the "
    "learning curve."
)
Batch = Annotated[int, Rule(lambda n: None if n >= 2 else f"must be 2 or more, not {n}: PPO normalises over it")]


@dataclass(frozen=True)
class PPOOptions:
    """How agents learn by PPO."""

    steps: Count = 100_000
    """Steps of all environments together."""
    size: Pixels = 64
    """Width and height of the pictures."""
    envs: Workers = 8
    """Number of environments side by side."""
    rollout: Count = 256
    """Steps of each environment between two updates."""
    batch: Batch = 256
    """Steps of environments per gradient step."""
    passes: Count = 4
    """Number of passes over each rollout."""
    lr: Positive = 2.5e-4
    """Learning rate."""
    entropy: float = 0.01
    """Weight of the entropy bonus."""
    reward_scale: Positive = 0.1
    """Factor of the rewards for learning; reported rewards are not scaled."""
    cached: bool = True
    """Compute the base's features once per step of the environment, not in every pass (sidetune and features)."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the networks that finetune, scratch and side-only train, when acting and when learning."""
    threads: Count | None = None
    """Threads of torch; by default OMP_NUM_THREADS, else 1, so that runs side by side leave each other their cores."""
    agent: AgentOptions = field(default=AgentOptions(env="doom-home"))
    sides: SideOptions = field(default=SideOptions(side="fcn5", side_width=0.25, merge="alpha"))


@dataclass(frozen=True)
class Settings:
    """One run: a method and a seed."""

    method: str = "sidetune"
    seed: int = 0
    out: str = "runs/agent"
    ppo: PPOOptions = field(default=PPOOptions())
    # What scratch trains. Runs of version 0.1.0 have no such entry, and never go on as something else.
    network: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", "base" if self.method == "scratch" else None)


@dataclass(frozen=True, kw_only=True)
class Result(Scores):
    """A learning curve, and the outcomes of the agent in the test episodes.

    Attributes:
        curve: rows of steps, mean reward, success and SPL of the last episodes, and seconds so far.
        added: number of parameters that were trained.
        alpha: the base's weight in the merge at the end.
        base_passes: number of pictures that the base has seen; None where it was run in every pass.
        steps_per_second: steps of the environments per second of training, updates included.
        resumed: how often an interrupted training was resumed.
        settings: settings of the run.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "method", method_of(self.method, self.settings))


def method_of(name: str, settings: Mapping[str, Any]) -> str:
    """Today's name of a run's method: version 0.1.0 called the side alone "scratch"."""
    return "side-only" if name == "scratch" and settings.get("network") is None else name


def learning_success(curve: Sequence[dict[str, float]]) -> float | None:
    """Mean success of a learning curve in percent, from its first episode on; None where there is none."""
    found = [100 * row["success"] for row in curve if "success" in row]
    return sum(found) / len(found) if found else None


def table(results: Sequence[Result]) -> str:
    """Outcomes in the test episodes, and costs, in Markdown: a column per method."""
    runs = {method: [r for r in results if r.method == method] for method in dict.fromkeys(r.method for r in results)}
    rows = {title: [mean_text(of, name, scale) for of in runs.values()] for name, title, scale in MEASURES}
    # A value of a run, and its decimals.
    others: dict[str, tuple[Callable[[Result], float | None], int]] = {
        "Success while learning, %": (lambda r: learning_success(r.curve), 1),
        "At its end, %": (lambda r: learning_success(r.curve[-1:]), 1),
        "Parameters trained": (lambda r: r.added, 0),
        "Steps per second": (lambda r: r.steps_per_second, 0),
    }
    for title, (value, decimals) in others.items():
        found = [[v for r in of if (v := value(r)) is not None] for of in runs.values()]
        rows[title] = [number_text(estimate(values), decimals) for values in found]
    rows["Seeds"] = [str(len(of)) for of in runs.values()]
    text = f"| | {' | '.join(runs)} |\n| --- |{' ---: |' * len(runs)}\n"
    text += "".join(f"| {title} | {' | '.join(row)} |\n" for title, row in rows.items())
    return f"{text}\n{NOTE}\n" + (f"\n{HOME}\n" if results[0].env == "doom-home" else "")


def charts(results: Sequence[Result]) -> list[Chart]:
    """Learning curves: success, where the environment has it, and reward."""
    made = []
    for name, title, scale in (MEASURES[0], ("reward", "Reward of an episode", 1.0)):
        lines = []
        for method in dict.fromkeys(r.method for r in results):
            curves = [r.curve for r in results if r.method == method]
            runs = [{int(row["steps"]): scale * row[name] for row in curve if name in row} for curve in curves]
            steps = [step for step in runs[0] if all(step in run for run in runs)]
            points = [Point(step, *mean_and_error([run[step] for run in runs]), len(runs)) for step in steps]
            lines.append(Line(method, points))
        if any(line.points for line in lines):
            note = f"Mean of the last {RECENT} episodes while learning. Higher is better."
            made.append(Chart(title.partition(",")[0], "steps of the environments", title, lines, note=note))
    return made


FAMILIES["rl-run"] = Family(
    "PPO",
    partial(read_result, Result),
    {title: scaled(name, scale) for name, title, scale in MEASURES}
    | {"Parameters trained": scaled("added"), "Steps per second": scaled("steps_per_second")},
    charts,
)
