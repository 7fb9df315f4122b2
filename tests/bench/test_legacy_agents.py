"""Trajectories, runs and policies of agents that version 0.1.0 wrote are read, and act as they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from legacy_cases import ROOT, copied, differing, hashes, read

pytest.importorskip("stable_baselines3")
pytest.importorskip("minari")

from stable_baselines3 import PPO

from sidetuning.cli import main
from sidetuning_bench.agents.extractor import AgentExtractor
from sidetuning_bench.agents.play import load_player
from sidetuning_bench.agents.ppo import probabilities
from sidetuning_bench.agents.trajectories import COMPASS, read_steps


def tables_of(run: Path) -> list[str]:
    """The rows of a run's tables."""
    return [line for line in (run / "table.md").read_text().splitlines() if line.startswith("|")]


@pytest.mark.usefixtures("fake_habitat")
@pytest.mark.parametrize("scenario", ["imitation", "rl"])
def test_runs(scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(copied(tmp_path, "data", "trajectories", f"runs/{scenario}"))
    folder = Path("runs") / scenario
    about, expected = read(folder)
    rows = list(zip(expected["rgb"].numpy(), expected["compass"].numpy(), strict=True))
    for cell in about["cells"]:
        player = load_player(folder / "run" / cell)
        found = torch.stack([player.policy({"rgb": rgb, COMPASS: compass}) for rgb, compass in rows])
        assert not differing({cell: found}, expected, "policy/")
    before, tables = hashes(folder / "run"), tables_of(folder / "run")
    main(["bench", *about["command"].split()])
    # It is found done; the report is made again, and so are equal tables, with other words below them, and films.
    after = hashes(folder / "run")
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {"report.html", "table.md"}
    assert tables_of(folder / "run") == tables and len(tables) > 8


@pytest.mark.usefixtures("fake_habitat")
def test_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read as they were, and the command adds one."""
    monkeypatch.chdir(copied(tmp_path, "data", "trajectories"))
    about, expected = read(Path("trajectories"))
    folder = Path("trajectories") / about["folder"]
    steps = read_steps(folder)
    assert (len(steps.starts) - 1, len(steps), steps.fingerprint()) == tuple(
        about[name] for name in ("episodes", "steps", "fingerprint")
    )
    found = {name: getattr(steps, name)[about["rows"]] for name in ("rgb", "extra", "actions")}
    assert not differing({**found, "starts": steps.starts}, expected, "")
    main(["bench", *about["command"].replace("--episodes 10", "--episodes 11").split()])
    steps, more = read_steps(folder), about["with_11_episodes"]
    assert (len(steps), steps.fingerprint()) == (more["steps"], more["fingerprint"])


def test_a_policy_of_stable_baselines3() -> None:
    """Its file names the library's extractor, which knew a compass then; and it knows the weights of its base alone."""
    folder = ROOT / "policies" / "ppo"
    about, expected = read(folder)
    kwargs = {
        "features_extractor_class": AgentExtractor,
        "features_extractor_kwargs": about["extractor"],
        "net_arch": [],
    }
    agent = PPO.load(folder / "agent.zip", device="cpu", custom_objects={"policy_kwargs": kwargs})
    rows = zip(expected["rgb"].numpy(), expected["compass"].numpy(), strict=True)
    found = [probabilities(agent.policy, {"rgb": rgb, COMPASS: compass}) for rgb, compass in rows]
    assert not differing({"policy": torch.cat(found)}, {"policy": expected["policy"]}, "")
