"""A tiny environment, a tiny base and a PPO learner that the tests of agents share."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor, nn

import sidetuning as st
from sidetuning.integrations.sb3 import CODE, SideTunedExtractor, VecBaseFeatures

PICTURE = spaces.Box(0, 255, (3, 16, 16), np.uint8)


class Sides(gym.Env[Any, Any]):
    """A bright half of a noisy picture, left or right: the action says which; ten answers are an episode."""

    def __init__(self) -> None:
        self.observation_space: Any = spaces.Dict({"rgb": spaces.Box(0, 255, (16, 16, 3), np.uint8)})
        self.action_space: Any = spaces.Discrete(2)

    def look(self) -> dict[str, Any]:
        self.right = int(self.np_random.integers(2))
        image = self.np_random.integers(0, 120, (16, 16, 3)).astype(np.uint8)
        image[:, 8:] += np.uint8(100 * self.right)
        image[:, :8] += np.uint8(100 * (1 - self.right))
        return {"rgb": image}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.look(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.right)
        self.steps += 1
        return self.look(), reward, False, self.steps == 10, {}


def small_base(seed: int = 7) -> st.Base:
    """Pictures (b, 3, 16, 16) -> (b, 8, 4, 4)."""
    with st.seeded(seed):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        # Its statistics then differ from those of a new batch norm.
        net(torch.randn(8, 3, 16, 16))
    return st.Base(net, example=torch.zeros(1, 3, 16, 16, dtype=torch.uint8), mean=[0.5] * 3, std=[0.25] * 3)


def other_base() -> st.Base:
    return small_base(8)


def learner(
    method: str = "sidetune",
    cached: bool = False,
    envs: int = 2,
    extractor: type[SideTunedExtractor] = SideTunedExtractor,
    learning_rate: float = 3e-4,
    rollout: int = 64,
) -> PPO:
    """PPO on `Sides` with a small extractor."""
    env: Any = VecMonitor(DummyVecEnv([Sides] * envs))
    env.seed(0)
    if cached:
        env = VecBaseFeatures(env, small_base())
    parts = {"base": small_base, "method": method, "side": "fcn4", "init": None, "hidden": 32}
    policy = {"features_extractor_class": extractor, "features_extractor_kwargs": parts, "net_arch": []}
    settings: dict[str, Any] = {"n_steps": rollout, "batch_size": 64, "n_epochs": 4, "seed": 0, "device": "cpu"}
    return PPO("MultiInputPolicy", env, policy_kwargs=policy, learning_rate=learning_rate, **settings)


def probabilities(model: PPO, observation: Any) -> Tensor:
    """Probabilities that the policy gives to the actions, (b, actions)."""
    model.policy.set_training_mode(False)
    with torch.no_grad():
        distribution: Any = model.policy.get_distribution(model.policy.obs_to_tensor(observation)[0]).distribution
    return distribution.probs


def answers(model: PPO, seed: int = 5) -> Tensor:
    """Probabilities for four random pictures."""
    x: dict[str, Any] = {"rgb": np.random.default_rng(seed).integers(0, 255, (4, 3, 16, 16)).astype(np.uint8)}
    space: Any = model.policy.observation_space
    if CODE in space.spaces:
        x[CODE] = small_base()(torch.from_numpy(x["rgb"])).out.numpy()
    return probabilities(model, x)


def check_learning_and_saving(model: PPO, folder: Path) -> None:
    """Learn and save: the base stays as it is, is not trained, and is not in the file."""
    extractor: Any = model.policy.features_extractor
    before = small_base().identity()
    # Orthogonal initialisation has skipped the base.
    assert extractor.base.identity() == before
    first = answers(model)
    model.learn(256)
    # Nor have the batch norms moved.
    assert extractor.base.identity() == before
    trained = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in extractor.base.net.parameters()}
    assert not torch.allclose(answers(model), first, atol=1e-4)
    file = folder / "agent.zip"
    model.save(file)
    with zipfile.ZipFile(file) as archive:
        state = torch.load(archive.open("policy.pth"), weights_only=True)
    network = small_base().net
    assert isinstance(network, nn.Sequential)
    sizes = {tuple(p.shape) for p in network.parameters()}
    copies = [k for k, v in state.items() if tuple(v.shape) in sizes and "trunk" not in k and ".net." in k]
    assert not copies
    if not any("trunk.net" in name for name in state):
        values = [v for v in state.values() if v.shape == (8, 3, 3, 3)]
        assert not any(torch.equal(v, network.get_parameter("0.weight")) for v in values)
    again = PPO.load(file)
    assert torch.equal(answers(again), answers(model)) and not torch.allclose(answers(again), first, atol=1e-4)
