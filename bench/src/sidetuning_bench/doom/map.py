"""Exact geometry of Doom maps: what a camera sees at every pixel, from the map's lines and sectors alone.

A Doom map is a set of two-dimensional lines between sectors; a sector is an area with one floor height and one ceiling
height. So an image column shows what the column's ray crosses, nearest first: the floor and the ceiling of the sector
that the ray is in, then the wall where it leaves that sector. Lengths are map units, 32 to the metre.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidetuning.errors import DataError
from sidetuning_bench.doom import compiled

NOTHING, FLOOR, CEILING, WALL, SKY = range(5)
LIQUIDS = (b"NUKAGE", b"FWATER", b"LAVA", b"BLOOD", b"SLIME0")
NO_SIDE = 65535

VERTEX = np.dtype([("x", "<i2"), ("y", "<i2")])
LINE = np.dtype([(name, "<u2") for name in ("start", "end", "flags", "special", "tag", "right", "left")])
SIDE = np.dtype([("x", "<i2"), ("y", "<i2"), ("upper", "S8"), ("lower", "S8"), ("middle", "S8"), ("sector", "<u2")])
SECTOR_FIELDS = {"floor": "<i2", "ceiling": "<i2", "floor_texture": "S8", "ceiling_texture": "S8"}
SECTOR = np.dtype([*SECTOR_FIELDS.items(), ("light", "<i2"), ("special", "<i2"), ("tag", "<i2")])


@dataclass(frozen=True)
class Camera:
    """A square image of `size` pixels with focal lengths in pixels. Doom's pixels are 1.2 times as high as wide."""

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


class View(NamedTuple):
    """What a camera sees of a map without its things; compiled functions fill the arrays.

    Attributes:
        depth: depth along the optical axis, in map units; inf at the sky. (size, size)
        normal: normal in world coordinates (x east, y north, z up), towards the viewer; 0 at the sky. (size, size, 3)
        kind: NOTHING, FLOOR, CEILING, WALL or SKY. (size, size) int8
        surface: an id that pixels of one floor, ceiling or wall part share; -1 at the sky, -2 where nothing was hit.
        sector: sector of floor and ceiling pixels, else -1.
    """

    depth: NDArray[np.float64]
    normal: NDArray[np.float64]
    kind: NDArray[np.int8]
    surface: NDArray[np.int64]
    sector: NDArray[np.int64]


class DoomMap(NamedTuple):
    """The lines and sectors of a map.

    Attributes:
        lines: x1, y1, x2, y2 of each line. (n, 4)
        front, back: the sectors right and left of each line, -1 for none. (n,)
        blocking: lines that nobody can walk through. (n,)
        floor, ceiling: heights of the sectors. (sectors,)
        sky, liquid: sectors under the open sky; sectors with water, slime, lava or blood for a floor. (sectors,)
    """

    lines: NDArray[np.float64]
    front: NDArray[np.int64]
    back: NDArray[np.int64]
    blocking: NDArray[np.bool_]
    floor: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    sky: NDArray[np.bool_]
    liquid: NDArray[np.bool_]

    @classmethod
    def of(cls, vertices: Any, lines: Any, sides: Any, sectors: Any) -> DoomMap:
        """The map of a WAD file's records."""
        points = np.stack([vertices["x"], vertices["y"]], 1).astype(np.float64)
        ends = np.concatenate([points[lines["start"]], points[lines["end"]]], 1)
        front, back = _sectors_of(lines["right"], sides), _sectors_of(lines["left"], sides)
        floor, ceiling = sectors["floor"].astype(np.float64), sectors["ceiling"].astype(np.float64)
        sky = np.array([t.upper().startswith(b"F_SKY") for t in sectors["ceiling_texture"]])
        liquid = np.array([t.upper().startswith(LIQUIDS) for t in sectors["floor_texture"]])
        return cls(ends, front, back, (lines["flags"] & 1) > 0, floor, ceiling, sky, liquid)

    def sector_at(self, x: float, y: float) -> int:
        """The sector around a point, -1 outside the map: on which side of the nearest line does a ray start?"""
        # A direction that no line is likely to have.
        dx, dy = 0.9238795, 0.3826834
        (ax, ay), (ex, ey) = self.lines[:, :2].T - [[x], [y]], (self.lines[:, 2:] - self.lines[:, :2]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            along_ray, along_line = ((ax * v - ay * u) / (dx * ey - dy * ex) for u, v in ((ex, ey), (dx, dy)))
        away = np.where((along_ray > 1e-9) & (along_line >= 0) & (along_line <= 1), along_ray, np.inf)
        i = int(away.argmin())
        return -1 if away[i] == np.inf else int((self.front if ey[i] * ax[i] < ex[i] * ay[i] else self.back)[i])

    def look(self, x: float, y: float, eye: float, yaw: float, camera: Camera) -> View:
        """The view of a level camera at (x, y) and height `eye`; `yaw` in degrees from east, anticlockwise."""
        square = (camera.size, camera.size)
        depth, normal, kind = np.full(square, np.inf), np.zeros((*square, 3)), np.zeros(square, np.int8)
        view = View(depth, normal, kind, np.full(square, -2, np.int64), np.full(square, -1, np.int64))
        sector = self.sector_at(x, y)
        if sector >= 0:
            _look(self, view, sector, (x, y, eye), np.radians(yaw), camera.fx, camera.fy)
        return view

    def free_points(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Up to `count` random places where a player can stand: not in a liquid, 40 units away from walls. (n, 2)"""
        ends = self.lines.reshape(-1, 2)
        solid = self.lines[(self.back < 0) | self.blocking]
        start, along = solid[:, :2], solid[:, 2:] - solid[:, :2]
        length2 = np.maximum((along**2).sum(1), 1e-9)
        found: list[NDArray[np.float64]] = []
        for p in rng.uniform(ends.min(0), ends.max(0), (800 * count, 2)):
            if len(found) == count:
                break
            sector = self.sector_at(*p)
            if sector < 0 or self.liquid[sector] or self.ceiling[sector] - self.floor[sector] < 64:
                continue
            t = np.clip(((p - start) * along).sum(1) / length2, 0, 1)
            if ((start + t[:, None] * along - p) ** 2).sum(1).min() >= 40**2:
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
    return DoomMap.of(*(np.frombuffer(parts[part], kind) for part, kind in kinds.items()))


def _sectors_of(side: NDArray[Any], sides: NDArray[Any]) -> NDArray[np.int64]:
    sectors = sides["sector"][np.minimum(side, len(sides) - 1)].astype(np.int64)
    return np.where(side == NO_SIDE, -1, sectors)


@compiled
def _paint(view: Any, column: int, rows: Any, z: float, n: Any, kind: int, surface: int) -> None:
    """Part of a wall or of the sky: one depth, from the first to the last of the rows."""
    for row in range(rows[0], rows[1] + 1):
        view.depth[row, column] = z
        view.normal[row, column, 0], view.normal[row, column, 1], view.normal[row, column, 2] = n
        view.kind[row, column] = kind
        view.surface[row, column] = surface


@compiled
def _paint_level(view: Any, column: int, rows: Any, rise: float, up: float, kind: int, sector: int) -> None:
    """Part of a floor or ceiling; `rise` is its height above the eye times the focal length."""
    middle = view.depth.shape[0] / 2
    for row in range(rows[0], rows[1] + 1):
        view.depth[row, column] = rise / (middle - row - 0.5)
        view.normal[row, column, 2] = up
        view.kind[row, column] = kind
        view.surface[row, column] = 2 * sector + kind - FLOOR
        view.sector[row, column] = sector


@compiled
def _look(level: Any, view: Any, start: int, place: Any, yaw: float, fx: float, fy: float) -> None:
    """Fill the arrays of a view, column by column; `place` is x, y and the height of the eye."""
    x, y, _ = place
    lines, size, n = level.lines, view.depth.shape[0], level.lines.shape[0]
    c, s = np.cos(yaw), np.sin(yaw)
    # Forward and right coordinates of both ends of each line.
    seen = np.empty((n, 4))
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
        nearest = np.argsort(at[:k])
        _paint_column(level, view, column, start, crossed[nearest], at[nearest], place, fy)


@compiled
def _paint_column(
    level: Any, view: Any, column: int, sector: int, crossed: Any, at: Any, place: Any, fy: float
) -> None:
    """Fill a column from the lines that its ray crosses, nearest first, at the depths `at`."""
    x, y, eye = place
    size, none = view.depth.shape[0], (0.0, 0.0, 0.0)
    # The rows that are still open, both included.
    top, bottom = 0, size - 1
    for i, z in zip(crossed, at):
        x1, y1, x2, y2 = level.lines[i]
        ex, ey = x2 - x1, y2 - y1
        right = ex * (y - y1) < ey * (x - x1)
        near, far = (level.front[i], level.back[i]) if right else (level.back[i], level.front[i])
        # Seen from outside, inside one sector, or a line that the ray has already passed.
        if near < 0 or near == far or (near != sector and far == sector):
            continue
        sector, low, high = near, level.floor[near], level.ceiling[near]

        floor_row = max(top, int(np.ceil(size / 2 - (low - eye) / z * fy - 0.5)))
        _paint_level(view, column, (floor_row, bottom), (low - eye) * fy, 1.0, FLOOR, sector)
        bottom = min(bottom, floor_row - 1)
        ceiling_row = min(bottom, int(np.ceil(size / 2 - (high - eye) / z * fy - 0.5)) - 1)
        if level.sky[sector]:
            _paint(view, column, (top, ceiling_row), np.inf, none, SKY, -1)
        else:
            _paint_level(view, column, (top, ceiling_row), (high - eye) * fy, -1.0, CEILING, sector)
        top = max(top, ceiling_row + 1)
        if top > bottom:
            return

        length = np.sqrt(ex * ex + ey * ey)
        sign = 1.0 if right else -1.0
        facing = (sign * ey / length, -sign * ex / length, 0.0)
        # The end of the map.
        if far < 0:
            _paint(view, column, (top, bottom), z, facing, WALL, 1_000_000 + i)
            return
        if level.ceiling[far] < high:
            row = min(bottom, int(np.ceil(size / 2 - (level.ceiling[far] - eye) / z * fy - 0.5)) - 1)
            # Doom draws no wall between two skies.
            if level.sky[sector] and level.sky[far]:
                _paint(view, column, (top, row), np.inf, none, SKY, -1)
            else:
                _paint(view, column, (top, row), z, facing, WALL, 2_000_000 + i)
            top = max(top, row + 1)
        if level.floor[far] > low:
            row = max(top, int(np.ceil(size / 2 - (level.floor[far] - eye) / z * fy - 0.5)))
            _paint(view, column, (row, bottom), z, facing, WALL, 3_000_000 + i)
            bottom = min(bottom, row - 1)
        # A closed door.
        if level.floor[far] >= level.ceiling[far]:
            _paint(view, column, (top, bottom), z, facing, WALL, 2_000_000 + i)
            return
        if top > bottom:
            return
        sector = far
