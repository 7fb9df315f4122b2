"""Habitat as an environment of agents: `--env habitat:CONFIG` where habitat-lab is installed.

Habitat's environments speak old gym (`reset` gives an observation, `step` four values); here they speak gymnasium, with
the observations and the order of actions of `doom.nav`. Install (Linux, Python 3.10 or later):

    conda install habitat-sim headless -c conda-forge -c aihabitat-nightly
    pip install git+https://github.com/facebookresearch/habitat-lab.git#subdirectory=habitat-lab
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from PIL import Image

from sidetuning.errors import SideTuningError
from sidetuning_bench.agents.trajectories import COMPASS

ACTIONS = ("stop", "move_forward", "turn_left", "turn_right")
# Metres, of PointNav's success.
GOAL_RADIUS = 0.2


class HabitatWorld(gym.Env[Any, Any]):
    """A Habitat environment with gymnasium's interface.

    Observation: `rgb` (size, size, 3) uint8, and `pointgoal_with_gps_compass` (2,) float32 where the task has it.
    Actions: stop, move_forward, turn_left, turn_right, whatever their order in Habitat. Info: Habitat's measures, and
    `is_success`.

    Args:
        env: what `habitat.gym.make_gym_from_config` returns.
        size: width and height of the pictures; others are resized by averaging.

    Raises:
        SideTuningError: the task has no `rgb` sensor, or not these four actions.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (as in gymnasium)
    render_mode = "rgb_array"
    # The action stop ends an episode.
    stops = True
    radius = GOAL_RADIUS

    def __init__(self, env: Any, size: int) -> None:
        self.env, self.size = env, size
        # A number means an action by the order of the task's configuration; the action space is sorted by name.
        names = list(env.unwrapped.habitat_env.task.actions)
        if missing := [name for name in ACTIONS if name not in names]:
            raise SideTuningError(f"the task has the actions {', '.join(names)}, and not {', '.join(missing)}")
        self._actions = [names.index(name) for name in ACTIONS]
        sensors = env.observation_space.spaces
        if "rgb" not in sensors:
            raise SideTuningError(f"the task has the sensors {', '.join(sensors)}; add rgb_sensor to its configuration")
        space: dict[str, spaces.Space[Any]] = {"rgb": spaces.Box(0, 255, (size, size, 3), np.uint8)}
        self.compass = COMPASS in sensors
        if self.compass:
            space[COMPASS] = spaces.Box(np.array([0, -np.pi], np.float32), np.array([1e4, np.pi], np.float32))
        self.action_space, self.observation_space = spaces.Discrete(len(ACTIONS)), spaces.Dict(space)
        self._follower: Any = None
        self._image = np.zeros((size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: the one that the seed names or, without a seed, a random one.

        Habitat goes through its episodes in one order, whatever the seed: copies of an environment would all walk the
        same ways.
        """
        super().reset(seed=seed)
        inner = self.env.unwrapped.habitat_env
        if seed is not None:
            self.env.unwrapped.seed(seed)
        k = seed if seed is not None else int(self.np_random.integers(2**31))
        # Episodes are ordered by scene; successive seeds should see many scenes.
        order = np.random.default_rng(0).permutation(len(inner.episodes))
        # The next reset takes this one.
        inner.current_episode = inner.episodes[order[k % len(order)]]
        return self._observation(self.env.reset()), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen, reward, done, info = self.env.step(self._actions[int(action)])
        stopped = ACTIONS[int(action)] == "stop"
        measures = {k: float(info[k]) for k in ("distance_to_goal", "success", "spl") if k in info}
        about = {**info, **measures, "is_success": bool(measures.get("success", 0.0))}
        return self._observation(seen), float(reward), done and stopped, done and not stopped, about

    def _observation(self, seen: Any) -> dict[str, Any]:
        self._image = np.asarray(seen["rgb"])[..., :3].astype(np.uint8)
        if self._image.shape[:2] != (self.size, self.size):
            image = Image.fromarray(self._image).resize((self.size, self.size), Image.Resampling.BOX)
            self._image = np.array(image)
        compass = {COMPASS: np.asarray(seen[COMPASS], np.float32)} if self.compass else {}
        return {"rgb": self._image, **compass}

    def expert(self) -> int:
        """The action of Habitat's own shortest-path follower."""
        inner = self.env.unwrapped.habitat_env
        if self._follower is None:
            from habitat.tasks.nav.shortest_path_follower import ShortestPathFollower

            self._follower = ShortestPathFollower(inner.sim, GOAL_RADIUS, return_one_hot=False)
        # Habitat numbers the simulator's actions in this order.
        action = self._follower.get_next_action(inner.current_episode.goals[0].position)
        return 0 if action is None else int(action)

    def render(self) -> Any:
        return self._image

    def close(self) -> None:
        self.env.close()


def make(config: str, split: str, size: int) -> HabitatWorld:
    """The environment of a configuration file, on one of the splits of its data set.

    Raises:
        ImportError: Habitat is not installed.
        SideTuningError: the configuration or its data cannot be read.
    """
    try:
        import habitat
        from habitat.gym import make_gym_from_config
    except ImportError as error:
        raise ImportError("habitat:… needs habitat-sim and habitat-lab; docs/agents.md says how to install") from error
    try:
        settings = habitat.get_config(config, overrides=[f"habitat.dataset.split={split}"])
        return HabitatWorld(make_gym_from_config(settings), size)
    except SideTuningError:
        raise
    # Habitat, hydra, the simulator and its files raise all kinds of errors.
    except Exception as error:
        raise SideTuningError(f"habitat:{config} cannot be opened ({type(error).__name__}: {error})") from error
