"""Small labelled images: parquet files in the Hub's column layout, a Hub name, or folders of image files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sidetuning.errors import ArtifactError, DataError, DataWarning
from sidetuning.files import parse_json
from sidetuning.images import ImageFolder, image_folder
from sidetuning.transforms import decode_image
from sidetuning_bench.from_hub import local_folder, open_parquet, split_files

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")
# Names of splits: each must know the classes of all others.
SPLITS = ("train", "val", "valid", "validation", "dev", "test")
# The largest class number where classes have no names.
LARGEST = 65_535


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Encoded images of one size and their labels; an image is decoded when it is asked for.

    Attributes:
        labels: (n,) int64.
        names: names of the classes, by label.
    """

    def __init__(self, cells: Sequence[bytes | Path], labels: Sequence[int], names: list[str], where: str) -> None:
        if not cells:
            raise DataError(f"{where} holds no image")
        bad = next((i for i, y in enumerate(labels) if not 0 <= y < len(names)), None)
        if bad is not None:
            raise DataError(f"row {bad} of {where} has the label {labels[bad]}, outside 0 … {len(names) - 1}")
        self._cells, self._where = cells, where
        self.labels, self.names = torch.tensor(labels), names
        self.shape = tuple(self._decode(0).shape)

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._decode(index)
        if tuple(image.shape) != self.shape:
            raise DataError(f"{self._name(index)} is {tuple(image.shape)}, the first one is {self.shape}")
        return image, int(self.labels[index])

    def _name(self, index: int) -> str:
        cell = self._cells[index]
        return str(cell) if isinstance(cell, Path) else f"row {index} of {self._where}"

    def _decode(self, index: int) -> Tensor:
        """uint8 (3, h, w)."""
        try:
            return decode_image(self._cells[index])
        except (DataError, OSError) as error:
            raise DataError(f"{self._name(index)}: {error}") from error

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, uint8 (n, 3, h, w), and all labels."""
        return torch.stack([self[i][0] for i in range(len(self))]), self.labels

    def fingerprint(self) -> str:
        """sha256 over the encoded images and the labels, wherever they lie."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for cell in self._cells:
            digest.update(cell.read_bytes() if isinstance(cell, Path) else cell)
        return digest.hexdigest()


def load_images(source: str | Path, split: str) -> ImageSet:
    """Open one split of a data set of small images; a class has one number in all splits.

    Args:
        source: a folder with `<split>*.parquet` (columns `img` and `fine_label` or `label`, the layout of
            `uoft-cs/cifar100` and `uoft-cs/cifar10`), a folder with `<split>/<class>/`, which holds image files, or a
            name on the Hub.
        split: "train" or "test".

    Raises:
        DataError: nothing there, a missing column, an image that cannot be decoded, a label out of range.
    """
    root = local_folder(source, "uoft-cs/cifar100")
    folder, files = root / split, split_files(root, split, [".parquet"])
    found = _found(root, split) if folder.is_dir() else None
    if found is not None and found.files:
        if files:
            raise DataError(f"{root} holds both {files[0].name} and images in {split}/; keep one of them there")
        if found.skipped:
            warnings.warn(f"{folder} has {len(found.files)} images{_left_out(found)}", DataWarning, stacklevel=2)
        return ImageSet(found.files, found.labels, found.names, str(folder))
    if files:
        others = {name: split_files(root, name, [".parquet"]) for name in SPLITS if name != split}
        return _read_parquet({split: files, **others}, split)
    if found is not None:
        raise DataError(f"{folder} holds no image in a folder of its class{_left_out(found)}")
    raise DataError(
        f"{root} holds neither {split}*.parquet nor a folder {split}/<class>/; give the folder of a CIFAR data set "
        "or a name on the Hub such as uoft-cs/cifar100"
    )


def _left_out(found: ImageFolder) -> str:
    """What was left out of a folder, or nothing."""
    parts = ", ".join(f"{count} {reason}" for reason, count in sorted(found.skipped.items()))
    return f"; left out: {parts}" if parts else ""


def _found(root: Path, split: str) -> ImageFolder:
    """The images of a split, whose classes have numbers in all splits."""
    others = [root / other for other in SPLITS if other != split and (root / other).is_dir()]
    return image_folder(root / split, {name for other in others for name in image_folder(other).names})


def _read_parquet(files: Mapping[str, list[Path]], split: str) -> ImageSet:
    own = files[split]
    where = str(own[0] if len(own) == 1 else own[0].parent)
    cells: list[Any] = []
    labels: dict[str, list[Any]] = {}
    names = None
    for name, parts in files.items():
        labels[name] = []
        for file in parts:
            images, found, known = _columns(file, name == split)
            cells += images
            labels[name] += found
            names = known if name == split else names
    images = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    if (bad := next((i for i, cell in enumerate(images) if not isinstance(cell, bytes)), None)) is not None:
        raise DataError(f"row {bad} of {where} holds no image, but a {type(images[bad]).__name__}; give encoded images")
    if names is None and all(isinstance(label, str) for label in labels[split]):
        # Texts of all splits, so that a class has one number in all.
        names = sorted({label for some in labels.values() for label in some if isinstance(label, str)})
        return ImageSet(images, [names.index(label) for label in labels[split]], names, where)
    numbers = [_class_number(label, f"row {i} of {where}") for i, label in enumerate(labels[split])]
    if names is None:
        highest = [y for some in labels.values() for y in some if isinstance(y, (int, float)) and 0 <= y <= LARGEST]
        if (bad := next((i for i, y in enumerate(numbers) if y > LARGEST), None)) is not None:
            raise DataError(
                f"row {bad} of {where} has the label {numbers[bad]}, above {LARGEST}; number the classes from 0 on"
            )
        names = [str(i) for i in range(int(max(highest, default=0)) + 1)]
    return ImageSet(images, numbers, names, where)


def _class_number(label: Any, where: str) -> int:
    """A label as the number of a class."""
    if isinstance(label, (int, float)) and label == label // 1:
        return int(label)
    what = "no label" if label is None or label != label else f"the label {label!r:.50}"
    raise DataError(f"{where} has {what}; a label is one class: its number, or in all rows its name")


def _columns(file: Path, images: bool) -> tuple[list[Any], list[Any], list[str] | None]:
    """Encoded images where they are asked for, labels, and the names of the classes where the file has them."""
    mend = "download it again"
    try:
        with open_parquet(file) as parquet:
            schema = parquet.schema_arrow
            column = _column(str(file), schema.names, LABEL_COLUMNS)
            image = [_column(str(file), schema.names, IMAGE_COLUMNS)] if images else []
            table = parquet.read([*image, column]).to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is no readable parquet data ({error}); {mend}") from error
    text = (schema.metadata or {}).get(b"huggingface", b"{}").decode("utf-8", "replace")
    try:
        about = parse_json(text, str(file), {"info?": {"features?": {f"{column}?": {"names?": [str]}}}}, mend)
    except ArtifactError as error:
        raise DataError(str(error)) from error
    features = ((about.get("info") or {}).get("features") or {}).get(column) or {}
    return table[image[0]] if image else [], table[column], features.get("names")


def _column(where: str, present: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in present:
            return name
    raise DataError(f"{where} has the columns {', '.join(present)}; it needs one of {', '.join(wanted)}")


def random_flip_crop(images: Tensor, padding: int, generator: torch.Generator | None = None) -> Tensor:
    """Flip each image left-right with probability 1/2 and crop it at a random place after zero-padding.

    Shape: (b, c, h, w), any type -> the same.
    """
    b, _, h, w = images.shape
    flip = torch.rand(b, generator=generator) < 0.5
    top, left = torch.randint(0, 2 * padding + 1, (2, b), generator=generator)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # (b, h', w', c)
    rows = top[:, None] + torch.arange(h)  # (b, h)
    columns = left[:, None] + torch.arange(w)  # (b, w)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    sample = torch.arange(b)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
