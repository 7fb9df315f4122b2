"""Measures of learning tasks one after another, from the matrix of accuracies (paper, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidetuning.files import write_json

# The smallest error that a ratio divides by: one mistake in a thousand images.
FLOOR = 1e-3


@dataclass
class AccuracyMatrix:
    """Accuracy of every task after every task learned.

    Attributes:
        tasks: Names, in the order of learning.
        rows: `rows[i][j]` is the accuracy of task j after learning task i, j <= i.
    """

    tasks: list[str]
    rows: list[list[float]] = field(default_factory=list)

    def add(self, row: list[float]) -> None:
        """Append the accuracies of all tasks learned so far."""
        count = len(self.rows) + 1
        if len(row) != count:
            raise ValueError(f"row {count - 1} of an accuracy matrix has {count} numbers, not {len(row)}")
        self.rows.append(row)

    @property
    def learned(self) -> list[float]:
        """Accuracy of each task just after it was learned."""
        return [row[-1] for row in self.rows]

    @property
    def final(self) -> list[float]:
        """Accuracy of each task at the end."""
        return self.rows[-1] if self.rows else []

    @property
    def average(self) -> float:
        """Average accuracy over the tasks at the end; a ValueError where nothing is learned yet."""
        if not self.rows:
            raise ValueError("an accuracy matrix without rows has no average; learn a task first")
        return sum(self.final) / len(self.final)

    @property
    def forgetting(self) -> list[float]:
        """Accuracy that each task lost between when it was learned and the end."""
        return [learned - final for learned, final in zip(self.learned, self.final, strict=True)]

    @property
    def backward_transfer(self) -> float:
        """Mean of final - learned over all tasks but the last (Lopez-Paz and Ranzato, 2017); 0 for a single task.

        It is negative where a method forgets.
        """
        changes = [-f for f in self.forgetting[:-1]]
        return sum(changes) / len(changes) if changes else 0.0

    def save(self, path: str | Path) -> None:
        """Write tasks and rows as JSON."""
        content = {"tasks": self.tasks, "accuracy": self.rows, "average": self.average, "forgetting": self.forgetting}
        write_json(path, content)


def forward_transfer(in_sequence: Sequence[float], first: Sequence[float]) -> float:
    """Mean gain in accuracy of tasks learned in a sequence over the same tasks learned first.

    The first task is left out, because it has none before it; the value of a single task is 0.

    Args:
        in_sequence: Accuracy of task k just after it was learned in the sequence.
        first: Its accuracy where it is the first task that the method learns.
    """
    gains = [a - b for a, b in _pairs(in_sequence, first)[1:]]
    return sum(gains) / len(gains) if gains else 0.0


def rigidity(in_sequence: Sequence[float], first: Sequence[float]) -> float:
    """Mean log ratio of the errors of tasks learned in a sequence over those of the same tasks learned first.

    The first task is left out. The value is 0 where tasks do not touch each other and for a single task, log 2 where
    the error doubles, and negative where earlier tasks help.

    Args:
        in_sequence: Error of task k just after it was learned in the sequence: a loss, or 1 - accuracy.
        first: Its error where it is the first task that the method learns.
    """
    ratios = [math.log(max(a, FLOOR) / max(b, FLOOR)) for a, b in _pairs(in_sequence, first)[1:]]
    return sum(ratios) / len(ratios) if ratios else 0.0


def average_rank(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean rank of every method over tasks, 1 is the best; equal values share the mean of their ranks.

    Args:
        table: Maps each method to its value per task; higher is better.

    Raises:
        ValueError: There are no values, or the methods have different numbers of tasks.
    """
    import pandas as pd

    columns = list(table.values()) or [[]]
    for column in columns:
        _pairs(columns[0], column)
    ranks: dict[str, float] = pd.DataFrame(table).rank(axis=1, ascending=False).mean().to_dict()
    return ranks


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of n); the error of one value is 0."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def bootstrap(values: Sequence[float] | NDArray[np.float64], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean, from resampling the values with replacement (percentiles; Efron, 1979).

    It has no width where all values are equal; for shares near 0 and 1 Wilson's interval is better.
    """
    x = np.asarray(values, np.float64)
    rows = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    low, high = np.percentile(x[rows].mean(1), (2.5, 97.5))
    return float(low), float(high)


def _pairs(a: Sequence[float], b: Sequence[float]) -> list[tuple[float, float]]:
    """Values of the same tasks, pair by pair."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} values cannot be compared with {len(b)}: give one for each task")
    return list(zip(a, b, strict=True))
