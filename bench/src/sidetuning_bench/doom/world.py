"""A player in Doom that can be put anywhere and walks; the navigation environments are made of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidetuning_bench.doom import grid as doom_grid
from sidetuning_bench.doom.engine import EngineError, engine, explained, vizdoom
from sidetuning_bench.doom.frames import SETUP, picture
from sidetuning_bench.doom.grid import Grid

# ViZDoom's maze of rooms, with the same textures everywhere; all other maps are Freedoom's.
HOME = "my_way_home"
VARIABLES = ("POSITION_X", "POSITION_Y", "ANGLE")


class World:
    """One running engine, on one map at a time; the engine ends with `close`, with this object, and with this process.

    Args:
        size: width and height of the pictures.
        cache: folder for the grids of maps.
    """

    def __init__(self, size: int, cache: str | Path = "~/.cache/sidetuning") -> None:
        self.size = size
        self.cache = Path(cache).expanduser() / "doom-grids"
        self.map = ""
        self.x = self.y = self.yaw = 0.0
        self._grids: dict[str, Grid] = {}
        self._commands: tuple[str, ...] = ()
        self._game: Any = None
        self._running = ExitStack()
        self.image: NDArray[np.uint8] = np.zeros((size, size, 3), np.uint8)

    def load(self, name: str, commands: Sequence[str] = (), seed: int | None = None) -> Grid:
        """Go to a map, unless it is there already, and give the engine commands there; returns the map's grid.

        With a seed the map begins anew, so that all that follows depends on the seed alone.
        """
        if name not in self._grids:
            self._grids[name] = load_grid(name, self.cache)
        with explained(name):
            if name != self.map or self._game.is_episode_finished():
                self._open(name)
                self._commands = (*SETUP, *commands)
                self._begin(seed)
            elif seed is not None:
                self._begin(seed)
        return self._grids[name]

    def _open(self, name: str) -> None:
        """Put the engine on a map; one of another file needs another engine."""
        if self._game is not None and HOME not in (name, self.map):
            self._game.set_doom_map(name)
        elif name != self.map:
            self._running.close()
            self._game = self._running.enter_context(start(name, self.size))
            # Finalizers run last made, first called: this one before that of the engine's folder.
            weakref.finalize(self, self._running.close)
        self.map = name

    def _begin(self, seed: int | None = None) -> None:
        if seed is not None:
            self._game.set_seed(seed)
        self._game.new_episode()
        for command in self._commands:
            self._game.send_game_command(command)

    def place(self, x: float, y: float, yaw: float) -> None:
        """Put the player at a point, at rest, looking to `yaw` (degrees from east, anticlockwise)."""
        with explained(self.map):
            for _ in range(2):
                self._game.send_game_command(f"warp {x:.0f} {y:.0f}")
                # A turn in the same tic as a warp is lost.
                self._game.make_action([0, 0], 1)
                if not self._game.is_episode_finished():
                    break
                # Sliding on from the last episode, the player has left the level in this very tic.
                self._begin()
            # A level that has just begun takes no turns in its first tics.
            for _ in range(35):
                off = (self._game.get_state().game_variables[2] - yaw + 180) % 360 - 180
                if abs(off) < 0.5:
                    break
                self._game.make_action([0, off], 1)
            self._look()

    def walk(self, tics: int) -> bool:
        """Walk ahead for a number of tics; False where that ended the level."""
        return self._act([1, 0], tics)

    def turn(self, degrees: float) -> bool:
        """Turn anticlockwise; False where the level ended."""
        return self._act([0, -degrees], 1)

    def _act(self, action: list[float], tics: int) -> bool:
        if self._game is None:
            raise EngineError("no level is open; reset the environment first")
        with explained(self.map):
            self._game.make_action(action, tics)
            if self._game.is_episode_finished():
                return False
            self._look()
        return True

    def _look(self) -> None:
        state = self._game.get_state()
        self.x, self.y, self.yaw = (float(v) for v in state.game_variables)
        self.image = picture(state.screen_buffer, self.size)

    def close(self) -> None:
        """End the engine."""
        self._running.close()
        self._game, self.map = None, ""


def start(name: str, size: int, buffers: Sequence[str] = ()) -> AbstractContextManager[Any]:
    """An engine on a map, with buttons for walking and turning."""
    options: dict[str, Any] = {"buttons": ("MOVE_FORWARD", "TURN_LEFT_RIGHT_DELTA"), "variables": VARIABLES}
    if name == HOME:
        name, options["scenario"] = "map01", Path(vizdoom().scenarios_path) / f"{HOME}.wad"
    return engine(name, size=size, buffers=buffers, arguments="-nomonsters", **options)


def load_grid(name: str, cache: Path) -> Grid:
    """The grid of a map, from the cache where it is there, else built in an engine of its own and stored there."""
    cell = 8.0 if name == HOME else 16.0
    file = cache / doom_grid.file_name(name, cell, vizdoom().__version__)
    grid = doom_grid.load(file)
    if grid is None:
        with start(name, 64, ("sectors_info", "objects_info")) as game:
            game.new_episode()
            state = game.get_state()
            grid = doom_grid.build(state.sectors, state.objects, cell)
        doom_grid.save(grid, file)
    return grid
