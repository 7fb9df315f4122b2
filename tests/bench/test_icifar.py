"""iCIFAR on the command line, as a user runs it: what it writes, its errors, and that kills do not matter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sidetuning as st
from sidetuning_bench import compare
from sidetuning_bench import icifar as scenario
from sidetuning_bench.options import GridOptions, with_values

CLI = [sys.executable, "-m", "sidetuning.cli"]


def sidetuning(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=180, check=False)


def icifar(data: Path, out: Path, cache: Path, *more: object, tasks: int = 2, samples: int = 64) -> list[object]:
    given = ["bench", "icifar", "--data", data, "--out", out, "--cache", cache, "--tasks", tasks, "--samples", samples]
    return [*given, "--batch", 16, "--side", "mlp", "--init", "xavier", "--merge", "alpha", *more]


def hashes(run: Path) -> dict[str, str]:
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.rglob("side.safetensors")}


def one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, and one line on stderr that starts with the program's name."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("sidetuning: "), done.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def run(tiny_cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("icifar")
    done = sidetuning(*icifar(tiny_cifar, folder / "run", folder / "cache"))
    assert done.returncode == 0, done.stderr
    assert "classes-0-9" in done.stdout and "classes-10-19" in done.stdout and "average" in done.stdout
    return folder / "run"


def test_version() -> None:
    done = sidetuning("--version")
    assert done.returncode == 0 and done.stdout == f"sidetuning {st.__version__}\n"


def test_parts_lists_what_is_registered() -> None:
    done = sidetuning("parts")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0
    registries: dict[str, Any] = {"base": st.BASES, "side": st.SIDES, "merge": st.MERGES, "head": st.HEADS}
    for kind, registry in registries.items():
        assert lines[kind].split(", ") == registry.names()


def test_a_run_writes_what_it_did(run: Path) -> None:
    settings = json.loads((run / "run.json").read_text())
    assert settings["scenario"] == "icifar" and settings["settings"]["samples"] == 64
    assert settings["versions"]["sidetuning"] == st.__version__
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["task"], len(row["accuracy"])) for row in rows] == [("classes-0-9", 1), ("classes-10-19", 2)]
    assert all(0 <= a <= 1 for row in rows for a in row["accuracy"])
    assert json.loads((run / "matrix.json").read_text())
    for name in ("classes-0-9", "classes-10-19"):
        config = json.loads((run / "tasks" / name / "side.json").read_text())
        assert config["task"] == name and len(config["labels"]) == 10
    assert list((run / "resume").iterdir()) == []
    model = st.load(run)
    assert model.tasks == ["classes-0-9", "classes-10-19"]
    assert rows[1]["accuracy"][0] == rows[0]["accuracy"][0], "the first task was forgotten"


@pytest.mark.slow
def test_the_same_command_again_changes_nothing(run: Path, tiny_cifar: Path) -> None:
    before, metrics = hashes(run), (run / "metrics.jsonl").read_text()
    times = {f: f.stat().st_mtime_ns for f in run.rglob("side.*")}
    done = sidetuning(*icifar(tiny_cifar, run, run.parent / "cache"))
    assert done.returncode == 0, done.stderr
    assert len(before) == 2 and hashes(run) == before and (run / "metrics.jsonl").read_text() == metrics
    assert {f: f.stat().st_mtime_ns for f in run.rglob("side.*")} == times
    assert "classes-10-19" in done.stdout


@pytest.mark.slow
def test_another_seed_in_the_same_folder_is_refused(run: Path, tiny_cifar: Path) -> None:
    before = hashes(run)
    one_sentence(sidetuning(*icifar(tiny_cifar, run, run.parent / "cache", "--seed", 1)), "seed 0 (now 1)", "--out")
    assert hashes(run) == before


@pytest.mark.slow
def test_predict_asks_every_task(run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 40), (200, 30, 30)).save(tmp_path / "red.png")
    done = sidetuning("predict", run, tmp_path / "red.png")
    assert done.returncode == 0, done.stderr
    assert "classes-0-9" in done.stdout and "classes-10-19" in done.stdout
    (tmp_path / "broken.png").write_bytes(b"no image")
    one_sentence(sidetuning("predict", run, tmp_path / "broken.png"), "broken.png")


def test_photographs_are_turned_upright_and_deep_ones_keep_their_grey(tmp_path: Path) -> None:
    from sidetuning.transforms import decode_image

    seen = np.zeros((20, 40, 3), np.uint8)
    seen[:, :20] = 255  # white on its left
    turned, exif = Image.fromarray(np.rot90(seen).copy()), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned.save(tmp_path / "photo.png", exif=exif)
    image = decode_image(tmp_path / "photo.png")
    assert image.shape == (3, 20, 40) and image[:, :, :20].min() == 255 and image[:, :, 20:].max() == 0
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(tmp_path / "deep.png")
    assert (decode_image(tmp_path / "deep.png") == 128).all()


@pytest.mark.slow
def test_mistakes_are_one_sentence(run: Path, tiny_cifar: Path, tmp_path: Path) -> None:
    cache = run.parent / "cache"
    one_sentence(sidetuning(*icifar(tmp_path / "nowhere", tmp_path / "a", cache)), "nowhere", "does not exist")
    one_sentence(sidetuning(*icifar(tiny_cifar, tmp_path / "b", cache, "--merge", "alhpa")), "'alhpa'", "'alpha'")
    one_sentence(sidetuning(*icifar(tiny_cifar, tmp_path / "c", cache, tasks=0)), "--tasks must be 1 or more")
    for name, value, message in (
        ("batch", 0, "--batch must"),
        ("samples", 0, "--samples must"),
        ("lr", -1.0, "--lr must be above 0"),
        ("smoothing", 2.0, "--smoothing must be from 0 to 1"),
    ):
        with pytest.raises(st.SideTuningError, match=message):
            scenario.run(with_values(scenario.Settings(), {"out": str(tmp_path / "c"), name: value}))
    with pytest.raises(st.SideTuningError, match="--seeds must be 1 or more"):
        compare.run(compare.Settings(compare.OnIcifar(), run=GridOptions(str(tmp_path / "d"), seeds=0)))
    (tmp_path / "file").touch()
    one_sentence(sidetuning(*icifar(tiny_cifar, tmp_path / "file" / "run", cache)), "cannot be written to")


@pytest.mark.slow
def test_a_setting_that_the_method_does_not_read_cannot_be_given(tiny_cifar: Path, tmp_path: Path) -> None:
    done = sidetuning("bench", "icifar", "psp", "--data", tiny_cifar, "--out", tmp_path / "run", "--merge", "alpha")
    assert done.returncode == 2 and "--merge" in done.stderr and "icifar sidetune" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_row_that_was_lost_is_said(run: Path, tiny_cifar: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    done = sidetuning(*icifar(tiny_cifar, tmp_path / "run", run.parent / "cache"))
    one_sentence(done, "metrics.jsonl is damaged", "classes-0-9")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(run: Path, tiny_cifar: Path, small_disk: Callable[[str], Path]) -> None:
    """First the cache does not fit, then the tasks, then all goes on to the same weights as on a large disk."""
    folder = small_disk("300k")
    one_sentence(sidetuning(*icifar(tiny_cifar, folder / "run", folder / "cache")), "disk", "full", "resumes")
    small_disk("1300k")
    done = sidetuning(*icifar(tiny_cifar, folder / "run", folder / "cache"))
    assert done.returncode == 1 and (folder / "run" / "metrics.jsonl").exists()
    assert "the disk is full" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    small_disk("64m")
    done = sidetuning(*icifar(tiny_cifar, folder / "run", folder / "cache"))
    assert done.returncode == 0, done.stderr
    assert hashes(folder / "run") == hashes(run)


def newest(folder: Path) -> int:
    """When something below `folder` was last written, in ns."""
    times = []
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            times.append(file.stat().st_mtime_ns)
    return max(times, default=0)


@pytest.mark.slow
def test_five_kills_at_random_moments_do_not_change_the_result(tiny_cifar: Path, tmp_path: Path) -> None:
    more = ("--save-every", 0.0)
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed-cache"
    done = sidetuning(*icifar(tiny_cifar, whole, tmp_path / "cache", *more, samples=6400))
    assert done.returncode == 0, done.stderr
    rng, hit = random.Random(0), []
    for watched in (cache, *[killed / "resume"] * 4):  # while the base runs, then in the midst of training
        before = newest(watched)
        process = subprocess.Popen(
            [*CLI, *map(str, icifar(tiny_cifar, killed, cache, *more, samples=6400))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and newest(watched) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None:
            process.kill()
            hit.append(watched.name)
        process.wait()
    assert len(hit) == 5, f"only {len(hit)} of five kills hit a running process"
    done = sidetuning(*icifar(tiny_cifar, killed, cache, *more, samples=6400))
    assert done.returncode == 0, done.stderr
    assert len(hashes(whole)) == 2 and hashes(killed) == hashes(whole)
    assert json.loads((killed / "matrix.json").read_text()) == json.loads((whole / "matrix.json").read_text())
