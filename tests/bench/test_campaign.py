"""A few kills and damaged files; `python bench/records/run.py campaign` has the hundreds and thousands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sidetuning as st
from campaign_subjects import make_trajectories, read_trajectories

RECORDS = Path(__file__).parents[2] / "bench" / "records"


def rows(folder: Path, call: str) -> list[dict[str, Any]]:
    """The outcomes of a call, made in a process of its own, which may fork."""
    settings = f"campaign.Settings(kills=12, mutations=300, out={str(folder)!r})"
    code = f"import campaign\nif __name__ == '__main__':\n    campaign.{call}({settings})\n"
    (folder / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(RECORDS)!r})\n{code}")
    subprocess.run([sys.executable, folder / "script.py"], check=True, timeout=900, stdout=subprocess.DEVNULL)
    (file,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_killed_writers_lose_nothing(tmp_path: Path) -> None:
    found = rows(tmp_path, "kill")
    # Some writers are killed twice.
    assert sum(row["kills"] for row in found) >= 12
    assert not [row for row in found if row["failed"]]


@pytest.mark.slow
def test_damaged_files_are_refused_or_say_the_same(tmp_path: Path) -> None:
    found = rows(tmp_path, "mutate")
    assert len(found) == 300 and sum(row["outcome"] == "refused" for row in found) > 100
    assert not [row for row in found if row["failed"]]


@pytest.mark.parametrize("name", ["data/1/part-0.arrow", "data/0/metadata.json", "metadata.json", "data/metadata.json"])
def test_changed_trajectories_are_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("minari")
    make_trajectories(tmp_path)
    read_trajectories(tmp_path)
    file = tmp_path / "walks-v0" / name
    data = bytearray(file.read_bytes())
    # The last digit of a number, or a pixel.
    at = max(i for i, byte in enumerate(data[: 3 * len(data) // 4]) if 48 <= byte <= 57)
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises((st.DataError, st.ArtifactError), match=r"changed|not what was written"):
        read_trajectories(tmp_path)
