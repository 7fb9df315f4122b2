"""Files in Taskonomy's layout, made by hand as the release has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# Pixels of most pictures here; the release has 512.
N = 8
DEEP = ("depth_euclidean", "depth_zbuffer", "edge_texture", "edge_occlusion", "keypoints2d", "keypoints3d")
# Literally as in the release, not as the module thinks.
SUFFIX = {name: f"{name}.png" for name in ("rgb", "normal", "principal_curvature", "reshading", *DEEP)}
SUFFIX |= {"segment_semantic": "segmentsemantic.png", "segment_unsup25d": "segment_unsup25d.png"}
SUFFIX |= {"mask_valid": "depth_zbuffer.png", "point_info": "point_info.json"}
SUFFIX |= {"class_object": "class_object.npy", "class_scene": "class_places.npy"}


def file_of(root: Path, domain: str, building: str = "hanson", point: int = 0, view: int = 0) -> Path:
    return root / domain / building / f"point_{point}_view_{view}_domain_{SUFFIX[domain]}"


def raw_values(domain: str, rng: np.random.Generator, n: int = N) -> npt.NDArray[Any]:
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


def put(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)
    return values
