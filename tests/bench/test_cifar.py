"""Small labelled images: what is damaged or missing is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import sidetuning as st
from conftest import conv_base, write_parquet
from sidetuning.errors import DataWarning
from sidetuning_bench.cifar import load_images


def test_data_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(st.DataError, match="does not exist"):
        load_images(tmp_path / "nowhere", "train")
    with pytest.raises(st.DataError, match=r"neither train\*\.parquet"):
        load_images(tmp_path, "train")


def images(n: int = 3, size: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("column", ["img", "fine_label"])
def test_a_missing_column_is_named(column: str, tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", images(), [0, 1, 2])
    (file,) = tmp_path.iterdir()
    pq.write_table(pq.read_table(file).drop_columns([column]), file)
    with pytest.raises(st.DataError, match=f"needs one of .*{column}"):
        load_images(tmp_path, "train")


def test_a_corrupt_image_is_named_by_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", images(), [0, 1, 2])
    (file,) = tmp_path.iterdir()
    table = pq.read_table(file)
    cells = table["img"].to_pylist()
    cells[1]["bytes"] = cells[1]["bytes"][:200]
    pq.write_table(pa.table({"img": cells, "fine_label": [0, 1, 2]}), file)
    data = load_images(tmp_path, "train")
    assert data[0][0].shape == data[2][0].shape == (3, 32, 32)
    with pytest.raises(st.DataError, match=r"row 1 of .*cannot be decoded"):
        data[1]


def test_a_corrupt_image_stops_the_cache_with_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", "train", images(), [0, 1, 2])
    (file,) = (tmp_path / "data").iterdir()
    cells = pq.read_table(file)["img"].to_pylist()
    cells[2]["bytes"] = b"no image"
    pq.write_table(pa.table({"img": cells, "fine_label": [0, 1, 2]}), file)
    with pytest.raises(st.DataError, match="row 2"):
        st.cache_features(conv_base(), load_images(tmp_path / "data", "train"), tmp_path / "cache", progress=False)


def test_an_image_of_another_size_is_named_by_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", images(), [0, 1, 2])
    (file,) = tmp_path.iterdir()
    cells = pq.read_table(file)["img"].to_pylist()
    buffer = io.BytesIO()
    Image.fromarray(images(1, 16)[0]).save(buffer, "PNG")
    cells[2]["bytes"] = buffer.getvalue()
    pq.write_table(pa.table({"img": cells, "fine_label": [0, 1, 2]}), file)
    data = load_images(tmp_path, "train")
    with pytest.raises(st.DataError, match=r"row 2 .*\(3, 16, 16\).*\(3, 32, 32\)"):
        data[2]


def test_a_label_outside_the_classes_is_named_by_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", images(), [0, -1, 2])
    with pytest.raises(st.DataError, match=r"row 1 .*-1"):
        load_images(tmp_path, "train")
    (file,) = tmp_path.iterdir()
    cells = pq.read_table(file)["img"].to_pylist()
    about = {
        "info": {
            "features": {"img": {"_type": "Image"}, "fine_label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
        }
    }
    schema = {b"huggingface": json.dumps(about).encode()}
    good, bad = ([0, 1, 1], [0, 1, 2])
    pq.write_table(pa.table({"img": cells, "fine_label": good}).replace_schema_metadata(schema), file)
    assert load_images(tmp_path, "train").names == ["cat", "dog"]
    pq.write_table(pa.table({"img": cells, "fine_label": bad}).replace_schema_metadata(schema), file)
    with pytest.raises(st.DataError, match=r"row 2 .*label 2, outside 0 … 1"):
        load_images(tmp_path, "train")


def test_a_file_that_is_no_parquet_is_said(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(st.DataError, match="no readable parquet"):
        load_images(tmp_path, "train")


def test_folders_of_image_files_are_data_too(tmp_path: Path) -> None:
    for name, image in zip(("cat", "dog"), images(2), strict=True):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "test" / name / "0.png")
    data = load_images(tmp_path, "test")
    assert data.names == ["cat", "dog"] and data.labels.tolist() == [0, 1]
    assert torch.equal(data[1][0], torch.from_numpy(images(2)[1]).permute(2, 0, 1))
    (tmp_path / "train").mkdir()
    with pytest.raises(st.DataError, match="no image"):
        load_images(tmp_path, "train")


def folder_of(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def test_a_class_has_one_number_in_all_splits(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/cat/1.png", "train/dog/1.png", "train/fox/1.png", "test/cat/1.png")
    folder_of(root, "test/fox/in/2.WebP", "val/ant/1.png", "train/.ipynb_checkpoints/1.png")
    with pytest.warns(DataWarning, match=r"test has 2 images; left out: 2 classes without an image \(ant, dog\)"):
        test = load_images(root, "test")
    assert test.names == ["ant", "cat", "dog", "fox"] and test.labels.tolist() == [1, 3]
    with pytest.warns(DataWarning, match=r"train has 3 images.*1 hidden files and folders"):
        assert load_images(root, "train").labels.tolist() == [1, 2, 3]


def test_a_damaged_image_of_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    root = folder_of(tmp_path, "train/cat/1.png", "train/cat/2.png")
    (root / "train/cat/2.png").write_bytes(b"no image")
    with pytest.raises(st.DataError, match=r"train/cat/2.png: the image cannot be decoded"):
        load_images(root, "train")[1]


def test_an_empty_split_says_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.heic").touch()
    with pytest.raises(st.DataError, match=r"holds no image.*1 files that end in .heic"):
        load_images(tmp_path, "train")


def labelled(folder: Path, labels: Any, name: str = "train") -> Path:
    """A split of black images with these labels."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data.getvalue(), "path": None}] * len(labels)
    pq.write_table(pa.table({"image": cells, "label": labels}), folder / f"{name}.parquet")
    return folder


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        (pa.array(["b", "a"]).dictionary_encode(), ["a", "b"], [1, 0]),
        ([0.0, 2.0], ["0", "1", "2"], [0, 2]),
        ([True, False], ["0", "1"], [1, 0]),
        (pa.array([1, 0], pa.uint8()), ["0", "1"], [1, 0]),
    ],
)
def test_labels_of_every_kind_are_read(labels: Any, names: list[str], numbers: list[int], tmp_path: Path) -> None:
    data = load_images(labelled(tmp_path, labels), "train")
    assert data.names == names and data.labels.tolist() == numbers and data.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ([1.0, None], "row 1 .* has no label"),
        ([0.0, float("nan")], "row 1 .* has no label"),
        (["cat", None], "row 0 .* has the label 'cat'"),
        ([0.5], r"row 0 .* has the label 0\.5"),
        ([float("inf")], "row 0 .* has the label inf"),
        ([[0], [0, 1]], r"row 0 .* has the label \[0\]"),
        ([b"cat"], "row 0 .* has the label b'cat'"),
        ([{"a": 1}], "row 0 .* has the label {'a': 1}"),
        ([0, 10**9], "row 1 .* has the label 1000000000, above 65535"),
        ([-1], "row 0 .* has the label -1"),
    ],
)
def test_labels_of_no_class_are_named_by_their_row(labels: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(st.DataError, match=what):
        load_images(labelled(tmp_path, labels), "train")


def test_names_and_numbers_of_parquet_are_those_of_all_splits(tmp_path: Path) -> None:
    labelled(tmp_path, ["cat", "dog", "fox"])
    assert load_images(labelled(tmp_path, ["fox", "cat"], "test"), "test").labels.tolist() == [2, 0]
    labelled(tmp_path, [0, 4])
    assert load_images(labelled(tmp_path, [1, 0], "test"), "test").names == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "1.png"}, "1.png", [1, 2]])
def test_a_row_without_an_encoded_image_is_named(cell: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([cell]), "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(st.DataError, match=r"row 0 .* holds no image"):
        load_images(tmp_path, "train")


def test_a_small_file_of_many_rows_is_refused(tmp_path: Path) -> None:
    rows = 2_000_000
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([b"x"]))
    labels = pa.array(np.zeros(rows, np.int64))
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "train.parquet", compression="gzip")
    with pytest.raises(st.DataError, match=r"has 2,000,000 rows in [\d,]+ bytes"):
        load_images(tmp_path, "train")


def test_the_files_of_a_split_are_the_parts_of_one(tmp_path: Path) -> None:
    for k in range(2):
        labelled(tmp_path / "data", [k], f"train-0000{k}-of-00003")
    with pytest.raises(st.DataError, match="has 2 of 3 parts of train"):
        load_images(tmp_path, "train")
    labelled(tmp_path / "data", [2], "train-00002-of-00003")
    labelled(tmp_path / ".ipynb_checkpoints", [7], "train-00000-of-00003")
    labelled(tmp_path / "data", [8], "training")
    assert load_images(tmp_path, "train").labels.tolist() == [0, 1, 2]
    labelled(tmp_path / "data", [9], "train-00000-of-00003 (1)")
    with pytest.warns(DataWarning, match=r"train-00000-of-00003 \(1\).parquet is no part of"):
        assert load_images(tmp_path, "train").labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("stray", ["train_old", "train (1)", "other/train"])
def test_several_files_of_a_split_are_named(stray: str, tmp_path: Path) -> None:
    labelled(tmp_path, [0])
    labelled((tmp_path / stray).parent, [0], Path(stray).name)
    with pytest.raises(st.DataError, match="several files of train"):
        load_images(tmp_path, "train")


def test_a_split_is_a_file_or_a_folder(tmp_path: Path) -> None:
    folder_of(labelled(tmp_path, [0]), "train/cat/1.png")
    with pytest.raises(st.DataError, match=r"holds both train.parquet and images in train/"):
        load_images(tmp_path, "train")
