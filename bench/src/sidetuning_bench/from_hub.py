"""Data sets by path or by name on the Hub, and the files of their splits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from pyarrow.parquet import ParquetFile

from sidetuning.errors import DataError, DataWarning
from sidetuning.images import hidden


def local_folder(source: str | Path, example: str) -> Path:
    """The path where it exists, else a cached snapshot of the Hub's data set of that name: its parquet files.

    Raises:
        DataError: neither; `example` is named as one that exists on the Hub.
    """
    if Path(source).exists():
        return Path(source)
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DataError(f"{name} does not exist; give the folder of a data set or a Hub name such as {example}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # no network, no such data set, no access: all mean that there is no data
        raise DataError(
            f"{name} is no folder here and could not be read from the Hub ({type(error).__name__}); "
            "check the name and the network, or give the path of a local copy"
        ) from error


def open_parquet(file: Path) -> ParquetFile:
    """Open a parquet file; DataError where it has more rows than bytes, and would fill the memory."""
    parquet, size = ParquetFile(file), file.stat().st_size
    if parquet.metadata.num_rows > size:
        raise DataError(f"{file} has {parquet.metadata.num_rows:,} rows in {size:,} bytes; download it again")
    return parquet


def split_files(root: Path, split: str, endings: Sequence[str]) -> list[Path]:
    """The files of a split, in order: one, the numbered parts of one, or none.

    Args:
        root: a folder; its folders are searched too, but not the hidden ones.
        split: the first word of their names.
        endings: endings of their names, in lower case.

    Raises:
        DataError: several files that are no parts of one, or parts that are missing.
    """
    named = [file for file in sorted(root.rglob("*")) if re.match(rf"{split}(?![a-z])", file.name, re.I)]
    found = [file for file in named if file.suffix.lower() in endings and file.is_file()]
    found = [file for file in found if not any(map(hidden, file.relative_to(root).parts))]
    # The Hub's names: train-00001-of-00003, and in older data sets a checksum after it.
    parts = {file: re.fullmatch(rf"{split}-(\d+)-of-(\d+)(?:-[0-9a-f]+)?", file.stem, re.I) for file in found}
    shards = [file for file, part in parts.items() if part]
    if shards and (left := sorted(set(found) - set(shards))):
        warnings.warn(f"{left[0]} is no part of {shards[0]}; it was left out", DataWarning, stacklevel=2)
    numbers = [(int(part[1]), int(part[2])) for part in parts.values() if part]
    if shards and len({file.parent for file in shards}) == 1 and len({count for _, count in numbers}) == 1:
        if sorted(number for number, _ in numbers) == list(range(numbers[0][1])):
            return shards
        raise DataError(f"{shards[0].parent} has {len(shards)} of {numbers[0][1]} parts of {split}; fetch them all")
    numbered = not shards and all(re.fullmatch(rf"{split}[-_]?\d+", file.stem, re.I) for file in found)
    if len(found) > 1 and not (numbered and len({(file.parent, file.suffix) for file in found}) == 1):
        names = ", ".join(str(file.relative_to(root)) for file in found[:4])
        raise DataError(f"{root} has several files of {split} ({names}); keep one of them in a folder of its own")
    return found
