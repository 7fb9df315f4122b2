"""Measures of learning tasks one after another, from the matrix of accuracies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sidetuning.artifacts import write_json


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
        """Average accuracy over the tasks at the end."""
        return sum(self.final) / len(self.final)

    @property
    def forgetting(self) -> list[float]:
        """What each task lost from when it was learned to the end (the paper: the rise of an old task's error)."""
        return [learned - final for learned, final in zip(self.learned, self.final, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write tasks and rows as JSON."""
        write_json(
            path, {"tasks": self.tasks, "accuracy": self.rows, "average": self.average, "forgetting": self.forgetting}
        )
