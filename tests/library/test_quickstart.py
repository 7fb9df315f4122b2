"""The commands and the Python of docs/quickstart.md run as they stand, on photographs of the same classes' names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_parts import write_digits
from sidetuning.cli import main

TEXT = (Path(__file__).parents[2] / "docs/quickstart.md").read_text()
CLASSES = {"photos": ("fox", "hamster", "mouse"), "vehicles": ("bus", "train", "tractor")}


def write_photographs(root: Path) -> None:
    """Digits in folders of the document's names, with the files that it asks about."""
    for folder, names in CLASSES.items():
        write_digits(root / folder, range(len(names)), 34)
        for digit, name in enumerate(names):
            (root / folder / f"digit-{digit}").rename(root / folder / name)
    write_digits(root / "holdout", range(3), 5, first=40)
    for digit, name in enumerate(CLASSES["photos"]):
        (root / "holdout" / f"digit-{digit}").rename(root / "holdout" / name)
    for command in commands():
        for path in [Path(word) for word in command if word.endswith(".png")]:
            first = next((root / path).parent.glob("*.png"))
            first.rename(root / path)


def commands() -> list[list[str]]:
    """What the transcripts call."""
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in re.findall(r"^\$ sidetuning (.*)$", block, re.MULTILINE)]


@pytest.mark.slow
def test_the_transcript_and_the_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [command[0] for command in commands()] == ["train", "train", "predict", "evaluate"]
    said = []
    for command in commands():
        main([re.sub(r"^1m$", "1s", word) for word in command])
        shown = capsys.readouterr()
        said.append(shown.out + shown.err)
    assert "saved in my-model" in said[0] and "saved in my-model" in said[1]
    assert "pets" in said[2] and "vehicles" in said[2] and "95 % interval" in said[3]
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/quickstart.md", "exec"), scope)
    assert (tmp_path / "another-model/tasks/pets/side.json").exists()
