"""`sidetuning collect-trajectories`: an expert's way through many episodes, as a data set in Minari's format."""

from __future__ import annotations

import multiprocessing
import re
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sidetuning.errors import SideTuningError
from sidetuning_bench.agents.trajectories import Episode, Writer, concatenate
from sidetuning_bench.agents.worlds import TEST_SEED, expert_of, make_world
from sidetuning_bench.runs import Run, at_least_one, end_with_parent

AHEAD = 16  # episodes per process that may wait to be written
SEEDS = 1_000_000  # between the episodes of two seeds


@dataclass(frozen=True)
class Settings:
    """Collect trajectories of the shortest-path expert; the same command again goes on where it stopped."""

    env: str = "doom-pointnav"
    """doom-pointnav, doom-home, or habitat:CONFIG."""
    out: str = "runs/trajectories/doom-pointnav-v0"
    """Folder of the data set; its name is the data set's in Minari, so it ends in a version, such as -v0."""
    split: str = "train"
    """Of the scenes."""
    episodes: int = 1000
    """Successful episodes to write; the expert's failures are counted and left out."""
    size: int = 64
    """Width and height of the pictures."""
    stray: float = 0.15
    """Share of steps at which a random action is taken instead, so that ways back are seen too; what the expert would have done is kept."""
    seed: int = 0
    """Of the episodes and of straying."""
    workers: int | None = None
    """Processes; one per core by default."""
    progress: bool = True
    """Show a progress bar."""


def run(settings: Settings) -> tuple[int, int]:
    """Collect what is not there yet; returns how many episodes were written in this call and how many failed.

    Raises:
        SideTuningError: the folder holds a data set of other settings, or the expert fails nearly always.
        ImportError: Minari is not installed.
    """
    s = settings
    at_least_one(s, "episodes", "workers", "size")
    if not 0 <= s.stray < 1:
        raise SideTuningError(f"--stray {s.stray}: give a share of 0 or more, below 1")
    if not 0 <= s.seed < TEST_SEED // SEEDS:
        raise SideTuningError(
            f"--seed {s.seed}: give 0 to {TEST_SEED // SEEDS - 1}; later ones reach the test episodes"
        )
    if not re.fullmatch(r".+-v\d+", Path(s.out).name):
        raise SideTuningError(
            f"--out {s.out}: Minari wants a name that ends in a version, such as {Path(s.out).name}-v0"
        )
    Run(s.out, "collect-trajectories", s, free=("out", "episodes", "workers", "progress"))
    world = make_world(s.env, s.split, s.size)
    try:
        expert_of(world, s.env)
        spaces = world.observation_space, world.action_space
    finally:
        world.close()
    writer = Writer(
        s.out, *spaces, {"description": f"shortest-path expert in {s.env}, split {s.split}, straying {s.stray}"}
    )
    tried = writer.tried
    failed, before = 0, len(writer)
    workers = s.workers or torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=s.episodes, initial=min(before, s.episodes), unit="episode", disable=not s.progress) as bar,
        ProcessPoolExecutor(workers, context, _start, (s,)) as pool,
    ):
        waiting: deque[Future[Episode | None]] = deque()
        try:
            for k in range(tried, tried + AHEAD * workers):
                waiting.append(pool.submit(_collect, k))
            while len(writer) < s.episodes:
                episode = waiting.popleft().result()
                tried += 1
                waiting.append(pool.submit(_collect, tried + AHEAD * workers - 1))
                if episode is None:
                    failed += 1
                    if failed > 20 + tried // 2:
                        raise SideTuningError(f"the expert failed in {failed} of {tried} episodes of {s.env}")
                    continue
                writer.append(episode, tried)
                bar.update()
        except BrokenProcessPool as error:
            raise SideTuningError("a collecting process was killed; the same command goes on from there") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return len(writer) - before, failed


_settings: Settings
_world: Any


def _start(settings: Settings) -> None:
    """In every process, first."""
    global _settings, _world
    end_with_parent()
    _settings, _world = settings, make_world(settings.env, settings.split, settings.size)
    Finalize(None, _world.close, exitpriority=10)


def _collect(k: int) -> Episode | None:
    """The episode with number k; None where the expert failed."""
    s = _settings
    rng = np.random.default_rng([s.seed, k])
    seen, info = _world.reset(seed=s.seed * SEEDS + k)
    observations, actions, expert, rewards = [seen], [], [], []
    ended = cut = False
    while not (ended or cut):
        expert.append(_world.expert())
        strays = rng.random() < s.stray
        actions.append(int(rng.integers(1, _world.action_space.n)) if strays else expert[-1])  # 0 would end the episode
        seen, reward, ended, cut, info = _world.step(actions[-1])
        observations.append(seen)
        rewards.append(float(reward))
    if "success" not in info:
        raise SideTuningError(
            f"{s.env} does not say whether an episode succeeded; add the measure success to its configuration"
        )
    if not info["success"]:
        return None
    return Episode(
        s.seed * SEEDS + k,
        concatenate(observations),
        np.array(actions),
        np.array(expert),
        np.array(rewards),
        bool(ended),
    )


def main(settings: Settings) -> None:
    """Collect and say what there is."""
    written, failed = run(settings)
    print(f"{written} episodes written to {settings.out}; {failed} in which the expert failed were left out")
