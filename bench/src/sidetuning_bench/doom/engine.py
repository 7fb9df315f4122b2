"""The Doom engine of ViZDoom with the levels of Freedoom, closed whatever happens to the process that started it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sidetuning.errors import EngineError

FAILURES = (
    "ViZDoomErrorException", "ViZDoomIsNotRunningException", "ViZDoomUnexpectedExitException", "SharedMemoryException",
    "MessageQueueException", "FileDoesNotExistException",
)  # fmt: skip
HIDDEN = ("hud", "weapon", "crosshair", "decals", "particles", "messages", "screen_flashes")


def vizdoom() -> Any:
    """The module, or a sentence on how to get it."""
    try:
        import vizdoom as module
    except ImportError as error:
        raise EngineError("this needs the Doom engine; type: pip install 'sidetuning[doom]'") from error
    return module


def freedoom() -> Path:
    """The WAD file of Freedoom: Phase 2 that comes with ViZDoom."""
    return Path(vizdoom().__file__).resolve().parent / "freedoom2.wad"


@contextmanager
def told(level: str) -> Iterator[None]:
    """What fails in the engine as an `EngineError`; for calls of a game outside the block of `engine`."""
    try:
        yield
    except tuple(getattr(vizdoom(), name) for name in FAILURES) as error:
        raise EngineError(
            f"the Doom engine on {level} failed ({error}); run the same command again, and reinstall vizdoom if it fails as before"
        ) from error


@contextmanager
def engine(
    level: str, *, height: int = 240, buttons: Sequence[str] = (), variables: Sequence[str] = (), seed: int = 0,
    depth: bool = False, labels: bool = False, geometry: bool = False, scenario: Path | None = None, arguments: str = "",
) -> Iterator[Any]:  # fmt: skip
    """A running `vizdoom.DoomGame` on a level of Freedoom, without a window.

    Args:
        level: "map01" … "map32".
        height: of the picture, 120, 240, 480 or 960; the width is 4/3 of it.
        buttons, variables: names of `vizdoom.Button` and `vizdoom.GameVariable`, in the order in which they are used.
        seed: of everything that is random in the game.
        depth, labels: whether the depth buffer and the labels buffer are filled.
        geometry: whether every state tells the sectors and the things of the level, which takes time.
        scenario: a WAD file with levels of its own.
        arguments: more words for the engine's command line.

    The engine is a process of its own, with files in shared memory. It is closed when the block ends, and by a small watching shell
    when this process is killed.

    Raises:
        EngineError: ViZDoom is not installed, or the engine does not start or dies.
    """
    vzd = vizdoom()
    game = vzd.DoomGame()
    game.set_doom_game_path(str(freedoom()))
    game.set_doom_map(level)
    game.set_window_visible(False)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_screen_resolution(getattr(vzd.ScreenResolution, f"RES_{height * 4 // 3}X{height}"))
    game.set_depth_buffer_enabled(depth)
    game.set_labels_buffer_enabled(labels)
    game.set_sectors_info_enabled(geometry)
    game.set_objects_info_enabled(geometry)
    if scenario is not None:
        game.set_doom_scenario_path(str(scenario))
    for part in HIDDEN:
        getattr(game, f"set_render_{part}")(False)
    game.set_available_buttons([getattr(vzd.Button, name) for name in buttons])
    game.set_available_game_variables([getattr(vzd.GameVariable, name) for name in variables])
    game.set_episode_timeout(10**8)
    game.set_episode_start_time(2)
    game.set_seed(seed)
    game.add_game_args(f"+sv_cheats 1 {arguments}".strip())
    with told(level), TemporaryDirectory(prefix="vizdoom-") as own:
        game.set_doom_config_path(str(Path(own) / "vizdoom.ini"))
        watcher = _watch(own)
        try:
            here = Path.cwd()
            os.chdir(own)  # an engine makes a folder where it starts, and crashes where another one makes it just then
            try:
                game.init()
            finally:
                os.chdir(here)
            if watcher is not None:
                _tell(watcher, _instance(own))
            yield game
        finally:
            game.close()
            if watcher is not None:
                watcher.kill()
                watcher.communicate()


# Reads the engine's folder and, once it runs, the name of its shared memory, until the end of the pipe, which the death of this
# process brings. An engine that was being started then is there a moment later. The folder is not among grep's own arguments, where
# grep would find itself.
WATCH = r"""
read -r own || exit
forget() { rm -f "/dev/shm/ViZDoomSM$1" "/dev/shm/ViZDoomMQCtr$1" "/dev/shm/ViZDoomMQDoom$1"; }
unused() {  # names whose files no process has mapped
  for file in /dev/shm/ViZDoomSM* /dev/shm/ViZDoomMQCtr*; do
    case $file in */ViZDoomSM*) id=${file#*ViZDoomSM} ;; *) id=${file#*ViZDoomMQCtr} ;; esac
    [ -e "$file" ] && ! printf %s "$id" | grep -qsF -f - /proc/[0-9]*/maps && echo "$id"
  done
}
while read -r line; do name=$line; done
for i in 1 2 3 4 5; do
  for file in $(printf %s "$own" | grep -lsF -f - /proc/[0-9]*/cmdline); do
    found=$(tr '\0' ' ' <"$file" | sed 's/.*viz_instance_id \([^ ]*\).*/\1/')
    pid=${file#/proc/}
    kill -9 "${pid%/*}"
    forget "$found"
  done
  sleep 0.2
done
forget "$name"
rm -rf "$own"
before=" $(unused | tr '\n' ' ')"  # of an engine that died, as of Ctrl-C, before its name was told
sleep 0.3
for id in $(unused); do
  case $before in *" $id "*) forget "$id" ;; esac
done
"""


def _watch(own: str) -> subprocess.Popen[bytes] | None:
    """A shell that kills the engine with the configuration in the folder `own` once this process has gone."""
    if shutil.which("sh") is None or not Path("/proc/self/cmdline").exists():  # macOS and Windows
        return None
    quiet = subprocess.DEVNULL
    watcher = subprocess.Popen(
        ["sh", "-c", WATCH], stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )
    _tell(watcher, own)
    return watcher


def _tell(watcher: subprocess.Popen[bytes], line: str) -> None:
    assert watcher.stdin is not None
    watcher.stdin.write(line.encode() + b"\n")
    watcher.stdin.flush()


def _instance(own: str) -> str:
    """What the names of the shared memory of the engine with the configuration in `own` end in."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            if "+viz_instance_id" in words and any(word.startswith(own) for word in words):
                return words[words.index("+viz_instance_id") + 1]
    return ""
