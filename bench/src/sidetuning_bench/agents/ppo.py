"""PPO of stable-baselines3 in the environments of `worlds`, with the encoders of `integrations.sb3`: one run of `rl`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.wrappers import TransformReward
from safetensors.torch import load_file, save_file
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecTransposeImage
from torch import Tensor
from tqdm import tqdm

from sidetuning.errors import SideTuningError
from sidetuning.files import atomic_write, write_json
from sidetuning.integrations.sb3 import VecBaseFeatures
from sidetuning.sides.initialise import mismatch
from sidetuning_bench.agents.extractor import AgentExtractor
from sidetuning_bench.agents.outcomes import scores
from sidetuning_bench.agents.rl import FREE, RECENT, SAVE_EVERY, Cell, Result
from sidetuning_bench.agents.worlds import TEST_SEED, Policy, drawing, episodes, make_world, map_base
from sidetuning_bench.runs import Run, read_result, side_options

SEEDS = 1000  # between two runs: the environments of one have successive seeds


def one(cell: Cell) -> Result:
    """The result of a cell: read where it is there, else learned and tested; a run that was stopped goes on from its last save.

    What is tested is the policy as it was saved and loaded.

    Raises:
        SideTuningError: another run is there, a damaged save, or a saved policy that does not answer as the learner does.
    """
    c = cell
    folder = Run(c.out, "rl-run", c, free=FREE)
    file = folder.folder / "result.json"
    if file.exists():
        return read_result(Result, file)  # type: ignore[no-any-return]
    env = training_env(c)
    try:
        model = build(c, env)
        saved = load_state(model, folder.resume("ppo"))
        folder.keep(lambda row: row["steps"] <= saved["steps"])  # what followed is done again, with other episodes
        curve = Curve(folder, c, saved)
        if model.num_timesteps < c.steps:
            model.learn(c.steps - model.num_timesteps, callback=curve, reset_num_timesteps=False)
        passes = int(saved["passes"]) + env.passes if isinstance(env, VecBaseFeatures) else None
    finally:
        env.close()
    save_policy(model.policy, folder.folder / "policy.safetensors")
    policy = load_policy(folder.folder)[1]
    same_answers(model.policy, policy, folder.folder)
    world = make_world(c.env, c.test_split, c.size)
    try:
        outcomes = list(episodes(world, drawing(world, policy_of(policy), c.seed), c.test_episodes, TEST_SEED))
    finally:
        world.close()
    result = Result(
        method=c.method, seed=c.seed, env=c.env, curve=folder.metrics(), added=sum(p.numel() for p in policy.parameters() if p.requires_grad),
        alpha=getattr(policy.features_extractor.branch, "alpha", None), base_passes=passes,
        steps_per_second=model.num_timesteps / curve.seconds, resumed=curve.resumed,
        settings={k: v for k, v in asdict(c).items() if k not in FREE}, **scores(outcomes),
    )  # fmt: skip
    write_json(file, asdict(result))
    folder.done("ppo")
    return result


def training_env(cell: Cell) -> VecEnv:
    """Environments side by side, with the base's features where the method uses them."""
    c = cell

    def make() -> Any:
        monitored = Monitor(make_world(c.env, "train", c.size))  # it sees the true rewards
        return TransformReward(monitored, lambda reward: c.reward_scale * float(reward))

    env: VecEnv = DummyVecEnv([make] * c.envs)
    if c.cached and c.method in ("sidetune", "features"):
        base = map_base(c.base, c.base_weights, c.size)
        env = VecBaseFeatures(env, base.to(get_device("auto")))  # where PPO computes
    return env


def try_extractors(cells: Iterable[Cell], world: Any) -> None:
    """See whether the extractors of some runs can be built for what is seen in an environment, before anything is written."""
    seen: Any = VecTransposeImage(DummyVecEnv([lambda: world])).observation_space
    for cell in cells:
        AgentExtractor(seen, **extractor_options(cell))


def extractor_options(cell: Cell) -> dict[str, Any]:
    """What a run's extractor is built with."""
    c = cell
    return {
        "base": partial(map_base, c.base, c.base_weights, c.size),
        "method": c.method,
        "side": c.side,
        "merge": c.merge,
        "init": c.init,
        "side_options": side_options(c.side, c.side_width),
        "precision": c.precision,
    }


def build(cell: Cell, env: VecEnv) -> PPO:
    """The learner."""
    c = cell
    return PPO(
        "MultiInputPolicy", env, n_steps=c.rollout, batch_size=c.batch, n_epochs=c.passes, learning_rate=c.lr, gamma=0.99,
        gae_lambda=0.95, ent_coef=c.entropy, clip_range=0.2, seed=SEEDS * c.seed,
        policy_kwargs={"features_extractor_class": AgentExtractor, "features_extractor_kwargs": extractor_options(c), "net_arch": [64]},
    )  # fmt: skip


class Curve(BaseCallback):
    """Writes a row after every rollout, and saves what a stopped run goes on from."""

    def __init__(self, folder: Run, cell: Cell, saved: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder, self.cell, self.passes_before = folder, cell, int(saved["passes"])
        self.recent: list[dict[str, float]] = saved.get("recent", [])
        self.seconds, self._since = float(saved["seconds"]), time.perf_counter()
        self.resumed = int(saved["resumed"])
        self._rollouts = 0

    def _on_training_start(self) -> None:
        cell = self.cell
        self._bar = tqdm(
            total=cell.steps, initial=self.num_timesteps, unit="step", desc=f"{cell.method}-{cell.seed}",
            dynamic_ncols=True, leave=False, disable=not cell.progress,
        )  # fmt: skip
        if self.num_timesteps:
            self.resumed += 1
            self._save()  # so that this time counts, even if it is stopped before the next save

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                measures = {name: float(info[name]) for name in ("success", "spl") if name in info}
                self.recent = [*self.recent[1 - RECENT :], {"reward": float(info["episode"]["r"]), **measures}]
        self._bar.update(self.cell.envs)
        return True

    def _on_rollout_start(self) -> None:  # after the update from the rollout before
        if self._rollouts:
            self._tick()
            if self._rollouts % SAVE_EVERY == 0:
                self._save()

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        self._tick()
        if self.recent:
            means = {name: float(np.mean([row[name] for row in self.recent])) for name in self.recent[-1]}
            self.folder.append({"steps": self.num_timesteps, **means, "seconds": self.seconds})
            self._bar.set_postfix({name: f"{mean:.2f}" for name, mean in means.items()})

    def _on_training_end(self) -> None:
        self._tick()
        self._save()
        self._bar.close()

    def _save(self) -> None:
        done = {"seconds": self.seconds, "passes": self.passes, "recent": self.recent, "resumed": self.resumed}
        save_state(self.model, self.folder.resume("ppo"), done)  # type: ignore[arg-type]

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    @property
    def passes(self) -> int:
        """Pictures that the base has seen."""
        return self.passes_before + int(getattr(self.training_env, "passes", 0))


def save_state(model: PPO, file: Path, done: Mapping[str, Any]) -> None:
    """What a stopped run goes on from, but for the episodes that were under way; `done` is what the run counts itself."""
    state = {
        "policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict(), "steps": model.num_timesteps,
        "rng": torch.get_rng_state(), **done,
    }  # fmt: skip
    with atomic_write(file) as temporary:
        torch.save(state, temporary)


def load_state(model: PPO, file: Path) -> dict[str, Any]:
    """Bring a learner to where `save_state` saw it; zeros where there is nothing."""
    if not file.exists():
        return {"steps": 0, "seconds": 0.0, "passes": 0, "resumed": 0}
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    except Exception as error:  # torch raises what a damaged file makes it
        raise SideTuningError(f"{file} cannot be read ({error}); delete it to begin this run again") from error
    model.num_timesteps = state["steps"]
    if model.env is not None:  # other episodes than those that the run began with
        model.env.seed((int(model.seed or 0) + model.num_timesteps) % TEST_SEED)
    return state


SHARED = ("pi_features_extractor.", "vf_features_extractor.")  # other names of one extractor


def save_policy(policy: Any, file: Path) -> None:
    """The policy's tensors, each once; the base is not among them."""
    tensors = {k: v.contiguous() for k, v in policy.state_dict().items() if not k.startswith(SHARED)}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary)


def load_policy(folder: str | Path) -> tuple[Cell, Any]:
    """The settings and the policy of a finished run.

    Raises:
        SideTuningError: the folder holds none, or a damaged one.
    """
    file = Path(folder) / "policy.safetensors"
    try:
        cell = Cell(**json.loads((Path(folder) / "run.json").read_text())["settings"], out=str(folder))
        tensors = load_file(file)
    except Exception as error:
        raise SideTuningError(f"{folder} holds no policy of a finished run of rl ({error})") from error
    small = replace(cell, envs=1, rollout=cell.batch)  # nothing is learned
    env = training_env(small)
    try:
        policy: Any = build(small, env).policy
    finally:
        env.close()
    own = {
        k: tensors.get("features_extractor." + k.split(".", 1)[1] if k.startswith(SHARED) else k)
        for k in policy.state_dict()
    }
    wrong = mismatch(policy.state_dict(), {k: v for k, v in own.items() if v is not None})
    if wrong:
        raise SideTuningError(
            f"{file} is of another version of the library or damaged ({wrong}); delete its folder, and run the command again that learned it"
        )
    policy.load_state_dict(own)
    return cell, policy


def probabilities(policy: Any, observations: dict[str, Any]) -> Tensor:
    """Those that a policy gives to the actions: (n, actions), on the CPU."""
    policy.set_training_mode(False)
    with torch.no_grad():
        given: Tensor = policy.get_distribution(policy.obs_to_tensor(observations)[0]).distribution.probs
    return given.float().cpu()


def same_answers(policy: Any, loaded: Any, folder: Path) -> None:
    """Two policies answer alike to some observations.

    Raises:
        SideTuningError: they do not.
    """
    space = copy.deepcopy(policy.observation_space)
    space.seed(0)
    samples = [space.sample() for _ in range(8)]
    observations = {name: np.stack([s[name] for s in samples]) for name in samples[0]}
    off = float((probabilities(policy, observations) - probabilities(loaded, observations)).abs().max())
    if not off < 1e-5:  # rounding, where a GPU chooses another algorithm
        raise SideTuningError(
            f"the policy in {folder} does not answer as the one that was learned (probabilities differ by {off:.2g}); "
            "was it written to by another run? Delete policy.safetensors there, and run the same command again"
        )


def policy_of(policy: Any) -> Policy:
    """What a learned policy would do."""
    return lambda observation: probabilities(policy, observation)[0]
