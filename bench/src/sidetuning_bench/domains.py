"""Taskonomy's domains: how their files are named, encoded, written and read. NumPy and Pillow alone, no torch."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from sidetuning.errors import DataError, ShapeError, UnknownNameError
from sidetuning.files import read_bytes
from sidetuning.registry import unknown


@dataclass(frozen=True)
class Domain:
    """How the files of one domain are named and encoded.

    Attributes:
        name: name of the domain and of its folder.
        channels: channels that are kept of a file; 0 for ids and masks, which are planes (h, w); the number of scores.
        bits: bits of one value in the file: 8 or 16 (.png), 32 for scores (.npy), 0 for text (.json).
        suffix: end of the file names, all that follows `_domain_`.
        geometric: rendered from the mesh, so that a pixel where `mask_valid` is 0 means nothing.
    """

    name: str
    channels: int
    bits: int
    suffix: str
    geometric: bool = False


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain("rgb", 3, 8, "rgb.png"),
        Domain("normal", 3, 8, "normal.png", True),
        Domain("principal_curvature", 2, 8, "principal_curvature.png", True),
        Domain("reshading", 1, 8, "reshading.png", True),
        Domain("depth_euclidean", 1, 16, "depth_euclidean.png", True),
        Domain("depth_zbuffer", 1, 16, "depth_zbuffer.png", True),
        Domain("edge_texture", 1, 16, "edge_texture.png"),
        Domain("edge_occlusion", 1, 16, "edge_occlusion.png", True),
        Domain("keypoints2d", 1, 16, "keypoints2d.png"),
        Domain("keypoints3d", 1, 16, "keypoints3d.png", True),
        Domain("segment_semantic", 0, 8, "segmentsemantic.png"),
        Domain("segment_unsup25d", 3, 8, "segment_unsup25d.png"),
        Domain("mask_valid", 0, 8, "depth_zbuffer.png"),
        Domain("class_object", 1000, 32, "class_object.npy"),
        Domain("class_scene", 365, 32, "class_places.npy"),
        Domain("point_info", 0, 0, "point_info.json"),
    )
}
ALIASES = {"curvature": "principal_curvature"}
DEPTHS = ("depth_euclidean", "depth_zbuffer")
# Domains whose value 127 in the file means 0, and 254 this bound.
SIGNED = {"normal": 1.0, "principal_curvature": 2.0}
# Domains where the average of two values is neither.
UNBLENDABLE = (*DEPTHS, "segment_semantic", "segment_unsup25d", "mask_valid")
# A metre in units of a depth file.
METRE = 512
# Depths from here on mean that the mesh has a hole.
INVALID = 64500
SEMANTIC = ["uncertain", "background", "bottle", "chair", "couch", "potted plant", "bed", "dining table", "toilet"]
SEMANTIC += ["tv", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"]


def domain_of(name: str) -> Domain:
    """The entry of `DOMAINS`, also by an alias; raises UnknownNameError with near names."""
    name = ALIASES.get(name, name)
    if name not in DOMAINS:
        raise UnknownNameError(unknown("domain", name, DOMAINS, verb="known"))
    return DOMAINS[name]


def tensor_domain(name: str) -> Domain:
    """As `domain_of`; raises DataError where the files hold text."""
    domain = domain_of(name)
    if domain.bits == 0:
        raise DataError(f"{domain.name} is JSON text, no tensor; read the file that path_of gives with json.loads")
    return domain


def path_of(root: str | Path, domain: str, building: str, point: int, view: int) -> Path:
    """Where the file of a frame lies."""
    found = domain_of(domain)
    return Path(root) / found.name / building / f"point_{point}_view_{view}_domain_{found.suffix}"


def names(root: str | Path, domain: str) -> list[str]:
    """The names of a domain's classes or channels, by number.

    They come from ROOT/names.json (`{"segment_semantic": ["uncertain", …]}`) where that names the domain. Else they are
    Taskonomy's 18 for `segment_semantic`, and numbers for the others.
    """
    d, path = domain_of(domain), Path(root) / "names.json"
    table: Any = {}
    if path.exists():
        try:
            table = json.loads(read_bytes(path))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is no readable JSON file ({error}); mend it or remove it") from error
    found = table.get(d.name) if isinstance(table, dict) else []
    if found is None:
        return list(SEMANTIC) if d.name == "segment_semantic" else [str(i) for i in range(d.channels)]
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise DataError(f'{path} must read like {{"{d.name}": ["first name", "second name"]}}; mend it or remove it')
    return found


def read(path: str | Path, domain: str) -> npt.NDArray[Any]:
    """The values of one file, as they are in it.

    Returns:
        uint8 (c, h, w) for 8-bit domains, uint8 (h, w) for ids and masks, int32 (1, h, w) in 0 … 65535 for 16-bit
        domains, float32 (n,) for scores. Transparency is dropped. Of a picture with a palette the colours count, but of
        ids the numbers.

    Raises:
        DataError: the file is missing, damaged, or has other bits or channels than the domain.
    """
    d, path = tensor_domain(domain), Path(path)
    if not path.is_file():
        raise DataError(f"{d.name} has no file {path}; download or render it, or leave the domain {d.name} out")
    if d.bits == 32:
        return _scores(path, d)
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, _pixels(image, d)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is damaged: no format that Pillow knows; download or render it again") from error
    except Exception as error:
        # Pillow's decoders raise errors of all kinds.
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); download or render it again") from error
    if pixels is None:
        needed = "16-bit grey" if d.bits == 16 else "8-bit grey" if d.channels < 2 else "8-bit RGB"
        raise DataError(f"{path} is a picture of mode {mode}; {d.name} needs {needed}: save it again as that")
    if pixels.ndim == 3:
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels[None] if d.channels else pixels


def _pixels(image: Image.Image, d: Domain) -> npt.NDArray[Any] | None:
    """(h, w) or (h, w, c) of what the domain keeps, None where the picture is of another kind."""
    if d.bits == 16:
        # Older versions of Pillow give the mode I for a 16-bit PNG, others I;16 or I;16B.
        if not image.mode.startswith("I"):
            return None
        # Never through int16: values above 32767 would turn negative.
        pixels = np.array(image).astype(np.int32)
        return pixels if pixels.min() >= 0 and pixels.max() <= 65535 else None
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return None
    if d.name == "segment_semantic":
        # Some tools save grey as RGB, but colours are no ids.
        bands = [np.array(image.getchannel(i)) for i in range(3 if image.mode.startswith("RGB") else 1)]
        return bands[0] if image.mode != "1" and all((band == bands[0]).all() for band in bands) else None
    if image.mode in ("P", "PA"):
        # At once to RGB, Pillow would warn of transparency.
        image = image.convert("RGBA")
    if d.channels < 2:
        # Taskonomy's own are greys in RGB, which this keeps exactly.
        return np.array(image.convert("L"))
    return np.array(image.convert("RGB"))[..., : d.channels] if image.mode.startswith("RGB") else None


def _scores(path: Path, d: Domain) -> npt.NDArray[np.float32]:
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:
        # Bytes of any kind make NumPy raise errors of all kinds, pickled objects included.
        raise DataError(f"{path} is no readable .npy file of numbers ({error}); download or render it again") from error
    one = array.size == max(array.shape, default=0) > 0
    if not one or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise DataError(f"{path} must hold one vector of finite numbers for {d.name}; download or render it again")
    return array.reshape(-1).astype(np.float32)


def write(path: str | Path, domain: str, values: npt.ArrayLike | Mapping[str, Any]) -> None:
    """Encode values, or the mapping of `point_info`, and write them; the file is there whole or not at all.

    Folders are made. Files are not synced to the disk one by one: that would make rendering several times as slow.
    """
    d, path, buffer = domain_of(domain), Path(path), io.BytesIO()
    if d.bits == 0:
        buffer.write(json.dumps(values).encode())
    elif d.bits == 32:
        np.save(buffer, encode(domain, np.asarray(values)), allow_pickle=False)
    else:
        # This level takes a third of the time of the default, and the files are hardly larger.
        Image.fromarray(encode(domain, np.asarray(values))).save(buffer, "PNG", compress_level=1)
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


def encode(domain: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """What a file of the domain holds for values in the domain's own units; `targets.units` undoes it.

    Args:
        domain: name of the domain.
        values: an array that has the file's type already (uint8, uint16 or float32), or

            - depths (h, w) in metres: kept to 1/512 m and clipped to 0 … 64499 of these, 65535 where not finite;
            - normals (h, w, 3) in -1 … 1, curvatures (h, w, 2), clipped to -2 … 2: 127 is 0, also where not finite;
            - other maps, (h, w) or (h, w, 3), in 0 … 1; ids (h, w); masks (h, w), valid where not 0; scores (n,).

    Raises:
        ShapeError, DataError: another shape, another type, or values out of range.
    """
    d, values = tensor_domain(domain), np.asarray(values)
    axes = 1 if d.bits == 32 else 2 if d.channels < 2 else 3
    if values.ndim != axes or (axes == 3 and values.shape[2] not in (d.channels, 3)):
        shape = ("(n,)", "(h, w)", f"(h, w, {d.channels})")[axes - 1]
        raise ShapeError(f"{d.name} takes values of the shape {shape}, not {values.shape}")
    coded = _coded(d, values)
    if d.channels == 2 and coded.shape[2] == 2:
        # The files are RGB; the third channel is not used.
        coded = np.concatenate([coded, np.full_like(coded[..., :1], 127)], axis=2)
    return coded


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
