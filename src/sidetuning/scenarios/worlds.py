"""Environments by name, bases for what is seen in them, and how episodes are run: what imitation, rl, play and collect-trajectories share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sidetuning.base import Base, load_base
from sidetuning.errors import DataError, SideTuningError, UnknownNameError
from sidetuning.registry import Registry, unknown

WORLDS: Registry[Callable[..., Any]] = Registry(
    "environment",
    {
        "doom-pointnav": "sidetuning.data.doom_nav:pointnav",
        "doom-home": "sidetuning.data.doom_nav:home",
        "doom-explore": "sidetuning.data.doom_nav:explore",
    },
)
SPLITS = ("train", "val", "test")
TEST_SEED = 900_000_000  # of the first test episode: none that anybody learns from


def make_world(name: str, split: str, size: int) -> Any:
    """A gymnasium environment.

    Args:
        name: doom-pointnav, doom-home, doom-explore, or habitat:CONFIG with a file of Habitat's settings.
        split: "train", "val" or "test": scenes of which no two have one in common, where there are several.
        size: width and height of the pictures.

    Raises:
        UnknownNameError: no such environment or split.
        ImportError: the packages behind it are not installed.
    """
    if split not in SPLITS:
        raise UnknownNameError(unknown("split", split, SPLITS, verb="known"))
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "habitat":
        from sidetuning.integrations.habitat import make

        return make(rest, split, size)
    try:
        return WORLDS[name](split, size)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}; type: pip install 'sidetuning[agents]'") from error


def map_base(name: str, weights: str | None, size: int) -> Base:
    """A base for pictures of a size that gives a map; of a timm model it is the last one.

    Raises:
        DataError: it gives none.
    """
    output = "map" if name.startswith("timm:") else None
    base = load_base(name, weights=weights, output=output).with_example(
        torch.zeros(1, 3, size, size, dtype=torch.uint8)
    )
    if base.kind != "map":
        raise DataError(f"the base {name} returns a {base.kind}; agents need a map, such as resnet-doom-curvature's")
    return base


def expert_of(world: Any, name: str) -> Callable[[], int]:
    """What says the best action of an environment at any time.

    Raises:
        SideTuningError: the environment has no goal.
    """
    expert: Callable[[], int] | None = getattr(world, "expert", None)
    if expert is None:
        raise SideTuningError(f"{name} has no goal and so no expert to imitate; use doom-pointnav or doom-home")
    return expert


@dataclass(frozen=True)
class Outcome:
    """What an episode came to.

    Attributes:
        reward: the sum.
        success, spl: in 0 … 1, None where the environment has no such measure.
        steps: its length.
    """

    reward: float
    success: float | None
    spl: float | None
    steps: int


def episodes(
    world: Any, act: Callable[[dict[str, Any]], int], count: int, seed: int, watch: Callable[[Any], None] | None = None
) -> Iterator[Outcome]:
    """Run the episodes of `count` successive seeds; `watch(world)` is called at every step."""
    for k in range(count):
        observation, info = world.reset(seed=seed + k)
        reward, steps, done = 0.0, 0, False
        while not done:
            if watch is not None:
                watch(world)
            observation, gained, ended, cut, info = world.step(act(observation))
            reward, steps, done = reward + float(gained), steps + 1, ended or cut
        if watch is not None:
            watch(world)
        yield Outcome(reward, info.get("success"), info.get("spl"), steps)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927): right for few trials, and for shares of 0 and 1.

    For the mean of numbers in 0 … 1, given their sum, it is wide enough: they vary at most as much as trials do.
    """
    z = 1.96
    p = successes / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
