"""Rows of data: where each one's image or text lies, and its target."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetuning.problems import IGNORED
from sidetuning.transforms import TextTransform, Transform, Transforming, WordTransform


class Cells(Sequence[Any]):
    """A column of images of a data set of the library datasets, read when they are asked for.

    Args:
        table: the data set, whose column has features `Image(decode=False)`, or holds bytes.
        column: its name.
        folder: the table's, where the paths of files begin.
        indices: the rows, by default all.
    """

    def __init__(self, table: Any, column: str, folder: Path, indices: Sequence[int] | None = None) -> None:
        self.table, self.column, self.folder = table, column, folder
        self.indices = range(len(table)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        cell = self.table[int(self.indices[index])][self.column]
        if isinstance(cell, dict):
            inner, path = cell.get("bytes"), cell.get("path")
            return inner if inner is not None or path is None else self.folder / path
        return cell

    def take(self, rows: Sequence[int]) -> Cells:
        """Some of the rows."""
        return Cells(self.table, self.column, self.folder, [self.indices[row] for row in rows])


@dataclass(frozen=True)
class Rows:
    """Some rows of one task.

    Attributes:
        sources: what `transform` takes: paths, bytes, texts, pairs of texts, or lists of words.
        targets: class numbers (n,), or labels or numbers (n, k); of words class numbers (n, words of the longest), and
            -100 for what does not count.
        places: how each row is called in messages, "cat/1.jpg" or "row 3 of table.csv".
    """

    sources: Sequence[Any]
    targets: Tensor
    places: Sequence[str]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: Sequence[int]) -> Rows:
        """Some of the rows."""
        sources = self.sources
        taken = sources.take(rows) if isinstance(sources, Cells) else [sources[row] for row in rows]
        return Rows(taken, self.targets[torch.as_tensor(rows, dtype=torch.long)], [self.places[row] for row in rows])

    @property
    def of_words(self) -> bool:
        """Whether the sources are lists of words, which have a target each."""
        return isinstance(self.sources, list) and bool(self.sources) and isinstance(self.sources[0], list)

    def transform(self, base: Transforming) -> Transform | None:
        """What makes a base's input of the sources: its own transform, or that of words."""
        own = base.transform
        if not (self.of_words and isinstance(own, TextTransform)):
            return own
        return WordTransform(own.max_length, own.names, own.tokenizer)

    def batch(self, base: Transforming, rows: Sequence[int]) -> tuple[Any, Tensor]:
        """Some rows as `fit` takes them: `DataLoader(range(len(rows)), collate_fn=partial(rows.batch, base))`."""
        some, transform = self.take(rows), self.transform(base)
        if not isinstance(transform, WordTransform):
            assert transform is not None
            return transform.batch(some.sources), some.targets
        x, aligned = transform.aligned(some.sources)
        y = torch.full(x["input_ids"].shape, IGNORED)
        for row, words, classes in zip(y, aligned, some.targets.tolist(), strict=True):
            for (_, place), number in zip(words, classes):
                if place is not None:
                    row[place] = number
        return x, y

    def fingerprint(self) -> str:
        """A hash of the sources and targets; of files their paths, sizes and times."""
        digest = hashlib.sha256(self.targets.numpy().tobytes())
        if isinstance(self.sources, Cells):
            digest.update(f"{self.sources.table._fingerprint} {self.sources.column}".encode())
            digest.update(str(list(self.sources.indices)).encode())
            return digest.hexdigest()
        for source in self.sources:
            about = source.stat() if isinstance(source, Path) and source.exists() else None
            digest.update(repr((source, about and (about.st_size, about.st_mtime_ns))).encode("utf-8", "replace"))
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskData:
    """The data of one task.

    Attributes:
        splits: "train", "validation" and "test", as far as there are rows.
        kind: "image" or "text".
        problem: "classes", "labels", "numbers" or "tokens".
        names: of the classes, the labels or the numbers, in the order of the outputs.
        notes: sentences: what was guessed, made and left out.
        columns: the columns of a table as `load` takes them: "image", "text" and "label".
    """

    splits: dict[str, Rows]
    kind: str
    problem: str
    names: list[str]
    notes: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    def counts(self, split: str = "train") -> list[int]:
        """Rows of each class or label in a split, or words of each class; of numbers nothing."""
        targets = self.splits[split].targets
        if self.problem in ("classes", "tokens"):
            return torch.bincount(targets[targets != IGNORED], minlength=len(self.names)).tolist()
        return [int(n) for n in targets.nan_to_num().sum(0)] if self.problem == "labels" else []
