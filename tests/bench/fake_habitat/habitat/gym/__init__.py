import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium import spaces


class Env:
    """Habitat's own environment: it goes through its episodes in a fixed order, unless one is set for the next."""

    def __init__(self, sim: Any) -> None:
        self.sim = sim
        # In the order of the configuration.
        names = ("stop", "move_forward", "turn_left", "turn_right")
        self.task = SimpleNamespace(actions=dict.fromkeys(names))
        rng = random.Random(0)
        ways = [(rng.uniform(-math.pi, math.pi), rng.uniform(1, 3)) for _ in range(50)]
        goals = [(d * math.cos(a), d * math.sin(a)) for a, d in ways]
        self.episodes = [SimpleNamespace(goals=[SimpleNamespace(position=goal)]) for goal in goals]
        self._iterator = iter(self.episodes * 1000)
        self._episode: Any = None
        self._set = False

    @property
    def current_episode(self) -> Any:
        return self._episode

    @current_episode.setter
    def current_episode(self, episode: Any) -> None:
        self._episode, self._set = episode, True

    def reset(self) -> None:
        if not self._set:
            self._episode = next(self._iterator)
        self._set = False


class Task:
    """The task environment, which `unwrapped` gives; its seed is not what chooses an episode."""

    def __init__(self, sim: Any) -> None:
        self.habitat_env = Env(sim)

    def seed(self, seed: int) -> None:
        random.seed(seed)


class HabGymWrapper:
    """Old gym: reset gives an observation, step four values.

    The agent turns by 10 degrees; the goal is ahead, left or right.
    """

    def __init__(self, config: Any) -> None:
        self.config, self.unwrapped, self.closed = config, Task(self), False
        names = self.unwrapped.habitat_env.task.actions
        # As spaces.Dict sorts them.
        self.original_action_space = SimpleNamespace(spaces=dict.fromkeys(sorted(names)))
        self.action_space = spaces.Discrete(4)
        rgb = spaces.Box(0, 255, (24, 24, 3), np.uint8)
        compass = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict({"pointgoal_with_gps_compass": compass, "rgb": rgb})

    def reset(self) -> dict[str, Any]:
        self.unwrapped.habitat_env.reset()
        self.x = self.y = self.heading = 0.0
        self.goal = self.unwrapped.habitat_env.current_episode.goals[0].position
        self.shortest = self.before = math.hypot(*self.goal)
        self.walked, self.steps = 0.0, 0
        return self.observation()

    def polar(self) -> tuple[float, float]:
        dx, dy = self.goal[0] - self.x, self.goal[1] - self.y
        turn = (math.atan2(dy, dx) - self.heading + math.pi) % (2 * math.pi) - math.pi
        return math.hypot(dx, dy), turn

    def observation(self) -> dict[str, Any]:
        distance, angle = self.polar()
        image = np.zeros((24, 24, 3), np.uint8)
        image[:, : 12 + round(11 * max(-1, min(1, angle))), 0] = 255
        return {"rgb": image, "pointgoal_with_gps_compass": np.array([distance, angle], np.float32)}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, dict[str, float]]:
        # As EmbodiedTask.get_action_name does.
        name = list(self.unwrapped.habitat_env.task.actions)[action]
        if name == "move_forward":
            self.x += 0.25 * math.cos(self.heading)
            self.y += 0.25 * math.sin(self.heading)
            self.walked += 0.25
        elif name != "stop":
            self.heading += math.radians(10 if name == "turn_left" else -10)
        self.steps += 1
        distance = self.polar()[0]
        success = float(name == "stop" and distance < 0.2)
        reward = self.before - distance - 0.01 + 10 * success
        self.before = distance
        spl = success * self.shortest / max(self.shortest, self.walked)
        info = {"distance_to_goal": distance, "success": success, "spl": spl}
        return self.observation(), reward, name == "stop" or self.steps >= 60, info

    def close(self) -> None:
        self.closed = True


def make_gym_from_config(config: Any) -> HabGymWrapper:
    return HabGymWrapper(config)
