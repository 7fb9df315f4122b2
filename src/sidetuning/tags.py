"""Entities in the classes of words: what tags such as B-PER, I-PER and O mark, and how many of them are found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

# Begin, inside, end and last, single and unit.
TAG = re.compile("[BIELSU]-.+")
# The score, and what its counts are called before they are put together.
SCORE, COUNTS = "entity f1", ("entities found", "entities claimed", "entities")


def are_tags(names: Sequence[str]) -> bool:
    """Whether the names of classes are tags of entities: O, and others such as B-PER."""
    others = [name for name in names if name != "O"]
    return 0 < len(others) < len(names) and all(TAG.fullmatch(name) for name in others)


def entities(tags: Iterable[str]) -> set[tuple[int, int, str]]:
    """Begin, end and kind of a text's entities, read as CoNLL-2000's script does: I-PER after O begins one, too."""
    found, begin, kind = set[tuple[int, int, str]](), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = name == kind and prefix in ("I", "E", "L")
        if kind and not goes_on:
            found.add((begin, place, kind))
        if not goes_on:
            begin, kind = place, name
        if prefix in ("E", "L", "S", "U"):
            found.add((begin, place + 1, kind))
            kind = ""
    return found


def entity_counts(said: Iterable[str], truth: Iterable[str]) -> tuple[int, int, int]:
    """The entities of a text that are found, those that are claimed, and all that there are."""
    claimed, real = entities(said), entities(truth)
    return len(claimed & real), len(claimed), len(real)


def entity_f1(counts: Iterable[Sequence[float]]) -> float:
    """The harmonic mean of the share of claims that are right and the share of entities that are found."""
    found, claimed, real = map(sum, zip(*counts))
    return 2 * found / (claimed + real) if claimed + real else 0.0


def entity_metrics(names: Sequence[str]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Counts of entities in each text, of outputs (b, classes, t) and targets (b, t); `with_score` makes F1 of them."""

    def count(which: int, output: Tensor, target: Tensor) -> Tensor:
        rows = [(row >= 0, said, row) for said, row in zip(output.argmax(1), target, strict=True)]
        tags = [[[names[k] for k in ks[counted].tolist()] for ks in pair] for counted, *pair in rows]
        return torch.tensor([entity_counts(*pair)[which] for pair in tags], device=target.device)

    return {name: partial(count, which) for which, name in enumerate(COUNTS)}


def with_score(averages: dict[str, float]) -> dict[str, float]:
    """The averages with the score in place of the counts, where there are some."""
    counts = [averages[name] for name in COUNTS if name in averages]
    rest = {name: value for name, value in averages.items() if name not in COUNTS}
    return {**rest, SCORE: entity_f1([counts])} if counts else rest
