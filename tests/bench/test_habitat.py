"""Habitat through a stand-in for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from sidetuning.errors import SideTuningError
from sidetuning_bench.agents.habitat import HabitatWorld
from sidetuning_bench.agents.trajectories import COMPASS
from sidetuning_bench.agents.worlds import TEST_SEED, episodes, make_world


def test_habitat_speaks_gymnasium(habitat: str, tmp_path: Path) -> None:
    with pytest.raises(SideTuningError, match="cannot be opened"):
        make_world(f"habitat:{tmp_path}/none.yaml", "train", 32)
    world = make_world(habitat, "val", 32)
    assert world.env.config == {"path": str(tmp_path / "nav.yaml"), "overrides": ["habitat.dataset.split=val"]}
    check_env(world, skip_render_check=True)
    seen, _ = world.reset(seed=3)
    assert seen["rgb"].shape == (32, 32, 3) and seen[COMPASS].dtype == np.float32
    assert all(np.array_equal(a, b) for a, b in zip(seen.values(), world.reset(seed=3)[0].values(), strict=True))
    angle = seen[COMPASS][1]
    # Left, in our order, whatever Habitat's is.
    turned, *_ = world.step(2)
    assert (angle - turned[COMPASS][1]) % (2 * np.pi) == pytest.approx(np.radians(10), abs=1e-5)
    _, _, ended, cut, info = world.step(0)
    assert ended and not cut and info["is_success"] is False and info["distance_to_goal"] > 0
    # The seed says which episodes.
    both = (world, make_world(habitat, "val", 32))
    goals = [[w.reset(seed=s)[0][COMPASS].tolist(), w.reset()[0][COMPASS].tolist()] for w in both for s in (7, 8)]
    assert goals[:2] == goals[2:] and len({tuple(g) for pair in goals for g in pair}) == 4
    outcomes = list(episodes(world, lambda _: int(world.expert()), 20, TEST_SEED))
    assert np.mean([o.success or 0 for o in outcomes]) == 1 and min(o.spl or 0 for o in outcomes) > 0.7
    world.reset(seed=1)
    for _ in range(59):
        assert world.step(3)[2:4] == (False, False)
    # The end of time is no end of its own.
    assert world.step(3)[2:4] == (False, True)
    world.close()
    assert world.env.closed


def test_missing_sensors_and_actions_raise(habitat: str) -> None:
    from habitat.gym import make_gym_from_config

    env: Any = make_gym_from_config({})
    del env.unwrapped.habitat_env.task.actions["stop"]
    with pytest.raises(SideTuningError, match="and not stop"):
        HabitatWorld(env, 32)
    env = make_gym_from_config({})
    env.observation_space = spaces.Dict({COMPASS: env.observation_space[COMPASS]})
    with pytest.raises(SideTuningError, match="add rgb_sensor"):
        HabitatWorld(env, 32)
