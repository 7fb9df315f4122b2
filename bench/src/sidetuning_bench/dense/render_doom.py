"""`sidetuning bench render-doom`: labelled frames of Freedoom's levels, as a folder in Taskonomy's layout."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from tqdm import tqdm

from sidetuning.errors import SideTuningError
from sidetuning.files import held_folder
from sidetuning.terminal import say
from sidetuning_bench.doom.engine import EngineError
from sidetuning_bench.options import Count, Natural, check, must
from sidetuning_bench.runs import Run, end_with_parent

Pixels = Annotated[int, must("be from 16 to 960 pixels", lambda n: 16 <= n <= 960)]


@dataclass(frozen=True)
class Settings:
    """Render labelled frames of Freedoom's levels in Taskonomy's layout: pictures and labels of twelve dense tasks."""

    out: str = "runs/doom"
    """Folder for the frames; the same command resumes there."""
    frames: Count = 5000
    """Number of frames, spread evenly over 29 maps: 21 to train, 3 to validate, 5 to test."""
    size: Pixels = 128
    """Width and height in pixels."""
    seed: Natural = 0
    """Seed for places, directions and the game."""
    workers: Natural = 0
    """Number of rendering processes; 0 for one per core."""
    progress: bool = True
    """Show a progress bar."""


def run(settings: Settings) -> int:
    """Render the maps that are not there yet; returns the number of frames in the folder.

    Raises:
        SideTuningError: the engine is not installed, or the folder holds frames of other settings, or is another
            process's.
    """
    check(settings)
    with held_folder(settings.out):
        return render_all(settings)


def render_all(settings: Settings) -> int:
    """As `run`, into a folder that is held."""
    try:
        from sidetuning_bench.doom import frames as doom
    except ImportError as error:
        raise EngineError(
            f"rendering needs {error.name or error}; type: pip install 'sidetuning-bench[doom]'"
        ) from error

    folder = Run(settings.out, "render-doom", settings, free=("out", "workers", "progress"))
    doom.write_index(folder.folder)
    done = {row["map"]: row["frames"] for row in folder.metrics()}
    each, more = divmod(settings.frames, len(doom.MAPS))
    counts = {name: each + (i < more) for i, name in enumerate(doom.MAPS)}
    todo = {name: count for name, count in counts.items() if count and name not in done}
    if not todo:
        return sum(done.values())
    workers = min(settings.workers or torch.get_num_threads(), len(todo))
    bar = tqdm(
        total=settings.frames, initial=sum(done.values()), unit="frame", desc="render", disable=not settings.progress
    )
    with bar, ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        jobs = {pool.submit(render, settings, name, count): name for name, count in todo.items()}
        try:
            for job in as_completed(jobs):
                done[jobs[job]] = job.result()
                folder.append({"map": jobs[job], "frames": done[jobs[job]]})
                bar.update(done[jobs[job]])
        except BrokenProcessPool as error:
            raise SideTuningError(
                "a rendering process was killed, perhaps for want of memory; the same command resumes from there"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return sum(done.values())


def render(settings: Settings, name: str, count: int) -> int:
    """Render one map, in a process of the pool; returns how many frames it has."""
    from sidetuning_bench.doom import frames as doom

    return doom.render_map(Path(settings.out), name, count, settings.size, settings.seed)


def main(settings: Settings) -> None:
    """Render and say what is there."""
    total = run(settings)
    fewer = settings.frames - total
    short = f" ({fewer} fewer than asked for: some maps have too few good views)" if fewer else ""
    say(f"{total} frames in {settings.out}{short}")
