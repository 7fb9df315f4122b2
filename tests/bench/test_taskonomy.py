"""Taskonomy's layout: a folder made by hand as the release has it, its encodings, splits, and everything that can be wrong with it."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sidetuning.errors import DataError, ShapeError, UnknownNameError
from sidetuning_bench.dense.targets import target, units
from sidetuning_bench.dense.taskonomy import Taskonomy, read_split
from sidetuning_bench.domains import DOMAINS, encode, names, path_of, read, write

N = 8  # pixels of most pictures here; the release has 512
SUFFIX = {  # literally as in the release, not as the module thinks
    "rgb": "rgb.png", "normal": "normal.png", "principal_curvature": "principal_curvature.png", "reshading": "reshading.png",
    "depth_euclidean": "depth_euclidean.png", "depth_zbuffer": "depth_zbuffer.png", "edge_texture": "edge_texture.png",
    "edge_occlusion": "edge_occlusion.png", "keypoints2d": "keypoints2d.png", "keypoints3d": "keypoints3d.png",
    "segment_semantic": "segmentsemantic.png", "segment_unsup25d": "segment_unsup25d.png",
    "mask_valid": "depth_zbuffer.png", "class_object": "class_object.npy", "class_scene": "class_places.npy",
    "point_info": "point_info.json",
}  # fmt: skip
DEEP = ("depth_euclidean", "depth_zbuffer", "edge_texture", "edge_occlusion", "keypoints2d", "keypoints3d")
TINY = b"id,train,val,test\rhanson,1,0,0\rmerom,1,0,0\rtansboro,1,0,0\rmosquito,0,1,0\rwiconisco,0,1,0\rihlen,0,0,1"
FRAMES = {"hanson": 4, "merom": 3, "tansboro": 1, "wiconisco": 2, "ihlen": 1}


def file_of(root: Path, domain: str, building: str = "hanson", point: int = 0, view: int = 0) -> Path:
    return root / domain / building / f"point_{point}_view_{view}_domain_{SUFFIX[domain]}"


def raw_values(domain: str, rng: np.random.Generator, n: int = N) -> np.ndarray:
    """What the release's own files hold: its reshading is a grey in RGB, its curvature has a third channel."""
    if domain.startswith("class"):
        return rng.normal(size=1000 if domain == "class_object" else 365).astype(np.float32)
    if domain in DEEP:
        return rng.integers(0, 65536, (n, n), dtype=np.uint16)
    if domain == "segment_semantic":
        return rng.integers(0, 18, (n, n), dtype=np.uint8)
    if domain == "mask_valid":
        return np.where(rng.random((n, n)) < 0.8, 255, 0).astype(np.uint8)
    if domain == "reshading":
        return np.repeat(rng.integers(0, 256, (n, n, 1), dtype=np.uint8), 3, axis=2)
    return rng.integers(0, 256, (n, n, 3), dtype=np.uint8)


def put(path: Path, values: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return values


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """All domains of five buildings, two views of each point, and the tiny split with its CR line ends."""
    rng = np.random.default_rng(0)
    for domain in SUFFIX:
        for building, count in FRAMES.items():
            for i in range(count):
                path = file_of(tmp_path, domain, building, i // 2, i % 2)
                if path.suffix == ".json":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text('{"field_of_view_rads": 1.0}')
                else:
                    put(path, raw_values(domain, rng))
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/train_val_test_tiny.csv").write_bytes(TINY)
    return tmp_path


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


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
        Image.frombytes(mode, (2, 2), array.tobytes()).save(
            path, "TIFF"
        )  # a PNG has one of the modes, whichever the version
        with Image.open(path) as image:
            assert image.mode == mode
        assert read(path, "depth_zbuffer")[0].tolist() == values.tolist()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "png.png")
    assert read(tmp_path / "png.png", "depth_zbuffer")[0].tolist() == values.tolist()
    Image.fromarray(values.astype(np.int32) + 1).save(tmp_path / "more.png", "TIFF")
    with pytest.raises(DataError, match=r"more.png is a picture of mode I; depth_zbuffer needs 16-bit grey"):
        read(tmp_path / "more.png", "depth_zbuffer")


@pytest.mark.parametrize(
    ("domain", "mode", "needs"),
    [
        ("depth_euclidean", "L", "16-bit grey"), ("edge_texture", "RGB", "16-bit grey"), ("rgb", "I;16", "8-bit RGB"),
        ("rgb", "L", "8-bit RGB"), ("normal", "LA", "8-bit RGB"), ("curvature", "F", "8-bit RGB"),
        ("reshading", "I;16", "8-bit grey"), ("mask_valid", "F", "8-bit grey"), ("segment_semantic", "I;16", "8-bit grey"),
        ("segment_semantic", "1", "8-bit grey"),
    ],
)  # fmt: skip
def test_a_picture_of_another_kind_is_refused(domain: str, mode: str, needs: str, tmp_path: Path) -> None:
    Image.new(mode, (2, 2)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(DataError, match=rf"a.png is a picture of mode {mode}; .* needs {needs}: save it again"):
        read(tmp_path / "a.png", domain)


def test_transparency_is_dropped_and_palettes_are_looked_up(tmp_path: Path) -> None:
    colours = raw_values("rgb", np.random.default_rng(0), 4)
    rgba = Image.fromarray(np.dstack([colours, np.arange(16, dtype=np.uint8).reshape(4, 4)]))
    rgba.save(tmp_path / "rgba.png")
    assert np.array_equal(
        read(tmp_path / "rgba.png", "rgb").transpose(1, 2, 0), colours
    )  # neither blended nor blackened

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


def test_targets_are_in_the_ranges_of_the_original() -> None:
    ends = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    assert torch.allclose(target("rgb", ends), torch.tensor([[[-1, -0.6, 1.0]]]))
    deep = torch.tensor([[[0, 13107, 65535]]], dtype=torch.int32)
    assert torch.allclose(target("edge_texture", deep), torch.tensor([[[-1, -0.6, 1.0]]]))
    assert target("depth_zbuffer", deep).dtype == torch.float32
    ids = target("segment_semantic", torch.tensor([[17]], dtype=torch.uint8))
    assert ids.dtype == torch.int64 and ids.tolist() == [[17]]
    assert target("mask_valid", torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[0, 1]]
    with pytest.raises(
        ShapeError, match=r"target\('rgb', …\) takes the whole numbers that read\(\) gives, not torch.float32"
    ):
        target("rgb", torch.zeros(3, 2, 2))


def test_scores_become_probabilities_only_where_they_are_not() -> None:
    logits = torch.tensor([[0.5, 0.5, 0.0], [2.0, 1.0, 0.0], [2.0, -2.0, 1.0]])  # the last sums to 1, too
    expected = torch.stack([logits[0], logits[1].softmax(0), logits[2].softmax(0)])
    assert torch.allclose(target("class_object", logits), expected)
    assert torch.allclose(units("class_object", expected), expected)


def decoded(domain: str, values: np.ndarray, path: Path) -> np.ndarray:
    write(path, domain, values)
    back = units(domain, target(domain, torch.from_numpy(read(path, domain))))
    return back.permute(1, 2, 0).numpy() if back.ndim == 3 and len(back) > 1 else back.squeeze(0).numpy()


def test_round_trips_stay_within_half_a_step(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.png"
    metres = rng.uniform(0, 125, (40, 40)).astype(np.float32)
    assert abs(decoded("depth_zbuffer", metres, path) - metres).max() <= 0.5 / 512 + 1e-4
    normal = rng.normal(size=(40, 40, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    back = decoded("normal", normal, path)
    assert abs(np.linalg.norm(back, axis=-1) - 1).max() < 1e-6
    assert np.degrees(np.arccos((back * normal).sum(-1).clip(-1, 1))).max() < 0.5
    bent = rng.uniform(-2, 2, (40, 40, 2)).astype(np.float32)
    assert abs(decoded("curvature", bent, path) - bent).max() <= 1 / 127 + 1e-6
    with Image.open(path) as image:
        assert image.mode == "RGB" and (np.array(image)[..., 2] == 127).all()
    unit = rng.random((40, 40)).astype(np.float32)
    assert abs(decoded("reshading", unit, path) - unit).max() <= 0.5 / 255 + 1e-6
    assert abs(decoded("keypoints3d", unit, path) - unit).max() <= 0.5 / 65535 + 1e-6
    picture = raw_values("rgb", rng)
    assert abs(decoded("rgb", picture, path) * 255 - picture).max() < 1e-3
    ids = raw_values("segment_semantic", rng).astype(np.int64)
    assert np.array_equal(decoded("segment_semantic", ids, path), ids)
    mask = rng.random((5, 5)) < 0.5
    assert np.array_equal(decoded("mask_valid", mask, path), mask)
    scores = rng.dirichlet(np.ones(7))
    write(tmp_path / "a.npy", "class_object", scores)
    assert np.allclose(target("class_object", torch.from_numpy(read(tmp_path / "a.npy", "class_object"))), scores)


def test_walls_are_exact_and_what_is_unknown_is_marked(tmp_path: Path) -> None:
    axes = np.array([[[0, 0, 1], [0, -1, 0], [1, 0, 0]]], float)
    assert encode("normal", axes).tolist() == [[[127, 127, 254], [127, 0, 127], [254, 127, 127]]]
    assert np.allclose(decoded("normal", axes, tmp_path / "a.png"), axes, atol=1e-6)
    assert encode("normal", np.full((1, 1, 3), np.nan)).tolist() == [[[127] * 3]]
    assert encode("curvature", np.array([[[0.0, 9.0]]])).tolist() == [[[127, 254, 127]]]
    assert abs(decoded("curvature", np.zeros((1, 1, 2)), tmp_path / "b.png")).max() < 1e-6
    depth = encode("depth_zbuffer", np.array([[np.inf, np.nan, 1000.0, -1.0, 2.0]]))
    assert depth.dtype == np.uint16 and depth.tolist() == [[65535, 65535, 64499, 0, 1024]]
    assert encode("mask_valid", np.array([[True, False]])).tolist() == [[255, 0]]
    assert encode("depth_euclidean", np.array([[70.0]], np.float16)).tolist() == [
        [35840]
    ]  # times 512 is beyond float16


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
    domain: str, values: np.ndarray, message: str, tmp_path: Path
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


EXPECTED = {"train": ["hanson", "merom"], "val": ["wiconisco"], "test": ["ihlen"]}


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("around", [b"", b"\xef\xbb\xbf"])
def test_splits_are_read_with_any_line_ends(end: bytes, header: bool, around: bytes, tmp_path: Path) -> None:
    lines = TINY.split(b"\r")[0 if header else 1 :]
    (tmp_path / "mine.csv").write_bytes(around + end.join([*lines[:3], b"", *lines[3:], b" ", b""]))
    assert read_split(tmp_path / "mine.csv", "elsewhere") == EXPECTED  # neither mosquito nor tansboro


def test_columns_go_by_their_names_and_a_building_may_be_in_all_splits(tmp_path: Path) -> None:
    (tmp_path / "debug.csv").write_text("id,test,val,train\na,1,0,0\nb, 1, 1, 1\n")
    assert read_split("debug.csv", tmp_path) == {"train": ["b"], "val": ["b"], "test": ["a", "b"]}


@pytest.mark.parametrize("line", ["b,1,0", "b,1,0,0,0", "b,yes,no,no", ",1,0,0", "b;1;0;0"])
def test_a_bad_line_of_a_split_is_shown(line: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f"id,train,val,test\na,1,0,0\n{line}\n")
    with pytest.raises(
        DataError, match=rf"s.csv has the line '{line}'; expected id,train,val,test such as hanson,1,0,0"
    ):
        read_split("s.csv", tmp_path)


def test_split_files_are_found_in_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_split("tiny", root) == EXPECTED
    (root / "train_val_test_full.csv").write_text("ihlen,1,0,0")
    assert read_split("full", root)["train"] == ["ihlen"]
    (root / "tiny").write_text("merom,1,0,0")  # ROOT/<name> goes before ROOT/splits
    assert read_split("tiny", root)["train"] == ["merom"]
    with pytest.raises(
        DataError,
        match=r"no split file fullplus in .*; there is splits/train_val_test_tiny.csv, train_val_test_full.csv.*split=None",
    ):
        read_split("fullplus", root)
    (root / "empty.csv").write_text("id,train,val,test\r")
    with pytest.raises(DataError, match=r"empty.csv names no building"):
        read_split("empty.csv", root)
    (root / "utf16.csv").write_bytes("id,train".encode("utf-16"))
    with pytest.raises(DataError, match=r"utf16.csv cannot be read as text"):
        read_split("utf16.csv", root)
    with pytest.raises(DataError, match=r"no split file .*splits.csv in .*; there is .*train_val_test_tiny.csv"):
        Taskonomy(root, subset=None)
    (root / "splits.csv").write_text("merom,0,0,1")
    (root / "tmp").mkdir()
    (root / "tmp/splits.csv").write_text("hanson,0,0,1")
    monkeypatch.chdir(root / "tmp")  # a splits.csv that happens to lie where one works is not meant
    assert {b for b, _, _ in Taskonomy(root, subset=None, split="test").frames} == {"merom"}


def test_a_sample_has_what_was_asked_by_the_names_asked(root: Path) -> None:
    data = Taskonomy(root, domains=("rgb", "curvature", "depth_zbuffer", "segment_semantic", "class_object"))
    assert len(data) == 7 and {b for b, _, _ in data.frames} == {"hanson", "merom"} and data.absent == []
    sample = data[1]
    assert list(sample) == ["rgb", "curvature", "depth_zbuffer", "segment_semantic", "class_object", "mask"]
    assert data.shapes == {k: tuple(v.shape) for k, v in sample.items()}
    assert sample["curvature"].shape == (2, N, N) and sample["class_object"].shape == (1000,)
    assert data.frames[1] == ("hanson", 0, 1)
    assert data.path(1, "curvature") == file_of(root, "principal_curvature", "hanson", 0, 1)
    with Image.open(file_of(root, "mask_valid", "hanson", 0, 1)) as image:
        assert sample["mask"].dtype == torch.bool and np.array_equal(sample["mask"].numpy(), np.array(image) == 255)
    assert len(Taskonomy(root, split="val")) == 2
    assert len(Taskonomy(root, split=None)) == 10  # tansboro's folder is there, and broken
    assert len(list(Taskonomy(root, domains="rgb"))) == 7


def test_frames_are_in_the_order_of_their_numbers(root: Path) -> None:
    for point in (10, 2):
        put(file_of(root, "rgb", "merom", point, 0), np.zeros((N, N, 3), np.uint8))
    for stray in (
        "point_1_view_0_domain_normal.png",
        ".point_7_view_0_domain_rgb.png.12.tmp",
        "point_01_view_0_domain_rgb.png",
    ):
        (root / "rgb/merom" / stray).touch()
    remove(root / "mask_valid")
    remove(root / "depth_zbuffer")
    frames = Taskonomy(root, domains=("rgb",)).frames
    assert [f[1:] for f in frames if f[0] == "merom"] == [(0, 0), (0, 1), (1, 0), (2, 0), (10, 0)]


def test_the_mask_falls_back_on_the_depth_and_then_on_nothing(root: Path) -> None:
    remove(root / "mask_valid")
    edge = np.full((N, N), 64499, np.uint16)
    edge[0, 0], edge[0, 1] = 64500, 65535
    put(file_of(root, "depth_zbuffer"), edge)
    mask = Taskonomy(root)[0]["mask"]
    assert mask.sum() == N * N - 2 and not mask[0, :2].any()
    remove(root / "depth_zbuffer")
    assert Taskonomy(root)[0]["mask"].shape == (N, N) and Taskonomy(root).tensors("mask").all()
    assert Taskonomy(root, domains=("class_scene",))[0]["mask"].tolist() == [[True]]


def test_a_mask_of_ones_is_valid_as_well(root: Path) -> None:
    put(file_of(root, "mask_valid"), np.eye(N, dtype=np.uint8))
    assert Taskonomy(root)[0]["mask"].sum() == N


def test_missing_domains_and_files_are_told(root: Path) -> None:
    remove(root / "edge_texture")
    with pytest.raises(
        DataError, match=r"has no folder edge_texture; its domains: class_object, .*Ask for these, or download it"
    ):
        Taskonomy(root, domains=("rgb", "edge_texture"))
    (root / "normal").rename(root / "normals")
    with pytest.raises(DataError, match=r"no folder normal; .*, rename the folder normals if it is that, or download"):
        Taskonomy(root)
    for point, view in ((0, 1), (1, 0)):
        file_of(root, "reshading", "hanson", point, view).unlink()
    with pytest.raises(
        DataError,
        match=r"2 of 7 frames have no file of reshading; the first is .*hanson/point_0_view_1_domain_reshading.*leave reshading out, or name it first",
    ):
        Taskonomy(root, domains=("rgb", "reshading"))
    assert len(Taskonomy(root, domains=("reshading", "rgb"))) == 5  # the remedy works
    remove(root / "reshading/merom")
    assert Taskonomy(root, domains=("reshading", "rgb")).absent == ["merom"]
    file_of(root, "mask_valid", "merom", 1, 0).unlink()
    with pytest.raises(
        DataError, match=r"1 of 7 frames have no file of mask_valid, from which the mask is read; the first is"
    ):
        Taskonomy(root, domains=("rgb",))
    with pytest.raises(DataError, match=r"nowhere is no folder; give the one that holds the folders of the domains"):
        Taskonomy(root / "nowhere")
    (root / "other.csv").write_text("model,1,0,0")
    with pytest.raises(
        DataError, match=r"rgb has no frame of model; expected files like rgb/model/point_0_view_0_domain_rgb.png"
    ):
        Taskonomy(root, domains=("rgb",), subset="other.csv")


def test_wrong_arguments_are_told(root: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"domain 'depth_zbufer' is not known; did you mean 'depth_zbuffer'"):
        Taskonomy(root, domains=("rgb", "depth_zbufer"))
    with pytest.raises(UnknownNameError, match=r"split 'training' is not known; did you mean 'train'"):
        Taskonomy(root, split="training")
    with pytest.raises(DataError, match=r"point_info is JSON text"):
        Taskonomy(root, domains=("rgb", "point_info"))
    with pytest.raises(DataError, match="has 7 frames of this, not 8"):
        Taskonomy(root, limit=8)
    for wrong in ({"domains": ()}, {"size": 0}, {"limit": 0}):
        with pytest.raises(DataError, match=r"at least|not 0"):
            Taskonomy(root, **wrong)
    with pytest.raises(UnknownNameError, match=r"domain 'reshading' is not asked for; there is rgb, normal, mask"):
        Taskonomy(root).tensors("reshading")
    with pytest.raises(UnknownNameError, match=r"domain 'mask_valid' is not asked for; there is rgb"):
        Taskonomy(root).tensors("mask_valid")


def test_few_frames_are_nested_even_and_of_the_seed(tmp_path: Path) -> None:
    for building, count in (("a", 40), ("b", 40), ("c", 3), ("d", 40)):
        for i in range(count):
            put(file_of(tmp_path, "rgb", building, i), np.zeros((1, 1, 3), np.uint8))

    def few(limit: int | None, seed: int = 0) -> list[tuple[str, int, int]]:
        return Taskonomy(tmp_path, domains=("rgb",), split=None, limit=limit, seed=seed).frames

    assert few(20) == few(20) == few(100)[:20]
    assert Counter(b for b, _, _ in few(12)) == {"a": 3, "b": 3, "c": 3, "d": 3}
    assert sorted(Counter(b for b, _, _ in few(20)).values()) == [3, 5, 6, 6]  # c has no more
    assert sorted(few(123)) == few(None) and few(20, seed=1) != few(20)
    chosen = [i for b, i, _ in few(100) if b == "a"]
    assert chosen != sorted(chosen) and len(set(chosen)) == len(chosen)
    put(file_of(tmp_path, "rgb", "d", 99), np.zeros((1, 1, 3), np.uint8))
    assert [f for f in few(100) if f[0] == "a"][:20] == [("a", i, 0) for i in chosen][
        :20
    ]  # a frame more elsewhere changes nothing


def test_resizing_averages_what_can_be_averaged(tmp_path: Path) -> None:
    quarter = np.array([[0, 10], [20, 33]])
    for domain in [d for d in SUFFIX if not d.startswith(("class", "point"))]:
        kind = np.uint16 if domain in DEEP else np.uint8
        values = np.tile(quarter, (2, 2)).astype(kind)
        colour = domain in ("rgb", "normal", "principal_curvature", "segment_unsup25d")
        put(file_of(tmp_path, domain), np.repeat(values[..., None], 3, 2) if colour else values)
    (tmp_path / "names.json").write_text(json.dumps({"segment_semantic": [str(i) for i in range(40)]}))
    nearest = ("depth_euclidean", "depth_zbuffer", "segment_semantic", "segment_unsup25d", "mask_valid")
    domains = [d for d in SUFFIX if (tmp_path / d).exists()]
    sample = Taskonomy(tmp_path, domains=domains, split=None, size=2)[0]
    for domain in domains:
        assert sample[domain].shape[-2:] == (2, 2) and sample[domain].dtype == (
            torch.int32 if domain in DEEP else torch.uint8
        )
        assert sample[domain].unique().tolist() == ([33] if domain in nearest else [16]), domain  # 15.75
    assert sample["mask"].all()


def test_a_picture_of_512_pixels_becomes_any_size(root: Path) -> None:
    rng = np.random.default_rng(0)
    for domain in ("rgb", "mask_valid"):
        for i in range(4):
            put(file_of(root, domain, "hanson", i // 2, i % 2), raw_values(domain, rng, 512))
    data = Taskonomy(root, domains=("rgb",), size=96)
    assert data.tensors("rgb").shape == (7, 3, 96, 96) and data.shapes["mask"] == (96, 96)
    with Image.open(file_of(root, "rgb")) as image:
        box = np.array(image.resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert abs(Taskonomy(root, domains=("rgb",), size=64)[0]["rgb"].permute(1, 2, 0).numpy() - box).max() <= 1
    whole = Taskonomy(root, domains=("rgb",))
    assert whole[0]["rgb"].shape == (3, 512, 512)
    with pytest.raises(
        DataError,
        match=r"merom/point_0_view_0_domain_rgb.png is \(3, 8, 8\), the first frame is \(3, 512, 512\); size=",
    ):
        whole[4]
    with pytest.raises(DataError, match=r"normal.png is \(3, 8, 8\), the first frame is \(3, 512, 512\)"):
        Taskonomy(root)
    with pytest.raises(DataError, match=r"merom/point_0_view_0_domain_rgb.png is"):
        whole.tensors("rgb")


def test_tensors_are_the_samples_stacked(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    domains = ("rgb", "curvature", "depth_euclidean", "segment_semantic", "class_scene")
    data = Taskonomy(root, domains=domains, limit=5)
    for name in (*domains, "mask"):
        stack = data.tensors(name)
        assert torch.equal(stack, torch.stack([data[i][name] for i in range(5)])) and stack.dtype == data[0][name].dtype
    assert capfd.readouterr().err == ""
    assert torch.equal(data.tensors("principal_curvature", progress=True), data.tensors("curvature"))
    assert "0/5" in capfd.readouterr().err
    np.save(data.path(3, "class_scene"), np.zeros(7))
    with pytest.raises(DataError, match=r"class_places.npy is \(7,\), the first frame is \(365,\)"):
        data.tensors("class_scene")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one core
def test_workers_and_copies_give_the_same(root: Path) -> None:
    data = Taskonomy(root, domains=("rgb", "depth_zbuffer"))
    batches = list(DataLoader(data, batch_size=4, num_workers=2))
    for name in ("rgb", "depth_zbuffer", "mask"):
        assert torch.equal(torch.cat([b[name] for b in batches]), data.tensors(name))
    copy = pickle.loads(pickle.dumps(data))  # as for workers that are spawned
    assert all(torch.equal(copy[2][k], v) for k, v in data[2].items())


def test_the_fingerprint_follows_the_files_wherever_they_lie(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = Taskonomy(root).fingerprint()
    assert first == Taskonomy(root).fingerprint()
    assert Taskonomy(root, size=4).fingerprint() != first != Taskonomy(root, limit=6).fingerprint()
    assert Taskonomy(root, domains=("rgb",)).fingerprint() != first
    moved = root.rename(tmp_path_factory.mktemp("moved") / "data")
    assert Taskonomy(moved).fingerprint() == first
    middle = file_of(moved, "normal", "hanson", 1, 0)
    put(middle, np.zeros((N, N, 3), np.uint8))  # another size of the file
    second = Taskonomy(moved).fingerprint()
    assert second != first
    last = file_of(moved, "mask_valid", "merom", 1, 0)
    data = bytearray(last.read_bytes())
    data[-1] ^= 1  # the same size
    last.write_bytes(data)
    changed = Taskonomy(moved)
    assert changed.fingerprint() not in (first, second)
    middle.unlink()
    with pytest.raises(DataError, match=r"has changed since it was opened .*point_1_view_0_domain_normal.png"):
        changed.fingerprint()


def test_names_come_from_the_folder_or_are_those_of_taskonomy(root: Path) -> None:
    assert len(names(root, "segment_semantic")) == 18 and names(root, "segment_semantic")[::17] == ["uncertain", "vase"]
    assert names(root, "class_object")[-1] == "999" and names(root, "curvature") == ["0", "1"]
    put(file_of(root, "segment_semantic", "merom", 1, 0), np.full((N, N), 18, np.uint8))
    data = Taskonomy(root, domains=("rgb", "segment_semantic"))
    told = r"merom/point_1_view_0_domain_segmentsemantic.png has the id 18, but 18 classes have names; name all in .*names.json"
    for read_it in (lambda: data[6], lambda: data.tensors("segment_semantic")):
        with pytest.raises(DataError, match=told):
            read_it()
    table = root / "names.json"
    table.write_text(json.dumps({"segment_semantic": [f"kind {i}" for i in range(19)]}))
    assert Taskonomy(root, domains=("rgb", "segment_semantic"))[6]["segment_semantic"].max() == 18
    assert names(root, "segment_semantic")[18] == "kind 18" and names(root, "class_scene")[-1] == "364"
    for bad in (
        '{"segment_semantic": "wall"}',
        '["wall"]',
        '{"segment_semantic": [1]}',
        '{"segment_semantic": []}',
        "{",
    ):
        table.write_text(bad)
        with pytest.raises(DataError, match=r"names.json .*mend it or remove it"):
            names(root, "segment_semantic")


def test_a_prediction_keeps_its_gradient_and_its_errors() -> None:
    prediction = torch.full((2, 1, 2, 2), 1.5, requires_grad=True)
    metres = units("depth_zbuffer", prediction)
    assert math.isclose(metres[0, 0, 0, 0].item(), 2.5 / 2 * 65535 / 512, rel_tol=1e-6)
    metres.sum().backward()
    assert prediction.grad is not None and (prediction.grad > 0).all()
    assert units("normal", torch.rand(2, 3, 4, 4)).norm(dim=1).sub(1).abs().max() < 1e-6
    assert units(
        "curvature", target("curvature", torch.tensor([[[254]], [[0]]], dtype=torch.uint8))
    ).flatten().tolist() == [2, -2]
    assert units("segment_semantic", torch.tensor([[3]])).tolist() == [[3]]
