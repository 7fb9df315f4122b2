"""A new reader's test: the recipes of CONTRIBUTING.md are followed to the letter, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEP = r"(Write|Append to|Insert into `(\w+)` of) `([^`]+)`:\n\n```python\n(.*?)```"
# The first line of a table of names.
ROW = r'^ +"[\w-]+": "[\w.:]+",\n'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources and the tests."""
    ignored = shutil.ignore_patterns("__pycache__", "legacy", "results")
    for part in ("src", "bench/src", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def follow(recipe: str, root: Path) -> list[str]:
    """Do what a section says with its files; returns the commands that it ends with."""
    (section,) = re.findall(rf"## {recipe}\n(.*?)\n## ", TEXT, re.DOTALL)
    steps = re.findall(STEP, section, re.DOTALL)
    assert steps
    for verb, table, name, code in steps:
        file = root / name
        if verb == "Write":
            assert not file.exists()
            file.write_text(code)
        elif verb == "Append to":
            file.write_text(f"{file.read_text()}\n\n{code}")
        else:
            row = re.search(rf"^ +{table} = \(", file.read_text(), re.MULTILINE)
            addition = code if row is None else f"{code.strip()} "
            row = row or re.search(ROW, file.read_text(), re.MULTILINE)
            assert row is not None
            file.write_text(file.read_text().replace(row[0], row[0] + addition, 1))
    commands = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(commands) == 1
    return str(commands[0]).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "part", "listing"),
    [("Add a merge", "maximum", ["parts"]), ("Add a method", "biases", ["bench", "icifar", "--help"])],
)
def test_recipes(recipe: str, part: str, listing: list[str], copy: Path) -> None:
    command = follow(recipe, copy)
    assert command[:3] == ["python", "-m", "pytest"]
    paths = os.pathsep.join(str(copy / folder) for folder in ("src", "bench/src"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        given = [sys.executable, "-m", *arguments]
        done = subprocess.run(given, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert part in run("sidetuning.cli", *listing)
    tested = run(*command[2:], "-q", "-p", "no:cacheprovider")
    assert int(re.findall(r"(\d+) passed", tested)[0]) >= 4
