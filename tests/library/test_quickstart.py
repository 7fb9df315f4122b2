"""The commands of docs/quickstart.md run as they stand, on photographs of the same classes' names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_parts import write_photographs
from sidetuning.cli import main

TEXT = (Path(__file__).parents[2] / "docs/quickstart.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_transcript_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs(tmp_path)
    monkeypatch.chdir(tmp_path)
    transcript = "".join(re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL))
    commands = [shlex.split(line) for line in re.findall(r"^\$ sidetuning (.*)$", transcript, re.MULTILINE)]
    assert [command[0] for command in commands] == ["train", "train", "predict", "evaluate"]
    said = []
    for command in commands:
        # A minute for each task is for readers.
        main(["1s" if word == "1m" else word for word in command])
        shown = capsys.readouterr()
        said.append(shown.out + shown.err)
    assert "saved in my-model" in said[0] and "saved in my-model" in said[1]
    assert "pets" in said[2] and "vehicles" in said[2] and "95 % interval" in said[3]
