"""Outcomes of agents in test episodes, and how certain they are: what the tables of imitation and rl share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidetuning_bench.continual import bootstrap, mean_and_error
from sidetuning_bench.results import Estimate, number_text

# 95 % of a normal distribution lie within this many standard deviations.
Z = 1.96
# Measures of an agent, their titles in tables, and the factor of their units there.
MEASURES = (("success", "Success, %", 100.0), ("spl", "SPL, %", 100.0), ("reward", "Reward", 1.0))


class Outcome(NamedTuple):
    """Outcome of an episode.

    Attributes:
        success, spl: in 0 … 1; None where the environment has no such measure.
        reward: sum of the rewards.
        steps: number of steps.
    """

    success: float | None
    spl: float | None
    reward: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Outcomes of an agent in all test episodes, which are the same for all agents of a comparison.

    Attributes:
        success, spl, reward, steps: means over the episodes; None where the environment has no such measure.
        intervals: 95 % intervals over episodes of success and SPL (Wilson), and of reward (normal).
        episodes: outcome of each episode, in order.
    """

    success: float | None
    spl: float | None
    reward: float
    steps: float
    intervals: dict[str, tuple[float, float]]
    episodes: list[Outcome]

    def __post_init__(self) -> None:
        # JSON has lists in place of tuples.
        object.__setattr__(self, "episodes", [Outcome(*episode) for episode in self.episodes])


def scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The fields of `Scores`."""
    values: dict[str, list[Any]] = {name: [getattr(o, name) for o in outcomes] for name in Outcome._fields}
    means = {name: None if None in found else sum(found) / len(found) for name, found in values.items()}
    shares = [name for name in ("success", "spl") if means[name] is not None]
    intervals = {name: wilson(sum(values[name]), len(outcomes)) for name in shares}
    mean, error = mean_and_error(values["reward"])
    intervals["reward"] = (mean - Z * error, mean + Z * error)
    return {**means, "intervals": intervals, "episodes": list(outcomes)}


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927), right for few trials and for shares of 0 and 1.

    For the mean of numbers in 0 … 1, given their sum, it is wide enough: they vary at most as much as trials do.
    """
    p = successes / count
    middle = (p + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(p * (1 - p) / count + Z * Z / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def per_episode(runs: Sequence[Scores], name: str) -> NDArray[np.float64]:
    """A measure in every episode, averaged over the runs of a method, (episodes,)."""
    return np.mean([[getattr(o, name) for o in run.episodes] for run in runs], axis=0, dtype=np.float64)


def mean_text(runs: Sequence[Scores], name: str, scale: float = 1.0) -> str:
    """A method's mean ± standard error over its runs and, in brackets, the mean's 95 % interval over the episodes.

    The interval is a bootstrap over episodes, and that of `Scores.intervals` for a single run. It is Wilson's, with the
    episodes as trials, where all runs succeed, or fail, in all episodes: a bootstrap would have no width.
    """
    means = [scale * value for run in runs if (value := getattr(run, name)) is not None]
    if not means:
        return number_text(None)
    if len(runs) == 1:
        ends = runs[0].intervals[name]
    else:
        values = per_episode(runs, name)
        constant = name in ("success", "spl") and set(values) in ({0.0}, {1.0})
        ends = wilson(float(values.sum()), len(values)) if constant else bootstrap(values)
    return f"{number_text(Estimate(*mean_and_error(means)))} {_brackets(ends, scale)}"


def difference_text(runs: Sequence[Scores], others: Sequence[Scores], name: str, scale: float = 1.0) -> str:
    """A method's mean less another's, in the same episodes.

    ± is the standard error over the pairs of runs (in the order given, which is that of seeds; a single run is paired
    with all). The 95 % bootstrap interval over the episodes is that of these very runs.
    """
    if any(getattr(run, name) is None for run in (*runs, *others)) or not runs or not others:
        return number_text(None)
    more = per_episode(runs, name) - per_episode(others, name)
    ours, theirs = ([getattr(run, name) for run in some] for some in (runs, others))
    paired = 1 in (len(ours), len(theirs)) or len(ours) == len(theirs)
    pairs = np.subtract(ours, theirs) if paired else more.mean(keepdims=True)
    estimate = Estimate(scale * float(more.mean()), scale * mean_and_error(pairs.tolist())[1])
    return f"{number_text(estimate)} {_brackets(bootstrap(more), scale)}"


def _brackets(ends: Sequence[float], scale: float) -> str:
    return "[" + ", ".join(number_text(scale * end) for end in ends) + "]"
