"""`sidetuning bench collect-trajectories`: an expert's way through many episodes, as a data set in Minari's format."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sidetuning.errors import SideTuningError
from sidetuning.files import held_folder
from sidetuning.terminal import say
from sidetuning_bench.agents.trajectories import Episode, Writer
from sidetuning_bench.agents.worlds import TEST_SEED, check_expert, make_world
from sidetuning_bench.options import Count, Pixels, Rule, Workers, check
from sidetuning_bench.runs import Run, end_with_parent, writable

# Episodes per process that may wait to be written.
AHEAD = 16
# Distance between the seeds of the first episodes of two seeds.
SEEDS = 1_000_000
LAST_SEED = TEST_SEED // SEEDS - 1
LATE = f"give 0 to {LAST_SEED}; later ones reach the test episodes"
Seed = Annotated[int, Rule(lambda n: None if 0 <= n <= LAST_SEED else f"{n}: {LATE}")]
Stray = Annotated[float, Rule(lambda x: None if 0 <= x < 1 else f"{x}: give a share of 0 or more, below 1")]


@dataclass(frozen=True)
class Settings:
    """Collect trajectories of the shortest-path expert; the same command resumes."""

    env: str = "doom-pointnav"
    """Environment: doom-pointnav, doom-home, or habitat:CONFIG."""
    out: str = "runs/trajectories/doom-pointnav-v0"
    """Folder of the data set; its name is the data set's in Minari, so it ends in a version, such as -v0."""
    split: str = "train"
    """Split of the scenes."""
    episodes: Count = 1000
    """Number of successful episodes to write; the expert's failures are counted and left out."""
    size: Pixels = 64
    """Width and height of the pictures."""
    stray: Stray = 0.15
    """Share of steps with a random action instead, which show ways back; the expert's action is kept as the label."""
    seed: Seed = 0
    """Seed for episodes and random actions."""
    workers: Workers | None = None
    """Number of processes; one per core by default."""
    progress: bool = True
    """Show a progress bar."""


class Walks(Dataset[Any]):
    """Walk number k is an `Episode`, or None where the expert failed; every process opens an environment of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.world: Any = None

    def __getitem__(self, k: int) -> Episode | SideTuningError | None:
        try:
            if self.world is None:
                end_with_parent()
                self.world = make_world(self.settings.env, self.settings.split, self.settings.size)
                Finalize(None, self.world.close, exitpriority=10)
            return self.walk(k)
        # It is raised by who asked, since torch would wrap it in the traceback of this process.
        except SideTuningError as error:
            return error

    def walk(self, k: int) -> Episode | None:
        """Walk as the expert does, but for random actions now and then."""
        world, seed = self.world, self.settings.seed * SEEDS + k
        rng = np.random.default_rng([self.settings.seed, k])
        seen, info = world.reset(seed=seed)
        observations, actions, expert, rewards = [seen], [], [], []
        ended = cut = False
        while not (ended or cut):
            expert.append(world.expert())
            strays = rng.random() < self.settings.stray
            # Action 0 would end the episode.
            actions.append(int(rng.integers(1, world.action_space.n)) if strays else expert[-1])
            seen, reward, ended, cut, info = world.step(actions[-1])
            observations.append(seen)
            rewards.append(float(reward))
        if "success" not in info:
            raise SideTuningError(f"{self.settings.env} has no measure success; add it to its configuration")
        if not info["success"]:
            return None
        arrays = {name: np.stack([each[name] for each in observations]) for name in seen}
        return Episode(seed, arrays, np.array(actions), np.array(expert), np.array(rewards), bool(ended))


def walks(settings: Settings, first: int) -> Iterator[Episode | None]:
    """Walks from number `first` on, in order, from several processes."""
    # Processes of torch end with the loop over them.
    loader = DataLoader(
        Walks(settings),
        batch_size=None,
        sampler=itertools.count(first),
        num_workers=settings.workers or torch.get_num_threads(),
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",
    )
    try:
        for walk in loader:
            if isinstance(walk, SideTuningError):
                raise walk
            yield walk
    except RuntimeError as error:
        raise SideTuningError(f"a collecting process was killed ({error}); the same command resumes there") from error


def run(settings: Settings) -> tuple[int, int]:
    """Collect missing episodes; returns how many episodes were written in this call and how many failed.

    Raises:
        SideTuningError: the folder holds a data set of other settings, or the expert fails nearly always.
        ImportError: Minari is not installed.
    """
    check(settings)
    out, env = Path(settings.out), settings.env
    if not re.fullmatch(r".+-v\d+", out.name):
        raise SideTuningError(f"--out {out}: Minari wants a name that ends in a version, such as {out.name}-v0")
    writable(out)
    with held_folder(out):
        Run(out, "collect-trajectories", settings, free=("out", "episodes", "workers", "progress"))
        with closing(make_world(env, settings.split, settings.size)) as world:
            check_expert(world, env)
            about = {"description": f"shortest-path expert in {env}, split {settings.split}, straying {settings.stray}"}
            writer = Writer(out, world.observation_space, world.action_space, about)
        failed, before, tried = 0, len(writer), writer.tried
        todo = walks(settings, tried)
        with tqdm(total=settings.episodes, initial=before, unit="episode", disable=not settings.progress) as bar:
            while len(writer) < settings.episodes:
                episode = next(todo)
                tried += 1
                if episode is not None:
                    writer.append(episode, tried)
                    bar.update()
                    continue
                failed += 1
                if failed > 20 + tried // 2:
                    raise SideTuningError(f"the expert failed in {failed} of {tried} episodes of {env}")
        return len(writer) - before, failed


def main(settings: Settings) -> None:
    """Collect, and print what was written."""
    written, failed = run(settings)
    say(f"{written} episodes written to {settings.out}; {failed} in which the expert failed were left out")
