"""Answers of tables: names that are spelled in two ways, cells that are missing in lists, and numbers out of range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sidetuning as st
from sidetuning.data import load

datasets = pytest.importorskip("datasets")


def answers(folder: Path, *labels: Any, feature: Any = None, **options: Any) -> st.data.TaskData:
    """The data of a table with these answers, again and again."""
    columns = {"text": [f"text {i}" for i in range(6 * len(labels))], "label": list(labels) * 6}
    features = datasets.Features({"text": datasets.Value("string"), "label": feature}) if feature else None
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / "a.parquet"))
    return load(folder / "a.parquet", split=False, **options)


def test_a_class_keeps_its_rows_however_its_name_is_spelled(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=[" World", "Sports", "cafe\u0301"])
    data = answers(tmp_path, 0, 1, 2, feature=names)
    assert data.names == ["World", "Sports", "caf\u00e9"] and data.counts() == [6, 6, 6]
    assert answers(tmp_path, "caf\u00e9", "cafe\u0301", "x").names == ["caf\u00e9", "x"]
    # What an older task calls its class stays.
    known = answers(tmp_path, "a", "b", names=["a ", "b"])
    assert known.names == ["a ", "b"] and known.counts() == [6, 6]
    with pytest.raises(st.DataError, match="two classes, labels or columns are called 'a'"):
        answers(tmp_path, 0, 1, feature=datasets.ClassLabel(names=["a", "a "]))
    with pytest.raises(st.DataError, match="two classes, labels or columns are called 'label'"):
        answers(tmp_path, 0, 1, label=["label", "label"])


def test_what_is_missing_in_a_list_is_no_label(tmp_path: Path) -> None:
    data = answers(tmp_path, ["a", None], ["b", "a"])
    assert data.names == ["a", "b"] and data.splits["train"].targets[:2].tolist() == [[1, 0], [1, 1]]
    numbers = answers(tmp_path, [None, 1.5], [0.5, 2.5])
    assert numbers.problem == "numbers" and len(numbers.splits["train"]) == 6
    assert any("6 with an answer that is no number" in note for note in numbers.notes)
    flags = answers(tmp_path, [0, None], [0, 1], [1, 1])
    assert flags.names == ["label 1", "label 2"] and len(flags.splits["train"]) == 12
    assert answers(tmp_path, [], *([0.5, i / 2] for i in range(4))).names == ["label 1", "label 2"]


def test_numbers_that_would_be_infinite_are_left_out(tmp_path: Path) -> None:
    data = answers(tmp_path, 1e40, 1.5, 2.5, problem="numbers")
    assert len(data.splits["train"]) == 12 and any("6 with an answer that is not finite" in n for n in data.notes)


def test_answers_of_other_kinds_are_read_or_refused(tmp_path: Path) -> None:
    assert answers(tmp_path, b"a", b"b").names == ["a", "b"]
    with pytest.raises(st.DataError, match=r"not \{'a': 1\}; name another column"):
        answers(tmp_path, {"a": 1}, {"a": 2})
    with pytest.raises(st.DataError, match="the corners of a box; give --problem labels or --problem numbers"):
        answers(tmp_path, *([i, i + 1, i + 100, i + 200] for i in range(20)))
