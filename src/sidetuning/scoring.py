"""A task's answers to rows of data, and what they are worth: accuracy with its interval, per class, calibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sidetuning.branch import Branch
from sidetuning.data import Rows
from sidetuning.errors import DataError, TaskError
from sidetuning.predicting import Answer, each_answered
from sidetuning.problems import IGNORED
from sidetuning.tags import SCORE, are_tags, entity_counts, entity_f1
from sidetuning.transforms import WordTransform
from sidetuning.tuner import SideTuner

# Rows of a base pass; bins of the calibration; the normal quantile of a 95 % interval.
BATCH, BINS, QUANTILE = 32, 10, 1.96


@dataclass(frozen=True)
class Scored:
    """A task's outputs for rows.

    Attributes:
        rows: those that could be read; of words each is a row, whose source is (words of its text, its place).
        outputs: (n, outputs): probabilities of classes and labels, or numbers.
        problem: "classes", also of words, "labels" or "numbers".
        names: of the outputs.
        unreadable: sentences about rows that could not be read, and words without an answer.
        texts: of words the number of each one's text.
    """

    rows: Rows
    outputs: Tensor
    problem: str
    names: list[str]
    unreadable: list[str]
    texts: list[int] = field(default_factory=list)

    @property
    def predicted(self) -> Tensor:
        """The most probable class (n,), labels (n, k) as booleans, or the numbers."""
        if self.problem == "classes":
            return self.outputs.argmax(1)
        return self.outputs > 0.5 if self.problem == "labels" else self.outputs

    @property
    def right(self) -> Tensor:
        """Whether the answer to each row is right; of labels all of them."""
        right = self.predicted == self.rows.targets.to(self.predicted.dtype)
        return right.all(1) if right.ndim > 1 else right

    def scores(self) -> dict[str, float]:
        """The numbers of all rows."""
        targets, n = self.rows.targets, len(self.rows)
        if self.problem == "numbers":
            errors, around = (self.outputs - targets).double(), targets.double() - targets.double().mean(0)
            squares, spread = errors.square(), around.square().sum(0)
            numbers = {"mae": float(errors.abs().mean()), "rmse": math.sqrt(float(squares.mean()))}
            # A target that never changes has nothing to explain.
            explained = (1 - squares.sum(0) / spread)[spread > 0]
            return {**numbers, **({"r2": float(explained.mean())} if len(explained) else {}), "samples": float(n)}
        if self.problem == "labels":
            each = (self.predicted == targets.bool()).float().mean()
            table = self.table()
            f1 = sum(row["f1"] for row in table) / len(table)
            all_right = float(self.right.float().mean())
            return {"accuracy": float(each), "all right": all_right, "f1": f1, "samples": float(n)}
        # Words depend on the others of their text, which counts as one.
        independent = len(set(self.texts)) or n
        low, high = interval(int(self.right.sum()) * independent / n, independent)
        seen = [row for row in self.table() if row["rows"]]
        balanced = sum(row["recall"] for row in seen) / len(seen)
        accuracy = float(self.right.float().mean())
        loss = -float(self.outputs[torch.arange(n), targets].clamp(min=1e-12).log().mean())
        f1 = sum(row["f1"] for row in seen) / len(seen)
        numbers = {"accuracy": accuracy, "low": low, "high": high, "balanced accuracy": balanced, "f1": f1}
        if self.texts and are_tags(self.names):
            numbers[SCORE] = self.entity_f1()
        return {**numbers, "loss": loss, "calibration error": self.calibration_error(), "samples": float(n)}

    def entity_f1(self) -> float:
        """The F1 of the entities that the classes of words mark."""
        said, truth = ([self.names[k] for k in ks] for ks in (self.predicted, self.rows.targets))
        groups = itertools.groupby(zip(self.texts, said, truth, strict=True), lambda word: word[0])
        return entity_f1([entity_counts(*list(zip(*group))[1:]) for _, group in groups])

    def table(self) -> list[dict[str, Any]]:
        """Per class or label: its rows, precision, recall and F1."""
        if self.problem == "classes":
            truth, said = (F.one_hot(t, len(self.names)).bool() for t in (self.rows.targets, self.predicted))
        else:
            truth, said = self.rows.targets.bool(), self.predicted
        hits, rows, claims = (x.sum(0).tolist() for x in (truth & said, truth, said))
        return [
            {
                "name": name,
                "rows": rows[k],
                "precision": hits[k] / claims[k] if claims[k] else 0.0,
                "recall": hits[k] / rows[k] if rows[k] else 0.0,
                "f1": 2 * hits[k] / (rows[k] + claims[k]) if rows[k] + claims[k] else 0.0,
            }
            for k, name in enumerate(self.names)
        ]

    def confusion(self) -> Tensor:
        """Rows of each class (first dimension) by the class that was answered (k, k)."""
        k = len(self.names)
        return torch.bincount(self.rows.targets * k + self.predicted, minlength=k * k).view(k, k)

    def calibration(self) -> list[tuple[float, float, int]]:
        """Mean probability, share that was right, and rows, of the answers in ten bins of probability."""
        top = self.outputs.max(1).values
        bins = (top * BINS).long().clamp(max=BINS - 1)
        found = []
        for k in bins.unique().tolist():
            inside = bins == k
            found.append((float(top[inside].mean()), float(self.right[inside].float().mean()), int(inside.sum())))
        return found

    def calibration_error(self) -> float:
        """How far probability and share differ, on average over rows."""
        return sum(n * abs(p - share) for p, share, n in self.calibration()) / max(1, len(self.rows))

    def mistakes(self, most: int) -> list[int]:
        """The rows with wrong answers, the most certain ones first; of numbers those with the largest errors."""
        if self.problem == "numbers":
            return (self.outputs - self.rows.targets).abs().sum(1).argsort(descending=True)[:most].tolist()
        sure = self.outputs.max(1).values if self.problem == "classes" else (self.outputs - 0.5).abs().max(1).values
        wrong = (~self.right).nonzero().flatten()
        return wrong[sure[wrong].argsort(descending=True, stable=True)][:most].tolist()


def interval(right: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, z = right / n, QUANTILE**2 / n
    middle, half = (share + z / 2) / (1 + z), QUANTILE / (1 + z) * math.sqrt(share * (1 - share) / n + z / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def score(model: SideTuner, task: str, rows: Rows, *, mirror: bool = False, progress: bool = True) -> Scored:
    """Ask a task about rows whose answers are known; each is prepared as in the task's training.

    Args:
        model, task: the model and the task.
        rows: the rows, with targets in the order of the task's labels.
        mirror: average over each image and its mirror image.
        progress: show a bar.

    Raises:
        DataError: no row can be read.
        TaskError: a task of another problem than classes, labels or numbers.
    """
    branch = model[task]
    words = isinstance(branch.transform, WordTransform)
    problem = "classes" if words else type(branch.problem).__name__.lower()
    if problem not in ("classes", "labels", "numbers"):
        raise TaskError(f"task '{task}' answers with {problem}, which are not scored from rows; use st.evaluate")
    if words != rows.of_words:
        raise DataError(f"task '{task}' answers for {'words' if words else 'whole rows'}, and the data do not")
    outputs, kept, unreadable, lost = [], list[tuple[int, int]](), list[str](), 0
    for start in tqdm(range(0, len(rows), BATCH), task, disable=not progress, leave=False):
        batch = range(start, min(start + BATCH, len(rows)))
        ask = partial(model.predict, tasks=[task], mirror=mirror)
        for i, found in zip(batch, each_answered(ask, [rows.sources[i] for i in batch]), strict=True):
            if isinstance(found, DataError):
                unreadable.append(f"{rows.places[i]}: {found}")
                continue
            counted = (rows.targets[i] != IGNORED).nonzero().flatten().tolist() if words else [0]
            shown = {k: found[task][k].answers if words else found[task] for k in counted}
            outputs += [_values(task, branch, answers) for answers in shown.values() if answers]
            kept += [(i, k) for k, answers in shown.items() if answers]
            lost += sum(not answers for answers in shown.values())
    if lost:
        unreadable.append(f"{lost} words of which the base sees no token, as after the end of what it reads")
    if not kept:
        raise DataError(f"no row can be read: {'; '.join(unreadable[:3])}")
    names, places = branch.labels or [str(k) for k in range(len(outputs[0]))], [row for row, _ in kept]
    if words:
        named = [f"{rows.places[row]}, word {k + 1}" for row, k in kept]
        whole = Rows([(rows.sources[i], k) for i, k in kept], rows.targets[tuple(torch.tensor(kept).T)], named)
    else:
        whole = rows.take(places)
    columns = int(whole.targets.max()) + 1 if problem == "classes" else whole.targets.shape[1]
    if columns > len(names) or (problem != "classes" and columns != len(names)):
        raise DataError(
            f"task '{task}' has {len(names)} outputs, and the data {columns}; give data of the same answers"
        )
    return Scored(whole, torch.tensor(outputs), problem, names, unreadable, places if words else [])


def _values(task: str, branch: Branch, answers: Sequence[Answer]) -> list[float]:
    """The values of a row by output."""
    by_name = {answer.label: answer.value for answer in answers}
    if len(by_name) != len(answers):
        raise TaskError(f"two outputs of task '{task}' have the same name; give its labels other names")
    return [by_name[name] for name in branch.labels or [str(k) for k in range(len(by_name))]]
