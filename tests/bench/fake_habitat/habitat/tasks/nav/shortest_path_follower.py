import math


class ShortestPathFollower:
    def __init__(self, sim, goal_radius, return_one_hot=True):
        assert not return_one_hot
        self.sim, self.goal_radius = sim, goal_radius

    def get_next_action(self, goal):
        assert tuple(goal) == self.sim.goal
        distance, angle = self.sim.polar()
        if distance < self.goal_radius:
            return 0
        if abs(angle) <= math.radians(5.1):
            return 1
        return 2 if angle > 0 else 3
