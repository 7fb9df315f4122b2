"""Folders and tables of one's own become the rows of a task; what was guessed and left out is said."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sidetuning as st
from sidetuning.data import TaskData, load

datasets = pytest.importorskip("datasets")


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, **counts: int) -> Path:
    """A folder of images by class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png(i))
    return root


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def sizes(data: TaskData) -> dict[str, int]:
    return {split: len(rows) for split, rows in data.splits.items()}


def said(data: TaskData, *parts: str) -> None:
    assert all(any(part in note for note in data.notes) for part in parts), data.notes


def test_a_folder_by_class_is_split_with_equal_shares(tmp_path: Path) -> None:
    root = folder(tmp_path, cat=80, dog=40)
    (root / "cat" / ".hidden.png").write_bytes(png())
    (root / "dog" / "notes.txt").touch()
    (root / "dog" / "LAST.PNG").write_bytes(png())
    data = load(root)
    assert (data.kind, data.problem, data.names) == ("image", "classes", ["cat", "dog"])
    assert sizes(data) == {"train": 85, "validation": 18, "test": 18}
    assert data.counts("validation") == [12, 6] and data.counts("test") == [12, 6]
    said(data, "1 hidden files", "1 files that end in .txt", "18 for validation, 18 for test")
    paths = [{*rows.sources} for rows in data.splits.values()]
    assert len(set.union(*paths)) == 121
    assert all(path.parent.name == data.names[y] for r in data.splits.values() for path, y in zip(r.sources, r.targets))


def test_the_same_seed_gives_the_same_splits_and_another_others(tmp_path: Path) -> None:
    root = folder(tmp_path, cat=20, dog=20)
    first, again, other = (load(root, seed=seed).splits["validation"].places for seed in (0, 0, 1))
    assert first == again != other


def test_folders_of_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    folder(tmp_path / "train", cat=5, dog=5)
    folder(tmp_path / "val", cat=2, dog=1, fox=1)
    data = load(tmp_path)
    assert sizes(data) == {"train": 10, "validation": 4} and data.names == ["cat", "dog", "fox"]
    said(data, "no training row (fox)")


def test_uneven_classes_are_told(tmp_path: Path) -> None:
    said(load(folder(tmp_path, cat=40, dog=5), split=False), "uneven", "'cat' has 40 training rows, 'dog' 5")


def test_names_of_a_model_fix_the_order_and_leave_others_out(tmp_path: Path) -> None:
    data = load(folder(tmp_path, cat=3, dog=3, fox=2), names=["dog", "cat"], split=False)
    assert data.names == ["dog", "cat"] and data.counts() == [3, 3]
    said(data, "2 with the unknown class 'fox' (fox/0.png, fox/1.png)")


def test_bad_rows_of_a_table_are_named_and_left_out(tmp_path: Path) -> None:
    rows = [f"text {i},{['good', 'bad'][i % 2]}" for i in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows, ",good", "no label,"]))
    data = load(tmp_path / "a.csv", split=False)
    assert (data.kind, data.problem, data.names, sizes(data)) == ("text", "classes", ["bad", "good"], {"train": 20})
    assert data.splits["train"].sources[:2] == ["text 0", "text 1"] and data.splits["train"].targets[:2].tolist() == [
        1,
        0,
    ]
    said(data, "column 'label'", "column 'text'", "1 with no image or text (row 21", "1 with no answer (row 22")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_may_be_separated_by_other_marks(tmp_path: Path, separator: str) -> None:
    lines = [("review", "stars"), *[(f"it is {i}", str(i % 3)) for i in range(30)]]
    (tmp_path / "a.csv").write_text("\n".join(separator.join(line) for line in lines))
    data = load(tmp_path / "a.csv", label="stars", split=False)
    assert data.problem == "classes" and data.names == ["0", "1", "2"]


ANSWERS: dict[str, tuple[list[Any], str, list[str], list[Any]]] = {
    "numbers": ([i * 1.5 for i in range(20)], "numbers", ["label"], [0.0]),
    "many whole numbers": ([i * 7 for i in range(20)], "numbers", ["label"], [0.0]),
    "flags": ([i % 2 == 0 for i in range(20)], "classes", ["False", "True"], 1),  # type: ignore[dict-item]
    "lists": ([["a"], ["a", "b"], [], ["b"]] * 5, "labels", ["a", "b"], [1.0, 0.0]),
    "cells of labels": (["a|b", "b", "a", "b|c"] * 5, "labels", ["a", "b", "c"], [1.0, 1.0, 0.0]),
    "vectors": ([[0.5, i / 2] for i in range(20)], "numbers", ["label 1", "label 2"], [0.5, 0.0]),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_the_problem_is_guessed_and_said(tmp_path: Path, case: str) -> None:
    values, problem, names, first = ANSWERS[case]
    path = table(tmp_path / "a.jsonl", [{"text": f"text {i}", "label": value} for i, value in enumerate(values)])
    data = load(path, split=False)
    assert (data.problem, data.names) == (problem, names)
    assert data.splits["train"].targets[0].tolist() == first
    said(data, f"the problem is '{problem}'", "--problem")


def test_options_overrule_the_guesses(tmp_path: Path) -> None:
    rows = [{"text": "a", "other": f"b {i}", "label": i % 2, "x": i % 2, "y": 1} for i in range(20)]
    path = table(tmp_path / "a.jsonl", rows)
    assert load(path, problem="numbers", split=False).splits["train"].targets.shape == (20, 1)
    assert load(path, text=["text", "other"]).splits["train"].sources[0][0] == "a"
    several = load(path, text="other", label=["x", "y"], split=False)
    assert (several.problem, several.names) == ("labels", ["x", "y"])
    assert several.splits["train"].targets[:2].tolist() == [[0, 1], [1, 1]]


WORDS = [{"tokens": ["the", "old", "tower"], "ner_tags": ["O", "B-LOC", "I-LOC"]}] * 12


def test_lists_of_words_beside_lists_of_classes_are_tokens(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"tokens": ["the", "old"], "ner_tags": ["O"]},
        {"tokens": [], "ner_tags": []},
        {"tokens": ["is", None], "ner_tags": ["O", "O"]},
        {"tokens": ["is"], "ner_tags": None},
        {"tokens": ["is"], "ner_tags": [None]},
        {"tokens": ["is", "red", "?"], "ner_tags": ["O", None, "O"], "id": "7"},
    ]
    path = table(tmp_path / "a.jsonl", [*WORDS, *bad])
    data = load(path, split=False)
    rows = data.splits["train"]
    assert (data.kind, data.problem, data.names) == ("text", "tokens", ["B-LOC", "I-LOC", "O"])
    assert rows.of_words and rows.sources[-1] == ["is", "red", "?"] and data.counts() == [12, 12, 14]
    assert rows.targets.tolist() == [[2, 0, 1]] * 12 + [[2, -100, 2]]
    said(data, "column 'ner_tags' (--label)", "column 'tokens' (--text)", "the problem is 'tokens'", "1 words of train")
    said(data, "1 with more or fewer classes than words (row 13", "2 with no list of words, or of classes (row 14 of")
    said(data, "1 with no answer (row 16", "1 with no word that has a class (row 17")
    assert rows.take([12]).targets.tolist() == [[2, -100, 2]]
    assert rows.fingerprint() != load(path, split=False, names=["O", "B-LOC", "I-LOC"]).splits["train"].fingerprint()


def test_classes_of_words_may_be_numbers_with_gaps_and_are_those_of_the_training_rows(tmp_path: Path) -> None:
    rows = [{"words": ["a", "b", "c"], "tags": [10, 2, -100]}, {"words": ["d"], "tags": [7]}] * 6
    table(tmp_path / "train.jsonl", rows)
    table(tmp_path / "test.jsonl", [*rows[:2], {"words": ["a"], "tags": [3]}])
    data = load(tmp_path, split=False)
    assert data.names == ["2", "7", "10"] and sizes(data) == {"train": 12, "test": 2}
    assert data.splits["train"].targets[:2].tolist() == [[2, 0, -100], [1, -100, -100]]
    said(data, "left out of test: 1 with the unknown class '3'")


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_names_of_classes_of_words_are_those_of_the_data_set(tmp_path: Path, saved: str) -> None:
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "tokens": datasets.Sequence(datasets.Value("string")),
            "pos_tags": datasets.Sequence(datasets.ClassLabel(names=["DET", "NOUN"])),
            "ner_tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-LOC"])),
        }
    )
    columns = {
        "id": ["0", "1"],
        "tokens": [["the", "tower"], ["a"]],
        "pos_tags": [[0, 1], [0]],
        "ner_tags": [[0, 1], [-100]],
    }
    made = datasets.Dataset.from_dict(columns, features=features)
    path = tmp_path / "a.parquet" if saved == "parquet" else tmp_path / "data"
    made.to_parquet(str(path)) if saved == "parquet" else made.save_to_disk(str(path))
    data = load(path, split=False)
    assert data.names == ["O", "B-LOC"] and data.splits["train"].targets.tolist() == [[0, 1]]
    assert load(path, label="pos_tags", split=False).counts() == [2, 1]


def test_texts_with_rare_classes_are_in_all_splits(tmp_path: Path) -> None:
    common = [{"tokens": ["a"] * 19 + ["b"], "tags": ["O"] * 19 + ["B-x"]}] * 100
    rare = [{"tokens": ["a", "b", "c"], "tags": ["O", "B-x", "B-y"]}] * 20
    data = load(table(tmp_path / "a.jsonl", common + rare))
    assert [data.counts(split)[1] for split in ("train", "validation", "test")] == [14, 3, 3]
    said(data, "equal shares of texts by the rarest class in them (seed 0)", "'O' has", "training words")
    assert not any("--balance" in note for note in data.notes)


def test_lists_of_labels_beside_texts_stay_labels(tmp_path: Path) -> None:
    rows = [{"text": f"a {i}", "tokens": ["a", str(i)], "tags": ["x"] * (i % 2) + ["y", "z", "w"]} for i in range(20)]
    data = load(table(tmp_path / "a.jsonl", rows), split=False)
    assert data.problem == "labels" and data.splits["train"].sources[0] == "a 0"


def test_files_named_in_a_table_are_found_beside_it(tmp_path: Path) -> None:
    folder(tmp_path, images=4)
    rows = [{"file": f"images/{i}.png", "age": 1.5 * i} for i in range(5)]
    data = load(table(tmp_path / "a.jsonl", rows), label="age", split=False)
    assert data.kind == "image" and data.splits["train"].sources == [tmp_path / f"images/{i}.png" for i in range(4)]
    said(data, "1 with a missing file (row 5")


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_data_sets_of_the_library_keep_their_class_names(tmp_path: Path, saved: str) -> None:
    features = datasets.Features({"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=["x", "y"])})
    cells = [{"bytes": png(i), "path": None} for i in range(6)]
    rows = datasets.Dataset.from_dict({"image": cells, "fine_label": [0, 1, 0, 1, -1, 1]}, features=features)
    if saved == "disk":
        rows.save_to_disk(str(tmp_path / "data"))
    else:
        (tmp_path / "data").mkdir()
        rows.to_parquet(str(tmp_path / "data/train.parquet"))
    data = load(tmp_path / "data", split=False)
    assert (data.kind, data.names, data.splits["train"].targets.tolist()) == ("image", ["x", "y"], [0, 1, 0, 1, 1])
    assert [bytes(cell) for cell in data.splits["train"].sources] == [png(i) for i in (0, 1, 2, 3, 5)]
    said(data, "1 with no answer (row 5")


def test_rows_have_a_fingerprint_of_their_content(tmp_path: Path) -> None:
    root = folder(tmp_path, cat=2, dog=2)
    rows = load(root, split=False).splits["train"]
    before = rows.fingerprint()
    assert before == load(root, split=False).splits["train"].fingerprint() != rows.take([0, 1]).fingerprint()
    assert torch.equal(rows.take([2]).targets, torch.tensor([1]))
    (root / "cat" / "0.png").write_bytes(png(9) + b"more")
    assert before != load(root, split=False).splits["train"].fingerprint()


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing there": ("missing.csv", {}, "does not exist"),
    "another file": ("a.txt", {}, "holds .txt"),
    "no such column": ("a.jsonl", {"label": "lable"}, "no column 'lable'; it has"),
    "no label": ("b.jsonl", {}, "name it with --label"),
    "two texts": ("c.jsonl", {}, r"several columns hold texts \(a, b\)"),
    "all different": ("a.jsonl", {"label": "text"}, "are no classes"),
    "one class": ("d.jsonl", {}, "all rows are of one class"),
    "not of the problem": ("a.jsonl", {"problem": "numbers", "label": "text", "text": "other"}, "no row can be used"),
    "no problem": ("a.jsonl", {"problem": "clases"}, "must be one of classes, labels, numbers, tokens"),
    "both": ("a.jsonl", {"image": "text", "text": "text"}, "not both"),
    "no table": ("broken.jsonl", {}, "cannot be read"),
    "lists in CSV": ("a.csv", {"problem": "tokens"}, "'text' holds no lists of words; give JSON Lines or Parquet; CSV"),
    "words for classes": ("w.jsonl", {"problem": "classes"}, "no column holds images or texts"),
    "words named for classes": ("w.jsonl", {"problem": "classes", "text": "tokens"}, "give texts, or --problem tokens"),
    "two columns of classes": (
        "w.jsonl",
        {"label": ["ner_tags", "tokens"], "text": "tokens"},
        "are one column of lists",
    ),
    "numbers for words": ("n.jsonl", {}, "words have classes, and the answers are 40 different numbers"),
    "one class of words": ("n.jsonl", {"label": "same"}, "all words are of one class, 'O'"),
    "no class of words": ("n.jsonl", {"label": "none"}, "holds no answer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, case: str) -> None:
    name, options, told = WRONG[case]
    (tmp_path / "a.txt").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    table(tmp_path / "a.jsonl", [{"text": f"text {i}", "other": "b", "label": i % 2} for i in range(20)])
    table(tmp_path / "b.jsonl", [{"text": "a", "what": i} for i in range(20)])
    table(tmp_path / "c.jsonl", [{"a": "a", "b": "b", "label": i % 2} for i in range(20)])
    table(tmp_path / "d.jsonl", [{"text": "a", "label": 1} for i in range(20)])
    (tmp_path / "a.csv").write_text("text,label\n" + "a b,O O\n" * 5)
    table(tmp_path / "w.jsonl", WORDS)
    more = {"same": ["O", "O"], "none": [None, ""]}
    table(tmp_path / "n.jsonl", [{"tokens": ["a", "b"], "tags": [i / 7, -i / 7 - 1], **more} for i in range(20)])
    with pytest.raises(st.DataError, match=told) as caught:
        load(tmp_path / name, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_without_images_says_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(st.DataError, match="one folder of images a class"):
        load(tmp_path)


@pytest.mark.parametrize("flag", [int, bool])
def test_lists_of_flags_are_a_label_each(tmp_path: Path, flag: type) -> None:
    rows = [{"text": f"text {i}", "labels": [flag(i % 2), flag(i % 3 == 0), flag(1)]} for i in range(20)]
    data = load(table(tmp_path / "a.jsonl", rows), split=False)
    assert data.problem == "labels" and data.names == ["labels 1", "labels 2", "labels 3"]
    assert data.splits["train"].targets[:3].tolist() == [[0, 1, 1], [1, 0, 1], [0, 0, 1]]
    renamed = load(tmp_path / "a.jsonl", names=["odd", "third", "all"], split=False)
    assert torch.equal(renamed.splits["train"].targets, data.splits["train"].targets)


def test_lists_of_the_labels_zero_and_one_are_no_flags(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "labels": [[0, 1], [1], [0]][i % 3]} for i in range(12)]
    data = load(table(tmp_path / "a.jsonl", rows), split=False)
    assert data.names == ["0", "1"] and data.splits["train"].targets[:3].tolist() == [[1, 1], [0, 1], [1, 0]]


def test_folders_beside_those_of_splits_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder(tmp_path / "photos" / split, cat=4, dog=4)
    assert load(tmp_path / "photos").names == ["cat", "dog"]
    folder(tmp_path / "photos" / "unlabeled", misc=3)
    with pytest.raises(st.DataError, match="has the folders of splits test, train, and also unlabeled; move these"):
        load(tmp_path / "photos")
    folder(tmp_path / "twice" / "train", cat=4, dog=4)
    for split in ("val", "validation"):
        folder(tmp_path / "twice" / split, cat=4, dog=4)
    with pytest.raises(st.DataError, match="and also val; move these"):
        load(tmp_path / "twice")
    # What holds no image is no class, and a class may have that name.
    (tmp_path / "photos" / "unlabeled").rename(tmp_path / "elsewhere")
    (tmp_path / "photos" / "docs").mkdir()
    assert load(tmp_path / "photos").names == ["cat", "dog"]
    assert load(folder(tmp_path / "vehicles", train=8, bus=8, car=8)).names == ["bus", "car", "train"]


def test_a_table_is_of_the_split_of_its_folder(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        table(tmp_path / split / "0.jsonl", rows if split == "train" else rows[:6])
    data = load(tmp_path)
    assert sizes(data)["test"] == 6 and "test" in data.splits


def test_splits_that_are_left_out_are_told(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(20)], "label": ["a", "b"] * 10})
    splits = {"train": rows, "unsupervised": rows, "dev": rows.select(range(4)), "validation": rows.select(range(6))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved")
    said(data, "left out: the splits unsupervised, dev, which are not train, validation or test")
    assert sizes(data) == {"train": 20, "validation": 6}


def test_columns_of_several_answers_are_taken_by_their_names(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "x": i % 2, "y": int(i % 3 == 0)} for i in range(12)]
    source = table(tmp_path / "a.jsonl", rows)
    data = load(source, label=["x", "y"], problem="labels", split=False)
    swapped = load(source, label=["y", "x"], problem="labels", names=["x", "y"], split=False)
    assert torch.equal(swapped.splits["train"].targets, data.splits["train"].targets)
    renamed = load(source, label=["x", "y"], problem="labels", names=["odd", "third"], split=False)
    said(renamed, "the columns x, y are taken for odd, third, in this order")
    for label in (["x"], ["x", "text"]):
        with pytest.raises(st.DataError):
            load(source, label=label, problem="labels", names=["x", "y"], split=False)


def test_columns_that_are_called_zero_and_one_are_labels(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "0": i % 2, "1": int(i % 3 == 0)} for i in range(12)]
    source = table(tmp_path / "a.jsonl", [*rows, {"text": "odd", "0": 2, "1": 0}])
    for names in (None, ["0", "1"]):
        data = load(source, label=["0", "1"], problem="labels", names=names, split=False)
        assert data.splits["train"].targets[:3].tolist() == [[0, 1], [1, 0], [0, 0]]
        said(data, "1 with the unknown label '2'")


def test_a_name_with_a_space_after_it_is_the_same_class(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ["cat", "cat ", "dog"][i % 3]} for i in range(12)]
    assert load(table(tmp_path / "a.jsonl", rows), split=False).names == ["cat", "dog"]


def test_what_csv_calls_missing_is_told(tmp_path: Path) -> None:
    lines = [f"text {i},{['None', 'mild', 'strong'][i % 3]}" for i in range(12)]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    data = load(tmp_path / "a.csv", split=False)
    assert data.names == ["mild", "strong"]
    said(data, "left out of train: 4 with no answer", "in CSV an empty cell, None and NA are no answer")


def test_lists_are_no_classes(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": ["a", "b"]} for i in range(4)]
    with pytest.raises(st.DataError, match="a row has one class, and these are lists"):
        load(table(tmp_path / "a.jsonl", rows), problem="classes")
