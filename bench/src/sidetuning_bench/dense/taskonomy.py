"""Taskonomy as a data set: frames of dense and class labels of indoor pictures, split by building."""

from __future__ import annotations

import copy
import csv
import difflib
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sidetuning.errors import DataError, UnknownNameError
from sidetuning.registry import unknown
from sidetuning_bench.dense.targets import resize
from sidetuning_bench.domains import DOMAINS, INVALID, Domain, domain_of, names, path_of, read, tensor_domain

Frame = tuple[str, int, int]  # building, point, view

SPLITS = ("train", "val", "test")
BROKEN = ("mosquito", "tansboro")  # in the official splits, but broken in the release; the original skips them too


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
        f"no split file {name} in {root}; there is {have}. Give one as subset, or, in Python, split=None for all buildings"
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
        asked = [tensor_domain(name) for name in self.domains]
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
                    f"{self.root} has {len(self.frames)} frames of this, not {limit}; ask for 1 to {len(self.frames)}"
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
        other.domains, other._needed, other._mask_source = (domain,), [tensor_domain(domain)], None
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
        raw = torch.from_numpy(read(path, d.name))
        if d.name == "segment_semantic" and int(raw.max()) >= self._classes:
            have = f"{self._classes} classes have names; name all in {self.root / 'names.json'}"
            raise DataError(f"{path} has the id {int(raw.max())}, but {have}")
        if self.size is not None and d.bits != 32:
            raw = resize(raw, d, self.size)
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
                f"them, leave {d.name} out, or name it first in domains: then the frames are those that have it"
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
