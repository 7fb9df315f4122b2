import math
from typing import Any


class ShortestPathFollower:
    def __init__(self, sim: Any, goal_radius: float, return_one_hot: bool = True) -> None:
        assert not return_one_hot
        self.sim, self.goal_radius = sim, goal_radius

    def get_next_action(self, goal: Any) -> int:
        assert tuple(goal) == self.sim.goal
        distance, angle = self.sim.polar()
        if distance < self.goal_radius:
            return 0
        if abs(angle) <= math.radians(5.1):
            return 1
        return 2 if angle > 0 else 3
