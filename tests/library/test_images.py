"""Image files of every kind: read as they are, or refused in a sentence before they take memory."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidetuning.errors import DataError
from sidetuning.images import MOST_PIXELS, image_endings, image_folder
from sidetuning.transforms import decode_image, upright

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "TGA", "PCX", "SGI", "JPEG2000", "DIB"])
def test_lossless_formats_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(PIXELS), kind, **options)
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert torch.equal(decode_image(data), expected)
    (tmp_path / "image").write_bytes(data)
    assert torch.equal(decode_image(tmp_path / "image"), expected)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "AVIF", "MPO"])
def test_lossy_formats_are_read(kind: str) -> None:
    assert decode_image(encoded(Image.new("RGB", (9, 6), (200, 30, 40)), kind)).shape == (3, 6, 9)


def test_endings_are_those_of_the_formats_that_are_read() -> None:
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".mpo", ".ppm"} <= image_endings()
    assert not {".eps", ".ps", ".wmf", ".ico", ".icns", ".pdf", ".txt"} & image_endings()


@pytest.mark.parametrize("kind", ["EPS", "ICO", "ICNS", "PDF"])
def test_other_formats_start_nothing(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    (tmp_path / "photo.png").write_bytes(encoded(Image.new("RGB", (16, 16)), kind))
    with pytest.raises(DataError, match=r"cannot be decoded.*of a format that is not read \(AVIF"):
        decode_image(tmp_path / "photo.png")


HEADER = b"IHDR" + struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0)
LARGE = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\r" + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + b"\0\0\0dIDAT",
    "gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 10_000, 9_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 9000 9000 255\n",
    "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 30_000, 30_000, 24, 32),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", LARGE)
def test_sizes_are_checked_before_memory_is_taken(kind: str) -> None:
    with pytest.raises(DataError, match=f"more than {MOST_PIXELS:,} pixels; make it smaller"):
        decode_image(LARGE[kind])


def tiff(values: np.ndarray[Any, Any], **tags: int) -> bytes:
    """A grey TIFF of one strip with tags as they are given."""
    height, width = values.shape
    entries = {256: width, 257: height, 258: values.itemsize * 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries |= {279: values.nbytes, 339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind]}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    body = values.tobytes()
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(entries)) + table + b"\0" * 4


RAMP = np.array([[0, 257, 32_896, 65_535]])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "PNG"), [0, 1, 128, 255]),
        (encoded(Image.fromarray(RAMP.astype(np.uint16)), "TIFF"), [0, 1, 128, 255]),
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "PPM"), [0, 1, 128, 255]),
        (tiff(RAMP.astype("<u2"), t262=0), [255, 254, 127, 0]),
        # 12 bits: two values in three bytes.
        (tiff(np.frombuffer(b"\x00\x00\x10\x80\x8f\xff", np.uint8)[None], t256=4, t258=12), [0, 0, 128, 255]),
        (encoded(Image.fromarray(np.array([[0, 0.5, 0.25, 1]], np.float32)), "TIFF"), [0, 128, 64, 255]),
        (encoded(Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8)), "TIFF"), [0, 1, 128, 255]),
    ],
)
def test_deep_images_are_scaled(data: bytes, expected: list[int]) -> None:
    assert decode_image(data)[:, 0].tolist() == [expected] * 3


@pytest.mark.parametrize(
    "values",
    [RAMP.astype(np.int32), RAMP.astype(np.float32), np.array([[0.5, np.nan]], np.float32), np.array([[-0.1]], "<f4")],
)
def test_values_without_a_known_range_are_refused(values: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match="save it with 8 or 16 bits"):
        decode_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("values", [RAMP.astype("<i2"), RAMP.astype("<u4")])
def test_signed_and_wide_integers_are_refused(values: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"save it with 8 or 16 bits|cannot be decoded"):
        decode_image(tiff(values))


def test_palettes_with_transparency_give_their_colours() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(encoded(image, "PNG", transparency=bytes([0, 128])))[:, 0].T.tolist() == [
        [10, 20, 30],
        [40, 50, 60],
    ]


def test_a_device_or_a_folder_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(DataError, match="not an image file"):
            decode_image(path)


def make(root: Path, *files: str) -> Path:
    """Small images; other files where the name ends in a letter of no image."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix.lower() in image_endings():
            Image.new("RGB", (8, 8)).save(root / name)
        else:
            (root / name).write_text("no image")
    return root


def test_images_of_every_ending_and_of_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    root = make(tmp_path, "a/1.png", "b/1.WEBP", "b/2.tif", "b/3.GIF", "c/more/1.JPG", "c/more/still/2.jpeg", "c/3.Bmp")
    found = image_folder(root)
    assert found.names == ["a", "b", "c"] and found.labels == [0, 1, 1, 1, 2, 2, 2] and found.skipped == {}
    assert [str(file.relative_to(root)) for file in found.files[4:]] == [
        "c/3.Bmp",
        "c/more/1.JPG",
        "c/more/still/2.jpeg",
    ]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    root = make(tmp_path, "cat/1.png", "cat/notes.txt", "cat/Thumbs.db", "cat/.2.png", "cat/.cache/3.png", "4.png")
    make(root, ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png", "labels.csv", "cat copy/1.png", "cat - Copy/1.png")
    make(root, "Copy of cat/1.png", "cat (2)/1.png", "cat (copy)/1.png", "dog copy/1.png", "dog 2/1.png", "empty/x.txt")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "cat" / "round").symlink_to(root)
    (root / "cat" / "linked.png").symlink_to(root / "4.png")
    found = image_folder(root)
    assert found.names == ["cat", "dog 2", "dog copy"]
    assert [file.name for file in found.files] == ["1.png", "linked.png", "1.png", "1.png"]
    assert found.skipped == {
        "hidden files and folders": 4,
        "files that end in .txt": 2,
        "files that end in .db": 1,
        "files that end in .csv": 1,
        "images outside the classes": 1,
        "copied classes": 5,
        "devices, pipes and broken links": 2,
        "links to folders": 1,
        "classes without an image (empty)": 1,
    }


def test_classes_that_are_known_keep_their_numbers(tmp_path: Path) -> None:
    root = make(tmp_path, "cat/1.png", "fox/1.png")
    found = image_folder(root, ["cat", "dog", "fox"])
    assert found.labels == [0, 2] and found.names == ["cat", "dog", "fox"]
    assert found.skipped == {"classes without an image (dog)": 1}
    # One letter with its accent, and a letter with an accent after it.
    make(root, "caf\u00e9/1.png", "cafe\u0301/2.png")
    assert image_folder(root).names == ["caf\u00e9", "cat", "fox"] and image_folder(root).labels == [0, 0, 1, 2]


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", make(tmp_path, "1.png") / "1.png"):
        with pytest.raises(DataError, match="one folder of images a class"):
            image_folder(path)


def test_numbers_in_memory_whose_range_nobody_tells_are_refused() -> None:
    with pytest.raises(DataError, match="whose range no file tells"):
        upright(Image.fromarray(np.full((8, 8), 200, np.int32)))


def test_names_that_are_no_utf_8_stay_apart(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"caf\xe8", b"tea "):
        make(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), "1.png")
    assert image_folder(tmp_path).names == [r"caf\xe8", r"caf\xe9", "tea"]
