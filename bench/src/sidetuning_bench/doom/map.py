"""Exact geometry of Doom maps: what a camera sees at every pixel, from the map's lines and sectors alone.

A Doom map is a set of two-dimensional lines between sectors; a sector is an area with one floor height and one ceiling height.
So along an image column everything follows from the lines that the column's ray crosses, nearest first: the floor and the ceiling
of the sector that the ray is in, then the wall where it leaves that sector. Lengths are map units, 32 to the metre.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sidetuning.errors import DataError

NOTHING, FLOOR, CEILING, WALL, SKY = range(5)
LIQUIDS = (b"NUKAGE", b"FWATER", b"LAVA", b"BLOOD", b"SLIME0")
NO_SIDE = 65535

VERTEX = np.dtype([("x", "<i2"), ("y", "<i2")])
LINE = np.dtype(
    [("start", "<u2"), ("end", "<u2"), ("flags", "<u2"), ("special", "<u2"), ("tag", "<u2"), ("right", "<u2"), ("left", "<u2")]
)  # fmt: skip
SIDE = np.dtype([("x", "<i2"), ("y", "<i2"), ("upper", "S8"), ("lower", "S8"), ("middle", "S8"), ("sector", "<u2")])
SECTOR = np.dtype(
    [("floor", "<i2"), ("ceiling", "<i2"), ("floor_texture", "S8"), ("ceiling_texture", "S8"), ("light", "<i2"), ("special", "<i2"), ("tag", "<i2")]
)  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """A square image of `size` pixels; `fx` and `fy` are focal lengths in pixels. Doom's pixels are 1.2 times as high as wide."""

    size: int
    fx: float
    fy: float

    @classmethod
    def of_size(cls, size: int) -> Camera:
        """The middle square of Doom's 4:3 picture with 90 degrees horizontally (fx 160 and fy 192 at 320 x 240)."""
        return cls(size, 160 * size / 240, 192 * size / 240)

    def rays(self) -> NDArray[np.float64]:
        """The direction of every pixel at depth 1: x right, y down, z forward, (size, size, 3)."""
        middle = np.arange(self.size) + 0.5 - self.size / 2
        u, v = np.meshgrid(middle / self.fx, middle / self.fy)
        return np.stack([u, v, np.ones_like(u)], -1)


@dataclass
class View:
    """What a camera sees of a map without its things.

    Attributes:
        depth: along the optical axis, in map units; inf at the sky. (size, size)
        normal: of the surface in world coordinates (x east, y north, z up), towards the viewer; 0 at the sky. (size, size, 3)
        kind: NOTHING, FLOOR, CEILING, WALL or SKY. (size, size) int8
        surface: an id that pixels of one floor, ceiling or wall part share; -1 at the sky, -2 where nothing was hit.
        sector: of floor and ceiling pixels, else -1.
    """

    depth: NDArray[np.float64]
    normal: NDArray[np.float64]
    kind: NDArray[np.int8]
    surface: NDArray[np.int64]
    sector: NDArray[np.int64]


class DoomMap:
    """The lines and sectors of a map.

    Attributes:
        lines: x1, y1, x2, y2 of each line, (n, 4) float64.
        front, back: the sectors right and left of each line, -1 for none.
        blocking: lines that nobody can walk through.
        floor, ceiling: heights of the sectors.
        sky, liquid: sectors under the open sky; sectors with water, slime, lava or blood for a floor.
    """

    def __init__(self, vertices: Any, lines: Any, sides: Any, sectors: Any) -> None:
        points = np.stack([vertices["x"], vertices["y"]], 1).astype(np.float64)
        self.lines = np.concatenate([points[lines["start"]], points[lines["end"]]], 1)
        self.front = _sectors_of(lines["right"], sides)
        self.back = _sectors_of(lines["left"], sides)
        self.blocking = (lines["flags"] & 1) > 0
        self.floor = sectors["floor"].astype(np.float64)
        self.ceiling = sectors["ceiling"].astype(np.float64)
        self.sky = np.array([t.upper().startswith(b"F_SKY") for t in sectors["ceiling_texture"]])
        self.liquid = np.array([t.upper().startswith(LIQUIDS) for t in sectors["floor_texture"]])

    def sector_at(self, x: float, y: float) -> int:
        """The sector around a point, -1 outside the map."""
        return int(_sector_at(self.lines, self.front, self.back, x, y))

    def look(self, x: float, y: float, eye: float, yaw: float, camera: Camera) -> View:
        """What a level camera at (x, y) and height `eye` sees; `yaw` in degrees from east, anticlockwise."""
        n = camera.size
        view = View(
            np.full((n, n), np.inf), np.zeros((n, n, 3)), np.zeros((n, n), np.int8), np.full((n, n), -2, np.int64),
            np.full((n, n), -1, np.int64),
        )  # fmt: skip
        sector = self.sector_at(x, y)
        if sector >= 0:
            _look(
                self.lines, self.front, self.back, self.floor, self.ceiling, self.sky, x, y, eye, np.radians(yaw), sector,
                camera.fx, camera.fy, view.depth, view.normal, view.kind, view.surface, view.sector,
            )  # fmt: skip
        return view

    def free_points(
        self, rng: np.random.Generator, count: int, margin: float = 40.0, headroom: float = 64.0
    ) -> NDArray[np.float64]:
        """Up to `count` random places where a player can stand: not in a liquid, `margin` away from walls. (n, 2)"""
        ends = self.lines.reshape(-1, 2)
        solid = self.lines[(self.back < 0) | self.blocking]
        start, along = solid[:, :2], solid[:, 2:] - solid[:, :2]
        length2 = np.maximum((along**2).sum(1), 1e-9)
        found: list[NDArray[np.float64]] = []
        for p in rng.uniform(ends.min(0), ends.max(0), (800 * count, 2)):
            if len(found) == count:
                break
            sector = self.sector_at(*p)
            if sector < 0 or self.liquid[sector] or self.ceiling[sector] - self.floor[sector] < headroom:
                continue
            t = np.clip(((p - start) * along).sum(1) / length2, 0, 1)
            if ((start + t[:, None] * along - p) ** 2).sum(1).min() >= margin**2:
                found.append(p)
        return np.array(found).reshape(-1, 2)


def load_map(wad: Path, name: str) -> DoomMap:
    """Read a map from a WAD file.

    Raises:
        DataError: no WAD file, or no such map in it.
    """
    try:
        data = wad.read_bytes()
    except OSError as error:
        raise DataError(f"{wad} cannot be read ({error.strerror}); give the path of a WAD file") from error
    if data[:4] not in (b"IWAD", b"PWAD"):
        raise DataError(f"{wad} is no WAD file: it starts with {data[:4]!r}")
    count, at = struct.unpack("<ii", data[4:12])
    lumps = [struct.unpack("<ii8s", data[at + 16 * i : at + 16 * (i + 1)]) for i in range(count)]
    names = [raw.rstrip(b"\0").decode("latin1").upper() for _, _, raw in lumps]
    if name.upper() not in names:
        raise DataError(f"{wad} has no map {name}; it has {', '.join(n for n in names if n.startswith('MAP'))}")
    i = names.index(name.upper())
    parts = {names[j]: data[lumps[j][0] : lumps[j][0] + lumps[j][1]] for j in range(i + 1, min(i + 11, count))}
    if "BEHAVIOR" in parts:
        raise DataError(f"map {name} of {wad} is in Hexen's format, which is not read; give a map in Doom's format")
    kinds = {"VERTEXES": VERTEX, "LINEDEFS": LINE, "SIDEDEFS": SIDE, "SECTORS": SECTOR}
    return DoomMap(*(np.frombuffer(parts[part], kind) for part, kind in kinds.items()))


def _sectors_of(side: NDArray[Any], sides: NDArray[Any]) -> NDArray[np.int64]:
    sectors = sides["sector"][np.minimum(side, len(sides) - 1)].astype(np.int64)
    return np.where(side == NO_SIDE, -1, sectors)


@njit(cache=True)
def _sector_at(lines: Any, front: Any, back: Any, x: float, y: float) -> int:
    """Casts a ray, in a direction that no line is likely to have, to the nearest line and asks on which side it starts."""
    dx, dy = 0.9238795, 0.3826834
    nearest, sector = np.inf, -1
    for i in range(lines.shape[0]):
        ax, ay = lines[i, 0] - x, lines[i, 1] - y
        ex, ey = lines[i, 2] - lines[i, 0], lines[i, 3] - lines[i, 1]
        cross = dx * ey - dy * ex
        if cross == 0:
            continue
        t = (ax * ey - ay * ex) / cross
        u = (ax * dy - ay * dx) / cross
        if 1e-9 < t < nearest and 0 <= u <= 1:
            nearest = t
            sector = front[i] if ey * ax < ex * ay else back[i]
    return sector


@njit(cache=True)
def _paint(view: Any, column: int, first: int, last: int, z: float, n: Any, kind: int, surface: int) -> None:
    """Part of a wall or of the sky: one depth, rows `first` … `last`."""
    depth, normal, kinds, surfaces, _ = view
    for row in range(first, last + 1):
        depth[row, column] = z
        normal[row, column, 0], normal[row, column, 1], normal[row, column, 2] = n
        kinds[row, column] = kind
        surfaces[row, column] = surface


@njit(cache=True)
def _paint_level(
    view: Any, column: int, first: int, last: int, rise: float, fy: float, up: float, kind: int, sector: int
) -> None:
    """Part of a floor or ceiling that lies `rise` above the eye: depth from the row."""
    depth, normal, kinds, surfaces, sectors = view
    middle = depth.shape[0] / 2
    for row in range(first, last + 1):
        depth[row, column] = rise * fy / (middle - row - 0.5)
        normal[row, column, 2] = up
        kinds[row, column] = kind
        surfaces[row, column] = 2 * sector + kind - FLOOR
        sectors[row, column] = sector


@njit(cache=True)
def _look(
    lines: Any, front: Any, back: Any, floor: Any, ceiling: Any, sky: Any, x: float, y: float, eye: float, yaw: float,
    start: int, fx: float, fy: float, depth: Any, normal: Any, kinds: Any, surfaces: Any, sectors: Any,
) -> None:  # fmt: skip
    """Fill the arrays of a view, column by column."""
    size, n = depth.shape[0], lines.shape[0]
    view = (depth, normal, kinds, surfaces, sectors)
    none = (0.0, 0.0, 0.0)
    c, s = np.cos(yaw), np.sin(yaw)
    seen = np.empty((n, 4))  # forward and right coordinates of both ends
    for i in range(n):
        ax, ay = lines[i, 0] - x, lines[i, 1] - y
        bx, by = lines[i, 2] - x, lines[i, 3] - y
        seen[i] = (ax * c + ay * s, ax * s - ay * c, bx * c + by * s, bx * s - by * c)
    crossed, at = np.empty(n, np.int64), np.empty(n)
    for column in range(size):
        slope = (column + 0.5 - size / 2) / fx
        k = 0
        for i in range(n):
            g, h = seen[i, 1] - slope * seen[i, 0], seen[i, 3] - slope * seen[i, 2]
            if (g <= 0) == (h <= 0):
                continue
            z = seen[i, 0] + g / (g - h) * (seen[i, 2] - seen[i, 0])
            if z > 1e-6:
                crossed[k], at[k] = i, z
                k += 1
        sector, top, bottom = start, 0, size - 1  # rows that are still open, both included
        for j in np.argsort(at[:k]):
            i, z = crossed[j], at[j]
            ex, ey = lines[i, 2] - lines[i, 0], lines[i, 3] - lines[i, 1]
            right = ex * (y - lines[i, 1]) < ey * (x - lines[i, 0])
            near, far = (front[i], back[i]) if right else (back[i], front[i])
            if near < 0 or near == far or (near != sector and far == sector):
                continue  # seen from outside, inside one sector, or a line that the ray has already passed
            sector = near
            low, high = floor[sector], ceiling[sector]

            floor_row = max(top, int(np.ceil(size / 2 - (low - eye) / z * fy - 0.5)))
            _paint_level(view, column, floor_row, bottom, low - eye, fy, 1.0, FLOOR, sector)
            bottom = min(bottom, floor_row - 1)
            ceiling_row = min(bottom, int(np.ceil(size / 2 - (high - eye) / z * fy - 0.5)) - 1)
            if sky[sector]:
                _paint(view, column, top, ceiling_row, np.inf, none, SKY, -1)
            else:
                _paint_level(view, column, top, ceiling_row, high - eye, fy, -1.0, CEILING, sector)
            top = max(top, ceiling_row + 1)
            if top > bottom:
                break

            length = np.sqrt(ex * ex + ey * ey)
            sign = 1.0 if right else -1.0
            facing = (sign * ey / length, -sign * ex / length, 0.0)
            if far < 0:
                _paint(view, column, top, bottom, z, facing, WALL, 1_000_000 + i)
                break
            if ceiling[far] < high:
                row = min(bottom, int(np.ceil(size / 2 - (ceiling[far] - eye) / z * fy - 0.5)) - 1)
                if sky[sector] and sky[far]:  # Doom draws no wall between two skies
                    _paint(view, column, top, row, np.inf, none, SKY, -1)
                else:
                    _paint(view, column, top, row, z, facing, WALL, 2_000_000 + i)
                top = max(top, row + 1)
            if floor[far] > low:
                row = max(top, int(np.ceil(size / 2 - (floor[far] - eye) / z * fy - 0.5)))
                _paint(view, column, row, bottom, z, facing, WALL, 3_000_000 + i)
                bottom = min(bottom, row - 1)
            if top > bottom:
                break
            if floor[far] >= ceiling[far]:  # a closed door
                _paint(view, column, top, bottom, z, facing, WALL, 2_000_000 + i)
                break
            sector = far
