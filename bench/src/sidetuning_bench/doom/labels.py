"""The labels of dense tasks, from an image and the exact depth, normal and surface of each of its pixels.

Every label is a function of one frame and of the camera's rays alone, in numpy and OpenCV. Lengths in pixels are given
for images of 128 pixels and grow with the image, so that a label looks alike at every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

# The distance over which curvature is expressed as an angle, in pixels of an image of 128.
FOOTPRINT = 6.0
MAX_CURVATURE = 2.0


@dataclass
class Geometry:
    """Depth and normal of every pixel of a square image of n pixels.

    Attributes:
        depth: depth along the optical axis; where `valid` is False it is a large finite number. (n, n)
        normal: unit vectors in the camera's frame (x right, y down, z forward), towards the viewer; 0 where invalid.
            (n, n, 3)
        valid: False at the sky. (n, n) bool
        rays: direction of each pixel at depth 1. (n, n, 3)
        focal: focal length in pixels, horizontally.
    """

    depth: Array
    normal: Array
    valid: NDArray[np.bool_]
    rays: Array
    focal: float

    @property
    def scale(self) -> float:
        """Pixels of this image per pixel of an image of 128."""
        return len(self.depth) / 128

    @cached_property
    def points(self) -> Array:
        """Positions of the pixels in the camera's frame, (n, n, 3)."""
        return self.depth[..., None] * self.rays

    @cached_property
    def contours(self) -> NDArray[np.bool_]:
        """The occluding contours, found once for all labels."""
        return jumps(self)

    @property
    def distance(self) -> Array:
        """Euclidean distance from the camera, (n, n)."""
        return self.depth * np.linalg.norm(self.rays, axis=-1)


def reshading(g: Geometry) -> Array:
    """The surface lit by a lamp at the camera: the cosine between normal and direction to the viewer, in [0, 1]."""
    cosine = -(g.normal * g.rays).sum(-1) / np.linalg.norm(g.rays, axis=-1)
    return np.clip(cosine, 0, 1).astype(np.float32)


def jumps(g: Geometry) -> NDArray[np.bool_]:
    """Occluding contours: pixels whose right or lower neighbour lies on another surface, not on one seen at a slant.

    The gap between two neighbours is measured off the plane of either; it counts where it exceeds 3 % of the depth.
    """
    found = np.zeros(g.depth.shape, bool)
    for axis in (0, 1):
        here, there = (slice(None, -1), slice(1, None)) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
        step = g.points[there] - g.points[here]
        gap = np.minimum(abs((step * g.normal[here]).sum(-1)), abs((step * g.normal[there]).sum(-1)))
        both = g.valid[here] & g.valid[there]
        nearer = np.minimum(g.depth[here], g.depth[there])
        found[here] |= (both & (gap > 0.03 * nearer + 4)) | (g.valid[here] != g.valid[there])
    return found


def edge_occlusion(g: Geometry) -> Array:
    """Occluding contours, two pixels wide and slightly blurred, in [0, 1]."""
    wide = cv2.dilate(g.contours.astype(np.float32), _square(2 * g.scale))
    return _blur(wide, 0.7 * g.scale)


def edge_texture(image: NDArray[np.uint8], scale: float) -> Array:
    """The length of the Sobel gradient of the smoothed grey image, in [0, 1]; 1 at a step of a quarter of the range."""
    smooth = _blur(_grey(image), scale)
    return np.clip(np.hypot(cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)) * scale, 0, 1).astype(np.float32)


def keypoints2d(image: NDArray[np.uint8], scale: float) -> Array:
    """Harris corners of the image: a blob at each local maximum, higher for stronger corners, up to 1."""
    size = 2 * round(scale) + 1
    strength = cv2.cornerHarris(_grey(image), size, 3, 0.04)
    top = max(float(strength.max()), 1e-6)
    peaks = (strength == cv2.dilate(strength, _square(2 * size - 1))) & (strength > 0.02 * top)
    blobs = _blur(np.where(peaks, np.sqrt(np.maximum(strength, 0)), 0).astype(np.float32), 1.6 * scale)
    return blobs / max(float(blobs.max()), 1e-6)


def keypoints3d(g: Geometry) -> Array:
    """How much the shape changes in two directions at once, in [0, 1].

    The smaller eigenvalue of the structure tensor of normals and log depth: high where three planes meet, and at
    corners of contours.
    """
    shape = np.concatenate([g.normal, np.log(np.maximum(g.depth, 8))[..., None] / 4], -1).astype(np.float32)
    shape[~g.valid] = 0
    du, dv = cv2.Sobel(shape, -1, 1, 0), cv2.Sobel(shape, -1, 0, 1)
    a, b, c = (_blur((p * q).sum(-1), 2 * g.scale) for p, q in ((du, du), (du, dv), (dv, dv)))
    smaller = (a + c) / 2 - np.sqrt(((a - c) / 2) ** 2 + b**2)
    return np.clip(smaller / 3, 0, 1).astype(np.float32)


def curvature(g: Geometry) -> Array:
    """Both principal curvatures, larger first, positive where the surface bulges towards the viewer. (n, n, 2)

    From the first and second fundamental forms of the smoothed points and normals. They are the angle in radians by
    which the surface turns over six pixels of 128, so they do not depend on distance, and lie within ±2. In a world of
    planes, curvature is non-zero only along creases, as wide as the smoothing. It is 0 next to occluding contours,
    where it cannot be measured.
    """
    inner = g.valid & (cv2.dilate(g.contours.astype(np.uint8), _square(2 * round(g.scale) + 1)) == 0)
    normal = _blur(g.normal * g.valid[..., None], 1.5 * g.scale)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    points = _blur(g.points, g.scale)
    (pu, pv), (nu, nv) = _slopes(points), _slopes(normal)
    e, f, gg = (pu * pu).sum(-1), (pu * pv).sum(-1), (pv * pv).sum(-1)
    ll, m, n = (nu * pu).sum(-1), ((nu * pv) + (nv * pu)).sum(-1) / 2, (nv * pv).sum(-1)
    area = np.maximum(e * gg - f * f, 1e-6)
    gauss = (ll * n - m * m) / area
    mean = (e * n - 2 * f * m + gg * ll) / (2 * area)
    spread = np.sqrt(np.maximum(mean * mean - gauss, 0))
    # A length on the surface.
    footprint = g.depth / g.focal * FOOTPRINT * g.scale
    both = np.stack([mean + spread, mean - spread], -1) * footprint[..., None]
    return (np.clip(both, -MAX_CURVATURE, MAX_CURVATURE) * inner[..., None]).astype(np.float32)


def false_colours(surface: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A colour per surface, for `segment_unsup25d`, as Taskonomy stores segments. (n, n, 3)"""
    # Knuth's multiplicative hash.
    code = (surface * 2654435761) & 0xFFFFFF
    return np.stack([code & 255, (code >> 8) & 255, code >> 16], -1).astype(np.uint8)


def _grey(image: NDArray[np.uint8]) -> Array:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


def _blur(x: Any, sigma: float) -> Array:
    return cv2.GaussianBlur(x, (0, 0), sigma)


def _square(pixels: float) -> NDArray[np.uint8]:
    """A structuring element."""
    return np.ones((max(1, round(pixels)),) * 2, np.uint8)


def _slopes(x: Array) -> tuple[Array, Array]:
    """Derivatives along u and v, per pixel."""
    return cv2.Sobel(x, -1, 1, 0, ksize=3) / 8, cv2.Sobel(x, -1, 0, 1, ksize=3) / 8
