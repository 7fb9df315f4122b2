"""What the folders and processes of runs share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sidetuning as st
from sidetuning.errors import SideTuningError
from sidetuning_bench.domains import names
from sidetuning_bench.language.questions import read_questions
from sidetuning_bench.methods import load_method
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run, read_result, read_run, write_result


@dataclass(frozen=True)
class Settings:
    """A folder, and a setting."""

    out: str = ""
    rate: float = 0.1


@pytest.mark.slow
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


@pytest.mark.parametrize("cut", [b'{"task": "t', b'{"task": "t1"', b"\xfb"])
def test_a_last_row_that_was_cut_short_makes_room_for_the_next(cut: bytes, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "x", Settings())
    run.append({"task": "t0"})
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(file.read_bytes() + cut)
    assert run.metrics() == [{"task": "t0"}]
    run.append({"task": "t1"})
    assert [row["task"] for row in run.metrics()] == ["t0", "t1"] and file.read_bytes().endswith(b"}\n")


DEEP = ["[" * 100_000, '{"a":' * 5_000, "1" * 5_000, '{"scenario": 5}', "\ufeffno", ""]


@pytest.mark.parametrize("text", DEEP)
def test_json_of_another_form_is_one_sentence_everywhere(text: str, tmp_path: Path) -> None:
    for name in ("run.json", "result.json", "meta.json", "method.json", "train.json", "names.json"):
        (tmp_path / name).write_text(text)
    readers: list[Callable[[], Any]] = [
        lambda: read_run(tmp_path),
        lambda: Run(tmp_path, "x", Settings()),
        lambda: RunResult.load(tmp_path / "result.json"),
        lambda: read_result(RunResult, tmp_path / "result.json"),
        lambda: st.CachedFeatures(tmp_path),
        lambda: load_method(tmp_path, st.load_base("resnet44-cifar10")),
        lambda: read_questions(tmp_path / "train.json"),
        lambda: names(tmp_path, "segment_semantic") if text[:1] != "{" else read_run(tmp_path),
    ]
    for read in readers:
        with pytest.raises(st.SideTuningError) as error:
            read()
        assert "\n" not in str(error.value)


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "run.json").write_text('{"scenario": "ü", "settings": {}}', encoding=encoding)
        assert read_run(tmp_path)["scenario"] == "ü"


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
    ("old", "new"),
    [('"task-1"', '"task-9"'), ('"task-1"', '"task-1'), ('"sha256"', '"sha"'), ('{"task": "task-0"', "\x00")],
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


def test_rows_that_changed_places_are_reported(tmp_path: Path) -> None:
    run, file = run_with_rows(tmp_path), tmp_path / "metrics.jsonl"
    first, second, *others = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([second, first, *others]))
    with pytest.raises(SideTuningError, match="moved from another place"):
        run.metrics()


def test_a_row_that_a_kill_cut_short_is_written_again(tmp_path: Path) -> None:
    run, file = run_with_rows(tmp_path), tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert [row["task"] for row in run.metrics()] == ["task-0", "task-1", "task-2"]
    run.append({"task": "task-3"})
    assert [row["task"] for row in run.metrics()] == ["task-0", "task-1", "task-2", "task-3"]
    run.keep(lambda row: row["task"] != "task-0")
    run.append({"task": "task-4"})
    assert [row["task"] for row in run.metrics()] == ["task-1", "task-2", "task-3", "task-4"]


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
