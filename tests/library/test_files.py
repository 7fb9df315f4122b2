"""Writes are whole, wherever a path leads and whenever they end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sidetuning as st
from sidetuning.files import (
    atomic_write,
    check_signed,
    decode_text,
    held_folder,
    read_bytes,
    read_json,
    safetensors_header,
    signed,
    write_json,
    write_text,
)


def test_links_stay_and_devices_are_written_to(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    write_text("/dev/null", "nothing")
    assert Path("/dev/null").is_char_device()


def test_a_write_that_fails_leaves_what_was(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_text(file, "old")
    with pytest.raises(RuntimeError), atomic_write(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_what_killed_writers_left_is_removed_and_what_others_write_stays(tmp_path: Path) -> None:
    script = "import os, sys; from sidetuning.files import atomic_write\n"
    script += "with atomic_write(sys.argv[1]) as t: t.write_text('half'); os._exit(9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    (left,) = tmp_path.iterdir()
    with atomic_write(tmp_path / "a") as mine:
        mine.write_text("whole")
        assert not left.exists()
        with atomic_write(tmp_path / "b") as another:
            another.write_text("b")
        assert mine.exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"a": 1}', "'b'"),
        ('{"a": "1", "b": []}', "'a'"),
        ('{"a": 1, "b": [1]}', "'b'"),
        ('{"a": 1, "b": [], "c": ["x", 2]}', "'c'"),
        ('{"a": true, "b": []}', "'a'"),
        ('{"a": 1, "b": [], "d": "red"}', "'d'"),
    ],
)
def test_json_of_another_form_is_one_sentence(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "x.json").write_text(text)
    schema = {"a": int, "b": [str], "c?": (str, dict), "d?": {"green", 5}}
    with pytest.raises(st.ArtifactError, match=f"{place}.*; fetch it again"):
        read_json(tmp_path / "x.json", schema, "fetch it again")
    write_json(tmp_path / "x.json", good := {"a": 1, "b": ["x"], "c": ["x", {}], "d": "green", "more": 1})
    assert read_json(tmp_path / "x.json", schema, "") == good
    assert os.listdir(tmp_path) == ["x.json"]  # noqa: PTH208


def test_a_folder_has_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; from sidetuning.files import held_folder\n"
    script += "with held_folder(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with (
            pytest.raises(st.ArtifactError, match=r"another process works in .*run; wait"),
            held_folder(tmp_path / "run"),
        ):
            raise AssertionError
        # Processes of one launch.
        monkeypatch.setenv("RANK", "1")
        with held_folder(tmp_path / "run"):
            pass
        monkeypatch.delenv("RANK")
        other.kill()
    with held_folder(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []


def test_texts_have_their_byte_order_mark_or_none() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        text = "ü猫".encode(encoding)
        assert decode_text(b"\xff\xfe" + text if encoding == "utf-16-le" else text) == "ü猫"
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"\xfc")


def test_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "link", tmp_path):
        with pytest.raises(OSError, match="it is no file"):
            read_bytes(path)
        with pytest.raises(st.ArtifactError, match="is not JSON"):
            read_json(path, {}, "")


def test_what_is_signed_is_read_again_whatever_its_keys_are(tmp_path: Path) -> None:
    """Numbers as keys are texts in JSON, and sorted as such."""
    content = {"rows": {2: "b", 10: "a"}, "pair": (1, 2)}
    write_json(tmp_path / "file.json", signed(content))
    read = check_signed(read_json(tmp_path / "file.json", {}, "mend"), "file.json", "mend")
    assert read == {"rows": {"2": "b", "10": "a"}, "pair": [1, 2]}


def test_a_header_without_texts_has_none() -> None:
    for text in (b"{}", b'{"__metadata__": null}'):
        assert safetensors_header(len(text).to_bytes(8, "little") + text) == {}
