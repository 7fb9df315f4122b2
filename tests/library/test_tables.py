"""Tables in files: which rows are learned from, and what cells are."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sidetuning as st
from sidetuning.data import load

datasets = pytest.importorskip("datasets")


def table(path: Path, count: int = 20, word: str = "text", labels: str = "ab", header: str = "text,label") -> Path:
    """A CSV table of texts, and of letters as labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{word} {i},{labels[i % len(labels)]}" for i in range(count)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def labelled(path: Path, *labels: str, **options: object) -> st.data.TaskData:
    """The data of a CSV table whose labels are these, again and again."""
    lines = [f"text {i},{labels[i % len(labels)]}" for i in range(6 * len(labels))]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return load(path, split=False, **options)  # type: ignore[arg-type]


def test_copies_in_hidden_folders_are_no_rows(tmp_path: Path) -> None:
    table(tmp_path / "reviews.csv")
    table(tmp_path / ".ipynb_checkpoints" / "reviews-checkpoint.csv")
    assert len(load(tmp_path, split=False).splits["train"]) == 20


def test_files_of_no_split_are_not_learned_beside_train(tmp_path: Path) -> None:
    for name, count in {"train": 20, "test": 6, "evaluation": 8, "old": 30}.items():
        table(tmp_path / f"{name}.csv", count, name)
    data = load(tmp_path, split=False)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 20, "validation": 8, "test": 6}
    assert "left out: old.csv, whose names are of no split beside those of train" in data.notes
    assert any("train is read from train.csv" in note for note in data.notes)


def test_a_test_table_without_answers_is_said(tmp_path: Path) -> None:
    table(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("text\nhow is it\nwell\n")
    with pytest.raises(st.DataError, match="test has no column 'label', which train has"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("007", "7", "08"), ["007", "08", "7"]),
        (("9007199254740992", "9007199254740993"), ["9007199254740992", "9007199254740993"]),
        (("1", "2", "NA"), ["1", "2"]),
        (("1.0", "2.0"), ["1", "2"]),
        (("true", "false"), ["False", "True"]),
    ],
)
def test_cells_are_numbers_where_that_loses_nothing(tmp_path: Path, labels: tuple[str, ...], names: list[str]) -> None:
    assert labelled(tmp_path / "a.csv", *labels, problem="classes").names == names


def test_prices_are_numbers_and_so_is_what_is_said_to_be(tmp_path: Path) -> None:
    prices = labelled(tmp_path / "a.csv", *(f"{i}.50" for i in range(20)))
    assert prices.problem == "numbers" and prices.splits["train"].targets[:2].tolist() == [[0.5], [1.5]]
    assert labelled(tmp_path / "a.csv", "007", "8", problem="numbers").splits["train"].targets[0].item() == 7


def test_what_a_column_holds_is_known_from_all_its_rows(tmp_path: Path) -> None:
    lines = [f"text {i},{i % 3 if i < 10_000 else 'abc'[i % 3]}" for i in range(10_100)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    assert load(tmp_path / "a.csv", split=False).names == ["0", "1", "2", "a", "b", "c"]


def test_a_row_with_more_cells_than_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label\n" + "u,hello,a,\nu,there,b,\n" * 9)
    with pytest.raises(st.DataError, match="Expected 3 fields in line 2, saw 4"):
        load(tmp_path / "a.csv")


def test_tables_may_be_in_utf_16_and_columns_have_one_name(tmp_path: Path) -> None:
    table(tmp_path / "a.csv", word="café").write_bytes((tmp_path / "a.csv").read_text().encode("utf-16"))
    assert load(tmp_path / "a.csv").splits["train"].sources[0].startswith("café")
    with pytest.raises(st.DataError, match="2 columns called 'text'"):
        load(table(tmp_path / "b.csv", header="text,text"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_that_was_written_again_is_read_again(tmp_path: Path, ending: str) -> None:
    found = []
    for value in (10, 200):
        cell = {"bytes": Image.new("L", (8, 8), value).tobytes(), "path": None}
        if ending == "csv":
            table(tmp_path / "a.csv", word=f"text {value}")
        else:
            columns = {"image": [cell] * 4, "label": ["a", "b"] * 2}
            datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "a.parquet"))
        os.utime(tmp_path / f"a.{ending}", (1e9, 1e9))
        rows = load(tmp_path / f"a.{ending}", split=False).splits["train"]
        found.append((rows.fingerprint(), rows.sources[0]))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


def test_paths_of_images_begin_at_their_table(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "many" / split).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "many" / split / f"{i}.png")
        lines = "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4))
        (tmp_path / "many" / split / "table.csv").write_text("file,label\n" + lines)
    for split, rows in load(tmp_path / "many", split=False).splits.items():
        assert rows.sources == [tmp_path / "many" / split / f"{i}.png" for i in range(4)]
    cells = [{"bytes": None, "path": f"{i}.png"} for i in range(4)]
    made = datasets.Dataset.from_dict({"image": cells, "label": ["a", "b"] * 2})
    made.to_parquet(str(tmp_path / "many" / "test" / "table.parquet"))
    rows = load(tmp_path / "many" / "test" / "table.parquet", split=False).splits["train"]
    assert list(rows.sources) == [tmp_path / "many" / "test" / f"{i}.png" for i in range(4)]


def test_columns_are_those_that_a_task_was_learned_from(tmp_path: Path) -> None:
    rows = [f"{i} text,{i} body,{i % 5},{100.5 + i}" for i in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["text,body,rating,price", *rows]))
    learned = load(tmp_path / "a.csv", text="body", label="price", split=False)
    assert learned.columns == {"image": None, "text": ["body"], "label": ["price"]}
    again = load(tmp_path / "a.csv", names=["price"], problem="numbers", split=False, usual=learned.columns)
    assert again.splits["train"].sources[0] == "0 body" and again.splits["train"].targets[0].item() == 100.5
    with pytest.raises(st.DataError, match="answers with 'price', and the data have no such column"):
        load(tmp_path / "a.csv", names=["price"], problem="numbers", text="body", split=False)
    other = load(tmp_path / "a.csv", names=["price"], problem="numbers", text="body", label="rating", split=False)
    assert "the columns rating are taken for price, in this order" in other.notes


def test_what_csv_drops_is_said_of_folders_too(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "a,NA\nb,EU\n" * 9)
    with pytest.raises(st.DataError, match=r"of one class, 'EU'; give two or more \(in CSV an empty cell, None and NA"):
        load(tmp_path)
