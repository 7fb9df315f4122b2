"""Measures of learning tasks one after another, from the matrix of accuracies (paper, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidetuning.files import write_json


@dataclass
class AccuracyMatrix:
    """Accuracy of every task after every task learned.

    Attributes:
        tasks: names, in the order of learning.
        rows: `rows[i][j]` is the accuracy of task j after learning task i, j <= i.
    """

    tasks: list[str]
    rows: list[list[float]] = field(default_factory=list)

    def add(self, row: list[float]) -> None:
        """Append the accuracies of all tasks learned so far."""
        if len(row) != len(self.rows) + 1:
            raise ValueError(
                f"row {len(self.rows)} of an accuracy matrix has {len(self.rows) + 1} numbers, not {len(row)}"
            )
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
        """Average accuracy over the tasks at the end.

        Raises:
            ValueError: nothing is learned yet.
        """
        if not self.rows:
            raise ValueError("an accuracy matrix without rows has no average; learn a task first")
        return sum(self.final) / len(self.final)

    @property
    def forgetting(self) -> list[float]:
        """What each task lost from when it was learned to the end (the paper: the rise of an old task's error)."""
        return [learned - final for learned, final in zip(self.learned, self.final, strict=True)]

    @property
    def backward_transfer(self) -> float:
        """How much later tasks improved earlier ones: mean of final - learned over all tasks but the last.

        The measure of Lopez-Paz and Ranzato (2017); negative where a method forgets, 0 for a single task.
        """
        changes = [-f for f in self.forgetting[:-1]]
        return sum(changes) / len(changes) if changes else 0.0

    def save(self, path: str | Path) -> None:
        """Write tasks and rows as JSON."""
        write_json(
            path, {"tasks": self.tasks, "accuracy": self.rows, "average": self.average, "forgetting": self.forgetting}
        )


FLOOR = 1e-3  # smallest error that a ratio divides by: one mistake in a thousand images


def forward_transfer(in_sequence: Sequence[float], first: Sequence[float]) -> float:
    """What earlier tasks bring to later ones: mean accuracy of tasks learned in sequence, less that of the same learned first.

    Over all tasks but the first, which has none before it; 0 for a single task.

    Args:
        in_sequence: accuracy of task k just after it was learned in the sequence.
        first: its accuracy where it is the first task that the method learns.
    """
    _same_length(in_sequence, first)
    gains = [a - b for a, b in zip(in_sequence[1:], first[1:], strict=True)]
    return sum(gains) / len(gains) if gains else 0.0


def rigidity(in_sequence: Sequence[float], first: Sequence[float]) -> float:
    """How much worse tasks are learned because of earlier ones: mean log ratio of errors, in sequence over first.

    Over all tasks but the first, which has none before it. 0 for a method whose tasks do not touch each other and for a
    single task, log 2 where the error doubles, negative where earlier tasks help.

    Args:
        in_sequence: error of task k just after it was learned in the sequence: a loss, as in the paper, or 1 - accuracy.
        first: its error where it is the first task that the method learns.
    """
    _same_length(in_sequence, first)
    ratios = [math.log(max(a, FLOOR) / max(b, FLOOR)) for a, b in zip(in_sequence[1:], first[1:], strict=True)]
    return sum(ratios) / len(ratios) if ratios else 0.0


def average_rank(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean rank of every method over tasks, 1 the best; equal values share the mean of their ranks.

    Args:
        table: method -> value per task, higher is better, all of one length.

    Raises:
        ValueError: none, or of different lengths.
    """
    columns = list(table.values()) or [[]]
    for column in columns:
        _same_length(columns[0], column)
    ranks = dict.fromkeys(table, 0.0)
    for task in zip(*columns, strict=True):
        for name, value in zip(table, task, strict=True):
            ranks[name] += sum(other > value for other in task) + (sum(other == value for other in task) + 1) / 2
    return {name: total / len(columns[0]) for name, total in ranks.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (sample standard deviation over the root of n); the error of one value is 0."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def bootstrap(values: Sequence[float] | NDArray[np.float64], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, by drawing the values anew with replacement (percentiles; Efron, 1979).

    It has no width where all values are equal: of shares near 0 and 1, Wilson's interval says more.
    """
    x = np.asarray(values, np.float64)
    rows = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    low, high = np.percentile(x[rows].mean(1), (2.5, 97.5))
    return float(low), float(high)


def _same_length(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} values cannot be compared with {len(b)}: give one for each task")
