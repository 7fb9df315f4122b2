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
