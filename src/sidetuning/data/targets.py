"""What the answers of a table mean: classes, labels or numbers; rows without a usable one are left out and counted."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidetuning.data.rows import Rows, TaskData
from sidetuning.data.sources import Opened
from sidetuning.errors import DataError
from sidetuning.problems import IGNORED

# Different whole numbers up to which they are taken for classes, where each has this many rows on average.
MOST_CLASSES, ROWS_EACH = 50, 5
# What stands between the labels of one row.
BETWEEN = re.compile(r"\s*[;|]\s*")
# Rows that are named of those left out for one reason.
NAMED = 3
# The largest number that a target can be.
MOST = torch.finfo(torch.float32).max
CSV = "in CSV an empty cell, None and NA are no answer and no text"


def understand(opened: Opened, problem: str | None, names: Sequence[str] | None) -> TaskData:
    """Give every row of the columns its target; `problem` and `names` are those of `data.load`.

    Raises:
        DataError: answers that are of no problem or not of the given one, or no row that can be used.
    """
    notes = list(opened.notes)
    if names is not None and (len(opened.labels) > 1 or (problem == "numbers" and len(names) == 1)):
        opened = _in_order(opened, names, notes)
    values = {split: _values(columns) for split, columns in opened.answers.items()}
    every = [value for rows in values.values() for value in rows if value is not None]
    if opened.words:
        cells = [cell for row in values["train"] if isinstance(row, list) for cell in row if not _missing(cell)]
        every = [cell for cell in cells if isinstance(cell, (str, int, float)) and cell != IGNORED]
    if not every:
        raise DataError(f"the column '{opened.labels[0]}' holds no answer; name another with --label")
    if problem is None:
        problem, why = _guess(every, every if opened.words else values["train"], len(opened.labels), opened.classes)
        if opened.words and problem == "numbers":
            raise DataError(f"words have classes, and {why}; name another column with --label")
        problem, why = ("tokens", "the texts are lists of words") if opened.words else (problem, why)
        if opened.kind == "text" or opened.labels != ("class",):
            notes.append(f"the problem is '{problem}', since {why} (--problem)")
    # Of several columns each is a label.
    flags = problem == "labels" and (len(opened.labels) > 1 or _are_flags(every, names))
    known = list(names) if names is not None else _names(problem, every, opened, flags)
    places = {_name(name): place for place, name in enumerate(known)}
    if twice := [name for place, name in enumerate(known) if places[_name(name)] != place]:
        raise DataError(f"two classes, labels or columns are called '{twice[0]}'; give each a name of its own")
    splits = {}
    for split, rows in values.items():
        reasons: dict[str, list[str]] = {}
        targets, kept = [], []
        for i, value in enumerate(rows):
            words = opened.sources[split][i] if problem == "tokens" else None
            target, reason = _target(value, problem, places, words, flags)
            reason = reason or _no_source(opened.sources[split], i)
            if reason:
                reasons.setdefault(reason, []).append(opened.places[split][i])
            else:
                targets.append(target)
                kept.append(i)
        if opened.csv and {"no answer", "no image or text"} & set(reasons) and CSV not in notes:
            notes.append(CSV)
        whence = "" if names is not None and len(values) == 1 else f" of {split}"
        notes += _left_out(whence, reasons, opened.skipped.get(split, Counter()))
        if kept:
            whole = Rows(opened.sources[split], torch.zeros(len(rows)), opened.places[split]).take(kept)
            dtype = torch.float32 if problem in ("labels", "numbers") else torch.long
            if problem == "tokens":
                if ignored := sum(row.count(IGNORED) for row in targets):
                    notes.append(f"{ignored} words of {split} have no class, and do not count")
                targets = list(zip(*itertools.zip_longest(*targets, fillvalue=IGNORED)))
            splits[split] = Rows(whole.sources, torch.tensor(targets, dtype=dtype), whole.places)
    if "train" not in splits:
        theirs = "" if names is None else f"; the task's answers are {', '.join(known[:5])}{', …' * (len(known) > 5)}"
        raise DataError(f"no row can be used: {'; '.join(notes)}{theirs}")
    data = TaskData(splits, opened.kind, problem, known, notes, opened.columns)
    # Rows of a task that is known are not learned from.
    notes += _balance(data) if names is None else []
    return data


def _values(columns: list[list[Any]]) -> list[Any]:
    """A value for each row: the cell, or a list of those of several columns; None where one is missing."""
    cells = [[None if _missing(cell) else _decoded(cell) for cell in column] for column in columns]
    if len(cells) == 1:
        return cells[0]
    return [None if any(cell is None for cell in row) else list(row) for row in zip(*cells)]


def _missing(cell: Any) -> bool:
    blank = isinstance(cell, str) and not cell.strip()
    return cell is None or blank or (isinstance(cell, float) and math.isnan(cell))


def _decoded(cell: Any) -> Any:
    """A cell, whose texts may be bytes."""
    if isinstance(cell, dict):
        raise DataError(f"an answer is a text, a number or a list, not {cell!s:.40}; name another column with --label")
    if isinstance(cell, list):
        return [_decoded(inner) for inner in cell]
    return cell.decode("utf-8", "backslashreplace") if isinstance(cell, bytes) else cell


def _guess(every: list[Any], train: list[Any], columns: int, classes: list[str] | None) -> tuple[str, str]:
    """The problem of some answers, and why."""
    first = every[0]
    if columns > 1:
        flags = all(cell in (0, 1) for row in every for cell in row)
        return ("labels", "every column is yes or no") if flags else ("numbers", "several columns hold numbers")
    if isinstance(first, (list, tuple)):
        cells = [cell for row in every for cell in row if cell is not None]
        if cells and all(isinstance(cell, float) for cell in cells):
            return "numbers", "each answer is a list of numbers"
        boxes = len({len(row) for row in every}) == 1 and all(isinstance(cell, int) for cell in cells)
        if boxes and len(set(cells)) > MOST_CLASSES:
            raise DataError(
                f"each answer is a list of {len(first)} whole numbers, which may be labels, or numbers such as the "
                "corners of a box; give --problem labels or --problem numbers"
            )
        return "labels", "each answer is a list"
    if classes is not None:
        return "classes", f"the data name {len(classes)} classes"
    distinct = set(every)
    if all(isinstance(value, bool) for value in every):
        return "classes", "the answers are yes or no"
    if all(isinstance(value, (int, float)) for value in every):
        whole = all(float(value).is_integer() for value in every)
        few = len(distinct) <= MOST_CLASSES and len(distinct) * ROWS_EACH <= len(train)
        if whole and few:
            return "classes", f"the answers are {len(distinct)} whole numbers, again and again"
        return "numbers", f"the answers are {len(distinct)} different numbers"
    parts = {part for value in every for part in BETWEEN.split(str(value))}
    if len(parts) < len(distinct) and len(parts) * 2 <= len(every):
        return "labels", f"the answers are {len(parts)} labels, several in one cell"
    if len(distinct) * 2 > len(every) and len(every) > 2 * ROWS_EACH:
        raise DataError(
            f"the answers are {len(distinct)} different texts in {len(every)} rows, such as '{str(first)[:40]}', which "
            "are no classes; name another column with --label"
        )
    return "classes", f"the answers are {len(distinct)} texts"


def _in_order(opened: Opened, names: Sequence[str], notes: list[str]) -> Opened:
    """The columns of several labels or numbers in the order of a task's outputs; what they were renamed to is noted."""
    given = list(opened.labels)
    if len(given) != len(names) or (set(given) != set(names) and set(given) & set(names)):
        raise DataError(f"the task's answers are {', '.join(names)}, and --label names {', '.join(given)}; name these")
    if not set(given) & set(names):
        notes.append(f"the columns {', '.join(given)} are taken for {', '.join(names)}, in this order")
        return opened
    answers = {split: [columns[given.index(name)] for name in names] for split, columns in opened.answers.items()}
    return replace(opened, answers=answers, labels=tuple(names))


def _are_flags(every: list[Any], names: Sequence[str] | None) -> bool:
    """Whether each answer is a list of 0 and 1, one for each label, and not of the labels that are right."""
    count = len(every[0]) if isinstance(every[0], (list, tuple)) else 0
    if count < (2 if names is None else 1) or (names and (len(names) != count or set(names) <= {"0", "1"})):
        return False
    rows = [row for row in every if isinstance(row, (list, tuple)) and len(row) == count]
    return len(rows) == len(every) and all(cell in (0, 1, None) for row in rows for cell in row)


def _names(problem: str, every: list[Any], opened: Opened, flags: bool) -> list[str]:
    """The names of the outputs."""
    if problem in ("classes", "tokens"):
        if any(isinstance(value, (list, tuple, dict)) for value in every):
            raise DataError(
                "a row has one class, and these are lists; give --problem labels, or one column with --label"
            )
        return list(map(_name, opened.classes or dict.fromkeys(map(_name, sorted(set(every), key=_order)))))
    if len(opened.labels) > 1:
        return list(opened.labels)
    if problem == "labels" and not flags:
        found = {part for value in every for part in _parts(value)}
        return list(map(_name, opened.classes or dict.fromkeys(map(_name, sorted(found, key=_order)))))
    ((count, _),) = Counter(len(value) if isinstance(value, (list, tuple)) else 1 for value in every).most_common(1)
    return [opened.labels[0]] if count == 1 else [f"{opened.labels[0]} {k + 1}" for k in range(count)]


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then texts by alphabet."""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _name(value: Any) -> str:
    """A class as a text: 3.0 is 3, and one name may be spelled in two ways in Unicode."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return unicodedata.normalize("NFC", str(value)).strip()


def _parts(value: Any) -> list[Any]:
    """The labels of one row."""
    return [p for p in (value if isinstance(value, (list, tuple)) else BETWEEN.split(str(value))) if not _missing(p)]


def _target(
    value: Any, problem: str, places: dict[str, int], words: list[str] | None, flags: bool = False
) -> tuple[Any, str]:
    """The target of an answer, or why there is none; `places` are the numbers of the outputs by their names."""
    if value is None:
        return None, "no answer"
    if problem == "tokens":
        return _classes_of(value, words, places)
    if problem == "classes":
        name = _name(value)
        return (places[name], "") if name in places else (None, f"the unknown class '{name:.40}'")
    if problem == "labels":
        if flags or _are_flags([value], list(places)):
            strange, found = [_name(cell) for cell in value if cell not in (0, 1)], value
        else:
            parts = {_name(part) for part in _parts(value)}
            strange, found = sorted(parts - set(places)), [name in parts for name in places]
        return (None, f"the unknown label '{strange[0]:.40}'") if strange else ([float(cell) for cell in found], "")
    try:
        numbers = [float(cell) for cell in (value if isinstance(value, (list, tuple)) else [value])]
    except (TypeError, ValueError):
        return None, f"an answer that is no number ('{value!s:.40}')"
    if len(numbers) != len(places):
        return None, f"{len(numbers)} numbers in place of {len(places)}"
    # In single precision larger ones are infinite; nor is any comparison with NaN true.
    return (numbers, "") if all(abs(number) <= MOST for number in numbers) else (None, "an answer that is not finite")


def _classes_of(value: Any, words: list[str] | None, places: dict[str, int]) -> tuple[Any, str]:
    """The class numbers of a row's words, or why there are none."""
    if words is None or not isinstance(value, list):
        return None, "no list of words, or of classes"
    if len(value) != len(words):
        return None, "more or fewer classes than words"
    found = [IGNORED if _missing(cell) or cell == IGNORED else places.get(_name(cell)) for cell in value]
    if None in found:
        return None, f"the unknown class '{_name(value[found.index(None)]):.40}'"
    return (None, "no word that has a class") if set(found) == {IGNORED} else (found, "")


def _no_source(sources: Sequence[Any], row: int) -> str:
    """Why a row has no image or text; images are looked at when they are decoded."""
    if not isinstance(sources, list):
        return ""
    if sources[row] is None:
        return "no image or text"
    return "a missing file" if isinstance(sources[row], Path) and not sources[row].is_file() else ""


def _left_out(whence: str, reasons: dict[str, list[str]], skipped: Counter[str]) -> list[str]:
    """Sentences about what was left out; `whence` names the split where there are several."""
    notes = []
    for reason, places in reasons.items():
        shown = ", ".join(places[:NAMED]) + ", …" * (len(places) > NAMED)
        notes.append(f"left out{whence}: {len(places)} with {reason} ({shown})")
    notes += [f"left out{whence}: {count} {reason}" for reason, count in sorted(skipped.items())]
    return notes


def _balance(data: TaskData) -> list[str]:
    """What the classes' numbers of training rows tell."""
    counts, row = data.counts(), "word" if data.problem == "tokens" else "row"
    notes = []
    if empty := [name for name, count in zip(data.names, counts) if not count]:
        shown = ", ".join(empty[:5]) + ", …" * (len(empty) > 5)
        notes.append(f"{len(empty)} of {len(data.names)} classes or labels have no training {row} ({shown})")
    found = [count for count in counts if count]
    if data.problem in ("classes", "tokens") and len(found) < 2:
        only, why = data.names[counts.index(max(counts))], f" ({CSV})" * (CSV in data.notes)
        raise DataError(f"all {row}s are of one class, '{only}'; give two or more{why}")
    if data.problem in ("classes", "tokens") and max(found) >= 5 * min(found):
        most, least = (data.names[counts.index(edge(found))] for edge in (max, min))
        mend = "; --balance gives all the same weight" if data.problem == "classes" else ""
        notes.append(f"the classes are uneven: '{most}' has {max(found)} training {row}s, '{least}' {min(found)}{mend}")
    return notes


def stratum(targets: Tensor, problem: str) -> Tensor:
    """The group of each row, whose share is kept in all splits: its rarest class, first label, or fifth of numbers."""
    if problem == "tokens":
        counted = targets != IGNORED
        rarity = torch.where(counted, torch.bincount(targets[counted])[targets.clamp(min=0)], targets.numel())
        return targets.gather(1, rarity.argmin(1, keepdim=True)).squeeze(1)
    if problem == "classes":
        return targets
    if problem == "labels":
        return torch.where(targets.any(1), targets.argmax(1), -1)
    first = targets[:, 0].contiguous()
    # Of at most 2^24 numbers, which is what torch takes.
    some = first[:: len(first) // 2**24 + 1]
    return torch.bucketize(first, some.quantile(torch.tensor([0.2, 0.4, 0.6, 0.8])))
