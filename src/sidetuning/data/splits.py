"""Splits that are missing are made: seeded, with the same share of each class."""

from __future__ import annotations

from dataclasses import replace

import torch

from sidetuning.data.rows import TaskData
from sidetuning.data.targets import stratum
from sidetuning.errors import DataError

# Shares of validation and test, and rows from which there is a test split.
SHARE, ENOUGH = 0.15, 100
# Rows of a made split at most.
MOST = 10_000


def complete(data: TaskData, seed: int) -> TaskData:
    """The data with a validation split, and with a test split where there are enough rows.

    Raises:
        DataError: too few rows to split.
    """
    train, found = data.splits["train"], dict(data.splits)
    wanted = [split for split in ("validation", "test") if split not in found]
    if "test" in wanted and (len(train) < ENOUGH or "validation" in found):
        wanted.remove("test")
    if not wanted:
        return data
    if len(train) < 4:
        raise DataError(f"{len(train)} rows are too few to learn and to validate; give at least two rows a class")
    share = min(SHARE, MOST / len(train))
    groups = stratum(train.targets, data.problem)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[int]] = {name: [] for name in ("train", *wanted)}
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)].tolist()
        # At least one for learning, and of three or more one for validation.
        count = max(round(len(rows) * share), 1) if len(rows) > len(wanted) else 0
        for name in wanted:
            parts[name] += rows[:count]
            rows = rows[count:]
        parts["train"] += rows
    if not parts["validation" if "validation" in wanted else "test"]:
        raise DataError("no class has two rows, so that none is left to validate with; give more rows")
    made = {name: train.take(sorted(rows)) for name, rows in parts.items()}
    sizes = ", ".join(f"{len(made[name])} for {name}" for name in wanted)
    each = "each class" if data.problem != "tokens" else "texts by the rarest class in them"
    note = f"split off, with equal shares of {each} (seed {seed}): {sizes}; {len(made['train'])} are left to learn"
    if "test" not in made and "test" not in found:
        note += "; there is no test split, so scores are of the validation rows"
    return replace(data, splits={**made, **{n: r for n, r in found.items() if n != "train"}}, notes=[*data.notes, note])
