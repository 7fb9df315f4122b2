"""The Doom engine of ViZDoom with the levels of Freedoom; it ends whatever happens to the process that started it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sidetuning.errors import SideTuningError

HIDDEN = ("hud", "weapon", "crosshair", "decals", "particles", "messages", "screen_flashes")


class EngineError(SideTuningError, RuntimeError):
    """The Doom engine is not installed, does not start, or died."""


def vizdoom() -> Any:
    """The module, or a sentence on how to get it."""
    try:
        import vizdoom as module
    except ImportError as error:
        raise EngineError("this needs the Doom engine; type: pip install 'sidetuning-bench[doom]'") from error
    return module


def freedoom() -> Path:
    """The WAD file of Freedoom: Phase 2 that comes with ViZDoom."""
    return Path(vizdoom().__file__).resolve().parent / "freedoom2.wad"


@contextmanager
def explained(level: str) -> Iterator[None]:
    """Turn the engine's failures into an `EngineError`; for calls of a game outside the block of `engine`."""
    vzd = vizdoom()
    # ViZDoom's SignalException is a Ctrl-C, and no failure.
    failures = [name for name in dir(vzd) if name.endswith("Exception") and name != "SignalException"]
    try:
        yield
    except tuple(getattr(vzd, name) for name in failures) as error:
        raise EngineError(f"the Doom engine on {level} failed ({error}); try again, or reinstall vizdoom") from error


@contextmanager
def engine(
    level: str,
    *,
    size: int = 240,
    buttons: Sequence[str] = (),
    variables: Sequence[str] = (),
    seed: int = 0,
    buffers: Sequence[str] = (),
    scenario: Path | None = None,
    arguments: str = "",
) -> Iterator[Any]:
    """A running `vizdoom.DoomGame` on a level of Freedoom, without a window.

    The engine is a process of its own, with files in shared memory. It is closed when the block ends, and by a small
    shell when this process is killed.

    Args:
        level: "map01" … "map32".
        size: least height of the picture, which is 120, 240, 480 or 960; the width is 4/3 of it.
        buttons, variables: names of `vizdoom.Button` and `vizdoom.GameVariable`, in the order in which they are used.
        seed: seed for everything that is random in the game.
        buffers: what states hold beside the picture: "depth_buffer", "labels_buffer", "sectors_info", "objects_info".
        scenario: a WAD file with levels of its own.
        arguments: more words for the engine's command line.

    Raises:
        EngineError: ViZDoom is not installed, or the engine does not start or dies.
    """
    vzd = vizdoom()
    game = vzd.DoomGame()
    game.set_doom_game_path(str(freedoom()))
    game.set_doom_map(level)
    game.set_window_visible(False)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    height = next((height for height in (120, 240, 480, 960) if height >= size), 960)
    game.set_screen_resolution(getattr(vzd.ScreenResolution, f"RES_{height * 4 // 3}X{height}"))
    for buffer in buffers:
        getattr(game, f"set_{buffer}_enabled")(True)
    if scenario is not None:
        game.set_doom_scenario_path(str(scenario.resolve()))
    for part in HIDDEN:
        getattr(game, f"set_render_{part}")(False)
    game.set_available_buttons([getattr(vzd.Button, name) for name in buttons])
    game.set_available_game_variables([getattr(vzd.GameVariable, name) for name in variables])
    game.set_episode_timeout(10**8)
    game.set_episode_start_time(2)
    game.set_seed(seed)
    game.add_game_args(f"+sv_cheats 1 {arguments}".strip())
    with explained(level), TemporaryDirectory(prefix="vizdoom-") as folder, _watched(Path(folder), game):
        yield game


# Started in place of the engine: notes its process and arguments, and starts it in the folder, where it makes another.
# Two engines that start in one folder at once crash.
START = """#!/bin/sh
cd {folder} && printf '%s\\n' $$ "$@" > started && exec {program} "$@"
"""
# Waits in the folder for the end of its input, which the death of this process brings, and ends the engine. One that
# was being started then is there a moment later.
WATCH = """
cat
for i in 1 2 3 4 5; do [ -s started ] && break; sleep 0.2; done
pid=$(head -n 1 started)
name=$(sed -n '/viz_instance_id/{n;p;}' started)
grep -qsF "$PWD" "/proc/$pid/cmdline" && kill -9 "$pid"
rm -rf "$PWD"
[ -n "$name" ] && rm -f "/dev/shm/ViZDoomSM$name" "/dev/shm/ViZDoomMQCtr$name" "/dev/shm/ViZDoomMQDoom$name"
"""
# Two threads that start engines at the same moment may crash the process, within ViZDoom.
STARTING = threading.Lock()


@contextmanager
def _watched(folder: Path, game: Any) -> Iterator[None]:
    """Run the engine in a folder of its own; on Linux a shell ends it once this process has gone."""
    game.set_doom_config_path(str(folder / "vizdoom.ini"))
    start, program = folder / "start", freedoom().with_name("vizdoom")
    start.write_text(START.format(folder=shlex.quote(str(folder)), program=shlex.quote(str(program))))
    start.chmod(0o700)
    # Not on Windows, nor where programs in temporary folders are not allowed.
    if os.name == "posix" and os.access(start, os.X_OK):
        game.set_vizdoom_path(str(start))
    watcher = None
    if shutil.which("sh") is not None and Path("/proc/self/cmdline").exists():
        files: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        watcher = subprocess.Popen(["sh", "-c", WATCH], cwd=folder, start_new_session=True, **files)
    try:
        with STARTING:
            game.init()
        yield
    finally:
        game.close()
        if watcher is not None:
            watcher.kill()
            watcher.communicate()
