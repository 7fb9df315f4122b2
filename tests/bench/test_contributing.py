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
STEP = r"(Write|Append to|Insert into `\w+` of) `([^`]+)`:\n\n```python\n(.*?)```"


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
    for verb, name, code in steps:
        file = root / name
        if verb == "Write":
            assert not file.exists()
            file.write_text(code)
        elif verb == "Append to":
            file.write_text(f"{file.read_text()}\n\n{code}")
        else:
            # A line of a table comes after the first of the same form.
            first = re.search(r'^ +"[\w-]+": "[\w.:]+",\n', file.read_text(), re.MULTILINE)
            assert first is not None
            file.write_text(file.read_text().replace(first[0], first[0] + code, 1))
    commands = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    assert len(commands) == 1
    return str(commands[0]).split()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "part"), [("Add a merge", "maximum"), ("Add a method", "biases")])
def test_recipes(recipe: str, part: str, copy: Path) -> None:
    command = follow(recipe, copy)
    assert command[:3] == ["python", "-m", "pytest"]
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy / 'bench/src'}", "OMP_NUM_THREADS": "1"}
    listing = [sys.executable, "-m", "sidetuning.cli", *(["parts"] if part == "maximum" else ["bench", "methods"])]
    listed = subprocess.run(listing, cwd=copy, env=environment, capture_output=True, text=True, check=True)
    assert part in listed.stdout
    tested = [sys.executable, *command[1:], "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(tested, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 4
