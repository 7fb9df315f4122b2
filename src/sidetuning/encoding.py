"""Rows of data through the base, once: decoded by several threads, encoded into the cache, bad images left out."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sidetuning.base import Base
from sidetuning.cache import cache_bytes, cache_features, cache_tokens, loader_over
from sidetuning.data import Rows
from sidetuning.errors import DataError, TaskError
from sidetuning.files import read_json, write_json
from sidetuning.launch import processes
from sidetuning.problems import IGNORED
from sidetuning.transforms import ImageTransform, TextTransform

# Bytes of features that are kept of one task at most, with taps.
MOST_BYTES = 8 * 10**9


class Images(Dataset[tuple[Tensor, Tensor]]):
    """The images of rows as a base takes them, and their targets; those that cannot be read are black, and noted.

    Args:
        rows: the rows.
        transform: makes the input.
        notes: JSON file of the rows that cannot be read, which outlives an interruption; each process has its own. None
            keeps none.
    """

    def __init__(self, rows: Rows, transform: ImageTransform, notes: Path | None) -> None:
        self.rows, self.transform, self.notes, self._lock = rows, transform, notes, threading.Lock()
        self._unreadable = self.unreadable()

    def unreadable(self) -> dict[int, str]:
        """Row -> why it cannot be read, of all processes."""
        files = [] if self.notes is None else sorted(self.notes.parent.glob(f"{self.notes.stem}*.json"))
        told = [read_json(file, dict, "delete the folder and encode again") for file in files]
        return {int(row): str(why) for rows in told for row, why in rows.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            x = self.transform(self.rows.sources[index])
        except DataError as error:
            x = torch.zeros(3, *self.transform.size, dtype=torch.uint8)
            self._note(index, str(error))
        return x, self.rows.targets[index]

    def _note(self, index: int, why: str) -> None:
        # Several threads read.
        with self._lock:
            if self.notes is not None and index not in self._unreadable:
                self._unreadable[index] = why
                number = processes().process_index
                file = self.notes.with_stem(f"{self.notes.stem}-{number}") if number else self.notes
                write_json(file, self._unreadable)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several at once. Pillow decodes and resizes without Python's lock."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.__getitem__, indices))

    def fingerprint(self) -> str:
        """A hash of the rows and of what the transform makes of them."""
        return f"{self.rows.fingerprint()} {json.dumps(self.transform.to_json())}"


class Texts:
    """The texts of rows as token ids; `labels` are the targets, of words one for each token."""

    def __init__(self, rows: Rows, base: Base, transform: TextTransform) -> None:
        self.rows, self.transform = rows, transform
        read = [rows.batch(base, range(i, min(i + 256, len(rows)))) for i in range(0, len(rows), 256)]
        ids = [x for x, _ in read]
        self._lengths = np.concatenate([batch["attention_mask"].sum(1).numpy() for batch in ids])
        self._tokens = hashlib.sha256(b"".join(batch["input_ids"].numpy().tobytes() for batch in ids)).hexdigest()
        of_tokens = (row for _, y in read for row in y) if rows.of_words else ()
        self.labels = [row[:length] for row, length in zip(of_tokens, self._lengths)] or rows.targets

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return self._lengths

    def fingerprint(self) -> str:
        """A hash of all tokens."""
        return f"{self._tokens} {self._lengths.sum()}"

    def batch(self, rows: Sequence[int], /) -> dict[str, Tensor]:
        """Some texts as the base takes them, padded."""
        return self.transform.batch([self.rows.sources[row] for row in rows])


@dataclass(frozen=True)
class Encoded:
    """A split whose features are known.

    Attributes:
        cached: gives `(x, features, y)`.
        rows: the rows that it was made of.
        kept: numbers of the rows that could be read.
        unreadable: sentences about those that could not.
    """

    cached: Any
    rows: Rows
    kept: list[int]
    unreadable: list[str] = field(default_factory=list)

    def loader(self, *, batch_size: int = 64, shuffle: bool = False, balance: bool = False) -> DataLoader[Any]:
        """Batches of `(x, features, y)`; `balance` repeats rows of rare classes, so that all classes have as many."""
        indices = self._balanced() if balance else self.kept
        return loader_over(self.cached, batch_size=batch_size, shuffle=shuffle, indices=indices)

    def _balanced(self) -> list[int]:
        targets = self.rows.targets[self.kept]
        if targets.ndim != 1:
            raise TaskError("only classes are balanced; leave --balance out")
        by_class = [[self.kept[i] for i in (targets == k).nonzero().flatten().tolist()] for k in targets.unique()]
        most = max(len(rows) for rows in by_class)
        return sorted(rows[i % len(rows)] for rows in by_class for i in range(most))


def encode(base: Base, rows: Rows, folder: str | Path, *, mirror: bool = False, progress: bool = True) -> Encoded:
    """Encode rows; what an interrupted call has encoded is not encoded again.

    Args:
        base: the base, with the taps that are wanted.
        rows: the rows.
        folder: of the caches.
        mirror: keep each image's mirror image too, as a second view.
        progress: show bars.

    Raises:
        DataError: none of the images can be read.
        TaskError: a base that reads neither images nor texts.
    """
    transform = rows.transform(base)
    if isinstance(transform, TextTransform):
        if mirror:
            raise DataError("texts have no mirror images; leave --mirror out")
        return _encode_texts(base, rows, transform, Path(folder), progress)
    if not isinstance(transform, ImageTransform):
        raise TaskError("this base reads neither images nor texts; give Base transform=, or call fit with batches")
    name = hashlib.sha256(f"{rows.fingerprint()} {transform}".encode()).hexdigest()[:16]
    images = Images(rows, transform, Path(folder) / f"unreadable-{name}.json")
    views = 2 if mirror else 1
    # Half precision, as the bench keeps features: a relative error of 5e-4 at most.
    cached = cache_features(
        base, images, folder, views=views, augment=mirrored if mirror else None, dtype="float16", progress=progress
    )
    unreadable = images.unreadable()
    kept = [i for i in range(len(rows)) if i not in unreadable]
    if not kept:
        raise DataError(f"none of {len(rows)} images can be read: {next(iter(unreadable.values()))}")
    told = [f"{rows.places[i]}: {why}" for i, why in sorted(unreadable.items())]
    return Encoded(cached, rows, kept, told)


def mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """The mirror images of a batch."""
    return x.flip(-1)


def _encode_texts(base: Base, rows: Rows, transform: TextTransform, folder: Path, progress: bool) -> Encoded:
    if base.kind != "sequence":
        raise TaskError(f"texts are encoded token by token, and this base returns a {base.kind}; leave output= out")
    texts, told = Texts(rows, base, transform), list[str]()
    if empty := [place for place, length in zip(rows.places, texts.lengths()) if not length]:
        told.append(f"{len(empty)} without a token, such as {empty[0]}")
        rows = rows.take(np.flatnonzero(texts.lengths()).tolist())
        texts = Texts(rows, base, transform)
    known = sum(int((row != IGNORED).sum()) for row in texts.labels) if rows.of_words else 0
    if lost := int((rows.targets != IGNORED).sum()) - known if rows.of_words else 0:
        told.append(f"{lost} words after the {transform.max_length} tokens of a text that are read, or without a token")
    cached = cache_tokens(base, texts, texts.labels, folder, progress=progress)
    return Encoded(cached, rows, list(range(len(rows))), told)


def bytes_of(base: Base, rows: Rows) -> int:
    """Size of the features of rows, about."""
    transform = base.transform
    if isinstance(transform, ImageTransform):
        return cache_bytes(base, Images(rows, transform, None), dtype="float16")
    numbers = sum(shape[-1] for shape in [base.output_shape, *base.tap_shapes.values()])
    # Half as many tokens as may be is more than most texts have; a number has two bytes.
    return numbers * len(rows) * (transform.max_length if isinstance(transform, TextTransform) else 1)


def affordable(base: Base, untapped: Base, rows: Rows) -> Base:
    """The tapped base with as many taps, the last ones, as can be kept; else the base without taps."""
    names = list(base.tap_shapes)
    for first in range(len(names)):
        tapped = base.with_taps(names[first:])
        if bytes_of(tapped, rows) <= MOST_BYTES:
            return tapped
    return untapped
