"""Environments by name, bases for what is seen in them, and how episodes are run: what imitation, rl, play and collect-trajectories share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidetuning.base import Base
from sidetuning.errors import DataError, SideTuningError, UnknownNameError
from sidetuning.loading import load_base
from sidetuning.registry import Registry, unknown
from sidetuning_bench.agents.outcomes import Outcome
from sidetuning_bench.agents.trajectories import COMPASS

WORLDS: Registry[Callable[..., Any]] = Registry(
    "environment",
    {
        "doom-pointnav": "sidetuning_bench.doom.nav:pointnav",
        "doom-home": "sidetuning_bench.doom.nav:home",
        "doom-explore": "sidetuning_bench.doom.nav:explore",
    },
)
HOME = (
    "doom-home is an eased my_way_home of ViZDoom: every episode starts 5 to 25 m from the armour along the way, each metre gained is "
    "rewarded (ViZDoom rewards the armour alone), and an episode has 200 steps."
)
SPLITS = ("train", "val", "test")
STOP, FORWARD, LEFT, RIGHT = range(4)  # in the order of Habitat, which all environments have
Act = Callable[[dict[str, Any]], int]  # an observation to an action
Policy = Callable[[dict[str, Any]], Tensor]  # an observation to the probabilities of the actions, (actions,) on the CPU
TEMPERATURE = 0.5  # of moves that are drawn
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
        from sidetuning_bench.agents.habitat import make

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


def stops(world: Any) -> bool:
    """Whether action 0 ends an episode, as in PointNav; elsewhere it does nothing."""
    return bool(getattr(world, "stops", False))


def drawing(world: Any, policy: Policy, seed: int) -> Act:
    """How a policy acts in tests: its moves are drawn, since one that always takes the likeliest may turn left and right for ever.

    They are drawn at TEMPERATURE, from the squares of the probabilities: a clone that is not sure of a turn dithers less.
    Where STOP ends an episode, it is taken where it is the likeliest action and never drawn, since nothing takes a stop back.
    """
    generator, first = torch.Generator().manual_seed(seed), int(stops(world))

    def act(observation: dict[str, Any]) -> int:
        probabilities = policy(observation)
        if first and probabilities.argmax() == STOP:
            return STOP
        sharpened = probabilities[first:] ** (1 / TEMPERATURE)
        return first + int(torch.multinomial(sharpened, 1, generator=generator))

    return act


def at_random(world: Any, seed: int = 0) -> Act:
    """An agent that moves at random; it never ends an episode."""
    rng = np.random.default_rng(seed)
    return lambda _: int(rng.integers(int(stops(world)), world.action_space.n))


def by_compass(world: Any, seed: int = 0, wander: float = 0.15) -> Act:
    """An agent that sees nothing: it turns towards the goal, goes ahead, and stops near it; what the compass alone brings.

    A share of its moves is random, so that it gets around some of the walls that it runs into.
    """
    rng = np.random.default_rng(seed)

    def act(observation: dict[str, Any]) -> int:
        distance, angle = observation[COMPASS]
        if distance <= 0.8 * world.radius:  # in Doom 1.2 m, as the expert
            return STOP
        if rng.random() < wander:
            return int(rng.integers(FORWARD, RIGHT + 1))
        if abs(angle) <= np.radians(8):  # half a turn
            return FORWARD
        return LEFT if angle > 0 else RIGHT

    return act


def episodes(
    world: Any, act: Act, count: int, seed: int, watch: Callable[[Any], None] | None = None
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
        yield Outcome(info.get("success"), info.get("spl"), reward, steps)
