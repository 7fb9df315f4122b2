"""`st.data.load`: a folder or a table of one's own, or a data set of the Hub, as the rows of one task.

What columns mean and what was left out is said in `TaskData.notes`; options overrule each guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidetuning.data.rows import Rows as Rows
from sidetuning.data.rows import TaskData as TaskData
from sidetuning.data.sources import open_source
from sidetuning.data.splits import complete as complete
from sidetuning.data.tables import SPLITS
from sidetuning.data.targets import understand
from sidetuning.errors import DataError

# The problems that data are loaded for.
LOADED = ("classes", "labels", "numbers", "tokens")


def load(
    source: str | Path,
    *,
    image: str | None = None,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    problem: str | None = None,
    names: Sequence[str] | None = None,
    split: bool = True,
    revision: str | None = None,
    configuration: str | None = None,
    seed: int = 0,
    usual: Mapping[str, Any] | None = None,
) -> TaskData:
    """Read the data of one task.

    Args:
        source: a folder with one folder of images a class, perhaps in folders "train", "validation" and "test"; a CSV,
            TSV, Parquet or JSON Lines file, or a folder of such by split; a folder of `datasets.save_to_disk`; or the
            name of a data set of the Hub.
        image: column of image files; paths are relative to the table's folder.
        text: column of texts, or of lists of words; or two columns of texts, which are pairs.
        label: column of the answers; several columns are several labels or numbers.
        problem: "classes", "labels", "numbers" or "tokens" (a class for each word; CSV cannot hold lists of words); by
            default guessed from the answers.
        names: the classes or labels in the order of a model's outputs; rows with others are left out.
        split: make the splits that are missing, seeded, with equal shares of each class. False leaves all as it is.
        revision: revision of a data set of the Hub.
        configuration: configuration of a data set of the Hub that has several.
        seed: seed of the splits.
        usual: `TaskData.columns` of the data that a task was learned from: what image, text and label do not name is
            taken from these columns where the data have them.

    Raises:
        DataError: nothing there, columns that cannot be told, or no row that can be used.
        ImportError: tables need the package datasets.
    """
    if problem not in (None, *LOADED):
        raise DataError(f"problem must be one of {', '.join(LOADED)}, not '{problem}'; leave it out to have it guessed")
    texts = (text,) if isinstance(text, str) else tuple(text or ())
    labels = (label,) if isinstance(label, str) else tuple(label or ())
    if image is not None and texts:
        raise DataError("a task reads images or texts: give image= or text=, not both")
    if len(texts) > 2:
        raise DataError(f"a row has one text or a pair, and text= names {len(texts)} columns")
    opened = open_source(source, image, texts, labels, revision, configuration, problem, usual)
    meant = [tuple(names or ()), tuple((usual or {}).get("label") or ())]
    if problem == "numbers" and names and len(names) == 1 and not labels and opened.labels not in meant:
        raise DataError(f"the task answers with '{names[0]}', and the data have no such column; name it with --label")
    data = understand(opened, problem, names)
    return complete(data, seed) if split else data


__all__ = ["SPLITS", "Rows", "TaskData", "load"]
