"""Small files of other programs, for the campaign: pictures, parquet, questions, frames and weights."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import sidetuning as st
from sidetuning.transforms import decode_image
from sidetuning_bench import domains
from sidetuning_bench.cifar import load_images
from sidetuning_bench.language.questions import read_questions

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def make_images(folder: Path) -> None:
    for kind in FORMATS:
        (folder / f"one.{kind.lower()}").write_bytes(picture(kind))


def read_images(folder: Path) -> Any:
    return [decode_image(folder / f"one.{kind.lower()}").float() / 255 for kind in FORMATS]


def make_parquet(folder: Path) -> None:
    for split, rows in (("train", 6), ("test", 3)):
        cells = [{"bytes": picture("PNG"), "path": None} for _ in range(rows)]
        table = pa.table({"img": cells, "fine_label": [k % 3 for k in range(rows)]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def read_parquet(folder: Path) -> Any:
    return [load_images(folder, split).tensors() for split in ("train", "test")]


def make_questions(folder: Path) -> None:
    answers = [{"text": "in Rome", "answer_start": 8}]
    entries = [{"id": str(k), "question": "Where is it?", "answers": answers if k % 2 else []} for k in range(4)]
    paragraph = {"context": "It lies in Rome since 1850.", "qas": entries}
    for split in ("train", "dev"):
        text = json.dumps({"version": "2.0", "data": [{"title": "x", "paragraphs": [paragraph]}]})
        (folder / f"{split}.json").write_text(text)


def read_squad(folder: Path) -> Any:
    return repr([read_questions(folder, split) for split in ("train", "dev")])


FRAMES = ("rgb", "depth_zbuffer", "normal", "segment_semantic", "class_object")


def make_frames(folder: Path) -> None:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "rgb": rng.random((6, 6, 3)),
        "depth_zbuffer": rng.random((6, 6)),
        "normal": rng.random((6, 6, 3)),
        "segment_semantic": rng.integers(0, 9, (6, 6)),
        "class_object": rng.random(12),
    }
    for name in FRAMES:
        domains.write(domains.path_of(folder, name, "room", 0, 0), name, values[name])
    (folder / "names.json").write_text(json.dumps({"class_object": [f"thing {k}" for k in range(12)]}))


def read_frames(folder: Path) -> Any:
    found = [domains.read(domains.path_of(folder, name, "room", 0, 0), name) for name in FRAMES]
    return [found, domains.names(folder, "class_object")]


def make_weights(folder: Path) -> None:
    shutil.copyfile(Path(st.__file__).parent / "bases" / "resnet44-cifar10.safetensors", folder / "w.safetensors")


def read_weights(folder: Path) -> Any:
    found = st.load_base("resnet44-cifar10", weights=folder / "w.safetensors")
    return found.identity().sha256
