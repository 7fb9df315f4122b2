import math
import random
from types import SimpleNamespace

import numpy as np
from gymnasium import spaces


class Task:
    """The task environment, which `unwrapped` gives: it owns the simulator and takes the seed."""

    def __init__(self):
        self.rng = random.Random(0)
        self.habitat_env = SimpleNamespace(sim=None, current_episode=None)

    def seed(self, seed):
        self.rng = random.Random(seed)


class HabGymWrapper:
    """Old gym: reset gives an observation, step four values. The agent turns by 10 degrees; the goal is ahead, left or right."""

    def __init__(self, config):
        self.config, self.unwrapped, self.closed = config, Task(), False
        names = ("move_forward", "stop", "turn_left", "turn_right")  # sorted, as spaces.Dict sorts them
        self.original_action_space = SimpleNamespace(spaces=dict.fromkeys(names))
        self.action_space = spaces.Discrete(4)
        rgb = spaces.Box(0, 255, (24, 24, 3), np.uint8)
        compass = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = spaces.Dict({"pointgoal_with_gps_compass": compass, "rgb": rgb})

    def reset(self):
        rng = self.unwrapped.rng
        self.x = self.y = self.heading = 0.0
        angle, distance = rng.uniform(-math.pi, math.pi), rng.uniform(1, 3)
        self.goal = distance * math.cos(angle), distance * math.sin(angle)
        self.shortest = self.before = distance
        self.walked, self.steps = 0.0, 0
        self.unwrapped.habitat_env = SimpleNamespace(
            sim=self, current_episode=SimpleNamespace(goals=[SimpleNamespace(position=self.goal)])
        )
        return self.observation()

    def polar(self):
        dx, dy = self.goal[0] - self.x, self.goal[1] - self.y
        turn = (math.atan2(dy, dx) - self.heading + math.pi) % (2 * math.pi) - math.pi
        return math.hypot(dx, dy), turn

    def observation(self):
        distance, angle = self.polar()
        image = np.zeros((24, 24, 3), np.uint8)
        image[:, : 12 + round(11 * max(-1, min(1, angle))), 0] = 255
        return {"rgb": image, "pointgoal_with_gps_compass": np.array([distance, angle], np.float32)}

    def step(self, action):
        name = list(self.original_action_space.spaces)[action]
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

    def close(self):
        self.closed = True


def make_gym_from_config(config):
    return HabGymWrapper(config)
