"""The published records: a result says how it was made, and is not run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import record
from run import main
from sidetuning_bench import grid


def test_a_cell_is_recorded_once_and_other_settings_are_refused(
    tiny_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(grid, "run_apart", lambda cell, work, bar: work(cell.settings))
    (tmp_path / "results").mkdir()
    folders = ["--data", str(tiny_cifar), "--cache", "cache", "--out", "runs"]
    given = ["compare", "icifar", *folders, "--methods", "features", "--seeds", "1", "--tasks", "2", "--batch", "8"]
    monkeypatch.setattr("sys.argv", ["run.py", *given, "--samples", "16"])
    main([*given, "--samples", "16"])
    assert "| features |" in capsys.readouterr().out
    file = tmp_path / "results/compare-methods-features-0.json"
    found = json.loads(file.read_text())
    assert found["settings"]["method"] == "features" and found["settings"]["samples"] == 16
    assert not {"data", "out", "cache", "base_weights"} & set(found["settings"])
    assert found["command"].startswith("python bench/records/run.py compare icifar")
    assert str(tmp_path) not in file.read_text() and str(tiny_cifar) not in file.read_text()
    assert {"machine", "threads", "date", "seed", "accuracy"} <= set(found)
    assert {"python", "sidetuning", "torch"} <= set(found["versions"]) <= {"python", *record.PACKAGES}

    written = file.stat().st_mtime_ns
    main([*given, "--samples", "16"])
    assert file.stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="was run with samples 16"):
        main([*given, "--samples", "24"])


def test_speed_is_recorded_with_its_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    import agent_worlds
    from sidetuning_bench.agents import ppo

    def measure(steps: int, passes: int, cached: bool) -> dict[str, float]:
        return {"steps_per_second": 300.0 if cached else 100.0, "base_passes": 10 if cached else 10 * (passes + 1)}

    written: dict[str, Any] = {}
    monkeypatch.setattr(agent_worlds, "measure", measure)
    monkeypatch.setattr(agent_worlds, "write", lambda name, content: written.update({name: content}))
    monkeypatch.setattr(ppo, "use_threads", lambda _: None)
    agent_worlds.run_speed(agent_worlds.Speed(rounds=2))
    found = written["rl-speed"]["passes"]
    assert list(found) == ["4", "10"] and len(found["4"]["once"]) == 2
    assert [row["base passes, every pass / once"] for row in found.values()] == [5.0, 11.0]
    assert found["10"]["steps per second, once / every pass"] == 3.0
