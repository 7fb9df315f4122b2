"""`sidetuning render-doom`: labelled frames of Freedoom's levels, written as a folder in Taskonomy's layout."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from sidetuning.errors import EngineError, SideTuningError
from sidetuning_bench.runs import Run, end_with_parent

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized
    from multiprocessing.synchronize import Event

_written: Synchronized[int]  # of a rendering process: frames written by all of them
_stop: Event  # somebody wants them to end


@dataclass(frozen=True)
class Settings:
    """Render labelled frames of Freedoom's levels in Taskonomy's layout: pictures and the labels of twelve dense tasks."""

    out: str = "runs/doom"
    """Folder for the frames; the same command run again goes on where it stopped."""
    frames: int = 5000
    """Frames in all, spread evenly over 29 maps: 21 to train, 3 to validate, 5 to test."""
    size: int = 128
    """Width and height in pixels."""
    seed: int = 0
    """Of places, directions and the game."""
    workers: int = 0
    """Processes that render; 0 for one per core."""
    progress: bool = True
    """Show a progress bar."""


def run(settings: Settings) -> int:
    """Render the maps that are not there yet; returns the number of frames in the folder.

    Raises:
        SideTuningError: the engine is not installed, or the folder holds frames of other settings.
    """
    s = settings
    if s.frames < 1 or not 16 <= s.size <= 960:
        raise SideTuningError(f"--frames {s.frames} --size {s.size}: give at least one frame, and 16 to 960 pixels")
    try:
        from sidetuning_bench.doom import frames as doom
    except ImportError as error:
        raise EngineError(f"rendering needs {error.name or error}; type: pip install 'sidetuning[doom]'") from error

    if s.workers < 0 or s.seed < 0:
        raise SideTuningError(f"--workers {s.workers} and --seed {s.seed} must be 0 or more")
    folder = Run(s.out, "render-doom", s, free=("out", "workers", "progress"))
    doom.write_index(folder.folder)
    done = {row["map"]: row["frames"] for row in folder.metrics()}
    counts = {m: s.frames // len(doom.MAPS) + (i < s.frames % len(doom.MAPS)) for i, m in enumerate(doom.MAPS)}
    todo = {m: n for m, n in counts.items() if n and m not in done}
    if not todo:
        return sum(done.values())
    workers = min(s.workers or torch.get_num_threads(), len(todo))
    context = multiprocessing.get_context("spawn")
    written, stop = context.Value("q", 0), context.Event()
    bar = tqdm(total=s.frames, initial=sum(done.values()), unit="frame", desc="render", disable=not s.progress)
    with bar, ProcessPoolExecutor(workers, context, _start, (written, stop)) as pool:
        jobs = {pool.submit(_render, s, m, n): m for m, n in todo.items()}
        waiting = set(jobs)
        start = bar.n
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.2)
                bar.update(start + written.value - bar.n)
                for job in ended:
                    done[jobs[job]] = job.result()
                    folder.append({"map": jobs[job], "frames": done[jobs[job]]})
        except BrokenProcessPool as error:
            raise SideTuningError(
                "a rendering process was killed, perhaps for want of memory; the same command goes on from there"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return sum(done.values())


def _start(written: Synchronized[int], stop: Event) -> None:
    """In every rendering process, first."""
    global _written, _stop
    _written, _stop = written, stop
    end_with_parent()


def _render(settings: Settings, name: str, count: int) -> int:
    from sidetuning_bench.doom import frames as doom

    return doom.render_map(Path(settings.out), name, count, settings.size, settings.seed, _tick)


def _tick() -> None:
    with _written.get_lock():
        _written.value += 1
    if _stop.is_set():
        raise KeyboardInterrupt


def main(settings: Settings) -> None:
    """Render and say what is there."""
    total = run(settings)
    short = (
        f" ({settings.frames - total} fewer than asked for: some maps have too few good views)"
        if total < settings.frames
        else ""
    )
    print(f"{total} frames in {settings.out}{short}")
