"""Agents: policies for stable-baselines3 and their traps, behaviour cloning, and Habitat through a stand-in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sidetuning as st

pytest.importorskip("stable_baselines3")

from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecTransposeImage

from sidetuning.errors import ArtifactError, DataError, ShapeError, SideTuningError
from sidetuning.integrations.sb3 import CODE, SideTunedExtractor, VecBaseFeatures
from sidetuning_bench.agents.trajectories import COMPASS, compass_numbers, extra_of

FAKE = Path(__file__).parent / "fake_habitat"


class Sides(gym.Env):
    """A bright half of a noisy picture, left or right: the action says which; ten answers are an episode."""

    def __init__(self, compass: bool = False) -> None:
        space: dict[str, spaces.Space] = {"rgb": spaces.Box(0, 255, (16, 16, 3), np.uint8)}
        if compass:
            space[COMPASS] = spaces.Box(np.array([0, -4], np.float32), np.array([9, 4], np.float32))
        self.observation_space, self.action_space = spaces.Dict(space), spaces.Discrete(2)

    def look(self):
        self.right = int(self.np_random.integers(2))
        image = self.np_random.integers(0, 120, (16, 16, 3)).astype(np.uint8)
        image[:, 8:] += np.uint8(100 * self.right)
        image[:, :8] += np.uint8(100 * (1 - self.right))
        seen = {"rgb": image}
        if COMPASS in self.observation_space.spaces:
            seen[COMPASS] = np.array([1.0, 0.5], np.float32)
        return seen

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.look(), {}

    def step(self, action):
        reward = float(action == self.right)
        self.steps += 1
        return self.look(), reward, False, self.steps == 10, {}


def small_base(seed: int = 7) -> st.Base:
    """Pictures (b, 3, 16, 16) -> (b, 8, 4, 4)."""
    with st.seeded(seed):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        net(torch.randn(8, 3, 16, 16))  # statistics that differ from those of a new batch norm
    return st.Base(net, example=torch.zeros(1, 3, 16, 16, dtype=torch.uint8), mean=[0.5] * 3, std=[0.25] * 3)


def other_base() -> st.Base:
    return small_base(8)


def learner(method="sidetune", cached=False, envs=2, **more):
    env = VecMonitor(DummyVecEnv([Sides] * envs))
    env.seed(0)
    if cached:
        env = VecBaseFeatures(env, small_base())
    extractor = {"base": small_base, "method": method, "side": "fcn4", "init": None, "hidden": 32}
    kwargs = {"features_extractor_class": SideTunedExtractor, "features_extractor_kwargs": extractor, "net_arch": []}
    settings = {"n_steps": 64, "batch_size": 64, "n_epochs": 4, "seed": 0, "device": "cpu", **more}
    return PPO("MultiInputPolicy", env, policy_kwargs=kwargs, **settings)


def answers(model, seed=5):
    x = {"rgb": np.random.default_rng(seed).integers(0, 255, (4, 3, 16, 16)).astype(np.uint8)}
    if CODE in model.observation_space.spaces:
        x[CODE] = small_base()(torch.from_numpy(x["rgb"])).out.numpy()
    model.policy.set_training_mode(False)
    with torch.no_grad():
        return model.policy.get_distribution(model.policy.obs_to_tensor(x)[0]).distribution.probs


@pytest.mark.parametrize("method", ["sidetune", "features", "finetune", "scratch"])
def test_the_base_stays_as_it_is_and_out_of_the_zip(method, tmp_path):
    model = learner(method)
    extractor = model.policy.features_extractor
    before = small_base().identity().sha256
    assert extractor.base.identity().sha256 == before  # orthogonal initialisation has passed it by
    first = answers(model)
    model.learn(256)
    assert extractor.base.identity().sha256 == before  # nor have the batch norms moved
    trained = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in extractor.base.net.parameters()}
    assert not torch.allclose(answers(model), first, atol=1e-4)

    file = tmp_path / "agent.zip"
    model.save(file)
    with zipfile.ZipFile(file) as archive:
        state = torch.load(archive.open("policy.pth"), weights_only=True)
    sizes = {tuple(p.shape) for p in small_base().net.parameters()}
    copies = [k for k, v in state.items() if tuple(v.shape) in sizes and "trunk" not in k and ".net." in k]
    assert not copies
    if method != "finetune":
        values = [v for v in state.values() if v.shape == (8, 3, 3, 3)]
        assert not any(torch.equal(v, small_base().net[0].weight) for v in values)
    again = PPO.load(file)
    assert torch.equal(answers(again), answers(model)) and not torch.allclose(answers(again), first, atol=1e-4)


def test_a_distilled_side_and_a_copy_survive_the_policys_initialisation():
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 64, 64), np.uint8)})
    with st.seeded(0):
        extractor = SideTunedExtractor(space, side_options={"width": 0.25, "signed": True})
    side = {k: v.clone() for k, v in extractor.branch.side.state_dict().items()}
    extractor.apply(lambda m: nn.init.zeros_(m.weight) if isinstance(m, nn.Conv2d) else None)
    from sidetuning.branch import distilled_weights
    from sidetuning.sides import SIDES

    wanted = SIDES.build("fcn5", extractor.base, options={"width": 0.25, "signed": True})
    from sidetuning.sides.initialise import load_weights

    load_weights(wanted, distilled_weights(extractor.base, "fcn5", {"width": 0.25, "signed": True}), "fcn5")
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(side[name], tensor) and torch.equal(extractor.branch.side.state_dict()[name], tensor)
    tuned = SideTunedExtractor(space, method="finetune").train()
    x = {"rgb": torch.rand(2, 3, 64, 64)}
    assert not [n for n, _ in tuned.trunk.named_buffers() if "running" in n]  # merged into the convolutions
    assert all(p.requires_grad for p in tuned.trunk.parameters())
    one, two = tuned(x), tuned.eval()(x)
    assert torch.equal(one, two)  # in training as in use, so PPO's ratios start at 1
    code = tuned.trunk(tuned.base.prepare(x["rgb"]))
    assert torch.allclose(code, tuned.base(x["rgb"]).out, atol=1e-3)


def test_a_curve_goes_on_from_what_was_saved(tmp_path):
    """Rows that were written after the last save belong to steps that are taken again."""
    from sidetuning_bench.agents.rl import Learning
    from sidetuning_bench.runs import Run

    folder = Run(tmp_path, "rl-run", Learning())
    for steps in (32, 64, 96):
        folder.append({"steps": steps, "reward": float(steps)})
    folder.keep(lambda row: row["steps"] <= 64)
    folder.append({"steps": 96, "reward": 0.0})
    assert [row["reward"] for row in folder.metrics()] == [32.0, 64.0, 0.0]


def test_a_timm_model_is_a_base_of_agents(tmp_path):
    timm = pytest.importorskip("timm")

    from sidetuning_bench.agents.worlds import map_base

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    save_file(dict(net.state_dict()) | {"classifier.bias": torch.zeros(9)}, tmp_path / "lite0.safetensors")
    base = map_base("timm:tf_efficientnet_lite0", str(tmp_path / "lite0.safetensors"), 64)
    assert base.kind == "map" and base.output_shape == (1280, 2, 2)
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    with pytest.raises(ArtifactError, match=r"torch\.load"):
        map_base("timm:tf_efficientnet_lite0", str(tmp_path / "lite0.pth"), 64)
    with pytest.raises(SideTuningError, match="agents need a map"):
        map_base("resnet44-cifar10", None, 32)


@pytest.mark.parametrize("method", ["finetune", "scratch"])
def test_what_is_tuned_may_run_in_bfloat16(method):
    """When acting and when learning alike, or PPO's ratios would not start at 1."""
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 16, 16), np.uint8)})
    x = {"rgb": torch.rand(4, 3, 16, 16)}
    made = {}
    for precision in ("no", "bf16"):
        with st.seeded(0):
            made[precision] = SideTunedExtractor(
                space, small_base, method, side="fcn4", init=None, hidden=32, precision=precision
            )
    kinds = []
    made["bf16"].trunk.register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with torch.no_grad():
        exact, acting = made["no"].eval()(x), made["bf16"].eval()(x)
    learning = made["bf16"].train()(x)
    assert kinds == [torch.bfloat16] * 2 and acting.dtype == learning.dtype == torch.float32
    assert torch.equal(acting, learning)
    assert not torch.equal(acting, exact) and torch.allclose(acting, exact, atol=0.1)
    learning.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made["bf16"].trunk.parameters())


def test_the_held_out_trajectories_are_those_of_all_numbers_of_trajectories():
    from sidetuning_bench.agents.imitation import split

    few, many = split(600, 5, 0), split(600, 550, 0)
    assert few[1] == many[1] and len(few[1]) == 50 and not {*many[0]} & {*many[1]} and many[0][:5] == few[0]
    assert split(600, 5, 1)[1] != few[1]
    assert len(split(40, 30, 0)[1]) == 4 and split(9, 9, 0)[1] == []


def test_charts_have_a_colour_for_every_row():
    from sidetuning_bench.agents.imitation import Result, charts, table
    from sidetuning_bench.agents.outcomes import Outcome, scores
    from sidetuning_bench.charts import COLOURS

    def rows(*methods):
        found = scores([Outcome(1.0, None, 2.0, 9)])  # and no SPL
        settings = {"env": "doom-pointnav"}
        return [Result(method=m, trajectories=0, seed=0, settings=settings, **found) for m in methods]

    three, baselines = ("sidetune", "features", "scratch"), ("expert", "compass", "random")
    (chart,) = charts(rows(*baselines, *three), [5])
    assert [line.name for line in chart.lines] == [*three, "expert", "compass"]
    five = rows(*baselines, *three, "finetune", "lora")
    assert [line.name for line in charts(five, [5])[0].lines] == [*three, "finetune", "lora", "expert"]
    assert len(charts(five, [5])[0].lines) == COLOURS and "| random | 100.0 [20.7, 100.0] |" in table(five, [5])


def test_a_mistake_writes_nothing_and_weights_are_found_from_everywhere(habitat, tmp_path, monkeypatch):
    from sidetuning_bench.agents import play, rl

    habitat.write_text("")
    settings = rl.Settings(
        env=f"habitat:{habitat}", size=32, out=str(tmp_path / "run"), threads=1, base="resnet-doom-curvature"
    )
    for wrong in (
        {"base": "resnet-doom"},
        {"merge": "alfa"},
        {"side": "fcn55"},
        {"init": "distiled"},
        {"base_weights": "none.safetensors"},
    ):
        with pytest.raises(SideTuningError):
            rl.run(replace(settings, **wrong))
        assert not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)
    found = {cell.base_weights for cell in rl.cells(replace(settings, base_weights="own.safetensors"))}
    assert found == {str(tmp_path / "own.safetensors")}
    (tmp_path / "file").write_text("")
    with pytest.raises(SideTuningError, match="cannot be written to"):
        play.film(None, 1, tmp_path / "file")


def test_torch_has_one_thread_unless_told_otherwise(monkeypatch):
    from sidetuning_bench.agents.rl import use_threads

    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    use_threads(None)
    assert given == []
    use_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_threads(None)
    assert given == [2, 1]


def test_going_on_counts_even_if_it_is_stopped_at_once(habitat, tmp_path):
    from sidetuning_bench.agents import ppo, rl
    from sidetuning_bench.runs import Run

    habitat.write_text("")
    cell = rl.Cell(
        method="features", seed=0, out=str(tmp_path / "run"), env=f"habitat:{habitat}", size=32, envs=1, rollout=16, batch=16,
        progress=False,
    )  # fmt: skip
    folder = Run(cell.out, "rl-run", cell, free=rl.FREE)
    env = ppo.training_env(cell)
    model = ppo.build(cell, env)
    file = folder.resume("ppo")
    for resumed in range(3):
        saved = ppo.load_state(model, file)
        assert saved["resumed"] == max(0, resumed - 1)
        curve = ppo.Curve(folder, cell, saved)
        curve.init_callback(model)
        curve.on_training_start({}, {})  # and no further, but for the first time
        if not resumed:
            model.num_timesteps = 16
            curve.on_training_end()
        assert torch.load(file, weights_only=True)["resumed"] == resumed == curve.resumed
    env.close()


def test_actors_run_a_folded_base_once_per_step(monkeypatch):
    from sidetuning_bench.agents.imitation import TASK, policy_of
    from sidetuning_bench.methods import METHODS, Task

    seen = {"rgb": np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)}
    image = {"x": torch.from_numpy(seen["rgb"]).permute(2, 0, 1)[None], "extra": torch.zeros(1, 0)}
    method = METHODS.build("features", small_base(), options={})
    method._add(Task(TASK, "policy", head_options={"actions": 4}), method.add)
    policy, passes = policy_of(method), []
    monkeypatch.setattr(method.base.net, "forward", lambda *_: pytest.fail("the base as it was ran"))
    encode = st.Base.encode
    monkeypatch.setattr(st.Base, "encode", lambda *given: passes.append(1) or encode(*given))
    found = policy(seen)
    assert len(passes) == 1
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.allclose(found, method(image, TASK)[0].softmax(0), atol=1e-5) and found.sum() == pytest.approx(1)


def test_from_scratch_the_base_is_not_run():
    model = learner("scratch")
    seen = []
    model.policy.features_extractor.base.net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    answers(model)
    side = learner("sidetune").policy.features_extractor.branch.side
    trunk = model.policy.features_extractor.trunk
    assert not seen and {n: p.shape for n, p in trunk.named_parameters()} == {
        n: p.shape for n, p in side.named_parameters()
    }


def test_an_agent_that_goes_on_meets_other_episodes(tmp_path):
    """And one without a goal has no success, which is not a success of 0."""
    from sidetuning_bench.agents.outcomes import Outcome, scores
    from sidetuning_bench.agents.ppo import load_state, save_state
    from sidetuning_bench.agents.rl import Result, charts, table

    model = learner()
    model.learn(64)
    save_state(model, tmp_path / "ppo.pt", {"seconds": 1.0, "passes": 5, "recent": [{"reward": 1.0}], "resumed": 0})
    again = learner()
    start = again.get_env().reset()["rgb"]
    fresh = learner()
    assert load_state(fresh, tmp_path / "ppo.pt")["recent"] == [{"reward": 1.0}]
    assert not np.array_equal(fresh.get_env().reset()["rgb"], start)
    curve = [{"steps": 64, "reward": 1.0, "seconds": 1.0}]
    result = Result(
        method="features", seed=0, env="doom-explore", curve=curve, added=10, alpha=None, base_passes=5, steps_per_second=100.0,
        **scores([Outcome(None, None, 1.0, 9), Outcome(None, None, 3.0, 9)]),
    )  # fmt: skip
    assert (
        "| SPL, % | – |\n| Reward | 2.0 [0.0, 4.0] |" in table([result])
        and "eased" not in table([result])
        and [c.title for c in charts([result])] == ["Reward of an episode"]
    )
    assert "doom-home is an eased my_way_home" in table([replace(result, env="doom-home")])
    assert not charts([replace(result, curve=[])])


def test_a_compass_goes_with_the_features():
    compass = torch.tensor([[3.0, np.pi / 2], [0.0, -np.pi]])
    assert torch.allclose(compass_numbers(compass), torch.tensor([[np.log(4), 0, 1], [0, -1, 0]]).float(), atol=1e-6)
    assert torch.equal(extra_of({COMPASS: compass.numpy()}, 2), compass_numbers(compass)) and extra_of({}, 2).shape == (
        2,
        0,
    )
    space = Sides(compass=True).observation_space
    extractor = SideTunedExtractor(
        spaces.Dict({"rgb": spaces.Box(0, 255, (3, 16, 16), np.uint8), COMPASS: space[COMPASS]}), base=small_base, side="fcn4",
        init=None, hidden=32,
    )  # fmt: skip
    out = extractor({"rgb": torch.rand(2, 3, 16, 16), COMPASS: compass})
    assert out.shape == (2, extractor.features_dim) == (2, 64)
    assert torch.equal(out[:, 32:], extractor.given(compass_numbers(compass)))
    with pytest.raises(st.UnknownNameError, match="did you mean 'sidetune'"):
        SideTunedExtractor(space, base=small_base, method="side-tune")
    with pytest.raises(ShapeError, match="pictures under 'rgb'"):
        SideTunedExtractor(spaces.Dict({"depth": space["rgb"]}), base=small_base)


def test_observations_pass_extra_numbers_to_heads_alone():
    base = small_base()
    model = st.SideTuner(base)
    model.add_task("go", side="fcn4", head="policy", head_options={"actions": 4, "extra": 3})
    x = torch.randint(0, 255, (5, 3, 16, 16), dtype=torch.uint8)
    extra = torch.randn(5, 3)
    with torch.no_grad():
        with_extra = model({"x": x, "extra": extra}, "go")
        assert with_extra.shape == (5, 4) and not torch.allclose(with_extra, model(x, "go"))
        assert torch.allclose(model({"x": x, "extra": torch.zeros(5, 3)}, "go"), model(x, "go"))
        mixed = model({"x": x, "extra": extra}, tasks=["go"] * 5)
        assert torch.allclose(torch.stack(mixed), with_extra, atol=1e-6)
        assert torch.allclose(model({"x": x, "extra": extra}, "go", features=base(x)), with_extra, atol=1e-6)
    with pytest.raises(ShapeError, match="3 extra numbers"):
        model({"x": x, "extra": torch.zeros(5, 2)}, "go")
    with pytest.raises(st.TaskError, match="at least two actions"):
        model.add_task("stay", side=None, merge="base-only", head="policy", head_options={"actions": 1})


def test_dropout_is_of_the_code_and_not_of_what_is_told():
    head = st.HEADS.build("policy", small_base(), options={"extra": 3, "dropout": 0.99}).train()
    code, extra = torch.randn(64, 8, 4, 4), torch.randn(64, 3)
    with torch.no_grad():
        assert (
            head.code(code) == head.code(code)
        ).float().mean() < 0.5  # almost all is dropped, each time another part
        assert torch.equal(head.given(extra), head.given(extra))
        assert torch.equal(head.eval()(code, extra), head(code, extra))


def test_pictures_that_are_learned_from_move_and_others_do_not():
    from sidetuning_bench.agents.imitation import Moves
    from sidetuning_bench.agents.trajectories import Steps

    rgb = torch.randint(1, 255, (40, 3, 16, 16), dtype=torch.uint8)
    steps = Steps(rgb, torch.zeros(40, 0), torch.arange(40), torch.tensor([0, 40]))
    still, known, actions = Moves(steps, None).__getitems__([3, 7])
    assert torch.equal(still.x, rgb[[3, 7]]) and known is None and actions.tolist() == [3, 7]
    moved = Moves(steps, None, 2).__getitems__(range(40))[0].x
    where = {(down, right) for x, y in zip(moved, rgb, strict=True) for down in range(-2, 3) for right in range(-2, 3)
             if torch.equal(x[:, 2:-2, 2:-2], y[:, 2 + down : 14 + down, 2 + right : 14 + right])}  # fmt: skip
    assert len(where) > 12 and not torch.equal(moved, Moves(steps, None, 2).__getitems__(range(40))[0].x)


# Habitat ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def habitat(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FAKE))
    yield tmp_path / "pointnav.yaml"
    for name in [n for n in sys.modules if n.partition(".")[0] == "habitat"]:
        del sys.modules[name]


def test_habitat_speaks_gymnasium(habitat):
    from gymnasium.utils.env_checker import check_env

    from sidetuning_bench.agents.worlds import TEST_SEED, episodes, make_world

    with pytest.raises(SideTuningError, match="cannot be opened"):
        make_world(f"habitat:{habitat}", "train", 32)
    habitat.write_text("")
    world = make_world(f"habitat:{habitat}", "val", 32)
    assert world.env.config == {"path": str(habitat), "overrides": ["habitat.dataset.split=val"]}
    check_env(world, skip_render_check=True)
    seen, _ = world.reset(seed=3)
    assert seen["rgb"].shape == (32, 32, 3) and seen[COMPASS].dtype == np.float32
    assert all(np.array_equal(a, b) for a, b in zip(seen.values(), world.reset(seed=3)[0].values()))
    angle = seen[COMPASS][1]
    turned, *_ = world.step(2)  # left, in our order, whatever Habitat's is
    assert (angle - turned[COMPASS][1]) % (2 * np.pi) == pytest.approx(np.radians(10), abs=1e-5)
    _, _, ended, cut, info = world.step(0)
    assert ended and not cut and info["is_success"] is False and info["distance_to_goal"] > 0
    other = make_world(f"habitat:{habitat}", "val", 32)
    goals = [
        [w.reset(seed=s)[0][COMPASS].tolist(), w.reset()[0][COMPASS].tolist()] for w in (world, other) for s in (7, 8)
    ]
    assert (
        goals[:2] == goals[2:] and len({tuple(g) for pair in goals for g in pair}) == 4
    )  # the seed says which episodes
    outcomes = list(episodes(world, lambda _: world.expert(), 20, TEST_SEED))
    assert np.mean([o.success for o in outcomes]) == 1 and min(o.spl for o in outcomes) > 0.7
    world.reset(seed=1)
    for _ in range(59):
        assert world.step(3)[2:4] == (False, False)
    assert world.step(3)[2:4] == (False, True)  # out of time is no end of its own
    world.close()
    assert world.env.closed


def test_habitat_lacking_what_is_needed_is_said(habitat):
    from sidetuning_bench.agents.habitat import HabitatWorld

    habitat.write_text("")
    import habitat.gym as fake  # the stand-in

    env = fake.make_gym_from_config({})
    del env.unwrapped.habitat_env.task.actions["stop"]
    with pytest.raises(SideTuningError, match="and not stop"):
        HabitatWorld(env, 32)
    env = fake.make_gym_from_config({})
    env.observation_space = spaces.Dict({COMPASS: env.observation_space[COMPASS]})
    with pytest.raises(SideTuningError, match="add rgb_sensor"):
        HabitatWorld(env, 32)


@pytest.mark.parametrize("method", ["sidetune", "features", "finetune", "scratch"])
def test_a_loaded_policy_answers_as_the_learner_did_and_a_fresh_one_does_not(habitat, tmp_path, method, monkeypatch):
    from sidetuning_bench.agents import ppo, rl
    from sidetuning_bench.runs import Run

    habitat.write_text("")
    settings = {"env": f"habitat:{habitat}", "size": 32, "envs": 2, "rollout": 16, "batch": 32, "steps": 64, "lr": 1e-2}
    cell = rl.Cell(
        method=method, seed=0, out=str(tmp_path / "run"), test_episodes=2, test_split="val", progress=False, **settings
    )
    env = ppo.training_env(cell)
    learner, fresh = ppo.build(cell, env), ppo.build(cell, env).policy
    learner.learn(64)
    Run(cell.out, "rl-run", cell, free=rl.FREE)
    ppo.save_policy(learner.policy, Path(cell.out) / "policy.safetensors")
    loaded = ppo.load_policy(cell.out)[1]
    observation = {k: np.stack([v] * 2) for k, v in learner.observation_space.sample().items()}
    wanted = ppo.probabilities(learner.policy, observation)
    assert wanted.shape == (2, 4) and torch.equal(ppo.probabilities(loaded, observation), wanted)
    assert not torch.allclose(ppo.probabilities(fresh, observation), wanted, atol=1e-3)
    ppo.same_answers(learner.policy, loaded, tmp_path)
    with pytest.raises(SideTuningError, match="does not answer as the one that was learned"):
        ppo.same_answers(learner.policy, fresh, tmp_path)
    if method == "features":  # it is the loaded one that is tested
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "load_policy", lambda _: (cell, fresh))
            with pytest.raises(SideTuningError, match="does not answer as the one that was learned"):
                ppo.one(cell)
    tensors = load_file(Path(cell.out) / "policy.safetensors")
    save_file({k: v for k, v in tensors.items() if ".given." not in k}, Path(cell.out) / "policy.safetensors")
    with pytest.raises(SideTuningError, match="another version of the library or damaged"):
        ppo.load_policy(cell.out)
    env.close()


def run(tmp_path, *arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKE), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sidetuning_bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)


def test_scenarios_run_unchanged_in_habitat(tmp_path):
    """collect-trajectories, imitation, rl and play, by the command line."""
    pytest.importorskip("minari")
    pytest.importorskip("av")
    (tmp_path / "nav.yaml").write_text("")
    world = ("--env", "habitat:nav.yaml")
    done = run(
        tmp_path, "collect-trajectories", *world, "--episodes", 12, "--out", "t-v0", "--size", 32, "--no-progress"
    )
    assert done.returncode == 0, done.stderr
    common = ("--no-progress", "--test-episodes", 3, "--seeds", 1)
    imitation = (
        "imitation", *world, "--data", "t-v0", "--out", "im", "--methods", "sidetune", "scratch", "--trajectories", 4, 11,
        "--steps", 30, "--cache", "cache", *common,
    )  # fmt: skip
    done = run(tmp_path, *imitation)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "im" / "table.md").read_text()
    assert "| expert | 100.0 [43.8, 100.0] | 100.0 [43.8, 100.0] |" in rows and rows.count("| sidetune |") == 3
    assert "| Success less that of sidetune, points | 4 trajectories | 11 trajectories |" in rows
    assert rows.count("| compass |") == rows.count("| random |") == 5 and "scratch trains a network of the base" in rows
    page = (tmp_path / "im" / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4 and "media-src data:" in page and "Success" in page
    result = json.loads((tmp_path / "im" / "sidetune-4-0" / "result.json").read_text())
    assert len(result["episodes"]) == 3 and result["frames"] > 20 and result["accuracy"] is not None
    assert result["success"] == np.mean([success for success, _spl, _reward, _steps in result["episodes"]])
    collected = {k: result["data"][k] for k in ("episodes", "stray", "seed", "env")}
    assert collected == {"episodes": 12, "stray": 0.15, "seed": 0, "env": "habitat:nav.yaml"}
    assert result["data"]["fingerprint"] == json.loads((tmp_path / "im/run.json").read_text())["fingerprints"]["data"]
    scratch = json.loads((tmp_path / "im" / "scratch-4-0" / "result.json").read_text())
    base = st.load_base("resnet-doom-curvature").parameter_count()
    assert scratch["added"] > base > result["added"] > 0  # what is trained, the network itself included
    before = (tmp_path / "im" / "sidetune-4-0" / "result.json").stat().st_mtime_ns
    assert run(tmp_path, *imitation).returncode == 0  # all is there already
    assert (tmp_path / "im" / "sidetune-4-0" / "result.json").stat().st_mtime_ns == before

    rl = (
        "rl",
        *world,
        "--out",
        "rl",
        "--methods",
        "sidetune",
        "finetune",
        "--steps",
        256,
        "--envs",
        2,
        "--rollout",
        32,
    )
    done = run(tmp_path, *rl, "--batch", 32, "--size", 32, *common)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "rl" / "sidetune-0" / "result.json").read_text())
    assert [row["steps"] for row in result["curve"]] and result["curve"][-1]["steps"] == 256
    assert 256 <= result["base_passes"] < 2 * 256 and result["alpha"] is not None
    assert (tmp_path / "rl" / "report.html").read_text().count("<video") == 4
    done = run(tmp_path, "play", "rl/finetune-0", "--episodes", 1)
    assert done.returncode == 0 and (tmp_path / "rl/finetune-0/play/episode-0.mp4").stat().st_size > 500, done.stderr
    tested = json.loads((tmp_path / "rl" / "finetune-0" / "result.json").read_text())
    assert (
        tested["resumed"] == 0
        and f"{tested['episodes'][0][3]} steps, reward {tested['episodes'][0][2]:.1f}" in done.stdout
    )
    for wrong, message in ((("play", "rl"), "such as rl/sidetune-0"), (("play", "none"), "holds no run")):
        done = run(tmp_path, *wrong)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    mistakes_are_said_before_anything_is_learned(tmp_path)


def mistakes_are_said_before_anything_is_learned(folder):
    from sidetuning_bench.agents import collect, imitation, rl

    clone = imitation.Settings(data=str(folder / "t-v0"), out=str(folder / "other"), trajectories=(4,), progress=False)
    shutil.copytree(folder / "t-v0", folder / "foreign-v0")
    (folder / "foreign-v0" / "run.json").unlink()  # of another collector: where it comes from is not known
    foreign = replace(clone, data=str(folder / "foreign-v0"))
    record = collect.Settings(out=str(folder / "x-v0"), progress=False)
    six = ("sidetune", "features", "independent", "scratch", "ewc", "finetune")
    for scenario, settings, message in (
        (imitation, replace(clone, env="doom-home"), "was collected in habitat:nav.yaml; give --env habitat:nav.yaml"),
        (imitation, replace(foreign, env="doom-home"), "collected with a compass, and doom-home has none"),
        (imitation, replace(foreign, env="doom-explore"), "no goal and so no expert"),
        (imitation, replace(clone, test_episodes=0), "--test-episodes must be 1 or more"),
        (imitation, replace(clone, base="resnet-doom-curvatur"), "did you mean 'resnet-doom-curvature'"),
        (imitation, replace(clone, merge="alfa"), "did you mean 'alpha'"),
        (imitation, replace(clone, dropout=1.0), "--dropout must be at least 0 and below 1, not 1.0"),
        (imitation, replace(clone, shift=-1), "--shift must be 0 or more"),
        (imitation, replace(clone, shift=64), "--shift must be below"),
        (imitation, replace(clone, trajectories=(0,)), "must be numbers of 1 or more"),
        (imitation, replace(clone, methods=six), "at most 5"),
        (imitation, replace(clone, trajectories=(12,)), "has 12 trajectories, of which 1 are held out, and so not 12"),
        (imitation, replace(clone, methods=("scratch", "scratch")), "--methods names scratch twice"),
        (imitation, replace(clone, env="habitat:nav.yaml", test_split="train"), "collected in the scenes of 'train'"),
        (collect, replace(record, out=str(folder / "x")), "such as x-v0"),
        (collect, replace(record, size=0), "--size must be 1 or more"),
        (rl, rl.Settings(size=0, out=str(folder / "y")), "--size must be 1 or more"),
        (collect, replace(record, seed=900), "give 0 to 899"),
        (rl, rl.Settings(out=str(folder / "other-rl"), batch=1), "--batch must be 2 or more"),
        (
            rl,
            rl.Settings(out=str(folder / "other-rl"), env="doom-pointnav", test_split="train"),
            "agents learn in these scenes",
        ),
        (rl, rl.Settings(out=str(folder / "other-rl"), test_split="tests"), "tests"),
        (collect, replace(record, env="doom-explore"), "no goal and so no expert"),
        (collect, replace(record, workers=-1), "--workers must be 1 or more"),
        (rl, rl.Settings(out=str(folder / "other-rl"), test_episodes=0), "--test-episodes must be 1 or more"),
    ):
        with pytest.raises(SideTuningError, match=message):
            scenario.run(settings)
    assert not list(folder.glob("other*/*-0"))  # no cell has begun


# Doom -------------------------------------------------------------------------------------------------------------------


def test_a_clone_beats_chance(tmp_path):
    """A learning test: more reward than a random agent in unseen scenes, by a permutation test on pairs."""
    pytest.importorskip("vizdoom")
    pytest.importorskip("minari")
    from sidetuning_bench.agents import collect, imitation
    from sidetuning_bench.agents.trajectories import read_steps
    from sidetuning_bench.agents.worlds import TEST_SEED, at_random, drawing, episodes, make_world, map_base
    from sidetuning_bench.methods import load_method

    data = str(tmp_path / "t-v0")
    collect.run(collect.Settings(out=data, episodes=100, progress=False))
    settings = imitation.Settings(
        data=data, out=str(tmp_path / "im"), methods=("features",), trajectories=(90,), seeds=1, steps=500, test_episodes=1,
        cache=str(tmp_path / "cache"), progress=False,
    )  # fmt: skip
    cell = next(imitation.cells(settings, 64))
    imitation.one(cell, read_steps(data), {})
    method = load_method(tmp_path / "im" / "features-90-0" / "tasks", map_base(cell.base, None, 64))
    rng = np.random.default_rng(0)
    world = make_world("doom-pointnav", "test", 64)
    try:
        clone = [o.reward for o in episodes(world, drawing(world, imitation.policy_of(method), 0), 16, TEST_SEED)]
        chance = [o.reward for o in episodes(world, at_random(world), 16, TEST_SEED)]
    finally:
        world.close()
    gained = np.array(clone) - np.array(chance)  # of the same episodes: some are harder than others
    flipped = (gained * rng.choice([-1, 1], (5000, len(gained)))).mean(1)
    assert np.mean(flipped >= gained.mean()) < 0.01, (np.mean(clone), np.mean(chance))


def test_a_killed_learner_goes_on(tmp_path):
    import time

    (tmp_path / "nav.yaml").write_text("")
    arguments = (
        "rl", "--env", "habitat:nav.yaml", "--out", "rl", "--methods", "features", "--seeds", "1", "--steps", "3200", "--envs", "2",
        "--rollout", "16", "--batch", "32", "--size", "32", "--test-episodes", "2", "--no-progress",
    )  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKE), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "sidetuning_bench", *arguments], cwd=tmp_path, env=env)
    saved = tmp_path / "rl" / "features-0" / "resume" / "ppo.pt"
    until = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait(30)
    state = torch.load(saved, weights_only=True)
    assert 0 < state["steps"] < 3200 and state["steps"] % 64 == 0
    assert state["recent"] and {"reward", "success", "spl"} == set(state["recent"][0])
    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "rl" / "features-0" / "result.json").read_text())
    steps = [row["steps"] for row in result["curve"]]
    assert steps == list(range(32, 3201, 32))[-len(steps) :]  # what followed the last save is there once
    assert 3200 < result["base_passes"] < 2 * 3200  # those before the kill are counted
    assert result["resumed"] == 1
    assert not saved.exists()
    (tmp_path / "rl" / "features-0" / "result.json").unlink()
    saved.parent.mkdir(exist_ok=True)
    saved.write_bytes(b"damaged")
    done = run(tmp_path, *arguments)
    assert (
        done.returncode == 1 and "delete it to begin this run again" in done.stderr and "Traceback" not in done.stderr
    )


# Benchmarks -------------------------------------------------------------------------------------------------------------


def test_benchmarks_record_ratios_and_the_versions_of_what_is_installed(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench/records")
    import agents
    import common

    def measure(steps, passes, cached):
        return {"steps_per_second": 300.0 if cached else 100.0, "base_passes": 10 if cached else 10 * (passes + 1)}

    written = {}
    monkeypatch.setattr(agents, "measure", measure)
    monkeypatch.setattr(agents, "record", lambda name, content: written.update({name: content}))
    monkeypatch.setattr(agents.rl, "use_threads", lambda _: None)
    agents.run_speed(agents.Speed(rounds=2))
    found = written["rl-speed"]["passes"]
    assert list(found) == ["4", "10"] and len(found["4"]["once"]) == 2
    assert [row["base passes, every pass / once"] for row in found.values()] == [5.0, 11.0]
    assert found["10"]["steps per second, once / every pass"] == 3.0
    monkeypatch.setattr(common, "PACKAGES", ("gymnasium", "stable-baselines3", "no-such-package"))
    assert common.versions() == {"gymnasium": gym.__version__, "stable-baselines3": version("stable-baselines3")}
