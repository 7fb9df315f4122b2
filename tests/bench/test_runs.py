"""What the folders and processes of runs share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidetuning.errors import SideTuningError
from sidetuning_bench.runs import Run, read_result, write_result


def test_memory_is_counted_anew() -> None:
    """In a process of its own: of a large one, which has run other tests, the system may put pages away meanwhile."""
    code = (
        "import torch\nfrom sidetuning_bench.runs import peak_memory_mb as memory_mb\n"
        # 400 MB
        "large = torch.ones(100_000_000)\ndel large\n"
        "high, anew, before = memory_mb(), memory_mb(anew=True), memory_mb()\n"
        "kept = torch.ones(20_000_000)\nprint(high, anew, before, memory_mb(), len(kept))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    high, anew, before, after, kept = map(float, done.stdout.split())
    if anew > high - 300:
        pytest.skip("this system keeps the old peak")
    assert 60 < after - before < 120 and kept


@dataclass(frozen=True)
class Settings:
    """Of a run."""

    rate: float = 0.1


def run_with_rows(folder: Path) -> Run:
    run = Run(folder, "toy", Settings())
    for k in range(4):
        run.append({"task": f"task-{k}"})
    return run


def changed(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"), [('"task-1"', '"task-9"'), ('"task-1"', '"task-1'), ('{"task": "task-0"', "\x00")]
)
def test_a_damaged_row_is_reported_and_the_others_stay(tmp_path: Path, old: str, new: str) -> None:
    run = run_with_rows(tmp_path)
    file = tmp_path / "metrics.jsonl"
    changed(file, old, new)
    before = file.read_bytes()
    for work in (run.metrics, lambda: run.append({"task": "task-4"})):
        with pytest.raises(SideTuningError, match=r"metrics\.jsonl, line [12],"):
            work()
    assert file.read_bytes() == before


def test_a_row_that_a_kill_cut_short_is_written_again(tmp_path: Path) -> None:
    run, file = run_with_rows(tmp_path), tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert [row["task"] for row in run.metrics()] == ["task-0", "task-1", "task-2"]
    run.append({"task": "task-3"})
    assert [row["task"] for row in run.metrics()] == ["task-0", "task-1", "task-2", "task-3"]


@pytest.mark.parametrize(
    ("old", "new"), [("0.1", "0.2"), ('"toy"', '"boy"'), ('"format_version": 2', '"format_version": 1')]
)
def test_a_changed_run_is_refused(tmp_path: Path, old: str, new: str) -> None:
    run_with_rows(tmp_path)
    changed(tmp_path / "run.json", old, new)
    with pytest.raises(SideTuningError, match=r"run\.json was changed"):
        Run(tmp_path, "toy", Settings())


def test_a_changed_result_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", Settings())
    assert read_result(Settings, tmp_path / "result.json") == Settings()
    changed(tmp_path / "result.json", "0.1", "0.2")
    with pytest.raises(SideTuningError, match=r"result\.json was changed"):
        read_result(Settings, tmp_path / "result.json")
