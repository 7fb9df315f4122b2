"""Where one can walk on a Doom map, how far it is, and which way: a grid of cells and geodesic distances over it.

Lengths are map units, 32 to the metre. A player is 16 units to each side; a cell can be walked on where the nearest
obstacle is at least 20 units away and a walk from the start of the map leads there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra

from sidetuning.errors import DataError
from sidetuning.files import atomic_write
from sidetuning_bench.doom import compiled

# Radius of a player, with a margin.
RADIUS = 20.0
# Larger clearances are not told apart.
FAR = 64.0
# The highest step a player climbs, the lowest ceiling that lets one pass.
STEP, HEADROOM = 24, 56
# The engine's categories of things that stand in the way.
SOLID = ("Decoration", "Vegetation", "LightSource", "Hazard")
# Steps to other cells, and the cells between; their lengths are at most 2.7 % above straight lines.
STRAIGHT: dict[tuple[int, int], list[tuple[int, int]]] = {(1, 0): [], (0, 1): []}
MOVES = STRAIGHT | {(1, 1): [(1, 0), (0, 1)], (1, -1): [(1, 0), (0, -1)], (2, 1): [(1, 0), (1, 1)]}
MOVES |= {(1, 2): [(0, 1), (1, 1)], (2, -1): [(1, 0), (1, -1)], (1, -2): [(0, -1), (1, -1)]}
# Version of the files.
VERSION = 2


@dataclass(frozen=True)
class Grid:
    """Cells of a map.

    Attributes:
        low: the corner with the smallest coordinates, (2,).
        cell: width of a cell.
        clearance: distance from each cell's centre to the nearest obstacle, at most FAR. (columns, rows) float32
        number: number of each cell that can be walked on, -1 for others. (columns, rows) int32
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
        columns, rows = self.number.shape
        padded = np.pad(self.number, 2, constant_values=-1)
        return padded[2 + move[0] : 2 + move[0] + columns, 2 + move[1] : 2 + move[1] + rows]

    @cached_property
    def graph(self) -> Any:
        """The cells and the lengths of the steps between them, as a sparse matrix."""
        return self._weighted(np.ones(len(self.cells)))

    @cached_property
    def wary_graph(self) -> Any:
        """The graph with steps up to 2.5 times as long near obstacles, for a walker that stays away from them."""
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
    """Shortest ways to one goal, each kind computed when first asked for."""

    grid: Grid
    goal: tuple[float, float]
    number: int
    limit: float

    @cached_property
    def distances(self) -> NDArray[np.float64]:
        """The distance from each numbered cell to the goal's, inf where there is no way. (n,)"""
        return dijkstra(self.grid.graph, directed=False, indices=self.number, limit=self.limit)

    @cached_property
    def _next(self) -> NDArray[np.int32]:
        """The next cell of a way that stays away from obstacles. (n,)"""
        graph, limit = self.grid.wary_graph, 3 * self.limit
        return dijkstra(graph, directed=False, indices=self.number, limit=limit, return_predecessors=True)[1]

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
        sectors: sectors of `vizdoom.GameState`: their lines, floors and ceilings.
        things: objects of the same state.
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
    keep_away(clearance, low, cell, np.array(walls, np.float64).reshape(-1, 4), 0.0)
    posts = [[t.position_x, t.position_y] * 2 for t in things if t.category in SOLID]
    keep_away(clearance, low, cell, np.array(posts, np.float64).reshape(-1, 4), RADIUS)
    everywhere = Grid(low, cell, clearance, _numbered(clearance > RADIUS))
    part = connected_components(everywhere.graph, directed=False)[1]
    for largest in np.argsort(-np.bincount(part), kind="stable"):
        chosen = part == largest
        x, y = everywhere.centres[chosen][0]
        # The void between rooms is in no sector.
        if any(_inside(sector, x, y) for sector in sectors):
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


@compiled
def keep_away(clearance: Any, low: Any, cell: float, lines: Any, radius: float) -> None:
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
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {name: getattr(grid, name) for name in ("low", "cell", "clearance", "number")}
        np.savez_compressed(file, version=VERSION, **arrays)


def load(path: Path) -> Grid | None:
    """Read what `save` wrote; None where there is nothing, or nothing readable of this version."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if int(file["version"]) == VERSION:
                return Grid(file["low"], float(file["cell"]), file["clearance"], file["number"])
    # The bytes of a damaged zip file decide which error it raises; the grid is built again in a moment.
    except Exception:
        return None
    return None


def file_name(*parts: object) -> str:
    """The name of the file of a grid that was made from these values."""
    return f"{parts[0]}-{hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:12]}.npz"
