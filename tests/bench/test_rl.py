"""Reinforcement learning: runs that resume, policies that are saved and loaded, tables, and old runs."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("stable_baselines3")

from agent_parts import learner
from sidetuning.cli import main
from sidetuning.errors import SideTuningError
from sidetuning_bench.agents import ppo, rl
from sidetuning_bench.agents.curves import FREE, Result, Settings, charts, table
from sidetuning_bench.agents.outcomes import Outcome, scores
from sidetuning_bench.agents.play import film
from sidetuning_bench.options import with_values
from sidetuning_bench.runs import Run

SMALL = {"size": 16, "envs": 2, "rollout": 16, "batch": 32, "test_episodes": 2, "side_width": 0.0625, "init": "xavier"}


def settings_of(env: str, folder: Path, **values: Any) -> Settings:
    """A short run."""
    return with_values(Settings(out=str(folder / "run")), {**SMALL, "env": env, **values})


def test_a_curve_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    """Rows that were written after the last save belong to steps that are taken again."""
    folder = Run(tmp_path, "rl-run", Settings(), free=FREE)
    for steps in (32, 64, 96):
        folder.append({"steps": steps, "reward": float(steps)})
    folder.keep(lambda row: row["steps"] <= 64)
    folder.append({"steps": 96, "reward": 0.0})
    assert [row["reward"] for row in folder.metrics()] == [32.0, 64.0, 0.0]


def test_a_mistake_writes_nothing_and_weights_are_found_from_everywhere(
    habitat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    settings = with_values(rl.Settings(), {**SMALL, "env": habitat, "out": out, "threads": 1, "init": "distilled"})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"base": "resnet-doom"}, "did you mean"),
        ({"merge": "alfa"}, "did you mean"),
        ({"side": "fcn55"}, "did you mean"),
        ({"init": "distiled"}, "not known"),
        ({"base_weights": "none.safetensors"}, "does not exist"),
        ({"size": 0}, "--size must be 1 or more"),
        ({"batch": 1}, "--batch must be 2 or more"),
        ({"env": "doom-pointnav", "test_split": "train"}, "agents learn in these scenes"),
        ({"test_split": "tests"}, "tests"),
        ({"test_episodes": 0}, "--test-episodes must be 1 or more"),
        ({"methods": ("lora",)}, "not one of the extractor's"),
    ]
    for values, message in wrong:
        with pytest.raises(SideTuningError, match=message):
            rl.run(with_values(settings, values))
        assert not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)
    found = {
        cell.settings.ppo.agent.base_weights for cell in rl.cells(with_values(settings, {"base_weights": "own.st"}))
    }
    assert found == {str(tmp_path / "own.st")}
    (tmp_path / "file").write_text("")
    with pytest.raises(SideTuningError, match="cannot be written to"):
        film(ppo.player(Settings(), None), 1, tmp_path / "file")


def test_torch_has_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ppo.use_threads(None)
    assert given == []
    ppo.use_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    ppo.use_threads(None)
    assert given == [2, 1]


def test_going_on_counts_even_if_it_is_stopped_at_once(habitat: str, tmp_path: Path) -> None:
    settings = settings_of(habitat, tmp_path, method="features", envs=1, batch=16)
    folder = Run(settings.out, "rl-run", settings, free=FREE)
    env = ppo.training_env(settings)
    model = ppo.build(settings, env)
    file = folder.resume("ppo")
    for resumed in range(3):
        saved = ppo.load_state(model, file)
        assert saved["resumed"] == max(0, resumed - 1)
        curve = ppo.Curve(folder, saved)
        curve.init_callback(model)
        # It goes no further than that, but for the first time.
        curve.on_training_start({}, {})
        if not resumed:
            model.num_timesteps = 16
            curve.on_training_end()
        assert torch.load(file, weights_only=True)["resumed"] == resumed == curve.resumed
    env.close()


def test_a_resumed_agent_meets_other_episodes(tmp_path: Path) -> None:
    """And one without a goal has no success, which is not a success of 0."""
    model = learner()
    model.learn(64)
    counts = {"seconds": 1.0, "passes": 5, "recent": [{"reward": 1.0}], "resumed": 0}
    ppo.save_state(model, tmp_path / "ppo.pt", counts)
    start: Any = learner().env.reset()  # type: ignore[union-attr]
    fresh = learner()
    assert ppo.load_state(fresh, tmp_path / "ppo.pt")["recent"] == [{"reward": 1.0}]
    found: Any = fresh.env.reset()  # type: ignore[union-attr]
    assert not np.array_equal(found["rgb"], start["rgb"])


def test_tables_and_charts_leave_out_what_an_environment_has_not() -> None:
    result = Result(
        method="features",
        seed=0,
        env="doom-explore",
        curve=[{"steps": 64, "reward": 1.0, "seconds": 1.0}],
        added=10,
        alpha=None,
        base_passes=5,
        steps_per_second=100.0,
        **scores([Outcome(None, None, 1.0, 9), Outcome(None, None, 3.0, 9)]),
    )
    text = table([result])
    assert "| SPL, % | – |\n| Reward | 2.0 [0.0, 4.0] |" in text and "eased" not in text
    assert [chart.title for chart in charts([result])] == ["Reward of an episode"]
    assert "doom-home is an eased my_way_home" in table([replace(result, env="doom-home")])
    assert not charts([replace(result, curve=[])])


@pytest.mark.parametrize("method", ["sidetune", "features", "finetune", "scratch", "side-only"])
def test_a_loaded_policy_answers_as_the_learner_did_and_a_fresh_one_does_not(
    habitat: str, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(habitat, tmp_path, method=method, steps=64, lr=1e-2)
    env = ppo.training_env(settings)
    model, fresh = ppo.build(settings, env), ppo.build(settings, env).policy
    model.learn(64)
    Run(settings.out, "rl-run", settings, free=FREE)
    file = Path(settings.out) / "policy.safetensors"
    ppo.save_policy(model.policy, file)
    loaded = ppo.load_policy(settings.out)[1]
    space: Any = model.observation_space
    observation = {name: np.stack([value] * 2) for name, value in space.sample().items()}
    wanted = ppo.probabilities(model.policy, observation)
    assert wanted.shape == (2, 4) and torch.equal(ppo.probabilities(loaded, observation), wanted)
    assert not torch.allclose(ppo.probabilities(fresh, observation), wanted, atol=1e-3)
    ppo.check_same(model.policy, loaded, tmp_path)
    with pytest.raises(SideTuningError, match="is not the one that was learned"):
        ppo.check_same(model.policy, fresh, tmp_path)
    if method == "features":
        # It is the loaded one that is tested.
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "load_policy", lambda _: (settings, fresh))
            with pytest.raises(SideTuningError, match="is not the one that was learned"):
                ppo.run(settings)
    tensors, whole = {name: tensor.clone() for name, tensor in load_file(file).items()}, file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(SideTuningError, match="its sha256 is not the one recorded"):
        ppo.load_policy(settings.out)
    save_file({name: tensor for name, tensor in tensors.items() if ".given." not in name}, file)
    with pytest.raises(SideTuningError, match="another version of the library or damaged"):
        ppo.load_policy(settings.out)
    env.close()


def test_runs_of_version_0_1_0_that_call_the_side_alone_scratch_are_read_and_never_resumed_as_another(
    habitat: str, tmp_path: Path
) -> None:
    settings = settings_of(habitat, tmp_path, method="side-only")
    Run(settings.out, "rl-run", settings, free=FREE)
    env = ppo.training_env(settings)
    policy = ppo.build(settings, env).policy
    ppo.save_policy(policy, Path(settings.out) / "policy.safetensors")
    env.close()
    file = Path(settings.out) / "run.json"
    content = json.loads(file.read_text())
    old = {name: value for name, value in content["settings"].items() if name != "network"}
    file.write_text(json.dumps({"scenario": "rl-run", "settings": {**old, "method": "scratch"}}))
    found, loaded = ppo.load_policy(settings.out)
    assert found.method == "side-only"
    ppo.check_same(policy, loaded, tmp_path)
    with pytest.raises(SideTuningError, match="holds a run with other settings: network None"):
        Run(settings.out, "rl-run", replace(settings, method="scratch"), free=FREE)
    numbers: dict[str, Any] = {
        "env": "x",
        "curve": [],
        "added": 1,
        "alpha": None,
        "base_passes": None,
        "steps_per_second": 1.0,
    }
    for method, known, name in (
        ("scratch", {}, "side-only"),
        ("scratch", {"network": "base"}, "scratch"),
        ("features", {}, "features"),
    ):
        outcomes = scores([Outcome(None, None, 1.0, 9)])
        assert Result(method=method, seed=0, settings=known, **numbers, **outcomes).method == name


@pytest.mark.slow
def test_learning_and_playing_in_habitat(
    habitat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rl and play, by their commands."""
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    command = f"bench rl --env {habitat} --out rl --methods sidetune --steps 64 --envs 2 --rollout 16 --passes 1"
    command += " --batch 16 --size 16 --side-width 0.0625 --init xavier --test-episodes 2 --seeds 1 --no-progress"
    main(command.split())
    result = json.loads(Path("rl/sidetune-0/result.json").read_text())
    assert [row["steps"] for row in result["curve"]] and result["curve"][-1]["steps"] == 64
    assert 64 <= result["base_passes"] < 2 * 64 and result["alpha"] is not None and result["resumed"] == 0
    assert Path("rl/report.html").read_text().count("<video") == 2
    capsys.readouterr()
    main(["bench", "play", "rl/sidetune-0", "--episodes", "1"])
    assert Path("rl/sidetune-0/play/episode-0.mp4").stat().st_size > 500
    _, _, reward, steps = result["episodes"][0]
    assert f"{steps} steps, reward {reward:.1f}" in capsys.readouterr().out
    for wrong, message in (("rl", "such as rl/sidetune-0"), ("none", "holds no run")):
        with pytest.raises(SystemExit):
            main(["bench", "play", wrong])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_learner_goes_on(habitat: str, tmp_path: Path) -> None:
    steps = 640
    settings = settings_of(habitat, tmp_path, method="features", steps=steps)
    process = multiprocessing.get_context("spawn").Process(target=ppo.run, args=(settings,))
    process.start()
    folder = Path(settings.out)
    saved = folder / "resume" / "ppo.pt"
    until = time.monotonic() + 120
    while not saved.exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.join(30)
    state = torch.load(saved, weights_only=True)
    assert 0 < state["steps"] < steps and state["steps"] % 64 == 0
    assert state["recent"] and {"reward", "success", "spl"} == set(state["recent"][0])
    result = ppo.run(settings)
    found = [int(row["steps"]) for row in result.curve]
    # What followed the last save is there once.
    assert found == list(range(32, steps + 1, 32))[-len(found) :]
    # The passes before the kill are counted.
    assert result.base_passes is not None and steps < result.base_passes < 2 * steps
    assert result.resumed == 1 and not saved.exists()
    saved.parent.mkdir(exist_ok=True)
    saved.write_bytes(b"damaged")
    with pytest.raises(SideTuningError, match="delete it to begin this run again"):
        ppo.run(settings)
