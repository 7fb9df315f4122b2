"""Navigation in Doom with Habitat's conventions, as gymnasium environments: PointNav with an expert, and exploration.

`gymnasium.make("sidetuning_bench.doom.nav:DoomPointNav-v0")` and `…:DoomExplore-v0` build them too. Lengths are metres
(32 map units), angles radians. An agent has Habitat's four actions; a step ahead is some tics of Doom, so it starts
slowly and slides along walls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning.registry import unknown
from sidetuning_bench.doom import compiled
from sidetuning_bench.doom.frames import TEST, TRAIN, UNITS_PER_METRE, VAL
from sidetuning_bench.doom.grid import Grid, Ways
from sidetuning_bench.doom.world import HOME, World

ACTIONS = ("stop", "move_forward", "turn_left", "turn_right")
STOP, FORWARD, LEFT, RIGHT = range(4)
# The observation of distance and angle to the goal, by Habitat's name.
COMPASS = "pointgoal_with_gps_compass"
# Degrees of a turn, and tics of 1/35 s of a step ahead.
TURN, TICS = 15.0, 4
# Number of episodes in a row on one map, where `reset` gets no seed.
STAY = 8
# Place of the armour of my_way_home, in map units.
ARMOUR = (1040.0, -352.0)
# Shortest way from start to goal, and how near the goal counts as there, in metres.
NEAREST, FARTHEST, RADIUS = 5.0, 25.0, 1.5
# How far an explorer sees, in metres.
REACH = 10.0
# Rewards of every step, of success, and of every square metre seen for the first time.
SLACK, SUCCESS, SEEN = -0.01, 10.0, 0.1
MAPS: dict[str, tuple[str, ...]] = {"train": TRAIN, "val": VAL, "test": TEST, "home": (HOME,)}
# Levels of one wide place, where hardly any way winds.
OPEN = ("map18", "map20", "map27")
# Least ratio of pointnav's ways to straight lines, as in Habitat's generator of episodes.
WINDING = 1.1


Seen = dict[str, NDArray[Any]]
Info = dict[str, Any]


def point(xy: NDArray[np.float64]) -> tuple[float, float]:
    """An array (2,) as floats."""
    return float(xy[0]), float(xy[1])


class Episode(NamedTuple):
    """Where an episode starts and ends; lengths in map units, yaw in degrees."""

    map: str
    start: tuple[float, float]
    yaw: float
    goal: tuple[float, float]


class DoomWalk(gym.Env[Any, Any]):
    """The base of both environments: actions, pictures, episodes drawn from a seed, an engine that ends with it.

    After `reset(seed=…)` everything depends on the seed alone.

    Args:
        maps: "train", "val", "test", "home" (ViZDoom's my_way_home), or names of maps.
        size: width and height of the pictures.
        max_steps: number of steps after which an episode is cut off.
        cache: folder for the grids of maps.
        render_mode: gymnasium's; pictures are all there is.
    """

    # Whether the action stop ends an episode.
    stops = False
    turn = TURN
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        maps: str | Sequence[str] = "train",
        size: int = 64,
        max_steps: int = 200,
        cache: str | Path = "~/.cache/sidetuning",
        render_mode: str | None = "rgb_array",
    ) -> None:
        names = MAPS.get(maps, (maps,)) if isinstance(maps, str) else tuple(maps)
        known = [*TRAIN, *VAL, *TEST, HOME]
        for name in names:
            if name not in known:
                raise UnknownNameError(unknown("map", name, [*MAPS, *known], verb="one for walking"))
        if not names:
            raise SideTuningError("maps: give at least one")
        for what, count in (("size", size), ("max_steps", max_steps)):
            if count < 1:
                raise SideTuningError(f"{what} must be 1 or more, not {count}")
        self.maps, self.max_steps, self.render_mode = names, max_steps, render_mode
        self.action_space = spaces.Discrete(len(ACTIONS))
        self.observation_space: spaces.Dict = spaces.Dict({"rgb": spaces.Box(0, 255, (size, size, 3), np.uint8)})
        self.world = World(size, cache)
        self.grid: Grid
        self.episode: Episode
        self.steps = 0
        self.walked = 0.0
        # Given to the engine on every map.
        self.commands: tuple[str, ...] = ()
        self._map, self._stayed = "", 0

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Seen, Info]:
        super().reset(seed=seed)
        if seed is not None or self._stayed % STAY == 0 or not self._map:
            self._map, self._stayed = str(self.np_random.choice(self.maps)), 0
        self._stayed += 1
        anew = None if seed is None else int(self.np_random.integers(2**31))
        self.grid = self.world.load(self._map, self.commands, anew)
        self.episode = self.draw()
        self.world.place(*self.episode.start, self.episode.yaw)
        self.steps, self.walked = 0, 0.0
        return self.begin()

    def step(self, action: int) -> tuple[Seen, float, bool, bool, Info]:
        if not 0 <= int(action) < len(ACTIONS):
            raise SideTuningError(f"action {action} is none of 0 … 3: {', '.join(ACTIONS)}")
        x, y = self.world.x, self.world.y
        going = True
        if action == FORWARD:
            going = self.world.walk(TICS)
        elif action != STOP:
            going = self.world.turn(TURN if action == LEFT else -TURN)
        self.steps += 1
        self.walked += float(np.hypot(self.world.x - x, self.world.y - y)) / UNITS_PER_METRE
        reward, done, info = self.judge(int(action), going)
        ended = done or not going
        return self.observe(), reward, ended, self.steps >= self.max_steps and not ended, info

    def draw(self) -> Episode:
        """A random episode on the present map."""
        raise NotImplementedError

    def begin(self) -> tuple[Seen, Info]:
        """Called when the player stands at the start: the first observation and its measures."""
        raise NotImplementedError

    def judge(self, action: int, going: bool) -> tuple[float, bool, Info]:
        """Called after an action, `going` where the level goes on: the reward, whether the episode ends, measures."""
        raise NotImplementedError

    def observe(self) -> Seen:
        """The agent's observation."""
        return {"rgb": self.world.image.copy()}

    def render(self) -> Any:
        return self.world.image

    def close(self) -> None:
        self.world.close()


class DoomPointNav(DoomWalk):
    """Go to a point whose direction and distance the compass gives, and stop there.

    Observation: `rgb` (size, size, 3) uint8, and `pointgoal_with_gps_compass` (2,) float32: distance in metres and
    angle, positive to the left, of the straight line to the goal (Habitat's (rho, -phi)).

    Reward: -0.01 + metres of shortest way gained + 10 on success. Info: distance_to_goal (of the shortest way, metres),
    success, spl = success * shortest / max(shortest, walked).

    Args:
        maps, size, max_steps, cache, render_mode: as for `DoomWalk`.
        winding: least ratio of the shortest way to the straight line. At 0, most goals in Doom's wide levels can be
            reached by following the compass with closed eyes.
        compass: False for "home" alone: the goal is always the armour of my_way_home, being there is success, and the
            action stop does nothing.
    """

    radius = RADIUS

    def __init__(
        self,
        maps: str | Sequence[str] = "train",
        size: int = 64,
        max_steps: int = 200,
        cache: str | Path = "~/.cache/sidetuning",
        render_mode: str | None = "rgb_array",
        winding: float = 0.0,
        compass: bool = True,
    ) -> None:
        super().__init__(maps, size, max_steps, cache, render_mode)
        self.winding, self.compass, self.stops = winding, compass, compass
        if not compass and self.maps != (HOME,):
            raise SideTuningError("without a compass only maps='home' has a goal that can be known")
        if compass:
            space = {COMPASS: spaces.Box(np.array([0, -np.pi], np.float32), np.array([1e4, np.pi], np.float32))}
            self.observation_space = spaces.Dict({"rgb": self.observation_space["rgb"], **space})
            # Whoever takes it ends the level of my_way_home.
            self.commands = ("remove GreenArmor",)
        self.ways: Ways
        self.distance = self.shortest = 0.0

    def draw(self) -> Episode:
        rng, grid = self.np_random, self.grid
        low, high = NEAREST * UNITS_PER_METRE, FARTHEST * UNITS_PER_METRE
        # Nobody starts or ends in a corner.
        roomy = np.flatnonzero(grid.clearance[tuple(grid.cells.T)] > 28)
        for _ in range(100):
            goal = ARMOUR if not self.compass else point(grid.centres[rng.choice(roomy)])
            self.ways = grid.to(*goal, limit=2 * high)
            distances, straight = self.ways.distances[roomy], np.linalg.norm(grid.centres[roomy] - goal, axis=1)
            starts = roomy[(distances >= low) & (distances <= high) & (distances >= self.winding * straight)]
            if len(starts):
                start = point(grid.centres[rng.choice(starts)])
                return Episode(self._map, start, float(rng.uniform(-180, 180)), goal)
        raise SideTuningError(
            f"{self._map} has no ways from {NEAREST} to {FARTHEST} m that wind {self.winding}-fold; "
            "give a smaller winding, or other maps"
        )

    def begin(self) -> tuple[Seen, Info]:
        self.distance = self.shortest = self._distance()
        return self.observe(), self._info(False)

    def judge(self, action: int, going: bool) -> tuple[float, bool, Info]:
        before, self.distance = self.distance, self._distance()
        # A step reached the armour, and so the end of the level.
        taken = not going and not self.compass and self.distance <= 2 * RADIUS
        success = (self.distance <= RADIUS or taken) and (not self.stops or action == STOP)
        reward = SLACK + before - self.distance + SUCCESS * success
        return reward, success or (action == STOP and self.stops), self._info(success)

    def _distance(self) -> float:
        """Metres of the shortest way; unchanged where the player has left the map's cells."""
        units = self.ways.distance(self.world.x, self.world.y)
        return units / UNITS_PER_METRE if np.isfinite(units) else self.distance

    def _info(self, success: bool) -> Info:
        share = self.shortest / max(self.shortest, self.walked, 1e-6)
        measures = {"distance_to_goal": self.distance, "success": float(success), "spl": success * share}
        return {**measures, "is_success": success}

    def observe(self) -> Seen:
        seen = super().observe()
        if self.compass:
            dx, dy = self.episode.goal[0] - self.world.x, self.episode.goal[1] - self.world.y
            angle = (np.arctan2(dy, dx) - np.radians(self.world.yaw) + np.pi) % (2 * np.pi) - np.pi
            seen[COMPASS] = np.array([np.hypot(dx, dy) / UNITS_PER_METRE, angle], np.float32)
        return seen

    def expert(self) -> int:
        """The best action by the map: along the shortest way, a little off the walls, and stop at the goal."""
        world = self.world
        x, y = self.ways.waypoint(world.x, world.y)
        if self.distance <= 0.8 * RADIUS:
            return STOP
        off = (np.degrees(np.arctan2(y - world.y, x - world.x)) - world.yaw + 180) % 360 - 180
        if abs(off) <= 0.55 * TURN:
            return FORWARD
        return LEFT if off > 0 else RIGHT


class DoomExplore(DoomWalk):
    """See as much of a map as possible: 0.1 for every square metre of floor that comes into view for the first time.

    Observation: `rgb`. Info: seen (square metres so far). An episode lasts `max_steps`; stop does nothing. The
    arguments are those of `DoomWalk`.
    """

    _seen: NDArray[np.bool_]

    def draw(self) -> Episode:
        place = point(self.grid.centres[self.np_random.integers(len(self.grid.centres))])
        return Episode(self._map, place, float(self.np_random.uniform(-180, 180)), place)

    def begin(self) -> tuple[Seen, Info]:
        self._seen = np.zeros(np.array(self.grid.number.shape) * int(self.grid.cell) // UNITS_PER_METRE + 1, np.bool_)
        self._look()
        return self.observe(), {"seen": int(self._seen.sum())}

    def judge(self, action: int, going: bool) -> tuple[float, bool, Info]:
        new = self._look()
        return SEEN * new, False, {"seen": int(self._seen.sum())}

    def _look(self) -> int:
        """Mark what is in view, a fan of 90 degrees; returns how many squares are new."""
        grid, metre, world = self.grid, float(UNITS_PER_METRE), self.world
        ray = (world.x, world.y, np.radians(world.yaw), REACH * metre)
        return int(mark(self._seen, grid.clearance, grid.low, grid.cell, ray, metre))


@compiled
def mark(seen: Any, clearance: Any, low: Any, cell: float, view: Any, square: float) -> int:
    """Mark the squares in a view (x, y, yaw, reach) of 90 degrees; returns how many are new.

    Rays go from cell to cell until one that an obstacle may cross.
    """
    x, y, yaw, reach = view
    new = 0
    # A line that crosses a cell is at most this far from its centre.
    near = cell * np.sqrt(0.5)
    for i in range(91):
        angle = yaw + np.radians(i - 45.0)
        dx, dy = np.cos(angle), np.sin(angle)
        px, py = (x - low[0]) / cell, (y - low[1]) / cell
        column, row = int(np.floor(px)), int(np.floor(py))
        # Length of the ray between two columns, and between two rows.
        across, along = 1 / max(abs(dx), 1e-12), 1 / max(abs(dy), 1e-12)
        to_column = (column + 1 - px if dx > 0 else px - column) * across
        to_row = (row + 1 - py if dy > 0 else py - row) * along
        gone, first = 0.0, True
        while gone * cell <= reach and 0 <= column < clearance.shape[0] and 0 <= row < clearance.shape[1]:
            if clearance[column, row] < near and not first:
                break
            # The ray is in this cell from `gone` to `left`.
            left = min(to_column, to_row)
            middle = (gone + left) / 2 * cell
            a, b = int((x - low[0] + dx * middle) // square), int((y - low[1] + dy * middle) // square)
            if not seen[a, b]:
                seen[a, b] = True
                new += 1
            if to_column < to_row:
                column, to_column = column + (1 if dx > 0 else -1), to_column + across
            else:
                row, to_row = row + (1 if dy > 0 else -1), to_row + along
            gone, first = left, False
    return new


gym.register("DoomPointNav-v0", entry_point="sidetuning_bench.doom.nav:DoomPointNav")
gym.register("DoomExplore-v0", entry_point="sidetuning_bench.doom.nav:DoomExplore")


def pointnav(split: str, size: int) -> DoomPointNav:
    """Go to a point behind a corner by the compass, and stop there, on the maps of a split."""
    return DoomPointNav([name for name in MAPS[split] if name not in OPEN], size, winding=WINDING)


def home(split: str, size: int) -> DoomPointNav:
    """Go to the armour of my_way_home, without a compass; one map, whatever the split."""
    return DoomPointNav("home", size, compass=False)


def explore(split: str, size: int) -> DoomExplore:
    """See as much as possible, on the maps of a split."""
    return DoomExplore(split, size)
