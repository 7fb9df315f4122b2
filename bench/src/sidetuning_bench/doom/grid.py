"""Where one can walk on a Doom map, how far it is, and which way: a grid of cells and geodesic distances over it.

Lengths are map units, 32 to the metre. A player is 16 units to each side; a cell can be walked on where the nearest obstacle is at
least 20 units away and a walk from the start of the map leads there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from sidetuning.errors import DataError
from sidetuning.files import atomic_write

RADIUS = 20.0  # of a player, with a margin
FAR = 64.0  # clearances are not told apart from here on
STEP, HEADROOM = 24, 56  # the highest step a player climbs, the lowest ceiling that lets one pass
SOLID = ("Decoration", "Vegetation", "LightSource", "Hazard")  # the engine's categories of things that stand in the way
MOVES = {  # steps to other cells, and the cells between; their lengths are at most 2.7 % above straight lines
    (1, 0): (), (0, 1): (), (1, 1): ((1, 0), (0, 1)), (1, -1): ((1, 0), (0, -1)), (2, 1): ((1, 0), (1, 1)),
    (1, 2): ((0, 1), (1, 1)), (2, -1): ((1, 0), (1, -1)), (1, -2): ((0, -1), (1, -1)),
}  # fmt: skip
VERSION = 2  # of the files


@dataclass(frozen=True)
class Grid:
    """Cells of a map.

    Attributes:
        low: the corner with the smallest coordinates, (2,).
        cell: width of a cell.
        clearance: from each cell's centre to the nearest obstacle, at most FAR. (columns, rows) float32
        number: of each cell that can be walked on, -1 for others. (columns, rows) int32
    """

    low: NDArray[np.float64]
    cell: float
    clearance: NDArray[np.float32]
    number: NDArray[np.int32]

    @cached_property
    def cells(self) -> NDArray[np.int64]:
        """Column and row of each numbered cell, (n, 2)."""
        return np.argwhere(self.number >= 0)

    @cached_property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each numbered cell, (n, 2)."""
        return self.low + (self.cells + 0.5) * self.cell

    @cached_property
    def _edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Pairs of cells that a straight walk joins, and the length of each."""
        starts, ends, lengths = [], [], []
        for move, between in MOVES.items():
            target = self._shifted(move)
            ok = (self.number >= 0) & (target >= 0)
            for cell in between:
                ok &= self._shifted(cell) >= 0
            starts.append(self.number[ok])
            ends.append(target[ok])
            lengths.append(np.full(int(ok.sum()), self.cell * np.hypot(*move)))
        return np.concatenate(starts), np.concatenate(ends), np.concatenate(lengths)

    def _shifted(self, move: tuple[int, int]) -> NDArray[np.int32]:
        """The number of the cell `move` away from each cell, -1 beyond the edge."""
        out = np.full_like(self.number, -1)
        columns, rows = self.number.shape
        a, b = move
        if abs(a) < columns and abs(b) < rows:
            out[max(0, -a) : columns - max(0, a), max(0, -b) : rows - max(0, b)] = self.number[
                max(0, a) : columns + min(0, a), max(0, b) : rows + min(0, b)
            ]
        return out

    @cached_property
    def _graph(self) -> Any:
        return self._weighted(np.ones(len(self.cells)))

    @cached_property
    def _wary_graph(self) -> Any:
        """With lengths up to 2.5 times as long near obstacles, which a walker had better keep away from."""
        clearance = self.clearance[tuple(self.cells.T)]
        return self._weighted(1 + 1.5 * np.clip((40 - clearance) / 40, 0, 1))

    def _weighted(self, cost: NDArray[np.float64]) -> Any:
        start, end, length = self._edges
        n = len(self.cells)
        return csr_matrix((length * (cost[start] + cost[end]) / 2, (start, end)), shape=(n, n))

    def at(self, x: float, y: float) -> int:
        """The number of the cell around a point, or of the nearest within seven cells; -1 where there is none."""
        c, r = (np.array([x, y]) - self.low) // self.cell
        column, row = int(c), int(r)
        inside = 0 <= column < self.number.shape[0] and 0 <= row < self.number.shape[1]
        if inside and self.number[column, row] >= 0:
            return int(self.number[column, row])
        left, low = max(0, column - 7), max(0, row - 7)
        around = self.number[left : max(0, column + 8), low : max(0, row + 8)]
        near = np.argwhere(around >= 0) + np.array([left, low])
        if not len(near):
            return -1
        return int(self.number[tuple(near[((near - (column, row)) ** 2).sum(1).argmin()])])

    def to(self, x: float, y: float, limit: float = np.inf) -> Ways:
        """Distances and ways to a goal from everywhere; farther than `limit` counts as unreachable."""
        goal = self.at(x, y)
        if goal < 0:
            raise DataError(f"nobody can walk to ({x:.0f}, {y:.0f}) on this map")
        return Ways(self, (x, y), goal, limit)

    @cached_property
    def floor(self) -> NDArray[np.bool_]:
        """Cells that a player covers when walking on the numbered ones; what a map shows as floor. (columns, rows)"""
        steps = int(np.ceil(RADIUS / self.cell))
        return binary_dilation(self.number >= 0, iterations=steps) & (self.clearance > self.cell / 4)

    def straight(self, x: float, y: float, to_x: float, to_y: float) -> bool:
        """Whether a straight walk meets no obstacle."""
        count = max(2, int(np.hypot(to_x - x, to_y - y) / self.cell * 2))
        points = np.stack([np.linspace(x, to_x, count), np.linspace(y, to_y, count)], 1)[1:]
        cells = np.clip(((points - self.low) // self.cell).astype(int), 0, np.array(self.number.shape) - 1)
        return bool((self.number[tuple(cells.T)] >= 0).all())


@dataclass(frozen=True)
class Ways:
    """Shortest ways to one goal. What is not asked for is not computed."""

    grid: Grid
    goal: tuple[float, float]
    number: int
    limit: float

    @cached_property
    def distances(self) -> NDArray[np.float64]:
        """From each numbered cell to the goal's, inf where there is no way. (n,)"""
        return dijkstra(self.grid._graph, directed=False, indices=self.number, limit=self.limit)

    @cached_property
    def _next(self) -> NDArray[np.int32]:
        """The next cell of a way that keeps away from obstacles. (n,)"""
        found = dijkstra(
            self.grid._wary_graph, directed=False, indices=self.number, limit=3 * self.limit, return_predecessors=True
        )
        return found[1]

    def distance(self, x: float, y: float) -> float:
        """The length of the shortest way from a point, inf where there is none."""
        straight = float(np.hypot(self.goal[0] - x, self.goal[1] - y))
        if straight < 2 * self.grid.cell:
            return straight
        cell = self.grid.at(x, y)
        return max(straight, float(self.distances[cell])) if cell >= 0 else np.inf

    def waypoint(self, x: float, y: float, look: int = 24) -> tuple[float, float]:
        """Where to walk to next: the farthest of the next `look` cells of the way that a straight walk reaches."""
        if self.grid.straight(x, y, *self.goal):
            return self.goal
        cell, best = self.grid.at(x, y), self.goal
        for k in range(look):
            if cell < 0:
                break
            centre = self.grid.centres[cell]
            if k > 1 and not self.grid.straight(x, y, *centre):
                break
            best = (float(centre[0]), float(centre[1]))
            cell = int(self._next[cell])
        return best


def build(sectors: Sequence[Any], things: Sequence[Any], cell: float = 16.0) -> Grid:
    """The grid of the largest part of a map that can be walked on without opening doors.

    Args:
        sectors: of `vizdoom.GameState`: their lines, floors and ceilings.
        things: its objects.
        cell: width of a cell.
    """
    sides: dict[tuple[float, float, float, float], tuple[bool, list[Any]]] = {}
    for sector in sectors:
        for line in sector.lines:
            sides.setdefault((line.x1, line.y1, line.x2, line.y2), (line.is_blocking, []))[1].append(sector)
    walls = [line for line, (blocking, around) in sides.items() if blocking or len(around) < 2 or _blocks(*around[:2])]
    ends = np.array(list(sides)).reshape(-1, 2)
    low = ends.min(0) - 2 * cell
    columns, rows = np.ceil((ends.max(0) + 2 * cell - low) / cell).astype(int)
    clearance = np.full((columns, rows), FAR, np.float32)
    _keep_away(clearance, low, cell, np.array(walls, np.float64).reshape(-1, 4), 0.0)
    posts = [[t.position_x, t.position_y] * 2 for t in things if t.category in SOLID]
    _keep_away(clearance, low, cell, np.array(posts, np.float64).reshape(-1, 4), RADIUS)
    everywhere = Grid(low, cell, clearance, _numbered(clearance > RADIUS))
    part = connected_components(everywhere._graph, directed=False)[1]
    for largest in np.argsort(-np.bincount(part), kind="stable"):
        chosen = part == largest
        x, y = everywhere.centres[chosen][0]
        if any(_inside(sector, x, y) for sector in sectors):  # and not in the void between rooms
            walkable = np.zeros(clearance.shape, bool)
            walkable[tuple(everywhere.cells[chosen].T)] = True
            return Grid(low, cell, clearance, _numbered(walkable))
    raise DataError("nobody can walk on this map")


def _numbered(cells: NDArray[np.bool_]) -> NDArray[np.int32]:
    return np.where(cells, np.cumsum(cells).reshape(cells.shape) - 1, -1).astype(np.int32)


def _inside(sector: Any, x: float, y: float) -> bool:
    """Whether a point is in a sector: a ray from it crosses the sector's outline an odd number of times."""
    crossed = 0
    for line in sector.lines:
        if (line.y1 > y) != (line.y2 > y):
            crossed += x < line.x1 + (y - line.y1) / (line.y2 - line.y1) * (line.x2 - line.x1)
    return crossed % 2 == 1


def _blocks(a: Any, b: Any) -> bool:
    """Whether nobody can walk from one sector to the other and back."""
    room = min(a.ceiling_height, b.ceiling_height) - max(a.floor_height, b.floor_height)
    return abs(a.floor_height - b.floor_height) > STEP or room < HEADROOM


@njit(cache=True)
def _keep_away(clearance: Any, low: Any, cell: float, lines: Any, radius: float) -> None:
    """Lower the clearance of cells near lines (x1, y1, x2, y2) that are `radius` thick to each side."""
    reach = FAR + radius
    for i in range(lines.shape[0]):
        x1, y1, x2, y2 = lines[i]
        first_column = max(0, int((min(x1, x2) - reach - low[0]) // cell))
        last_column = min(clearance.shape[0] - 1, int((max(x1, x2) + reach - low[0]) // cell))
        first_row = max(0, int((min(y1, y2) - reach - low[1]) // cell))
        last_row = min(clearance.shape[1] - 1, int((max(y1, y2) + reach - low[1]) // cell))
        length2 = max((x2 - x1) ** 2 + (y2 - y1) ** 2, 1e-9)
        for column in range(first_column, last_column + 1):
            x = low[0] + (column + 0.5) * cell
            for row in range(first_row, last_row + 1):
                y = low[1] + (row + 0.5) * cell
                t = min(1.0, max(0.0, ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length2))
                away = np.hypot(x1 + t * (x2 - x1) - x, y1 + t * (y2 - y1) - y) - radius
                clearance[column, row] = min(clearance[column, row], away)


def save(grid: Grid, path: Path) -> None:
    """Write a grid, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, version=VERSION, low=grid.low, cell=grid.cell, clearance=grid.clearance, number=grid.number
        )


def load(path: Path) -> Grid | None:
    """Read what `save` wrote; None where there is nothing, or nothing readable of this version."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if int(file["version"]) == VERSION:
                return Grid(file["low"], float(file["cell"]), file["clearance"], file["number"])
    except Exception:  # a damaged zip file raises whatever its bytes make it; the grid is built again in a moment
        return None
    return None


def file_name(*parts: object) -> str:
    """The name of a grid's file, of what it is made from."""
    return f"{parts[0]}-{hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:12]}.npz"
