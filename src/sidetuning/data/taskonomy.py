"""Taskonomy on disk: dense and class labels of indoor pictures, one folder per domain; read, written and split."""

from __future__ import annotations

import contextlib
import copy
import csv
import difflib
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from sidetuning.errors import DataError, ShapeError, UnknownNameError
from sidetuning.registry import unknown

Frame = tuple[str, int, int]  # building, point, view


@dataclass(frozen=True)
class Domain:
    """How the files of one domain are named and encoded.

    Attributes:
        name: of the domain and of its folder.
        channels: that are kept of a file; 0 for ids and masks, which are planes (h, w); for scores, how many Taskonomy has.
        bits: of one value in the file: 8 or 16 (.png), 32 for scores (.npy), 0 for text (.json).
        suffix: of the file names, all that follows `_domain_`.
        geometric: rendered from the mesh, so that a pixel where `mask_valid` is 0 means nothing.
    """

    name: str
    channels: int
    bits: int
    suffix: str
    geometric: bool


DOMAINS: dict[str, Domain] = {
    d.name: d
    for d in (
        Domain("rgb", 3, 8, "rgb.png", False),
        Domain("normal", 3, 8, "normal.png", True),
        Domain("principal_curvature", 2, 8, "principal_curvature.png", True),
        Domain("reshading", 1, 8, "reshading.png", True),
        Domain("depth_euclidean", 1, 16, "depth_euclidean.png", True),
        Domain("depth_zbuffer", 1, 16, "depth_zbuffer.png", True),
        Domain("edge_texture", 1, 16, "edge_texture.png", False),
        Domain("edge_occlusion", 1, 16, "edge_occlusion.png", True),
        Domain("keypoints2d", 1, 16, "keypoints2d.png", False),
        Domain("keypoints3d", 1, 16, "keypoints3d.png", True),
        Domain("segment_semantic", 0, 8, "segmentsemantic.png", False),
        Domain("segment_unsup25d", 3, 8, "segment_unsup25d.png", False),
        Domain("mask_valid", 0, 8, "depth_zbuffer.png", False),  # so named in Taskonomy
        Domain("class_object", 1000, 32, "class_object.npy", False),
        Domain("class_scene", 365, 32, "class_places.npy", False),
        Domain("point_info", 0, 0, "point_info.json", False),
    )
}
ALIASES = {"curvature": "principal_curvature"}
DEPTHS = ("depth_euclidean", "depth_zbuffer")
SIGNED = {"normal": 1.0, "principal_curvature": 2.0}  # 0 is the file's value 127, this bound is 254
UNBLENDABLE = (*DEPTHS, "segment_semantic", "segment_unsup25d", "mask_valid")  # an average of two values is neither
METRE = 512  # in units of a depth file
INVALID = 64500  # depths from here on mean that the mesh has a hole
SPLITS = ("train", "val", "test")
BROKEN = ("mosquito", "tansboro")  # in the official splits, but broken in the release; the original skips them too
SEMANTIC = (
    "uncertain", "background", "bottle", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
)  # fmt: skip


def domain_of(name: str) -> Domain:
    """The entry of `DOMAINS`, also by an alias; raises UnknownNameError with near names."""
    name = ALIASES.get(name, name)
    if name not in DOMAINS:
        raise UnknownNameError(unknown("domain", name, DOMAINS, verb="known"))
    return DOMAINS[name]


def path_of(root: str | Path, domain: str, building: str, point: int, view: int) -> Path:
    """Where the file of a frame lies."""
    d = domain_of(domain)
    return Path(root) / d.name / building / f"point_{point}_view_{view}_domain_{d.suffix}"


def names(root: str | Path, domain: str) -> list[str]:
    """The names of a domain's classes or channels, by number.

    They come from ROOT/names.json (`{"segment_semantic": ["uncertain", …], "class_object": […]}`) where that names the domain, else
    they are Taskonomy's 18 for `segment_semantic` and numbers for the others.
    """
    d = domain_of(domain)
    path = Path(root) / "names.json"
    table: Any = {}
    if path.exists():
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no readable JSON file ({error}); mend it or remove it") from error
    found = table.get(d.name) if isinstance(table, dict) else []
    if found is None:
        return list(SEMANTIC) if d.name == "segment_semantic" else [str(i) for i in range(d.channels)]
    if not isinstance(found, list) or not found or not all(isinstance(n, str) for n in found):
        raise DataError(f'{path} must read like {{"{d.name}": ["first name", "second name"]}}; mend it or remove it')
    return found


def read(path: str | Path, domain: str) -> Tensor:
    """The values of one file, as they are in it.

    Returns:
        uint8 (c, h, w) for 8-bit domains, uint8 (h, w) for ids and masks, int32 (1, h, w) in 0 … 65535 for 16-bit domains,
        float32 (n,) for scores. A transparency is dropped; of a picture with a palette the colours count, of ids the numbers.

    Raises:
        DataError: the file is missing, damaged, or has other bits or channels than the domain.
    """
    d, path = _tensor_domain(domain), Path(path)
    if not path.exists():
        raise DataError(f"{d.name} has no file {path}; download or render it, or leave the domain {d.name} out")
    if d.bits == 32:
        return torch.from_numpy(_scores(path, d))
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, _pixels(image, d)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is damaged: no format that Pillow knows; download or render it again") from error
    except Exception as error:  # Pillow's decoders raise whatever their formats make them
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); download or render it again") from error
    if pixels is None:
        needed = "16-bit grey" if d.bits == 16 else "8-bit grey" if d.channels < 2 else "8-bit RGB"
        raise DataError(f"{path} is a picture of mode {mode}; {d.name} needs {needed}: save it again as that")
    if pixels.ndim == 3:
        pixels = pixels.transpose(2, 0, 1)
    elif d.channels:
        pixels = pixels[None]
    return torch.from_numpy(np.ascontiguousarray(pixels))


def encode(domain: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """What a file of the domain holds for values in the domain's own units; `units(domain, target(domain, …))` undoes it.

    Args:
        domain: its name.
        values: depths (h, w) in metres, stored to 1/512 m: not finite -> 65535, the rest is clipped to 0 … 64499; normals (h, w, 3) in
            -1 … 1 and curvatures (h, w, 2), clipped to -2 … 2: 0 is exactly 127, the bound 254, not finite counts as 0; other
            maps (h, w) or (h, w, 3) in 0 … 1; ids (h, w); masks (h, w), valid where not 0; scores (n,). An array that has the
            file's type already (uint8 or uint16) passes as it is.

    Raises:
        ShapeError, DataError: another shape, another type, or values out of range.
    """
    d, values = _tensor_domain(domain), np.asarray(values)
    axes = 1 if d.bits == 32 else 2 if d.channels < 2 else 3
    if values.ndim != axes or (axes == 3 and values.shape[2] not in (d.channels, 3)):
        shape = ("(n,)", "(h, w)", f"(h, w, {d.channels})")[axes - 1]
        raise ShapeError(f"{d.name} takes values of the shape {shape}, not {values.shape}")
    coded = _coded(d, values)
    if d.channels == 2 and coded.shape[2] == 2:  # the files are RGB, the third channel is not used
        coded = np.concatenate([coded, np.full_like(coded[..., :1], 127)], axis=2)
    return coded


def write(path: str | Path, domain: str, values: npt.ArrayLike | Mapping[str, Any]) -> None:
    """Encode values, or the mapping of `point_info`, and write them; the file is there whole or not at all. Folders are made.

    Not synced to the disk one by one: rendering many frames would take several times as long.
    """
    d, path = domain_of(domain), Path(path)
    buffer = io.BytesIO()
    if d.bits == 0:
        buffer.write(json.dumps(values).encode())
    elif d.bits == 32:
        np.save(buffer, encode(domain, np.asarray(values)), allow_pickle=False)
    else:
        image = Image.fromarray(encode(domain, np.asarray(values)))
        image.save(buffer, "PNG", compress_level=1)  # a third of the time of the default, hardly larger
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error}); free space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _tensor_domain(name: str) -> Domain:
    d = domain_of(name)
    if d.bits == 0:
        raise DataError(f"{d.name} is JSON text, no tensor; read the file that path_of gives with json.loads")
    return d


def _pixels(image: Image.Image, d: Domain) -> npt.NDArray[Any] | None:
    """(h, w) or (h, w, c) of what the domain keeps, None where the picture is of another kind."""
    if d.bits == 16:
        if not image.mode.startswith("I"):  # I;16, I;16B, and I, which older versions of Pillow make of a 16-bit PNG
            return None
        pixels = np.array(image).astype(np.int32)  # never through int16: values above 32767 would turn negative
        return pixels if pixels.min() >= 0 and pixels.max() <= 65535 else None
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return None
    if d.name == "segment_semantic":  # of a palette the numbers; some tools save grey as RGB, but colours are no ids
        bands = [np.array(image.getchannel(i)) for i in range(3 if image.mode.startswith("RGB") else 1)]
        return bands[0] if image.mode != "1" and all((band == bands[0]).all() for band in bands) else None
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # at once to RGB, Pillow would warn of transparency
    if d.channels < 2:
        return np.array(image.convert("L"))  # Taskonomy's own are greys in RGB, which this keeps exactly
    return np.array(image.convert("RGB"))[..., : d.channels] if image.mode.startswith("RGB") else None


def _scores(path: Path, d: Domain) -> npt.NDArray[np.float32]:
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # whatever the bytes make numpy raise, pickled objects included
        raise DataError(f"{path} is no readable .npy file of numbers ({error}); download or render it again") from error
    one = array.size == max(array.shape, default=0) > 0
    if not one or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise DataError(f"{path} must hold one vector of finite numbers for {d.name}; download or render it again")
    return array.reshape(-1).astype(np.float32)


def _coded(d: Domain, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kind: type[Any] = {8: np.uint8, 16: np.uint16, 32: np.float32}[d.bits]
    if d.name == "mask_valid":
        return np.where(values != 0, 255, 0).astype(np.uint8)
    if values.dtype == kind:
        return values
    if d.name == "segment_semantic":
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
            raise DataError(f"{d.name} takes whole numbers from 0 to 255, not {values.dtype} up to {values.max()}")
        return values.astype(np.uint8)
    if values.dtype.kind != "f":
        raise DataError(f"{d.name} takes floating-point values, or {kind.__name__} as in the file, not {values.dtype}")
    if d.bits == 32:
        return values.astype(np.float32)
    finite = np.isfinite(values)
    values = np.where(finite, values, 0).astype(np.float64)
    if d.name in DEPTHS:
        return np.where(finite, (values * METRE).round().clip(0, INVALID - 1), 65535).astype(np.uint16)
    low, high = (-1, 1) if d.name == "normal" else (0, 1)
    if d.name != "principal_curvature" and (values.min() < low - 1e-3 or values.max() > high + 1e-3):
        raise DataError(f"{d.name} takes values from {low} to {high}, not {values.min():.4g} to {values.max():.4g}")
    if d.name in SIGNED:
        return (127 + 127 * (values / SIGNED[d.name]).clip(-1, 1)).round().astype(np.uint8)
    return (values.clip(0, 1) * np.iinfo(kind).max).round().astype(kind)


def target(domain: str, raw: Tensor) -> Tensor:
    """What a network is trained to give, in the ranges of the original code.

    8-bit v -> v / 127.5 - 1; 16-bit v -> 2 v / 65535 - 1; ids -> int64; masks -> 0 or 1; scores -> themselves where they are
    probabilities already (not negative, sum 1), else their softmax.

    Shape: (…, c, h, w), (…, h, w) or (…, n), as from `read` -> the same, float32.
    """
    d = _tensor_domain(domain)
    if d.bits == 32:
        scores = raw.float()
        given = (scores >= 0).all(-1, keepdim=True) & ((scores.sum(-1, keepdim=True) - 1).abs() < 1e-2)
        return torch.where(given, scores, scores.softmax(-1))
    if raw.is_floating_point():
        raise ShapeError(f"target('{d.name}', …) takes the whole numbers that read() gives, not {raw.dtype}")
    if d.name == "segment_semantic":
        return raw.long()
    if d.name == "mask_valid":
        return (raw != 0).float()
    return 2 * raw.float() / (2**d.bits - 1) - 1


def units(domain: str, target: Tensor) -> Tensor:
    """A target or a prediction of it in the domain's own units: what metrics are computed on.

    Depths in metres, normals as unit vectors, curvatures in -2 … 2 (255, which `encode` never gives, is 2.016), other
    maps in 0 … 1; ids, masks and probabilities stay. Predictions outside the range of targets are not clipped.

    Shape: (…, c, h, w), (…, h, w) or (…, n) -> the same.
    """
    d = _tensor_domain(domain)
    if d.name in DEPTHS:
        return (target + 1) * (65535 / 2 / METRE)
    if d.name in SIGNED:
        centred = (127.5 * target + 0.5) / 127 * SIGNED[d.name]  # the file's value less 127, over 127
        return F.normalize(centred, dim=-3) if d.name == "normal" else centred
    return target if d.bits == 32 or d.channels == 0 else (target + 1) / 2


def _resize(raw: Tensor, d: Domain, size: int) -> Tensor:
    """(c, h, w) or (h, w) -> (c, size, size) or (size, size), the same type."""
    if raw.shape[-2:] == (size, size):
        return raw
    if d.name in UNBLENDABLE:
        rows, columns = (((torch.arange(size) + 0.5) * n / size).long() for n in raw.shape[-2:])
        return raw[..., rows[:, None], columns]
    return F.interpolate(raw[None].float(), size=(size, size), mode="area")[0].round().to(raw.dtype)


def read_split(path_or_name: str | Path, root: str | Path) -> dict[str, list[str]]:
    """The buildings of "train", "val" and "test", sorted, from a table `id,train,val,test` of buildings and flags.

    The official files are read as they are (CR line ends), those with other line ends, blank lines, a byte-order mark, or without
    the first line too. A building may be in several splits. The broken buildings mosquito and tansboro are left out.

    Args:
        path_or_name: a file, a file in ROOT, or the name of an official partition such as "tiny", whose
            `train_val_test_tiny.csv` lies in ROOT/splits or in ROOT.
        root: the folder of the data.

    Raises:
        DataError: no such file, or one that reads otherwise.
    """
    path = _split_file(path_or_name, Path(root))
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); download it again") from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(re.split(r"\r\n|\r|\n", text)) if "".join(row).strip()]
    columns = ["id", *SPLITS]
    if rows and set(columns) <= {c.lower() for c in rows[0]}:
        columns = [c.lower() for c in rows.pop(0)]
    buildings: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        entry = dict(zip(columns, row))
        if len(row) != len(columns) or not entry["id"] or any(entry[split] not in ("0", "1") for split in SPLITS):
            raise DataError(f"{path} has the line '{','.join(row)}'; expected id,train,val,test such as hanson,1,0,0")
        for split in SPLITS:
            if entry[split] == "1" and entry["id"] not in BROKEN:
                buildings[split].append(entry["id"])
    if not rows:
        raise DataError(f"{path} names no building; expected lines id,train,val,test such as hanson,1,0,0")
    return {split: sorted(found) for split, found in buildings.items()}


def _split_file(name: str | Path, root: Path) -> Path:
    official = f"train_val_test_{name}.csv"
    for path in (Path(name), root / name, root / "splits" / official, root / official):
        if path.is_file():
            return path
    found = [str(p.relative_to(root)) for p in sorted([*root.glob("*.csv"), *root.glob("splits/*.csv")])]
    have = ", ".join(found) or "no .csv file"
    raise DataError(
        f"no split file {name} in {root}; there is {have}. Give one as subset, or split=None for all buildings"
    )


class Taskonomy(Dataset[dict[str, Tensor]]):
    """Frames of Taskonomy, or of anything in its layout: raw tensors by domain, and "mask".

    `dataset[i]` is a dictionary with what `read` gives for each asked domain, and "mask", bool (h, w), false where the geometry
    is unknown: from `mask_valid` where that folder exists, else from `depth_zbuffer`, else true everywhere.

    Args:
        root: the folder that holds a folder per domain.
        domains: what a frame consists of. The frames are those of the first one; each must have all others.
        split: "train", "val", "test", or None for all buildings, without a split file.
        subset: which split file: the name of an official partition or a path (see `read_split`); None is ROOT/splits.csv.
        limit: how many frames to draw, evenly over the buildings; fewer are the first ones of more. None: all, sorted.
        size: resize to (size, size), None: keep. Depths, ids, false colours and masks take the nearest pixel, since an average of
            two of them is neither (a mask is thus that of the very pixel whose depth is kept); the rest takes the average of the
            area, holes of the mesh included.
        seed: of the draw.

    Attributes:
        frames: (building, point, view) of each frame.
        domains: as asked.
        shapes: of one frame's tensors, by name.
        absent: buildings of the split that have no folder here.

    Raises:
        DataError: a missing folder or file, a damaged one, too few frames, frames of several sizes without `size`.
        UnknownNameError: a domain or split that does not exist.
    """

    def __init__(
        self, root: str | Path, domains: Sequence[str] = ("rgb", "normal"), split: str | None = "train",
        subset: str | Path | None = "tiny", limit: int | None = None, size: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.root, self.size = Path(root), size
        self.domains = (domains,) if isinstance(domains, str) else tuple(domains)
        asked = [_tensor_domain(name) for name in self.domains]
        if not asked or (size is not None and size < 1):
            raise DataError(f"domains={self.domains}, size={size}: give at least one domain, and a size of at least 1")
        for d in asked:
            self._check_folder(d)
        here = [DOMAINS[name] for name in ("mask_valid", "depth_zbuffer") if (self.root / name).is_dir()]
        self._mask_source = here[0] if here else None
        self._needed = list(dict.fromkeys([*asked, *here[:1]]))
        self._classes = len(names(self.root, "segment_semantic"))
        self.frames, self.absent = self._find(split, subset)
        if limit is not None:
            if not 1 <= limit <= len(self.frames):
                raise DataError(
                    f"limit={limit}, but {self.root} has {len(self.frames)} frames of this; give 1 to {len(self.frames)}"
                )
            self.frames = _draw(self.frames, limit, seed)
        for d in self._needed[1:]:
            self._check_files(d)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._extent: tuple[int, ...] = ()  # (h, w) of all pictures
        for d in self._needed:
            if d.bits != 32 and not self._extent:
                self._extent = tuple(self._read(0, d).shape[-2:])
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self[0].items()}

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._get(index, (*self.domains, "mask"))

    def read(self, index: int, domain: str) -> Tensor:
        """One of the asked domains of one frame, or its "mask"."""
        return self._get(index, [domain])[domain]

    def only(self, domain: str) -> Taskonomy:
        """The same frames with one of their domains; its fingerprint does not depend on the others."""
        other = copy.copy(self)
        other.domains, other._needed, other._mask_source = (domain,), [_tensor_domain(domain)], None
        return other

    def path(self, index: int, domain: str) -> Path:
        """The file of one frame."""
        return path_of(self.root, domain, *self.frames[index])

    def tensors(self, domain: str, progress: bool = False, rows: Sequence[int] | None = None) -> Tensor:
        """All frames of one of the asked domains, or of "mask", stacked (n, …) in their raw type; threads read them.

        Args:
            domain: one of `domains`, or "mask".
            progress: show a bar.
            rows: read these frames alone.
        """
        from tqdm import tqdm

        if domain != "mask" and domain_of(domain) not in map(domain_of, self.domains):
            raise UnknownNameError(unknown("domain", domain, [*self.domains, "mask"], verb="asked for"))
        rows = range(len(self)) if rows is None else rows
        one = self._get(rows[0], [domain])[domain]
        stack = torch.empty((len(rows), *one.shape), dtype=one.dtype)

        def fill(place: int) -> None:
            stack[place] = self._get(rows[place], [domain])[domain]

        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            done = pool.map(fill, range(len(rows)))
            for _ in tqdm(done, domain, len(rows), unit="frame", disable=not progress, leave=False):
                pass
        return stack

    def fingerprint(self) -> str:
        """sha256 over the domains, `size`, all file names and file sizes, and the bytes of the first and the last frame.

        The bytes of all would take hours for the whole Taskonomy; a file in between that changes and keeps its size is not noticed.
        """
        digest = hashlib.sha256(repr((self.domains, self.size)).encode())
        try:
            for d in self._needed:
                for index in range(len(self)):
                    path = self.path(index, d.name)
                    digest.update(f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}\n".encode())
                for index in (0, -1):
                    digest.update(self.path(index, d.name).read_bytes())
        except OSError as error:
            raise DataError(f"{self.root} has changed since it was opened ({error}); open it again") from error
        return digest.hexdigest()

    def _get(self, index: int, wanted: Iterable[str]) -> dict[str, Tensor]:
        """Raw tensors of domains and "mask"; a file that serves several is read once."""
        sources = {name: self._mask_source if name == "mask" else domain_of(name) for name in wanted}
        raw = {d: self._read(index, d) for d in dict.fromkeys(sources.values()) if d is not None}
        sample = {name: raw[d] for name, d in sources.items() if d is not None}
        if "mask" in sample:
            valid = sample["mask"]
            sample["mask"] = valid != 0 if self._mask_source == DOMAINS["mask_valid"] else valid[0] < INVALID
        elif "mask" in sources:  # nothing tells what is valid; (1, 1) where only scores were asked for
            sample["mask"] = torch.ones(self._extent or (1, 1), dtype=torch.bool)
        return sample

    def _read(self, index: int, d: Domain) -> Tensor:
        path = self.path(index, d.name)
        raw = read(path, d.name)
        if d.name == "segment_semantic" and int(raw.max()) >= self._classes:
            have = f"{self._classes} classes have names; name all in {self.root / 'names.json'}"
            raise DataError(f"{path} has the id {int(raw.max())}, but {have}")
        if self.size is not None and d.bits != 32:
            raw = _resize(raw, d, self.size)
        shape = expected = tuple(raw.shape)
        if d.bits == 32:
            expected = self.shapes.get(d.name, shape)
        elif self._extent:
            expected = (*shape[:-2], *self._extent)
        if shape != expected:
            raise DataError(f"{path} is {shape}, the first frame is {expected}; size=… brings all pictures to one size")
        return raw

    def _find(self, split: str | None, subset: str | Path | None) -> tuple[list[Frame], list[str]]:
        """All frames of a split, and the buildings that are not here."""
        first = self._needed[0]
        folder = self.root / first.name
        here = {p.name for p in folder.iterdir() if p.is_dir() and p.name not in BROKEN}
        if split is None:
            buildings = sorted(here)
        elif split in SPLITS:
            buildings = read_split(self.root / "splits.csv" if subset is None else subset, self.root)[split]
        else:
            raise UnknownNameError(unknown("split", split, SPLITS, verb="known"))
        frames = _scan(self.root, first, [b for b in buildings if b in here])
        if not frames:
            some = ", ".join(buildings[:4]) + " …" * (len(buildings) > 4) if buildings else "any building"
            like = path_of("", first.name, (buildings or ["hanson"])[0], 0, 0)
            raise DataError(f"{folder} has no frame of {some}; expected files like {like} in {self.root}")
        return frames, [b for b in buildings if b not in here]

    def _check_folder(self, d: Domain) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder; give the one that holds the folders of the domains")
        folders = sorted(p.name for p in self.root.iterdir() if p.is_dir())
        if d.name not in folders:
            have = ", ".join(f for f in folders if f in DOMAINS) or "none"
            near = difflib.get_close_matches(d.name, [f for f in folders if f not in DOMAINS], n=1)
            hint = f", rename the folder {near[0]} if it is that" if near else ""
            raise DataError(
                f"{self.root} has no folder {d.name}; its domains: {have}. Ask for these{hint}, or download it"
            )

    def _check_files(self, d: Domain) -> None:
        folders = {building: self.root / d.name / building for building, _, _ in self.frames}
        here = {b: set(os.listdir(f)) if f.is_dir() else set() for b, f in folders.items()}  # noqa: PTH208 (names do)
        paths = (self.path(index, d.name) for index in range(len(self)))
        missing = [path for path in paths if path.name not in here[path.parent.name]]
        if missing:
            use = ", from which the mask is read" if d == self._mask_source else ""
            raise DataError(
                f"{len(missing)} of {len(self)} frames have no file of {d.name}{use}; the first is {missing[0]}; download or render "
                f"them, or name {d.name} first in domains: then the frames are those that have it"
            )


def _scan(root: Path, d: Domain, buildings: list[str]) -> list[Frame]:
    """All frames of a domain, sorted."""
    pattern = re.compile(rf"point_(0|[1-9]\d*)_view_(0|[1-9]\d*)_domain_{re.escape(d.suffix)}")
    frames: list[Frame] = []
    for building in sorted(buildings):
        found = map(pattern.fullmatch, os.listdir(root / d.name / building))  # noqa: PTH208 (names do)
        frames += sorted((building, int(m[1]), int(m[2])) for m in found if m)
    return frames


def _draw(frames: list[Frame], limit: int, seed: int) -> list[Frame]:
    """The first `limit` frames of a fixed random order that takes the buildings in turn.

    The order is that of hashes, so that it depends on no version of a random generator, and that a frame which is added
    elsewhere leaves it as it is.
    """

    def rank(*key: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()

    by_building: defaultdict[str, list[Frame]] = defaultdict(list)
    for frame in sorted(frames, key=lambda f: rank(*f)):
        by_building[frame[0]].append(frame)
    turns = zip_longest(*(by_building[b] for b in sorted(by_building, key=rank)))
    return [frame for turn in turns for frame in turn if frame is not None][:limit]
