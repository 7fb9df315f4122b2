"""Image files: which formats are read, how large they may be, and folders of labelled ones. Pillow alone, no torch."""

from __future__ import annotations

import functools
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sidetuning.errors import DataError

# The command line does not wait for Pillow.
if TYPE_CHECKING:
    from PIL import Image

# Pillow would start Ghostscript for EPS; icons may hold an image of another size than they say.
FORMATS = ["AVIF", "BMP", "DDS", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TGA"]
FORMATS += ["TIFF", "WEBP", "XBM", "XPM"]
# Width times height: 8192 x 8192 take 200 MB in RGB.
MOST_PIXELS = 2**26
# "cat copy 2", "cat - Copy (2)", "cat (another copy)", "cat (1)" and "Copy of cat", where "cat" is there too.
COPY = re.compile(r"copy of (.+)|(.+?)(?: - copy| copy| \((?:another )?copy\)|(?= \(\d+\)$))(?: \(\d+\)| \d+)?", re.I)


@contextmanager
def open_image(source: bytes | Path) -> Iterator[Image.Image]:
    """Open an encoded image for decoding: of a known format, and of a size that fits into memory.

    Args:
        source: the bytes of a file, or its path.

    Raises:
        DataError: another format, too many pixels (nothing is decoded then), or damaged; also inside the block.
        OSError: the path cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise DataError("it is a folder or a device, not an image file")
    large = f"the image has more than {MOST_PIXELS:,} pixels; make it smaller"
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(large)
                yield image
        except DataError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(large) from error
        except UnidentifiedImageError as error:
            known = "the image cannot be decoded: it is damaged, or of a format that is not read"
            raise DataError(f"{known} ({', '.join(FORMATS)} are)") from error
        except Exception as error:
            # Pillow's decoders raise whatever their formats make them.
            raise DataError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error


@functools.cache
def image_endings() -> set[str]:
    """Endings of the names of image files, in lower case and with their dots."""
    from PIL import Image

    # MPO is JPEG with more pictures, the first of which is read.
    return {ending for ending, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder with one folder per class.

    Attributes:
        files: image files, those of a class together.
        labels: number of the class of each file, by `names`.
        names: names of the classes.
        skipped: what was left out, with its count.
    """

    files: list[Path]
    labels: list[int]
    names: list[str]
    skipped: dict[str, int]


def image_folder(folder: str | Path, names: Collection[str] = ()) -> ImageFolder:
    """Find the images in `<folder>/<class>/`, and in folders within it.

    Hidden files, copies of whole classes, links to folders within a class, and files that are no images are left out.

    Args:
        folder: a folder of folders.
        names: classes that have a number even where they have no folder here, such as those of another split.

    Raises:
        DataError: the folder cannot be read.
    """
    root, skipped = Path(folder), Counter[str]()
    try:
        classes = class_folders(root)
        chosen = {path for paths in classes.values() for path in paths}
        for entry in root.iterdir():
            if entry not in chosen:
                skipped[_reason(entry) or ("copied classes" if entry.is_dir() else "images outside the classes")] += 1
        found = {name: [file for path in paths for file in _images(path, skipped)] for name, paths in classes.items()}
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error}); give a folder with one folder of images a class"
        ) from error
    everything = sorted({*names, *(name for name, files in found.items() if files)})
    pairs = [(file, k) for k, name in enumerate(everything) for file in sorted(found.get(name, ()), key=str)]
    if empty := sorted({*everything, *found} - {name for name, files in found.items() if files}):
        skipped[f"classes without an image ({', '.join(empty[:5])}{' …' * (len(empty) > 5)})"] = len(empty)
    return ImageFolder([file for file, _ in pairs], [k for _, k in pairs], everything, dict(skipped))


def class_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of the classes in `root`, by name; one name may be spelled in two ways in Unicode."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.is_dir() and not hidden(path.name):
            name = unicodedata.normalize("NFC", os.fsencode(path.name).decode("utf-8", "backslashreplace"))
            found.setdefault(name.strip(), []).append(path)
    copies = {name for name in found if (match := COPY.fullmatch(name)) and (match[1] or match[2]) in found}
    return {name: paths for name, paths in found.items() if name not in copies}


def hidden(name: str) -> bool:
    """Whether a file or folder is one that a system or an editor made for itself."""
    return name.startswith((".", "__MACOSX", "__pycache__"))


def _images(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """The images in a folder and in those within it; what is left out is counted."""
    waiting = [folder]
    while waiting:
        for entry in waiting.pop().iterdir():
            if reason := _reason(entry):
                skipped[reason] += 1
            elif not entry.is_dir():
                yield entry
            elif entry.is_symlink():
                # It may lead back to where it came from.
                skipped["links to folders"] += 1
            else:
                waiting.append(entry)


def _reason(entry: Path) -> str | None:
    """Why something in a folder is left out: None where it is an image or a folder."""
    if hidden(entry.name):
        return "hidden files and folders"
    if entry.is_dir():
        return None
    if not entry.is_file():
        return "devices, pipes and broken links"
    ending = entry.suffix.lower()
    return None if ending in image_endings() else f"files that end in {ending or 'nothing'}"
