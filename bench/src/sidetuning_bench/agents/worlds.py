"""Environments by name, how agents act and are tested in them, and the settings that imitation and rl share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
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
from sidetuning_bench.options import Count, SideOptions

WORLDS: Registry[Callable[..., Any]] = Registry(
    "environment", {f"doom-{name}": f"sidetuning_bench.doom.nav:{name}" for name in ("pointnav", "home", "explore")}
)
HOME = (
    "doom-home is an eased my_way_home of ViZDoom: every episode starts 5 to 25 m from the armour along the way, each "
    "metre gained is rewarded (ViZDoom rewards the armour alone), and an episode has 200 steps."
)
SPLITS = ("train", "val", "test")
# Actions in the order of Habitat, which all environments have.
STOP, FORWARD, LEFT, RIGHT = range(4)
# An observation to an action; an observation to the probabilities of the actions, (actions,) on the CPU.
Act = Callable[[dict[str, Any]], int]
Policy = Callable[[dict[str, Any]], Tensor]
TEMPERATURE = 0.5
# Seed of the first test episode; nobody learns from this one and those after it.
TEST_SEED = 900_000_000


@dataclass(frozen=True)
class AgentOptions:
    """Where agents act, how they are tested, and the base that they see with."""

    env: str = "doom-pointnav"
    """Environment: doom-pointnav, doom-home, doom-explore (rl alone), or habitat:CONFIG."""
    test_episodes: Count = 100
    """Number of unseen episodes that every agent is tested on."""
    test_split: str = "test"
    """Split of the scenes of these episodes."""
    base: str = "resnet-doom-curvature"
    """Base network. A timm:… model gives its last map."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""


def side_options(sides: SideOptions) -> dict[str, Any]:
    """Arguments of a side for a base that returns a map with both signs; fcn4, fcn5 and copy have a width."""
    width = {"width": sides.side_width}
    return {"fcn4": width, "fcn5": {**width, "signed": True}, "copy": width}.get(sides.side, {})


def make_world(name: str, split: str, size: int) -> Any:
    """A gymnasium environment.

    Args:
        name: doom-pointnav, doom-home, doom-explore, or habitat:CONFIG with a file of Habitat's settings.
        split: "train", "val" or "test"; no two of them share a scene, where there are several.
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
        raise ImportError(f"{name} needs {error.name}; type: pip install 'sidetuning-bench[agents]'") from error


def map_base(name: str, weights: str | None, size: int) -> Base:
    """A base for pictures of a size that returns a map; of a timm model it is the last one.

    Raises:
        DataError: it returns something else.
    """
    output = "map" if name.startswith("timm:") else None
    pictures = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    base = load_base(name, weights=weights, output=output).with_example(pictures)
    if base.kind != "map":
        raise DataError(f"the base {name} returns a {base.kind}; agents need a map, such as resnet-doom-curvature's")
    return base


def check_expert(world: Any, name: str) -> None:
    """Raise a SideTuningError where an environment has no goal and so no expert."""
    if not hasattr(world, "expert"):
        raise SideTuningError(f"{name} has no goal and so no expert to imitate; use doom-pointnav or doom-home")


def drawing(world: Any, policy: Policy, seed: int) -> Act:
    """How a policy acts in tests: actions are sampled at temperature 0.5, from the squares of their probabilities.

    A policy that always takes the likeliest action may turn left and right for ever. Where STOP ends an episode, it is
    taken where it is the likeliest action and never sampled, since nothing takes a stop back.
    """
    generator, first = torch.Generator().manual_seed(seed), int(world.stops)

    def act(observation: dict[str, Any]) -> int:
        probabilities = policy(observation)
        if first and probabilities.argmax() == STOP:
            return STOP
        sharpened = probabilities[first:] ** (1 / TEMPERATURE)
        return first + int(torch.multinomial(sharpened, 1, generator=generator))

    return act


def at_random(world: Any, seed: int = 0) -> Act:
    """An agent that moves at random and never ends an episode."""
    rng = np.random.default_rng(seed)
    return lambda _: int(rng.integers(int(world.stops), world.action_space.n))


def by_compass(world: Any, seed: int = 0, wander: float = 0.15) -> Act:
    """An agent that sees nothing: it turns towards the goal, goes ahead, and stops near it.

    A share of its moves is random, so that it gets around some of the walls that it runs into.
    """
    rng = np.random.default_rng(seed)

    def act(observation: dict[str, Any]) -> int:
        distance, angle = observation[COMPASS]
        # In Doom 1.2 m, as the expert.
        if distance <= 0.8 * world.radius:
            return STOP
        if rng.random() < wander:
            return int(rng.integers(FORWARD, RIGHT + 1))
        # 8° is half a turn.
        if abs(angle) <= np.radians(8):
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


@dataclass(frozen=True)
class Player:
    """A trained agent, and the environment that it is tested in.

    Attributes:
        name: name of its method.
        env, split, size: arguments of `make_world`.
        policy: probabilities that it gives to the actions.
        seed: seed of its moves in tests.
    """

    name: str
    env: str
    split: str
    size: int
    policy: Policy
    seed: int

    def outcomes(self, count: int) -> list[Outcome]:
        """Outcomes of the first test episodes."""
        with closing(make_world(self.env, self.split, self.size)) as world:
            return list(episodes(world, drawing(world, self.policy, self.seed), count, TEST_SEED))
