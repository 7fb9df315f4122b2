"""What agents came to in test episodes, and how sure that is: what the tables of imitation and rl share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidetuning_bench.continual import bootstrap, mean_and_error
from sidetuning_bench.results import Estimate, number_text


class Outcome(NamedTuple):
    """What an episode came to.

    Attributes:
        success, spl: in 0 … 1, None where the environment has no such measure.
        reward: the sum.
        steps: its length.
    """

    success: float | None
    spl: float | None
    reward: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What an agent came to in all test episodes, which are the same for all agents of a comparison.

    Attributes:
        success, spl, reward, steps: means over the episodes; None where the environment has no such measure.
        intervals: 95 % of success and SPL (Wilson) and of reward (mean ± 1.96 standard errors), of this agent over episodes.
        episodes: (success, SPL, reward, steps) of each one, in order.
    """

    success: float | None
    spl: float | None
    reward: float
    steps: float
    intervals: dict[str, tuple[float, float]]
    episodes: list[Outcome]

    def __post_init__(self) -> None:
        object.__setattr__(self, "episodes", [Outcome(*e) for e in self.episodes])  # JSON has lists


def scores(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The fields of `Scores`."""
    n = len(outcomes)
    values: dict[str, list[Any]] = {name: [getattr(o, name) for o in outcomes] for name in Outcome._fields}
    means = {name: None if None in found else sum(found) / n for name, found in values.items()}
    intervals = {name: wilson(sum(values[name]), n) for name in ("success", "spl") if means[name] is not None}
    return {**means, "intervals": {**intervals, "reward": normal(values["reward"])}, "episodes": list(outcomes)}


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): right for few trials, and for shares of 0 and 1.

    For the mean of numbers in 0 … 1, given their sum, it is wide enough: they vary at most as much as trials do.
    """
    z = 1.96
    p = successes / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def normal(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean."""
    mean, error = mean_and_error(values)
    return mean - 1.96 * error, mean + 1.96 * error


def per_episode(runs: Sequence[Scores], name: str) -> NDArray[np.float64]:
    """A measure in every episode, averaged over the runs of a method: (episodes,)"""
    return np.mean([[getattr(o, name) for o in run.episodes] for run in runs], axis=0, dtype=np.float64)


def mean_text(runs: Sequence[Scores], name: str, scale: float = 1.0) -> str:
    """A measure of a method: mean ± standard error over its runs and, in brackets, the mean's 95 % interval over the episodes.

    That interval is a bootstrap over episodes; of a single run it is the one in `Scores.intervals`. Where all runs succeed, or
    fail, in all episodes a bootstrap would have no width: it is Wilson's then, the episodes as trials.
    """
    means = [scale * value for run in runs if (value := getattr(run, name)) is not None]
    if not means:
        return number_text(None)
    if len(runs) == 1:
        ends = runs[0].intervals[name]
    else:
        values = per_episode(runs, name)
        alike = name in ("success", "spl") and set(values) in ({0.0}, {1.0})
        ends = wilson(float(values.sum()), len(values)) if alike else bootstrap(values)
    return f"{number_text(Estimate(*mean_and_error(means)))} {_brackets(ends, scale)}"


def difference_text(runs: Sequence[Scores], others: Sequence[Scores], name: str, scale: float = 1.0) -> str:
    """How much more a method has than another, in the same episodes: mean ± standard error over the pairs of runs (by seed; a single
    run is paired with all), and the 95 % bootstrap interval over the episodes, which is that of these very runs.
    """
    if any(getattr(run, name) is None for run in (*runs, *others)) or not runs or not others:
        return number_text(None)
    more = per_episode(runs, name) - per_episode(others, name)
    ours, theirs = ([getattr(run, name) for run in some] for some in (runs, others))
    single = len(ours) == 1 or len(theirs) == 1
    pairs = np.subtract(ours, theirs) if single or len(ours) == len(theirs) else more.mean(keepdims=True)
    estimate = Estimate(scale * float(more.mean()), scale * mean_and_error(pairs.tolist())[1])
    return f"{number_text(estimate)} {_brackets(bootstrap(more), scale)}"


def _brackets(ends: Sequence[float], scale: float) -> str:
    return "[" + ", ".join(number_text(scale * end) for end in ends) + "]"
