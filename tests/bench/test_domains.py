"""Files of Taskonomy's domains: names, encodings, and everything that can be wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from sidetuning.errors import DataError, ShapeError, UnknownNameError
from sidetuning_bench.domains import DOMAINS, path_of, read, write
from taskonomy_parts import DEEP, SUFFIX, N, file_of, put, raw_values


def test_the_table_is_that_of_the_release() -> None:
    assert {d.name: d.suffix for d in DOMAINS.values()} == SUFFIX
    assert {d.name for d in DOMAINS.values() if d.bits == 16} == set(DEEP)
    geometric = {
        "normal",
        "principal_curvature",
        "reshading",
        "edge_occlusion",
        "keypoints3d",
        "depth_euclidean",
        "depth_zbuffer",
    }
    assert {d.name for d in DOMAINS.values() if d.geometric} == geometric
    assert path_of("r", "curvature", "b", 10, 2) == Path(
        "r/principal_curvature/b/point_10_view_2_domain_principal_curvature.png"
    )
    with pytest.raises(UnknownNameError, match=r"domain 'normals' is not known; did you mean 'normal'"):
        path_of("r", "normals", "b", 0, 0)


@pytest.mark.parametrize("domain", [d for d in SUFFIX if d != "point_info"])
def test_a_file_of_the_release_is_read_as_it_is(domain: str, tmp_path: Path) -> None:
    values = put(file_of(tmp_path, domain), raw_values(domain, np.random.default_rng(1)))
    raw = read(path_of(tmp_path, domain, "hanson", 0, 0), domain)
    d = DOMAINS[domain]
    if d.bits == 32:
        assert raw.dtype == np.float32 and np.array_equal(raw, values)
    elif d.channels == 0:
        assert raw.dtype == np.uint8 and np.array_equal(raw, values)
    elif d.bits == 16:
        assert raw.dtype == np.int32 and raw.shape == (1, N, N) and np.array_equal(raw[0], values)
    else:
        assert raw.dtype == np.uint8 and raw.shape == (d.channels, N, N)
        assert np.array_equal(raw.transpose(1, 2, 0), values[..., : d.channels])


def test_16_bits_do_not_wrap_in_any_mode_of_pillow(tmp_path: Path) -> None:
    values = np.array([[0, 32767], [32768, 65535]])
    for mode, array in (
        ("I;16", values.astype("<u2")),
        ("I", values.astype(np.int32)),
        ("I;16B", values.astype(">u2")),
    ):
        path = tmp_path / f"{mode[-1]}.png"
        # A PNG has one of the modes, whichever the version.
        Image.frombytes(mode, (2, 2), array.tobytes()).save(path, "TIFF")
        with Image.open(path) as image:
            assert image.mode == mode
        assert read(path, "depth_zbuffer")[0].tolist() == values.tolist()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "png.png")
    assert read(tmp_path / "png.png", "depth_zbuffer")[0].tolist() == values.tolist()
    Image.fromarray(values.astype(np.int32) + 1).save(tmp_path / "more.png", "TIFF")
    with pytest.raises(DataError, match=r"more.png is a picture of mode I; depth_zbuffer needs 16-bit grey"):
        read(tmp_path / "more.png", "depth_zbuffer")


KINDS = {
    "16-bit grey": "depth_euclidean:L edge_texture:RGB",
    "8-bit RGB": "rgb:I;16 rgb:L normal:LA curvature:F",
    "8-bit grey": "reshading:I;16 mask_valid:F segment_semantic:I;16 segment_semantic:1",
}


@pytest.mark.parametrize(
    ("domain", "mode", "needs"),
    [(*case.split(":"), needs) for needs, cases in KINDS.items() for case in cases.split()],
)
def test_a_picture_of_another_kind_is_refused(domain: str, mode: str, needs: str, tmp_path: Path) -> None:
    Image.new(mode, (2, 2)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(DataError, match=rf"a.png is a picture of mode {mode}; .* needs {needs}: save it again"):
        read(tmp_path / "a.png", domain)


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path: Path) -> None:
    colours = raw_values("rgb", np.random.default_rng(0), 4)
    rgba = Image.fromarray(np.dstack([colours, np.arange(16, dtype=np.uint8).reshape(4, 4)]))
    rgba.save(tmp_path / "rgba.png")
    # Neither blended nor blackened.
    assert np.array_equal(read(tmp_path / "rgba.png", "rgb").transpose(1, 2, 0), colours)

    palette = Image.fromarray(np.array([[0, 1], [2, 17]], dtype=np.uint8)).convert("P")
    palette.putpalette([c for i in range(256) for c in (i, 255 - i, 7)])
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    assert read(tmp_path / "palette.png", "segment_semantic").tolist() == [[0, 1], [2, 17]]
    assert read(tmp_path / "palette.png", "normal")[:, 0, 1].tolist() == [1, 254, 7]
    Image.fromarray(np.full((2, 2, 4), 3, np.uint8)).save(tmp_path / "grey.png")
    assert read(tmp_path / "grey.png", "segment_semantic").tolist() == [[3, 3], [3, 3]]
    with pytest.raises(DataError, match=r"rgba.png .* segment_semantic needs 8-bit grey"):
        read(tmp_path / "rgba.png", "segment_semantic")
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read(tmp_path / "bits.png", "mask_valid").tolist() == [[255, 0]]
    Image.fromarray(np.array([[9, 200]], np.uint8)).save(tmp_path / "one.png")
    assert read(tmp_path / "one.png", "reshading").tolist() == [[[9, 200]]]


@pytest.mark.parametrize("damage", ["half", "empty", "text"])
@pytest.mark.parametrize("domain", ["rgb", "depth_zbuffer", "class_object"])
def test_a_damaged_file_is_named_with_the_remedy(damage: str, domain: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, domain)
    put(path, raw_values(domain, np.random.default_rng(0), 64))
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    with pytest.raises(DataError, match=rf"{path.name} is .*; download or render it again"):
        read(path, domain)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"edge_texture has no file .*point_3_view_1_domain_edge_texture.png; download or render it"
    ):
        read(path_of(tmp_path, "edge_texture", "hanson", 3, 1), "edge_texture")
    with pytest.raises(DataError, match=r"point_info is JSON text, no tensor; .* json.loads"):
        read(tmp_path / "x.json", "point_info")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_scores_are_one_vector_of_finite_numbers_and_never_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    np.save(path, np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"scores.npy is no readable .npy file of numbers .*Object arrays.*; download"):
        read(path, "class_object")
    assert not (tmp_path / "sprung").exists()
    for bad in (np.zeros((2, 3)), np.array([1.0, np.nan]), np.zeros(0), np.array(["a"]), np.array(1.0)):
        np.save(path, bad)
        with pytest.raises(DataError, match=r"scores.npy must hold one vector of finite numbers for class_scene"):
            read(path, "class_scene")
    np.save(path, np.arange(3)[None])
    assert read(path, "class_object").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("domain", "values", "message"),
    [
        ("rgb", np.full((2, 2, 3), 200.0), "rgb takes values from 0 to 1, not 200 to 200"),
        ("rgb", np.full((2, 2, 3), 200), "rgb takes floating-point values, or uint8 as in the file, not int64"),
        ("normal", np.full((2, 2, 3), -3.0), "normal takes values from -1 to 1"),
        ("depth_zbuffer", np.zeros((2, 2, 1)), r"depth_zbuffer takes values of the shape \(h, w\), not \(2, 2, 1\)"),
        ("curvature", np.zeros((2, 2, 4)), r"principal_curvature takes values of the shape \(h, w, 2\)"),
        ("class_object", np.zeros((2, 2)), r"class_object takes values of the shape \(n,\)"),
        (
            "segment_semantic",
            np.full((2, 2), 256),
            "segment_semantic takes whole numbers from 0 to 255, not int64 up to 256",
        ),
        ("segment_semantic", np.full((2, 2), -1), "segment_semantic takes whole numbers"),
        ("segment_semantic", np.full((2, 2), 0.5), "segment_semantic takes whole numbers from 0 to 255, not float64"),
    ],
)
def test_values_that_a_file_cannot_hold_are_refused(
    domain: str, values: npt.NDArray[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((DataError, ShapeError), match=message):
        write(tmp_path / "sub/a.png", domain, values)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = path_of(tmp_path, "edge_texture", "map01", 0, 0)
    write(path, "edge_texture", np.zeros((2, 2)))
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=rf"{path.name} cannot be written .*No space left.*; free space"):
        write(path, "edge_texture", np.ones((2, 2)))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    monkeypatch.undo()
    (tmp_path / "a file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "a file/a.png", "edge_texture", np.ones((2, 2)))
    write(path_of(tmp_path, "point_info", "map01", 0, 0), "point_info", {"yaw": 1.5})
    assert json.loads(file_of(tmp_path, "point_info", "map01").read_text()) == {"yaw": 1.5}
