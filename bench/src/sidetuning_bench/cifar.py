"""Small labelled images: parquet files in the Hub's column layout, a Hub name, or folders of image files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from sidetuning.errors import DataError
from sidetuning.transforms import decode_image
from sidetuning_bench.from_hub import local_folder

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Encoded images of one size and their labels; an image is decoded when it is asked for.

    Attributes:
        labels: (n,) int64.
        names: names of the classes, by label.
    """

    def __init__(self, cells: list[bytes], labels: Sequence[int], names: list[str], where: str) -> None:
        if not cells:
            raise DataError(f"{where} holds no image")
        bad = next((i for i, y in enumerate(labels) if y is None or not 0 <= y < len(names)), None)
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
            raise DataError(f"row {index} of {self._where} is {tuple(image.shape)}, the first one is {self.shape}")
        return image, int(self.labels[index])

    def _decode(self, index: int) -> Tensor:
        """uint8 (3, h, w)."""
        try:
            return decode_image(self._cells[index])
        except DataError as error:
            raise DataError(f"row {index} of {self._where}: {error}") from error

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, uint8 (n, 3, h, w), and all labels."""
        return torch.stack([self[i][0] for i in range(len(self))]), self.labels

    def fingerprint(self) -> str:
        """sha256 over the encoded images and the labels, wherever they lie."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for cell in self._cells:
            digest.update(cell)
        return digest.hexdigest()


def load_images(source: str | Path, split: str) -> ImageSet:
    """Open one split of a data set of small images.

    Args:
        source: a folder with `<split>*.parquet` (columns `img` and `fine_label` or `label`, the layout of
            `uoft-cs/cifar100` and `uoft-cs/cifar10`), a folder with `<split>/<class>/*.png`, or a name on the Hub.
        split: "train" or "test".

    Raises:
        DataError: nothing there, a missing column, an image that cannot be decoded, a label out of range.
    """
    root = local_folder(source, "uoft-cs/cifar100")
    files = sorted(map(str, root.rglob(f"{split}*.parquet")))
    folder = root / split
    if files:
        return _read(files[0] if len(files) == 1 else str(Path(files[0]).parent), "parquet", {"data_files": files})
    if folder.is_dir():
        return _read(str(folder), "imagefolder", {"data_dir": str(folder), "drop_labels": False})
    raise DataError(
        f"{root} holds neither {split}*.parquet nor a folder {split}/<class>/; give the folder of a CIFAR data set "
        "or a name on the Hub such as uoft-cs/cifar100"
    )


def _read(where: str, kind: str, options: dict[str, Any]) -> ImageSet:
    """Read encoded images and labels by a builder of `datasets`; streaming spares it a copy of the data on the disk."""
    import datasets  # type: ignore[import-untyped]

    # Its errors are told below.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    rows: list[tuple[Any, Any]] = []
    try:
        data = datasets.load_dataset(kind, split="train", streaming=True, **options)
        columns = [_column(where, list(data.features), wanted) for wanted in (IMAGE_COLUMNS, LABEL_COLUMNS)]
        for table in data.with_format("arrow").iter(batch_size=2000):
            rows += zip(*(table[column].to_pylist() for column in columns), strict=True)
    except DataError:
        raise
    except datasets.data_files.EmptyDatasetError as error:
        raise DataError(f"{where} holds no image") from error
    # Readers raise whatever their formats make them.
    except Exception as error:
        raise DataError(f"{where} is no readable {kind} data ({error}); download it again") from error
    if kind == "imagefolder":
        rows.sort(key=lambda row: (row[1], row[0]["path"]))
        cells = [Path(cell["path"]).read_bytes() for cell, _ in rows]
    else:
        cells = [cell["bytes"] if isinstance(cell, dict) else cell for cell, _ in rows]
    labels = [label for _, label in rows]
    names = getattr(data.features[columns[1]], "names", None)
    return ImageSet(cells, labels, names or [str(i) for i in range(max(filter(None, labels), default=0) + 1)], where)


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
