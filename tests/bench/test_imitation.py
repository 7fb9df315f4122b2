"""Imitation: what is held out, moved and run, tables and charts, and old runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sidetuning as st
from legacy_cases import ROOT
from sidetuning.cli import main
from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning_bench import grid
from sidetuning_bench.agents import cloning, collect, imitation
from sidetuning_bench.agents.cloning import TASK, Moves, Result, policy_of, split
from sidetuning_bench.agents.outcomes import Outcome, scores
from sidetuning_bench.agents.play import load_player
from sidetuning_bench.agents.trajectories import Steps
from sidetuning_bench.agents.worlds import TEST_SEED, at_random, drawing, episodes, make_world, map_base
from sidetuning_bench.charts import COLOURS
from sidetuning_bench.methods import METHODS, Task
from sidetuning_bench.options import with_values

# Where the trajectories of version 0.1.0 are from.
COLLECTED = "habitat:data/nav.yaml"


def test_the_same_trajectories_are_held_out_for_all_numbers() -> None:
    few, many = split(600, 5, 0), split(600, 550, 0)
    assert few[1] == many[1] and len(few[1]) == 50 and not {*many[0]} & {*many[1]} and many[0][:5] == few[0]
    assert split(600, 5, 1)[1] != few[1]
    assert len(split(40, 30, 0)[1]) == 4 and split(9, 9, 0)[1] == []


def test_charts_have_a_colour_for_every_row() -> None:
    def rows(*methods: str) -> list[Result]:
        # There is no SPL.
        found = scores([Outcome(1.0, None, 2.0, 9)])
        settings = {"env": "doom-pointnav"}
        return [Result(method=m, trajectories=0, seed=0, settings=settings, **found) for m in methods]

    three, baselines = ("sidetune", "features", "scratch"), ("expert", "compass", "random")
    (chart,) = imitation.charts(rows(*baselines, *three), [5])
    assert [line.name for line in chart.lines] == [*three, "expert", "compass"]
    five = rows(*baselines, *three, "finetune", "lora")
    (chart,) = imitation.charts(five, [5])
    assert [line.name for line in chart.lines] == [*three, "finetune", "lora", "expert"]
    assert len(chart.lines) == COLOURS and "| random | 100.0 [20.7, 100.0] |" in imitation.table(five, [5])


def test_actors_run_a_folded_base_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"rgb": np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)}
    image = {"x": torch.from_numpy(seen["rgb"]).permute(2, 0, 1)[None], "extra": torch.zeros(1, 0)}
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    base = st.Base(net, example=torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    method = METHODS.build("features", base, options={})
    method._add(Task(TASK, "policy", head_options={"actions": 4}), method.add)
    policy = policy_of(method)
    passes: list[int] = []
    encode = st.Base.encode

    def counted(self: st.Base, inputs: st.Input) -> st.Features:
        passes.append(1)
        return encode(self, inputs)

    monkeypatch.setattr(method.base.net, "forward", lambda *_: pytest.fail("the base as it was ran"))
    monkeypatch.setattr(st.Base, "encode", counted)
    found = policy(seen)
    assert len(passes) == 1
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.allclose(found, method(image, TASK)[0].softmax(0), atol=1e-5) and found.sum() == pytest.approx(1)


def test_pictures_that_are_learned_from_move_and_others_do_not() -> None:
    rgb = torch.randint(1, 255, (40, 3, 16, 16), dtype=torch.uint8)
    steps = Steps(rgb, torch.zeros(40, 0), torch.arange(40), torch.tensor([0, 40]))
    still, features, actions = Moves(steps, None).__getitems__([3, 7])
    assert not isinstance(still, torch.Tensor) and torch.equal(still["x"], rgb[[3, 7]])
    assert features is None and actions.tolist() == [3, 7]
    moved, other = (dict(Moves(steps, None, 2).__getitems__(range(40))[0])["x"] for _ in range(2))
    shifts = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    found = {
        (down, right)
        for x, y in zip(moved, rgb, strict=True)
        for down, right in shifts
        if torch.equal(x[:, 2:-2, 2:-2], y[:, 2 + down : 14 + down, 2 + right : 14 + right])
    }
    assert len(found) > 12 and not torch.equal(moved, other)


def test_a_timm_model_is_a_base_of_agents(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    net = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    save_file(dict(net.state_dict()) | {"classifier.bias": torch.zeros(9)}, tmp_path / "lite0.safetensors")
    base = map_base("timm:test_efficientnet", str(tmp_path / "lite0.safetensors"), 64)
    assert base.kind == "map" and base.output_shape == (256, 2, 2)
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    with pytest.raises(ArtifactError, match=r"torch\.load"):
        map_base("timm:test_efficientnet", str(tmp_path / "lite0.pth"), 64)
    with pytest.raises(SideTuningError, match="agents need a map"):
        map_base("resnet44-cifar10", None, 32)


@pytest.mark.slow
def test_cloning_in_habitat(habitat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its command, from trajectories of version 0.1.0; and mistakes are found before anything is learned."""
    pytest.importorskip("minari")
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    # A process per cell, as in the test of rl, would import torch anew.
    monkeypatch.setattr(grid, "run_apart", lambda cell, work, bar: work(cell.settings))
    shutil.copytree(ROOT / "trajectories/habitat-pointnav-v0", "t-v0")
    command = f"bench imitation --env {habitat} --data t-v0 --out im --methods sidetune scratch --trajectories 9"
    command += " --steps 10 --batch 16 --shift 2 --side-width 0.0625 --init xavier --cache cache"
    main(f"{command} --test-episodes 3 --seeds 1 --no-progress".split())
    rows = Path("im/table.md").read_text()
    assert "| expert | 100.0 [43.8, 100.0] |" in rows and rows.count("| sidetune |") == 3
    assert "| Success less that of sidetune, points | 9 trajectories |" in rows
    assert rows.count("| compass |") == rows.count("| random |") == 5
    page = Path("im/report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 4 and "media-src data:" in page and "Success" in page
    sidetune, scratch = (json.loads(Path(f"im/{m}-9-0/result.json").read_text()) for m in ("sidetune", "scratch"))
    assert len(sidetune["episodes"]) == 3 and sidetune["frames"] > 20 and sidetune["accuracy"] is not None
    assert sidetune["success"] == np.mean([success for success, _spl, _reward, _steps in sidetune["episodes"]])
    collected = {name: sidetune["data"][name] for name in ("episodes", "stray", "seed", "env")}
    assert collected == {"episodes": 10, "stray": 0.15, "seed": 0, "env": COLLECTED}
    assert sidetune["data"]["fingerprint"] == json.loads(Path("im/run.json").read_text())["fingerprints"]["data"]
    # All that is trained, the network itself included.
    base = st.load_base("resnet-doom-curvature").parameter_count()
    assert scratch["added"] > base > sidetune["added"] > 0
    check_mistakes(habitat)


def check_mistakes(env: str) -> None:
    """Every mistake raises, and no cell begins."""
    data = {"data": "t-v0", "out": "other", "progress": False, "env": env, "shift": 2}
    clone = with_values(imitation.Settings(("sidetune",), (4,)), data)
    # A data set of another collector does not say where it comes from.
    shutil.copytree("t-v0", "foreign-v0")
    Path("foreign-v0/run.json").unlink()
    foreign = {"data": "foreign-v0"}
    six = ("sidetune", "features", "independent", "scratch", "ewc", "finetune")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"env": "doom-home"}, f"was collected in {COLLECTED}; give --env {COLLECTED}"),
        ({"env": "doom-home", **foreign}, "collected with a compass, and doom-home has none"),
        ({"env": "doom-explore", **foreign}, "no goal and so no expert"),
        ({"test_episodes": 0}, "--test-episodes must be 1 or more"),
        ({"base": "resnet-doom-curvatur"}, "did you mean 'resnet-doom-curvature'"),
        ({"merge": "alfa"}, "did you mean 'alpha'"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, not 1.0"),
        ({"shift": -1}, "--shift must be 0 or more"),
        ({"shift": 16}, "--shift must be below"),
        ({"trajectories": (0,)}, "--trajectories must be 1 or more"),
        ({"methods": six}, "at most 5"),
        ({"trajectories": (10,)}, "has 10 trajectories, of which 1 are held out, and so not 10"),
        ({"methods": ("scratch", "scratch")}, "--methods must name something, and nothing twice"),
        ({"test_split": "train"}, "collected in the scenes of 'train'"),
    ]
    for values, message in wrong:
        with pytest.raises(SideTuningError, match=message):
            imitation.run(with_values(clone, values))
    wrong = [
        ({"out": "x"}, "such as x-v0"),
        ({"size": 0}, "--size must be 1 or more"),
        ({"seed": 900}, "give 0 to 899"),
        ({"env": "doom-explore"}, "no goal and so no expert"),
        ({"workers": -1}, "--workers must be 1 or more"),
    ]
    for values, message in wrong:
        with pytest.raises(SideTuningError, match=message):
            collect.run(with_values(collect.Settings(out="x-v0", progress=False), values))
    assert not list(Path().glob("other*/*-0"))


@pytest.mark.slow
def test_a_clone_beats_chance(tmp_path: Path) -> None:
    """A learning test: more reward than a random agent in unseen scenes, by a permutation test on pairs."""
    pytest.importorskip("vizdoom")
    pytest.importorskip("minari")
    data = str(tmp_path / "t-v0")
    collect.run(collect.Settings(out=data, episodes=100, progress=False))
    values = {"steps": 500, "test_episodes": 1, "cache": str(tmp_path / "cache"), "data": data, "trajectories": 90}
    folder = str(tmp_path / "clone")
    cloning.run(with_values(cloning.Settings(method="features", out=folder), values))
    player = load_player(folder)
    rng = np.random.default_rng(0)
    world = make_world("doom-pointnav", "test", 64)
    try:
        clone = [o.reward for o in episodes(world, drawing(world, player.policy, 0), 16, TEST_SEED)]
        chance = [o.reward for o in episodes(world, at_random(world), 16, TEST_SEED)]
    finally:
        world.close()
    # Differences in the same episodes: some are harder than others.
    gained = np.array(clone) - np.array(chance)
    flipped = (gained * rng.choice([-1, 1], (5000, len(gained)))).mean(1)
    assert np.mean(flipped >= gained.mean()) < 0.01, (np.mean(clone), np.mean(chance))
