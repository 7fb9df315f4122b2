"""Habitat as an environment of this library: `--env habitat:CONFIG` where habitat-lab is installed.

Habitat's environments speak old gym (`reset` gives an observation, `step` four values); here they become gymnasium's, with the
observations and the order of actions that `data.doom_nav` has. Install (Linux, Python 3.10 or later, for which the nightly channel
has builds):

    conda install habitat-sim headless -c conda-forge -c aihabitat-nightly
    pip install git+https://github.com/facebookresearch/habitat-lab.git#subdirectory=habitat-lab
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sidetuning.errors import SideTuningError
from sidetuning_bench.agents.trajectories import COMPASS

ACTIONS = ("stop", "move_forward", "turn_left", "turn_right")
GOAL_RADIUS = 0.2  # metres, of PointNav's success
MEASURES = ("distance_to_goal", "success", "spl")


class HabitatWorld(gym.Env[Any, Any]):
    """A Habitat environment with gymnasium's interface.

    Observation: `rgb` (size, size, 3) uint8, and `pointgoal_with_gps_compass` (2,) float32 where the task has it. Actions are stop,
    move_forward, turn_left, turn_right, whatever their order in Habitat. Info: Habitat's measures, and `is_success`.

    Args:
        env: what `habitat.gym.make_gym_from_config` returns.
        size: of the pictures; others are resized by averaging.

    Raises:
        SideTuningError: the task has no `rgb` sensor, or not these four actions.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (gymnasium's way)
    render_mode = "rgb_array"
    stops = True  # the action stop ends an episode
    radius = GOAL_RADIUS

    def __init__(self, env: Any, size: int) -> None:
        self.env, self.size = env, size
        # A number stands for an action by the order of the task's configuration; the action space is sorted by name.
        there = list(env.unwrapped.habitat_env.task.actions)
        missing = [name for name in ACTIONS if name not in there]
        if missing:
            raise SideTuningError(f"the task has the actions {', '.join(there)}, and not {', '.join(missing)}")
        self._actions = [there.index(name) for name in ACTIONS]
        sensors = env.observation_space.spaces
        if "rgb" not in sensors:
            raise SideTuningError(f"the task has the sensors {', '.join(sensors)}; add rgb_sensor to its configuration")
        self.action_space = spaces.Discrete(len(ACTIONS))
        space: dict[str, spaces.Space[Any]] = {"rgb": spaces.Box(0, 255, (size, size, 3), np.uint8)}
        self.compass = COMPASS in sensors
        if self.compass:
            space[COMPASS] = spaces.Box(np.array([0, -np.pi], np.float32), np.array([1e4, np.pi], np.float32))
        self.observation_space = spaces.Dict(space)
        self._follower: Any = None
        self._image = np.zeros((size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: the one that the seed gives, or without one another, drawn after it.

        Habitat itself goes through its episodes in one order, whatever the seed: copies of an environment would all walk the same.
        """
        super().reset(seed=seed)
        inner = self.env.unwrapped.habitat_env
        if seed is not None:
            self.env.unwrapped.seed(seed)
        k = seed if seed is not None else int(self.np_random.integers(2**31))
        count = len(inner.episodes)  # they come scene by scene: successive seeds shall see many
        place = np.random.default_rng(0).permutation(count)[k % count]
        inner.current_episode = inner.episodes[place]  # what the next reset takes
        return self._observation(self.env.reset()), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, done, info = self.env.step(self._actions[int(action)])
        stopped = ACTIONS[int(action)] == "stop"
        measures = {k: float(info[k]) for k in MEASURES if k in info}
        measures["is_success"] = bool(measures.get("success", 0.0))  # type: ignore[assignment]
        return (
            self._observation(observation),
            float(reward),
            done and stopped,
            done and not stopped,
            {**info, **measures},
        )

    def _observation(self, seen: Any) -> dict[str, Any]:
        image = np.asarray(seen["rgb"])[..., :3].astype(np.uint8)
        if image.shape[:2] != (self.size, self.size):
            from PIL import Image

            image = np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BOX))
        self._image = image
        observation: dict[str, Any] = {"rgb": image}
        if self.compass:
            observation[COMPASS] = np.asarray(seen[COMPASS], np.float32)
        return observation

    def expert(self) -> int:
        """The action of Habitat's own shortest-path follower."""
        inner = self.env.unwrapped.habitat_env
        if self._follower is None:
            from habitat.tasks.nav.shortest_path_follower import ShortestPathFollower

            self._follower = ShortestPathFollower(inner.sim, GOAL_RADIUS, return_one_hot=False)
        action = self._follower.get_next_action(inner.current_episode.goals[0].position)
        return 0 if action is None else int(action)  # Habitat numbers the simulator's actions in this order

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
        raise ImportError(
            "habitat:… needs habitat-sim and habitat-lab, which conda installs; see sidetuning/integrations/habitat.py"
        ) from error
    try:
        settings = habitat.get_config(config, overrides=[f"habitat.dataset.split={split}"])
        return HabitatWorld(make_gym_from_config(settings), size)
    except SideTuningError:
        raise
    except Exception as error:  # Habitat raises what hydra, its simulator and its files make it
        raise SideTuningError(f"habitat:{config} cannot be opened ({type(error).__name__}: {error})") from error
