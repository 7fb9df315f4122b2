"""Policies for stable-baselines3: the base stays as it is, codes are computed once, and other bases are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("stable_baselines3")

from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecTransposeImage

import sidetuning as st
from agent_parts import (
    PICTURE,
    Sides,
    answers,
    check_learning_and_saving,
    learner,
    other_base,
    probabilities,
    small_base,
)
from conftest import side_of
from sidetuning.errors import ArtifactError, DataError, ShapeError
from sidetuning.integrations.sb3 import CODE, SideTunedExtractor, VecBaseFeatures

PARTS: dict[str, Any] = {"base": small_base, "side": "fcn4", "hidden": 32}


def codes(base: st.Base) -> Any:
    """The space of the codes of a base in an observation."""
    space: Any = VecBaseFeatures(DummyVecEnv([Sides]), base).observation_space
    return space.spaces[CODE]


@pytest.mark.parametrize("method", ["sidetune", "features"])
def test_the_base_stays_as_it_is_and_out_of_the_zip(method: str, tmp_path: Path) -> None:
    check_learning_and_saving(learner(method), tmp_path)


def test_a_policy_of_another_base_is_refused(tmp_path: Path) -> None:
    model = learner()
    model.save(tmp_path / "agent.zip")
    other = {"features_extractor_kwargs": {**PARTS, "base": other_base}}
    kwargs = {"features_extractor_class": SideTunedExtractor, "net_arch": [], **other}
    with pytest.raises(ArtifactError, match="another base"):
        PPO.load(tmp_path / "agent.zip", policy_kwargs=kwargs, custom_objects={"policy_kwargs": kwargs})


def test_a_base_that_prepares_its_pictures_otherwise_is_another() -> None:
    """Equal weights are not enough; version 0.1.0 knew no more than their sha256, and what it saved still loads."""
    space = spaces.Dict({"rgb": PICTURE})
    other = st.Base(small_base().net, example=torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    extractor, state = SideTunedExtractor(space, **PARTS), SideTunedExtractor(space, **PARTS).state_dict()
    with pytest.raises(ArtifactError, match="another base"):
        SideTunedExtractor(space, **{**PARTS, "base": lambda: other}).load_state_dict(state)
    identity = small_base().identity()
    old = torch.tensor(list(bytes.fromhex(identity.sha256)), dtype=torch.uint8)
    extractor.load_state_dict({**state, "base_fingerprint": old})
    assert bytes(extractor.get_buffer("base_fingerprint").tolist()).hex() == identity.digest()
    new, saved = (codes(small_base()) for _ in range(2))
    saved.fingerprint = identity.sha256
    del saved.known
    assert saved == new == saved and saved != codes(other_base())
    assert new != codes(other)


def pooled_base(largest: bool) -> st.Base:
    """Equal weights, and a pooling that no weight tells."""
    with st.seeded(3):
        pool = nn.MaxPool2d(4) if largest else nn.AvgPool2d(4)
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), pool)
    return st.Base(net, example=torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_equal_weights_that_compute_other_codes_are_another_base(tmp_path: Path) -> None:
    one, other = pooled_base(True), pooled_base(False)
    assert one.identity().digest() == other.identity().digest()
    assert codes(one) != codes(other) and codes(one) == codes(pooled_base(True))
    space: Any = VecTransposeImage(VecBaseFeatures(DummyVecEnv([Sides]), other)).observation_space
    parts: dict[str, Any] = {**PARTS, "side": "mlp"}
    with pytest.raises(ArtifactError, match="same base"):
        SideTunedExtractor(space, **{**parts, "base": lambda: pooled_base(True)})
    plain = spaces.Dict({"rgb": PICTURE})
    trained = SideTunedExtractor(plain, **{**parts, "base": lambda: pooled_base(True)})
    same, strange = (SideTunedExtractor(plain, **{**parts, "base": lambda i=i: pooled_base(i)}) for i in (True, False))
    same.load_state_dict(trained.state_dict())
    with pytest.raises(ArtifactError, match="another base"):
        strange.load_state_dict(trained.state_dict())
    damaged = {**trained.state_dict(), "base_identity": torch.arange(9, dtype=torch.uint8)}
    with pytest.raises(ArtifactError, match="policy is damaged"):
        same.load_state_dict(damaged)
    older = {key: value for key, value in trained.state_dict().items() if key != "base_identity"}
    same.load_state_dict(older)


def test_codes_of_another_base_are_refused(tmp_path: Path) -> None:
    def env(base: st.Base) -> VecBaseFeatures:
        return VecBaseFeatures(DummyVecEnv([Sides]), base)

    def space(base: st.Base) -> Any:
        # As the policy gets it.
        return VecTransposeImage(env(base)).observation_space

    model = learner(cached=True)
    model.save(tmp_path / "agent.zip")
    assert torch.equal(answers(PPO.load(tmp_path / "agent.zip", env=env(small_base()))), answers(model))
    with pytest.raises(ValueError, match=f"base {other_base().identity().digest()[:8]}"):
        PPO.load(tmp_path / "agent.zip", env=env(other_base()))
    with pytest.raises(ArtifactError, match="same base"):
        SideTunedExtractor(space(other_base()), **PARTS)
    # A base for larger pictures is the same base.
    larger = env(small_base().with_example(torch.zeros(1, 3, 32, 32)))
    assert larger.observation_space == env(small_base()).observation_space
    with pytest.raises(ShapeError, match="wrap these environments once"):
        VecBaseFeatures(larger, small_base())
    with pytest.raises(TypeError, match="DummyVecEnv"):
        VecBaseFeatures(Sides(), small_base())  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="does not take such pictures"):
        VecBaseFeatures(VecFrameStack(DummyVecEnv([Sides]), 4), small_base())
    with pytest.raises(ShapeError, match="leave that out"):
        SideTunedExtractor(space(small_base()), base=lambda: small_base().with_taps(["0"]), side="ladder")


def test_what_learned_from_cached_codes_acts_without_them() -> None:
    model = learner(cached=True)
    model.learn(128)
    seen = Sides().reset(seed=1)[0]
    code = small_base().folded()(torch.from_numpy(seen["rgb"]).permute(2, 0, 1)[None]).out[0].numpy()
    found = [probabilities(model, observation) for observation in (seen, {**seen, CODE: code})]
    assert torch.equal(*found) and not torch.allclose(found[0], torch.tensor(0.5), atol=1e-3)


def inputs_of(extractor: SideTunedExtractor) -> int:
    """Numbers that the first layer for given numbers reads."""
    assert extractor.given is not None and isinstance(extractor.given[0], nn.Linear)
    return extractor.given[0].in_features


def test_other_numbers_reach_the_policy_and_entries_that_are_no_numbers_raise() -> None:
    space = spaces.Dict({"rgb": PICTURE, "speed": spaces.Box(-1, 1, (2,)), "level": spaces.Discrete(3)})
    extractor = SideTunedExtractor(space, **PARTS)
    # As stable-baselines3 makes them.
    seen = {"rgb": torch.rand(2, 3, 16, 16), "speed": torch.rand(2, 2), "level": torch.eye(3)[:2]}
    out = extractor(seen)
    assert out.shape == (2, extractor.features_dim) == (2, 64) and inputs_of(extractor) == 5
    for name in ("speed", "level"):
        other = extractor({**seen, name: seen[name].flip(0)})
        assert torch.equal(other[:, :32], out[:, :32]) and not torch.allclose(other[:, 32:], out[:, 32:])
    with pytest.raises(ShapeError, match="depth"):
        SideTunedExtractor(spaces.Dict({"rgb": PICTURE, "depth": spaces.Box(0, 1, (16, 16, 1))}), **PARTS)
    with pytest.raises(ShapeError, match="uint8"):
        SideTunedExtractor(spaces.Dict({"rgb": spaces.Box(0, 1, (3, 16, 16))}), **PARTS)
    with pytest.raises(ShapeError, match="pictures under 'rgb'"):
        SideTunedExtractor(spaces.Dict({"depth": PICTURE}), **PARTS)
    with pytest.raises(st.UnknownNameError, match="did you mean 'sidetune'"):
        SideTunedExtractor(space, **PARTS, method="side-tune")
    with pytest.raises(TypeError, match="function that builds"):
        SideTunedExtractor(space, **{**PARTS, "base": small_base()})
    with pytest.raises(DataError, match="normalize_images"):
        extractor({**seen, "rgb": 255 * seen["rgb"]})


@pytest.mark.slow
def test_any_base_and_any_side_make_an_extractor() -> None:
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 32, 32), np.uint8)})
    x = {"rgb": torch.rand(2, 3, 32, 32)}
    choices: list[dict[str, Any]] = [
        {},
        {"side": "fcn4", "init": "distilled"},
        {"merge": "sum"},
        {"method": "features"},
    ]
    for base in ("resnet44-cifar10", lambda: st.load_base("resnet44-cifar10", taps=["layer1"])):
        for options in choices:
            extractor = SideTunedExtractor(space, base, **options)
            assert extractor(x).shape == (2, 128) == (2, extractor.features_dim)


def test_a_side_of_ones_own_is_each_policys_own() -> None:
    space = spaces.Dict({"rgb": PICTURE})
    side = nn.Conv2d(3, 8, 4, 4)
    made = [SideTunedExtractor(space, base=small_base, side=side) for _ in range(2)]
    copies = [side_of(extractor.branch) for extractor in made if extractor.branch is not None]
    assert copies[0] is not copies[1] and side not in copies
    assert torch.equal(copies[0].get_parameter("weight"), side.weight)


def test_a_distilled_side_survives_the_policys_initialisation() -> None:
    from sidetuning.sides import SIDES
    from sidetuning.sides.initialise import distilled_weights, load_weights

    def clear(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)

    space = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 32, 32), np.uint8)})
    extractor = SideTunedExtractor(space, "resnet44-cifar10", side="fcn4", init="distilled")
    extractor.apply(clear)
    assert extractor.branch is not None
    wanted = SIDES.build("fcn4", extractor.base, options={})
    load_weights(wanted, distilled_weights(extractor.base, "fcn4", {}), "fcn4")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(side_of(extractor.branch).state_dict()[name], tensor)


def test_cached_features_are_those_of_the_base_and_cost_a_pass_per_step() -> None:
    live, cached = learner(), learner(cached=True)
    seen: list[int] = []
    extractor: Any = live.policy.features_extractor
    extractor.encoder.net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    assert torch.allclose(answers(live), answers(cached), atol=1e-5)
    for model in (live, cached):
        with st.seeded(0):
            # One rollout of 64 steps in two environments.
            model.learn(128)
    # The same learning, but for rounding.
    assert torch.allclose(answers(live), answers(cached), atol=1e-3)
    env: Any = cached.get_env()
    while not isinstance(env, VecBaseFeatures):
        env = env.venv
    # Besides the steps: the first observations, and the last ones of the episodes that were cut off after ten steps.
    assert env.passes == 128 + 2 + 2 * 6
    # Once when acting, four times when learning.
    assert sum(seen) >= 128 * 5


def test_the_last_observation_of_an_episode_has_features_too() -> None:
    env = VecBaseFeatures(DummyVecEnv([Sides] * 3), small_base())
    env.seed(1)
    first: Any = env.reset()
    assert env.passes == 3 and first[CODE].shape == (3, 8, 4, 4)
    for _ in range(10):
        step: Any = env.step(np.zeros(3, int))
    seen, _, dones, infos = step
    assert dones.all()
    for k, info in enumerate(infos):
        last = info["terminal_observation"]
        picture = torch.from_numpy(last["rgb"]).permute(2, 0, 1)[None]
        assert np.allclose(last[CODE], small_base()(picture).out[0], atol=1e-5)
        # `seen` belongs to the next episode.
        assert not np.allclose(last[CODE], seen[CODE][k])
    assert env.passes == 3 + 30 + 3


@pytest.mark.slow
def test_ppo_learns_with_a_side() -> None:
    """A learning test: far above chance, where ten answers of a random agent are right five times."""
    model = learner("sidetune", cached=True, envs=4, learning_rate=3e-3, rollout=32)
    model.learn(4000)
    rewards = [episode["r"] for episode in model.ep_info_buffer or ()]
    # By chance 5.0 ± 0.16.
    assert len(rewards) == 100 and np.mean(rewards) > 8.5
