"""Files damaged at random, as disks, networks and strangers do it, and what their readers make of them.

Mutation number i is a function of (seed, i) alone. Each runs in a worker process whose audit hook sees every file that
Python opens for writing, every unpickling, every program that is started; the worker's memory is watched.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sidetuning as st
from campaign_damage import VICTIM, mutate
from campaign_subjects import SUBJECTS, Subject, plain
from sidetuning_bench.runs import peak_memory_mb

# More than what a worker holds before, in MB and bytes.
MEMORY_MB = 1024
ADDRESSES = 3 << 30
SECONDS = 60
LONGEST = 1500
# Of the Hub's client and of ONNX Runtime, wherever a file comes from.
CACHES = str(Path.home() / ".cache")
# Seldom, since they take the longest.
RARE = {"named base": 8, "weights": 20, "parquet": 2, "resume": 2, "finished": 2}


@dataclass(frozen=True)
class Verdict:
    """What became of a damaged file.

    Attributes:
        outcome: "refused", "same", "other" (allowed), or what is wrong.
        text: of the error, or where it went wrong.
    """

    number: int
    subject: str
    mutation: str
    outcome: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("refused", "same", "other")


WATCHED: dict[str, Any] = {"folder": None, "seen": []}
EVENTS = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")
MOVES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what a reader must not do."""
    folder = WATCHED["folder"]
    if folder is None:
        return
    if event in EVENTS:
        WATCHED["seen"].append(f"{event} {arguments[:2]}")
    elif event in MOVES or (event == "open" and (writes(arguments))):
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            # Relative to an open folder, where its number is given.
            near = f"/proc/self/fd/{arguments[-1]}" if event in ("os.remove", "os.rmdir") and arguments[-1] > 0 else ""
            name = Path(near, os.fsdecode(path))
            # A link that is removed or replaced is a file of the folder.
            real = os.path.realpath(name) if event == "open" else str(Path(os.path.realpath(name.parent), name.name))
            if not real.startswith((folder, "/dev/null", "/dev/zero", CACHES)):
                WATCHED["seen"].append(f"{event} {real}")


def writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if isinstance(flags, int) else "r" not in (mode or "r")


def judge(number: int, seed: int, healthy: dict[str, tuple[Path, Any]], box: Path) -> Verdict:
    """Damage one subject and read it."""
    rng = random.Random(f"{seed} {number}")
    names = [name for name in SUBJECTS if number % RARE.get(name, 1) == 0]
    name = rng.choice(names)
    subject, (source, right) = SUBJECTS[name], healthy[name]
    folder = box / "files"
    remove(folder)
    shutil.copytree(source, folder)
    how, sign = mutate(folder, rng)
    before = memory()
    WATCHED.update(folder=str(folder.resolve()), seen=[])
    try:
        outcome, text = read(subject, folder, right, sign)
    finally:
        WATCHED["folder"] = None
    peak = peak_memory_mb() or 0
    if (box / VICTIM).read_text() != VICTIM:
        WATCHED["seen"].append(f"wrote to {VICTIM}")
        (box / VICTIM).write_text(VICTIM)
    if WATCHED["seen"]:
        outcome, text = "reached outside", "; ".join(WATCHED["seen"][:3])
    elif peak - before > MEMORY_MB:
        outcome, text = "too much memory", f"{peak - before:.0f} MB; {outcome} {text}"
    return Verdict(number, name, how, outcome, text)


def memory() -> float:
    """What this process holds, in MB; peaks count from here on."""
    peak_memory_mb(anew=True)
    return peak_memory_mb() or 0


def read(subject: Subject, folder: Path, right: Any, sign: bool) -> tuple[str, str]:
    """The outcome of reading, and its text."""
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = plain(subject.read(folder))
    except st.SideTuningError as error:
        text = str(error)
        one = text.strip() and "\n" not in text and len(text) < LONGEST and "Traceback" not in text
        return ("refused" if one else "no sentence"), text[:LONGEST]
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-3:]
        lines = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where))
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} ({lines})"
    if answer == right:
        return "same", ""
    return ("other", "") if not subject.checked or sign else ("wrong answer", str(answer)[:200])


def remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def prepare(root: Path) -> dict[str, tuple[Path, Any]]:
    """Healthy files of every subject, and what they say."""
    healthy = {}
    for name, subject in SUBJECTS.items():
        folder, copy = root / name.replace(" ", "-"), root / "copy"
        folder.mkdir(parents=True)
        subject.make(folder)
        shutil.copytree(folder, copy)
        healthy[name] = folder, plain(subject.read(copy))
        assert plain(subject.read(copy)) == healthy[name][1], name
        shutil.rmtree(copy)
    return healthy


def work(seed: int, pipe: Any) -> None:
    """A worker: judges the numbers that come through the pipe."""
    import torch

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as root:
        healthy = prepare(Path(root) / "healthy")
        box = Path(root) / "box"
        box.mkdir()
        (box / VICTIM).write_text(VICTIM)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))
        sys.addaudithook(watch)
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            pipe.send(judge(number, seed, healthy, box))


def run(numbers: Iterable[int], seed: int, keep: Callable[[Verdict], None]) -> None:
    """Judge mutations one after another; a worker that dies or hangs is a failure, and another one goes on."""
    spawn = multiprocessing.get_context("spawn")
    worker, pipe = None, None
    for number in numbers:
        if worker is None:
            pipe, end = spawn.Pipe()
            worker = spawn.Process(target=work, args=(seed, end), daemon=True)
            worker.start()
            end.close()
            # It imports, and makes the healthy files.
            pipe.recv()
        assert pipe is not None
        pipe.send(number)
        try:
            if not pipe.poll(SECONDS):
                raise TimeoutError(f"no answer in {SECONDS} s")
            keep(pipe.recv())
        except (EOFError, OSError, TimeoutError) as error:
            worker.kill()
            worker.join()
            text = f"{error or 'ended'} (exit code {worker.exitcode})"
            rng = random.Random(f"{seed} {number}")
            name = rng.choice([name for name in SUBJECTS if number % RARE.get(name, 1) == 0])
            keep(Verdict(number, name, "", "hangs" if isinstance(error, TimeoutError) else "dies", text))
            worker = None
    if worker is not None and pipe is not None:
        pipe.send(None)
        worker.join()
