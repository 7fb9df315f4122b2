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
from sidetuning.files import decode_text, read_bytes
from sidetuning.registry import unknown
from sidetuning_bench.dense.targets import resize
from sidetuning_bench.domains import DOMAINS, INVALID, Domain, domain_of, names, path_of, read, tensor_domain

# Building, point, view.
Frame = tuple[str, int, int]

SPLITS = ("train", "val", "test")
# In the official splits, but broken in the release; the original code skips them too.
BROKEN = ("mosquito", "tansboro")


class Taskonomy(Dataset[dict[str, Tensor]]):
    """Frames of Taskonomy, or of anything in its layout: raw tensors by domain, and "mask".

    `dataset[i]` is a dictionary with what `read` gives for each domain, and "mask", bool (h, w), false where the
    geometry is unknown: from `mask_valid` where that folder exists, else from `depth_zbuffer`, else true everywhere.

    Args:
        root: the folder that holds a folder per domain.
        domains: what a frame consists of. The frames are those of the first domain; each must have all others.
        split: "train", "val", "test", or None for all buildings, without a split file.
        subset: the split file: name of an official partition, or a path (see `read_split`); None is ROOT/splits.csv.
        limit: number of frames to draw, evenly over the buildings; fewer are the first ones of more. None: all, sorted.
        size: resize to (size, size), None: keep. Depths, ids, false colours and masks take the nearest pixel, since an
            average of two of them is neither; the rest takes the average of the area, holes of the mesh included.
        seed: seed of the draw.

    Attributes:
        frames: (building, point, view) of each frame.
        shapes: shapes of one frame's tensors, by name.
        absent: buildings of the split that have no folder here.

    Raises:
        DataError: a missing folder or file, a damaged one, too few frames, frames of several sizes without `size`.
        UnknownNameError: a domain or split that does not exist.
    """

    def __init__(
        self,
        root: str | Path,
        domains: Sequence[str] = ("rgb", "normal"),
        split: str | None = "train",
        subset: str | Path | None = "tiny",
        limit: int | None = None,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.root, self.size = Path(root), size
        self.domains = (domains,) if isinstance(domains, str) else tuple(domains)
        asked = [tensor_domain(name) for name in self.domains]
        if not asked or (size is not None and size < 1):
            raise DataError(f"domains={self.domains}, size={size}: give at least one domain, and a size of at least 1")
        self._check_folders(asked)
        here = [DOMAINS[name] for name in ("mask_valid", "depth_zbuffer") if (self.root / name).is_dir()]
        self._mask_source = here[0] if here else None
        self._needed = list(dict.fromkeys([*asked, *here[:1]]))
        self._classes = len(names(self.root, "segment_semantic"))
        self.frames, self.absent = self._find(split, subset)
        if limit is not None:
            if not 0 < limit <= len(self.frames):
                most = len(self.frames)
                raise DataError(f"{self.root} has {most} frames of this, not {limit}; ask for 1 to {most}")
            self.frames = _draw(self.frames, limit, seed)
        for d in self._needed[1:]:
            self._check_files(d)
        # (h, w) of all pictures: that of the first one.
        self._extent: tuple[int, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        pictures = [d for d in self._needed if d.bits != 32]
        if pictures:
            self._extent = tuple(self._read(0, pictures[0]).shape[-2:])
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self[0].items()}

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._get(index, (*self.domains, "mask"))

    def read(self, index: int, domain: str) -> Tensor:
        """One of the domains of one frame, or its "mask"."""
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
        """All frames of one of the domains, or of "mask", stacked (n, …) in their raw type; threads read them.

        Args:
            domain: one of `domains`, or "mask".
            progress: show a bar.
            rows: read these frames alone.
        """
        from tqdm import tqdm

        if domain != "mask" and domain_of(domain) not in map(domain_of, self.domains):
            raise UnknownNameError(unknown("domain", domain, [*self.domains, "mask"], verb="asked for"))
        rows = range(len(self)) if rows is None else rows
        one = self.read(rows[0], domain)
        stack = torch.empty((len(rows), *one.shape), dtype=one.dtype)

        def fill(place: int) -> None:
            stack[place] = self.read(rows[place], domain)

        # Pillow decodes outside Python's lock.
        with ThreadPoolExecutor() as pool:
            done = pool.map(fill, range(len(rows)))
            for _ in tqdm(done, domain, len(rows), unit="frame", disable=not progress, leave=False):
                pass
        return stack

    def fingerprint(self) -> str:
        """sha256 over the domains, `size`, all file names and file sizes, and the bytes of the first and last frame.

        The bytes of all would take hours for the whole Taskonomy. A file in between that changes and keeps its size is
        not noticed.
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
        elif "mask" in sources:
            # Nothing tells what is valid; (1, 1) where all domains are scores.
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
        here = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in BROKEN)
        if split is not None and split not in SPLITS:
            raise UnknownNameError(unknown("split", split, SPLITS, verb="known"))
        file = self.root / "splits.csv" if subset is None else subset
        splits = {} if split is None else read_split(file, self.root)
        buildings = here if split is None else splits[split]
        if splits and not buildings:
            counts = ", ".join(f"{len(found)} of {name}" for name, found in splits.items())
            raise DataError(f"{file} names no building of {split} ({counts}); choose another split or split file")
        frames = _scan(self.root, first, [building for building in buildings if building in here])
        if not frames:
            some = ", ".join(buildings[:4]) + " …" * (len(buildings) > 4) if buildings else "any building"
            like = path_of("", first.name, (buildings or ["hanson"])[0], 0, 0)
            raise DataError(f"{folder} has no frame of {some}; expected files like {like} in {self.root}")
        return frames, [building for building in buildings if building not in here]

    def _check_folders(self, asked: Sequence[Domain]) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder; give the one that holds the folders of the domains")
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir())
        missing = [d.name for d in dict.fromkeys(asked) if d.name not in folders]
        if not missing:
            return
        have = ", ".join(name for name in folders if name in DOMAINS) or "none"
        others = [name for name in folders if name not in DOMAINS]
        near = [found[0] for name in missing if (found := difflib.get_close_matches(name, others, n=1))]
        these = "these" + "".join(f", rename the folder {name} if it is that" for name in near)
        raise DataError(
            f"{self.root} has no folder {', '.join(missing)}; its domains: {have}. Ask for {these}, or download "
            f"{'it' if len(missing) == 1 else 'them'} (the command line asks for --tasks, and for rgb)"
        )

    def _check_files(self, d: Domain) -> None:
        folder = self.root / d.name
        here = {(name, file) for name in {frame[0] for frame in self.frames} for file in _files(folder / name)}
        paths = [self.path(index, d.name) for index in range(len(self))]
        missing = [path for path in paths if (path.parent.name, path.name) not in here]
        if missing:
            use = ", from which the mask is read" if d == self._mask_source else ""
            raise DataError(
                f"{len(missing)} of {len(self)} frames have no file of {d.name}{use}; the first is {missing[0]}; "
                f"download or render them, leave {d.name} out, or name it first in domains: then the frames are those "
                "that have it"
            )


def read_split(path_or_name: str | Path, root: str | Path) -> dict[str, list[str]]:
    """The buildings of "train", "val" and "test", sorted, from a table `id,train,val,test` of buildings and flags.

    The official files are read as they are (CR line ends), and files with other line ends, blank lines, a byte-order
    mark, or without the first line too. A building may be in several splits. The broken ones are left out.

    Args:
        path_or_name: a file, a file in ROOT, or the name of an official partition such as "tiny", whose
            `train_val_test_tiny.csv` lies in ROOT/splits or in ROOT.
        root: the folder of the data.

    Raises:
        DataError: no such file, or one that reads otherwise.
    """
    path = _split_file(path_or_name, Path(root))
    try:
        text = decode_text(read_bytes(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); download it again") from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(re.split(r"\r\n|\r|\n", text)) if "".join(row).strip()]
    columns = ["id", *SPLITS]
    if rows and set(columns) <= {cell.lower() for cell in rows[0]}:
        columns = [cell.lower() for cell in rows.pop(0)]
    if not rows:
        raise DataError(f"{path} names no building; expected lines id,train,val,test such as hanson,1,0,0")
    buildings: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows:
        entry = dict(zip(columns, row))
        if len(row) != len(columns) or not entry["id"] or any(entry[split] not in ("0", "1") for split in SPLITS):
            raise DataError(f"{path} has the line '{','.join(row)}'; expected id,train,val,test such as hanson,1,0,0")
        for split in SPLITS:
            if entry[split] == "1" and entry["id"] not in BROKEN:
                buildings[split].append(entry["id"])
    return {split: sorted(found) for split, found in buildings.items()}


def _split_file(name: str | Path, root: Path) -> Path:
    official = f"train_val_test_{name}.csv"
    for path in (Path(name), root / name, root / "splits" / official, root / official):
        if path.is_file():
            return path
    found = [str(path.relative_to(root)) for path in sorted([*root.glob("*.csv"), *root.glob("splits/*.csv")])]
    have = ", ".join(found) or "no .csv file"
    give = "Give one as subset, or, in Python, split=None for all buildings"
    raise DataError(f"no split file {name} in {root}; there is {have}. {give}")


def _files(folder: Path) -> list[str]:
    """Names of files; many times as fast as listing paths."""
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def _scan(root: Path, d: Domain, buildings: Iterable[str]) -> list[Frame]:
    """All frames of a domain, sorted."""
    pattern = re.compile(rf"point_(0|[1-9]\d*)_view_(0|[1-9]\d*)_domain_{re.escape(d.suffix)}")
    found = ((name, pattern.fullmatch(file)) for name in buildings for file in _files(root / d.name / name))
    return sorted((name, int(match[1]), int(match[2])) for name, match in found if match)


def _draw(frames: list[Frame], limit: int, seed: int) -> list[Frame]:
    """The first `limit` frames of a fixed random order that takes the buildings in turn.

    It is the order of hashes: it depends on no version of a random generator, and a frame that is added to another
    building leaves it as it is.
    """

    def rank(*key: object) -> bytes:
        return hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()

    by_building: defaultdict[str, list[Frame]] = defaultdict(list)
    for frame in sorted(frames, key=lambda frame: rank(*frame)):
        by_building[frame[0]].append(frame)
    turns = zip_longest(*(by_building[building] for building in sorted(by_building, key=rank)))
    return [frame for turn in turns for frame in turn if frame is not None][:limit]
