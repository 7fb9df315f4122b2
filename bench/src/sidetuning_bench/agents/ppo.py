"""PPO of stable-baselines3 in the environments of `worlds`, with the encoders of `extractor`: one run of rl."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.wrappers import TransformReward
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save_file
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecTransposeImage
from torch import Tensor

from sidetuning.beside import hash_of
from sidetuning.errors import SideTuningError
from sidetuning.files import atomic_write, held_folder, read_safetensors, safetensors_header
from sidetuning.integrations.sb3 import VecBaseFeatures
from sidetuning_bench.agents.curves import FREE, RECENT, Result, Settings, method_of
from sidetuning_bench.agents.extractor import AgentExtractor
from sidetuning_bench.agents.outcomes import scores
from sidetuning_bench.agents.worlds import TEST_SEED, Player, make_world, map_base, side_options
from sidetuning_bench.options import flat, with_values
from sidetuning_bench.report_runs import content_of
from sidetuning_bench.runs import Run, write_result

# Distance between the seeds of two runs: the environments of one have successive seeds.
SEEDS = 1000
# Other names of the tensors of the one extractor.
SHARED = ("pi_features_extractor.", "vf_features_extractor.")
# Rollouts between two saves.
SAVE_EVERY = 2


def run(settings: Settings) -> Result:
    """Learn and test; an interrupted run resumes from its last save. What is tested is the policy as it was loaded.

    Raises:
        SideTuningError: another run is there, or another process, a damaged save, or a saved policy that is not the
            learner's.
    """
    with held_folder(settings.out):
        return learn_and_test(settings)


def learn_and_test(settings: Settings) -> Result:
    """As `run`, in a folder that is held."""
    options = settings.ppo
    use_threads(options.threads)
    folder = Run(settings.out, "rl-run", settings, free=FREE)
    env = training_env(settings)
    try:
        model = build(settings, env)
        saved = load_state(model, folder.resume("ppo"))
        # Rows after the last save belong to steps that are taken again, in other episodes.
        folder.keep(lambda row: row["steps"] <= saved["steps"])
        curve = Curve(folder, saved)
        if model.num_timesteps < options.steps:
            model.learn(options.steps - model.num_timesteps, callback=curve, reset_num_timesteps=False)
        rate = model.num_timesteps / curve.seconds
        passes = int(saved["passes"]) + env.passes if isinstance(env, VecBaseFeatures) else None
    finally:
        env.close()
    save_policy(model.policy, folder.folder / "policy.safetensors")
    policy = load_policy(folder.folder)[1]
    branch = policy.features_extractor.branch
    check_same(model.policy, policy, folder.folder)
    result = Result(
        method=settings.method,
        seed=settings.seed,
        env=options.agent.env,
        curve=folder.metrics(),
        added=sum(p.numel() for p in policy.parameters() if p.requires_grad),
        alpha=branch and branch.alpha,
        base_passes=passes,
        steps_per_second=rate,
        resumed=curve.resumed,
        settings={name: value for name, value in flat(settings).items() if name not in FREE},
        **scores(player(settings, policy).outcomes(options.agent.test_episodes)),
    )
    write_result(folder.folder / "result.json", result)
    folder.done("ppo")
    return result


def use_threads(threads: int | None) -> None:
    """Set the number of torch's threads from here on; None is one thread, unless OMP_NUM_THREADS says otherwise."""
    if threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or 1)


def training_env(settings: Settings) -> VecEnv:
    """Environments side by side, with the base's features where the method uses them."""
    options = settings.ppo

    def make() -> Any:
        # The monitor sees the true rewards.
        monitored = Monitor(make_world(options.agent.env, "train", options.size))
        return TransformReward(monitored, lambda reward: options.reward_scale * float(reward))

    env: VecEnv = DummyVecEnv([make] * options.envs)
    if options.cached and settings.method in ("sidetune", "features"):
        base = map_base(options.agent.base, options.agent.base_weights, options.size)
        env = VecBaseFeatures(env, base.to(get_device("auto")))
    return env


def try_extractors(runs: Iterable[Settings], world: Any) -> None:
    """Build the extractors of some runs for an environment: mistakes are found before anything is written."""
    seen: Any = VecTransposeImage(DummyVecEnv([lambda: world])).observation_space
    for settings in runs:
        AgentExtractor(seen, **extractor_options(settings))


def extractor_options(settings: Settings) -> dict[str, Any]:
    """Arguments of a run's extractor."""
    options, agent = settings.ppo, settings.ppo.agent
    parts = {name: getattr(options.sides, name) for name in ("side", "merge", "init")}
    base = partial(map_base, agent.base, agent.base_weights, options.size)
    about = {"base": base, "method": settings.method, "precision": options.precision}
    return {**parts, **about, "side_options": side_options(options.sides)}


def build(settings: Settings, env: VecEnv) -> PPO:
    """The learner."""
    options = settings.ppo
    parts = {"features_extractor_class": AgentExtractor, "features_extractor_kwargs": extractor_options(settings)}
    steps: dict[str, Any] = {"n_steps": options.rollout, "batch_size": options.batch, "n_epochs": options.passes}
    rates: dict[str, Any] = {"learning_rate": options.lr, "ent_coef": options.entropy, "seed": SEEDS * settings.seed}
    return PPO("MultiInputPolicy", env, policy_kwargs={**parts, "net_arch": [64]}, **steps, **rates)


class Curve(BaseCallback):
    """Writes a row after every rollout, and saves what an interrupted run resumes from.

    Args:
        folder: folder of the run.
        saved: what `load_state` returned.
    """

    def __init__(self, folder: Run, saved: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder, self.passes_before, self.resumed = folder, int(saved["passes"]), int(saved["resumed"])
        self.recent: list[dict[str, float]] = saved.get("recent", [])
        self._started, self._rollouts = time.perf_counter() - float(saved["seconds"]), 0

    @property
    def seconds(self) -> float:
        """Training time so far, that before an interruption included."""
        return time.perf_counter() - self._started

    def _on_training_start(self) -> None:
        if self.num_timesteps:
            self.resumed += 1
            # It then counts even if it is interrupted before the next save.
            self._save()

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                measures = {name: float(info[name]) for name in ("success", "spl") if name in info}
                self.recent = [*self.recent[1 - RECENT :], {"reward": float(info["episode"]["r"]), **measures}]
        return True

    def _on_rollout_start(self) -> None:
        # The update from the rollout before has ended.
        if self._rollouts and self._rollouts % SAVE_EVERY == 0:
            self._save()

    def _on_rollout_end(self) -> None:
        self._rollouts += 1
        if self.recent:
            means = {name: float(np.mean([row[name] for row in self.recent])) for name in self.recent[-1]}
            self.folder.append({"steps": self.num_timesteps, **means, "seconds": self.seconds})

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        passes = self.training_env.passes if isinstance(self.training_env, VecBaseFeatures) else 0
        counts = {"seconds": self.seconds, "passes": self.passes_before + passes, "resumed": self.resumed}
        save_state(self.model, self.folder.resume("ppo"), {**counts, "recent": self.recent})


def save_state(model: Any, file: Path, counts: Mapping[str, Any]) -> None:
    """Write what an interrupted run resumes from, its own counts included; unfinished episodes are not part of it."""
    policy = model.policy
    networks = {"policy": policy.state_dict(), "optimizer": policy.optimizer.state_dict()}
    with atomic_write(file) as temporary:
        torch.save({**networks, "steps": model.num_timesteps, "rng": torch.get_rng_state(), **counts}, temporary)


def load_state(model: PPO, file: Path) -> dict[str, Any]:
    """Bring a learner to where `save_state` saw it; returns the counts, which are zeros where there is no file."""
    if not file.exists():
        return {"steps": 0, "seconds": 0.0, "passes": 0, "resumed": 0}
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        model.policy.load_state_dict(state["policy"])
        model.policy.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    # A damaged file makes torch raise all kinds of errors.
    except Exception as error:
        raise SideTuningError(f"{file} cannot be read ({error}); delete it to begin this run again") from error
    model.num_timesteps = state["steps"]
    if model.env is not None:
        # Other episodes than those that the run began with.
        model.env.seed((int(model.seed or 0) + model.num_timesteps) % TEST_SEED)
    return state


def save_policy(policy: Any, file: Path) -> None:
    """Write the policy's tensors, each once, without the base."""
    tensors = {name: t.contiguous() for name, t in policy.state_dict().items() if not name.startswith(SHARED)}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata={"sha256": hash_of(tensors)})


def load_policy(folder: str | Path) -> tuple[Settings, Any]:
    """The settings and the policy of a finished run.

    Raises:
        SideTuningError: the folder holds none, or a damaged one.
    """
    folder, file = Path(folder), Path(folder) / "policy.safetensors"

    def settings_of(saved: dict[str, Any]) -> Settings:
        return with_values(Settings(out=str(folder)), {**saved, "method": method_of(saved["method"], saved)})

    settings = content_of(folder, ("rl-run",), settings_of)["settings"]
    if not file.exists():
        raise SideTuningError(f"{folder} holds no policy; its command resumes the run")
    # Nothing is learned here.
    small = replace(settings, ppo=replace(settings.ppo, envs=1, rollout=settings.ppo.batch))
    env = training_env(small)
    try:
        policy: Any = build(small, env).policy
        data = read_safetensors(file)
        tensors, recorded = parse(data), safetensors_header(data).get("sha256")
        # Version 0.1.0 wrote none.
        if recorded is not None and recorded != hash_of(tensors):
            raise RuntimeError("its sha256 is not the one recorded")
        missing, unexpected = policy.load_state_dict(tensors, strict=False)
        if wrong := [*unexpected, *(name for name in missing if not name.startswith(SHARED))]:
            raise RuntimeError(f"{wrong[0]} is missing or not known")
    except (RuntimeError, SafetensorError, OSError) as error:
        raise SideTuningError(
            f"{file} is of another version of the library or damaged ({error}); delete its folder, and run the command "
            "again that learned it"
        ) from error
    finally:
        env.close()
    return settings, policy


def probabilities(policy: Any, observations: dict[str, Any]) -> Tensor:
    """Probabilities that a policy gives to the actions, (n, actions) on the CPU."""
    policy.set_training_mode(False)
    with torch.no_grad():
        given: Tensor = policy.get_distribution(policy.obs_to_tensor(observations)[0]).distribution.probs
    return given.float().cpu()


def check_same(policy: Any, loaded: Any, folder: Path) -> None:
    """Compare a policy with what was saved of it.

    Raises:
        SideTuningError: they differ.
    """
    found = loaded.state_dict()
    if not all(torch.equal(tensor.cpu(), found[name].cpu()) for name, tensor in policy.state_dict().items()):
        raise SideTuningError(
            f"the policy in {folder} is not the one that was learned: another run may have written there; delete "
            "policy.safetensors, and run the same command again"
        )


def player(settings: Settings, policy: Any) -> Player:
    """A learned policy in its test environment."""
    agent = settings.ppo.agent

    def act(observation: dict[str, Any]) -> Tensor:
        return probabilities(policy, observation)[0]

    return Player(settings.method, agent.env, agent.test_split, settings.ppo.size, act, settings.seed)
