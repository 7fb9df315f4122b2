"""Taskonomy's layout as a data set: splits, frames, masks, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sidetuning.errors import DataError, UnknownNameError
from sidetuning_bench.dense.taskonomy import Taskonomy, read_split
from sidetuning_bench.domains import names
from taskonomy_parts import DEEP, SUFFIX, N, file_of, put, raw_values

TINY = b"id,train,val,test\rhanson,1,0,0\rmerom,1,0,0\rtansboro,1,0,0\rmosquito,0,1,0\rwiconisco,0,1,0\rihlen,0,0,1"


FRAMES = {"hanson": 4, "merom": 3, "tansboro": 1, "wiconisco": 2, "ihlen": 1}


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


EXPECTED = {"train": ["hanson", "merom"], "val": ["wiconisco"], "test": ["ihlen"]}


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("around", [b"", b"\xef\xbb\xbf"])
def test_splits_are_read_with_any_line_ends(end: bytes, header: bool, around: bytes, tmp_path: Path) -> None:
    lines = TINY.split(b"\r")[0 if header else 1 :]
    (tmp_path / "mine.csv").write_bytes(around + end.join([*lines[:3], b"", *lines[3:], b" ", b""]))
    # Neither mosquito nor tansboro.
    assert read_split(tmp_path / "mine.csv", "elsewhere") == EXPECTED


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
    # ROOT/<name> goes before ROOT/splits.
    (root / "tiny").write_text("merom,1,0,0")
    assert read_split("tiny", root)["train"] == ["merom"]
    there = "splits/train_val_test_tiny.csv, train_val_test_full.csv"
    with pytest.raises(DataError, match=rf"no split file fullplus in .*; there is {there}.*split=None"):
        read_split("fullplus", root)
    (root / "empty.csv").write_text("id,train,val,test\r")
    with pytest.raises(DataError, match=r"empty.csv names no building"):
        read_split("empty.csv", root)
    (root / "utf16.csv").write_bytes("ihlen,1,0,0".encode("utf-16"))
    assert read_split("utf16.csv", root)["train"] == ["ihlen"]
    (root / "latin.csv").write_bytes("Zürich,1,0,0".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.csv cannot be read as text"):
        read_split("latin.csv", root)
    with pytest.raises(DataError, match=r"no split file .*splits.csv in .*; there is .*train_val_test_tiny.csv"):
        Taskonomy(root, subset=None)
    (root / "splits.csv").write_text("merom,0,0,1")
    (root / "tmp").mkdir()
    (root / "tmp/splits.csv").write_text("hanson,0,0,1")
    # A splits.csv that happens to lie where one works is not meant.
    monkeypatch.chdir(root / "tmp")
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
    # Tansboro's folder is there, and broken.
    assert len(Taskonomy(root, split=None)) == 10
    assert len(list(Taskonomy(root, domains="rgb"))) == 7  # type: ignore[call-overload]


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
        DataError,
        match=r"has no folder edge_texture; its domains: class_object, .*Ask for these, or download it .*--tasks",
    ):
        Taskonomy(root, domains=("rgb", "edge_texture"))
    (root / "normal").rename(root / "normals")
    with pytest.raises(DataError, match=r"no folder normal; .*, rename the folder normals if it is that, or download"):
        Taskonomy(root)
    for point, view in ((0, 1), (1, 0)):
        file_of(root, "reshading", "hanson", point, view).unlink()
    first = "hanson/point_0_view_1_domain_reshading.*leave reshading out, or name it first"
    with pytest.raises(DataError, match=rf"2 of 7 frames have no file of reshading; the first is .*{first}"):
        Taskonomy(root, domains=("rgb", "reshading"))
    # The remedy works.
    assert len(Taskonomy(root, domains=("reshading", "rgb"))) == 5
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
    # C has no more.
    assert sorted(Counter(b for b, _, _ in few(20)).values()) == [3, 5, 6, 6]
    assert sorted(few(123)) == few(None) and few(20, seed=1) != few(20)
    chosen = [i for b, i, _ in few(100) if b == "a"]
    assert chosen != sorted(chosen) and len(set(chosen)) == len(chosen)
    put(file_of(tmp_path, "rgb", "d", 99), np.zeros((1, 1, 3), np.uint8))
    # A frame more elsewhere changes nothing.
    assert [f for f in few(100) if f[0] == "a"][:20] == [("a", i, 0) for i in chosen][:20]


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
        # 15.75.
        assert sample[domain].unique().tolist() == ([33] if domain in nearest else [16]), domain
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
# On one core.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_and_copies_give_the_same(root: Path) -> None:
    data = Taskonomy(root, domains=("rgb", "depth_zbuffer"))
    batches = list(DataLoader(data, batch_size=4, num_workers=2))
    for name in ("rgb", "depth_zbuffer", "mask"):
        assert torch.equal(torch.cat([b[name] for b in batches]), data.tensors(name))
    # As for workers that are spawned.
    copy = pickle.loads(pickle.dumps(data))
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
    # Another size of the file.
    put(middle, np.zeros((N, N, 3), np.uint8))
    second = Taskonomy(moved).fingerprint()
    assert second != first
    last = file_of(moved, "mask_valid", "merom", 1, 0)
    data = bytearray(last.read_bytes())
    # The same size.
    data[-1] ^= 1
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
    told = (
        r"merom/point_1_view_0_domain_segmentsemantic.png has the id 18, but 18 classes have names; name all in .*names"
    )
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


def test_all_missing_domains_are_named(root: Path) -> None:
    for name in ("edge_texture", "normal", "reshading"):
        remove(root / name)
    (root / "normals").mkdir()
    asked = ("rgb", "edge_texture", "normal", "reshading", "normal")
    with pytest.raises(
        DataError, match=r"no folder edge_texture, normal, reshading; .*folder normals .*them .*--tasks"
    ):
        Taskonomy(root, domains=asked)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_buildings_is_told(split: str, root: Path) -> None:
    (root / "splits.csv").write_text("hanson,1,0,0\nmerom,1,0,0\n")
    with pytest.raises(DataError, match=rf"names no building of {split} \(2 of train, 0 of val, 0 of test\); choose"):
        Taskonomy(root, domains=("rgb",), split=split, subset=None)
