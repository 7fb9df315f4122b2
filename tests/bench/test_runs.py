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
from sidetuning.errors import DataWarning
from sidetuning_bench.domains import names
from sidetuning_bench.language.questions import read_questions
from sidetuning_bench.methods import load_method
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run, read_result, read_run


@dataclass(frozen=True)
class Settings:
    """No settings but a folder."""

    out: str = ""


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


def test_a_damaged_row_is_named_and_all_others_stay(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "x", Settings())
    for k in range(4):
        run.append({"task": f"t{k}"})
    file = tmp_path / "run/metrics.jsonl"
    damages = [b'{"task": "t1}\n', b'\xfb{"task": "t1"}\n', b"[1]\n", b"[" * 100_000 + b"\n", b"\0\0\0\n"]
    for damage in damages:
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([lines[0], damage, *lines[2:]]))
        with pytest.warns(DataWarning, match=r"line 2 of .*metrics.jsonl is damaged and was left out"):
            assert [row["task"] for row in run.metrics()] == ["t0", "t2", "t3"]
    with pytest.warns(DataWarning, match="line 2"):
        run.append({"task": "t4"})
    with pytest.warns(DataWarning, match="line 2"):
        run.keep(lambda row: row["task"] != "t3")
    with pytest.warns(DataWarning, match="line 2"):
        assert [row["task"] for row in run.metrics()] == ["t0", "t2", "t4"]
    assert damages[-1] in file.read_bytes()


@pytest.mark.parametrize("cut", [b'{"task": "t', b'{"task": "t1"', b"\xfb"])
def test_a_last_row_that_was_cut_short_makes_room_for_the_next(cut: bytes, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "x", Settings())
    run.append({"task": "t0"})
    file = tmp_path / "run/metrics.jsonl"
    file.write_bytes(file.read_bytes() + cut)
    assert run.metrics() == [{"task": "t0"}]
    run.append({"task": "t1"})
    assert file.read_bytes() == b'{"task": "t0"}\n{"task": "t1"}\n'
    file.write_bytes(file.read_bytes()[:-1])
    run.append({"task": "t2"})
    assert [row["task"] for row in run.metrics()] == ["t0", "t1", "t2"]


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
