"""Tables in files: which file is of which split, and their columns; CSV is read as texts, and then as what they are."""

from __future__ import annotations

import codecs
import csv
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidetuning.errors import DataError
from sidetuning.images import hidden

SPLITS = ("train", "validation", "test")
# Other names of splits.
OTHERS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
OTHERS |= {"testing": "test", "holdout": "test", "evaluation": "validation", "validate": "validation"}
KINDS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".ndjson": "json"}
# What stands in CSV for an empty cell, for yes and no, and for numbers: 007 and long numbers are names, which are kept.
MISSING = {"", "NA", "N/A", "n/a", "#NA", "#N/A", "<NA>", "None", "NULL", "null", "NaN", "nan", "-NaN", "-nan"}
FLAGS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
WHOLE = re.compile("[+-]?(0|[1-9][0-9]{0,14})")
REAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf(inity)?", re.IGNORECASE)


def split_of(name: str) -> str:
    """The split that a name stands for; empty for another name."""
    name = OTHERS.get(name.lower(), name.lower())
    return name if name in SPLITS else ""


def files_of(path: Path, notes: list[str]) -> tuple[str, dict[str, list[Path]]]:
    """What kind a table is, or those of a folder, and the files by split; which is which is noted."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    files = [f for f in files if not any(map(hidden, f.relative_to(path).parts))]
    kinds = Counter(KINDS[f.suffix.lower()] for f in files if f.suffix.lower() in KINDS)
    if not kinds:
        what = path.suffix or "a file without an ending" if path.is_file() else "no image in a folder of its class"
        raise DataError(
            f"{path} holds {what}; give a folder with one folder of images a class, or a table that ends in "
            f"{', '.join(KINDS)}"
        )
    if len(kinds) > 1:
        raise DataError(f"{path} holds tables of several kinds ({', '.join(kinds)}); give one of the files")
    (kind,) = kinds
    files = [f for f in files if KINDS.get(f.suffix.lower()) == kind]
    if len(files) == 1:
        return kind, {"train": files}
    by_split: dict[str, list[Path]] = {}
    for file in files:
        # By its name, or else by those of the folders that it is in.
        within = file.relative_to(path)
        words = [word for name in (within.stem, *within.parts[-2::-1]) for word in re.split(r"[^a-z]+", name.lower())]
        by_split.setdefault(next((found for word in words if (found := split_of(word))), ""), []).append(within)
    if unnamed := by_split.pop("", []):
        if "train" in by_split:
            notes.append(f"left out: {shown(unnamed)}, whose names are of no split beside those of train")
        else:
            by_split["train"] = unnamed
    notes += [f"{split} is read from {shown(of)}" for split, of in by_split.items()]
    return kind, {split: [path / file for file in of] for split, of in by_split.items()}


def shown(files: Sequence[Path]) -> str:
    """The first names of some files."""
    return ", ".join(map(str, files[:3])) + ", …" * (len(files) > 3)


def read(datasets: Any, kind: str, files: Sequence[Path]) -> Any:
    """The rows of some files of one kind."""
    if kind != "csv":
        # The library knows files again by their names and times; their content tells more.
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                while some := opened.read(1 << 24):
                    digest.update(some)
        name = digest.hexdigest()[:16]
        return datasets.load_dataset(kind, name, data_files={"train": list(map(str, files))}, split="train")
    columns: dict[str, list[str]] = {}
    for file in files:
        found = read_csv(file)
        if columns and list(found) != list(columns):
            raise DataError(f"{file} has the columns {', '.join(found)}, and {files[0]} {', '.join(columns)}")
        for name, cells in found.items():
            columns.setdefault(name, []).extend(cells)
    return datasets.Dataset.from_dict({name: typed(cells) for name, cells in columns.items()})


def read_csv(file: Path) -> dict[str, list[str]]:
    """The columns of a table; of a row with more cells than there are columns pandas raises."""
    import pandas

    with file.open("rb") as opened:
        first = opened.read(2)
    encoding = "utf-16" if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    how: dict[str, Any] = {"sep": separator(file, encoding), "encoding": encoding, "dtype": str, "na_filter": False}
    frame = pandas.read_csv(file, header=None, **how)
    header, *_ = frame.head(1).values.tolist()
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise DataError(f"{file} has {header.count(twice[0])} columns called '{twice[0]}'; give them different names")
    return {name or f"Unnamed: {k}": frame[k].tolist()[1:] for k, name in enumerate(header)}


def typed(cells: Sequence[str]) -> list[Any]:
    """Cells of CSV as what all of them are: flags, numbers, or texts; None for those that are missing."""
    given = [cell.strip() for cell in cells]
    known = [cell for cell in given if cell not in MISSING]
    make: Any = None
    if all(cell in FLAGS for cell in known):
        make = FLAGS.__getitem__
    elif all(map(WHOLE.fullmatch, known)):
        make = int
    elif all(map(REAL.fullmatch, known)) and not all(cell.lstrip("+-").isdigit() for cell in known):
        make = float
    return [None if short in MISSING else make(short) if make else cell for cell, short in zip(cells, given)]


def separator(file: Path, encoding: str) -> str:
    """What stands between the columns of a table, by its first line."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    with file.open(encoding=encoding, errors="replace", newline="") as lines:
        first = lines.readline()
    try:
        return csv.Sniffer().sniff(first, ",;\t|").delimiter if "," not in first else ","
    except csv.Error:
        return ","
