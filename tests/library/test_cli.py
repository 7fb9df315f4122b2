"""What the command line prints: texts of users as they are, without what a terminal obeys, and errors in a sentence."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

import sidetuning as st
import sidetuning_bench
from sidetuning import cli
from sidetuning.cli import guarded, main
from sidetuning.errors import DataWarning
from sidetuning.terminal import plain, say, say_csv, say_json, say_markdown, say_table

# Commands whose help text needs no torch.
LIGHT = ("parts", "export", "list", "info", "rename", "remove", "push", "pull", "serve")
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


def test_programs_get_whole_texts_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "猫" * 100 + "\udce9\x1b.png"
    for say_it, expected in (
        (lambda: say_csv([[name, "1"]]), f"{name},1\n".encode("utf-8", "surrogateescape")),
        (lambda: say_json(name, indent=None), json.dumps(name).encode() + b"\n"),
    ):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
        monkeypatch.setattr(sys, "stdout", stream)
        say_it()
        assert stream.buffer.getvalue() == expected  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", stream := io.StringIO())  # type: ignore[assignment]
    say_table(["source"], [["x" * 300]])
    assert "x" * 300 in stream.getvalue()  # type: ignore[attr-defined]


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
    # As `head` leaves other programs: without a word.
    assert process.returncode == 141 and not shown


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in LIGHT)])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = "import sys\nfrom sidetuning.cli import main\ntry:\n    main(sys.argv[1:])\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout and not done.stderr


def test_the_help_text_lists_every_command_and_each_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    files = {file.stem for file in Path(cli.__file__).with_name("commands").glob("[a-z]*.py")}
    assert files == set(cli.COMMANDS) and all(f"  {name} " in shown for name in [*cli.COMMANDS, "bench"])
    assert [shown.index(f"\n{group}:\n") for group in (cli.DATA, cli.MODELS, cli.BENCH)]
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert f"example: sidetuning {name}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("given", "hint"), [("exprt", "'export'"), ("bnech", "'bench'"), ("x", "there is train")])
def test_a_command_that_does_not_exist_has_near_names(
    given: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([given])
    shown = capsys.readouterr().err
    assert shown.startswith(f"sidetuning: command '{given}' is not known") and hint in shown


def test_no_command_at_all_is_an_error_with_the_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage: sidetuning COMMAND" in capsys.readouterr().err


def test_completion_knows_all_commands(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--tyro-write-completion", "bash", str(tmp_path / "completion")])
    text = (tmp_path / "completion").read_text()
    assert all(name in text for name in cli.COMMANDS)


def test_predict_reads_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("t", side="fcn4", head=2, init="distilled")
    model.save_task("t", tmp_path / "t")
    with pytest.raises(SystemExit, match="1"):
        main(["predict", str(tmp_path / "t"), "/dev/zero"])
    assert "/dev/zero: it is a folder or a device" in capsys.readouterr().err
