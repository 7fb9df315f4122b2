"""What the command line prints: texts of users as they are, without what a terminal obeys, and errors in a sentence."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

import sidetuning as st
import sidetuning_bench
from sidetuning.cli import guarded, main
from sidetuning.errors import DataWarning
from sidetuning.terminal import plain, say, say_markdown

HOSTILE = {
    "[/x]": "[/x]",
    "[bold red]cat[/bold red]": "[bold red]cat[/bold red]",
    "\x1b]0;owned\x07cat": "cat",
    "\x1b]8;;http://a\x1b\\\\cat".replace("\\\\", "\\"): "cat",
    "\x1b[2J\x1b[31mcat\x1b[0m": "cat",
    "\x9b31mcat": "cat",
    "\x1bccat\x08\x08": "ccat",
    "\u202etac": "tac",
    "c\udce4t": "c?t",
    "Käse 猫 :-)": "Käse 猫 :-)",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_terminal_obeys_is_printed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(text) == HOSTILE[text]
    say(text)
    assert capsys.readouterr().out == HOSTILE[text] + "\n"
    say_markdown(f"| label |\n|---|\n| {text} |")
    assert "\x1b" not in capsys.readouterr().out


def test_labels_and_names_of_files_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    labels = list(HOSTILE)[:4]
    model.add_task("t", side="fcn4", head=len(labels), init="distilled", labels=labels, problem="labels")
    model.save_task("t", "t")
    Image.new("RGB", (32, 32)).save("[y]\x1b[31m.png")
    main(["predict", "t", "[y]\x1b[31m.png"])
    shown = capsys.readouterr().out
    assert all(HOSTILE[label] in shown for label in labels) and "[y].png" in shown and "\x1b" not in shown


def test_every_text_is_printed_by_one_function() -> None:
    folders = [Path(str(package.__file__)).parent for package in (st, sidetuning_bench)]
    files = [file for folder in folders for file in folder.rglob("*.py") if file.name != "terminal.py"]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "console.print", "sys.stdout.write"):
                found.append(f"{file}:{node.lineno}")
    assert not found


def test_data_that_were_left_out_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        warnings.simplefilter("always")
        warnings.warn("2 \x1b[31mfiles were left out", DataWarning, stacklevel=1)
        warnings.warn("other", UserWarning, stacklevel=1)

    guarded(command)
    shown = capsys.readouterr().err
    assert shown.startswith("note: 2 files were left out\n") and "UserWarning: other" in shown


def test_errors_are_one_sentence_without_escape_codes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for image in ("\x1b[31mnowhere.png", "c\udce4t.png"):
        with pytest.raises(SystemExit, match="1"):
            main(["predict", str(tmp_path / image), image])
        shown = capsys.readouterr().err
        assert shown.startswith("sidetuning: ") and "\x1b" not in shown and "Traceback" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_a_character_and_a_reader_that_ended(encoding: str, tmp_path: Path) -> None:
    script = "from sidetuning.cli import guarded\nfrom sidetuning.terminal import say\n"
    script += "guarded(lambda: [say('│ 猫' * 20000) for _ in range(20)])"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert b"?" in done.stdout and not done.stderr
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        shown = process.stderr.read().decode()
    assert process.returncode == 1 and shown.count("\n") == 1 and "this output has ended" in shown


def test_predict_reads_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("t", side="fcn4", head=2, init="distilled")
    model.save_task("t", tmp_path / "t")
    for image in ("/dev/zero", str(tmp_path)):
        with pytest.raises(SystemExit, match="1"):
            main(["predict", str(tmp_path / "t"), image])
        assert f"{image}: it is a folder or a device" in capsys.readouterr().err
