"""Files damaged at random, as disks, networks and strangers do it, and what their readers make of them.

Mutation number i is a function of (seed, i) alone. Each runs in a worker process whose audit hook sees every file that
Python opens for writing, every unpickling, every program that is started; the worker's memory is watched.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sidetuning as st
from campaign_subjects import SUBJECTS, Subject
from sidetuning.files import json_text, signed
from sidetuning_bench.runs import peak_memory_mb

# More than what a worker holds before, in MB and bytes.
MEMORY_MB = 1024
ADDRESSES = 3 << 30
SECONDS = 60
LONGEST = 1500
# A file beside the damaged folder, which nobody may write to.
VICTIM = "victim"
# Of the Hub's client and of ONNX Runtime, wherever a file comes from.
CACHES = str(Path.home() / ".cache")
# Seldom, since they take the longest.
RARE = {"named base": 8, "weights": 20, "parquet": 2, "resume": 2, "finished": 2}
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "x" * 10_000, "../../up", "/dev/zero", "/nowhere/file", "a\x00b", "[/x]", "\x1b]0;owned\x07", "O"),
    *([], {}, [None], [1, 2, 3], {"a": 1}, ["mlp", {}], ["mlp", {"hidden": 10**7}], [["a"]], ["custom", {}]),
)
DEEP = ("[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000)
JUNK = (*DEEP, "1" * 5000, "", "null", "[]", "{}", '"x"', "\ufeff{}")


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


# ---- mutations of bytes: (content, rng) -> content


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4, 32))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice((1, 4, 8, 64))
    new = rng.choice((bytes(size), b"\xff" * size, b"\x7f" * size, rng.randbytes(size)))
    return data[:at] + new + data[at + size :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 7, 1000))) + data[at:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + rng.choice((1, 16, 4096))] * 2 + data[at:]


def swap(data: bytes, rng: random.Random) -> bytes:
    half = len(data) // 2
    size = rng.randint(1, max(1, half))
    return data[half : half + size] + data[size:half] + data[:size] + data[half + size :]


def zeros(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(len(data) - at)


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (flip, flip, overwrite, cut, insert, repeat, swap, zeros)
}

# ---- mutations of JSON


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed_json(content: Any, rng: random.Random) -> Any:
    """One value or key of JSON is another, or gone."""
    content = json.loads(json.dumps(content))
    found = list(places(content))
    if not found:
        return rng.choice(VALUES)
    path = rng.choice(found)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    kind = rng.choice(("value", "value", "value", "drop", "rename", "near", "swap"))
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(key) + rng.choice(("x", " ", ""))[::-1]] = holder.pop(key)
        holder["unknown"] = 1
    elif kind == "near":
        holder[key] = near(holder[key], rng)
    elif kind == "swap":
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    return content


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return type(value)(value * rng.choice((-1, 2, 10**6, 10**9)) + rng.choice((0, 1)))
    if isinstance(value, str):
        return rng.choice((value[::-1], value + "x", value[1:], value.upper(), "../" + value))
    if isinstance(value, list):
        return rng.choice((value[::-1], value * 2, value[1:], value * 1000))
    return {**value, "unknown": 1} if isinstance(value, dict) else rng.choice(VALUES)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The header of a safetensors file, and what follows it."""
    size = int.from_bytes(data[:8], "little")
    try:
        return json.loads(data[8 : 8 + size]), data[8 + size :]
    except ValueError:
        return None


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def resigned(content: Any) -> Any:
    return signed(content) if isinstance(content, dict) and "sha256" in content else content


def mutate_header(data: bytes, rng: random.Random, sign: bool) -> bytes:
    """A safetensors file with another header, or another text of ours within it."""
    header, rest = header_of(data) or ({}, data)
    text = header.get("__metadata__", {}).get("sidetuning")
    if text is None or rng.random() < 0.3:
        return with_header(changed_json(header, rng), rest)
    content = changed_json(json.loads(text), rng)
    header["__metadata__"]["sidetuning"] = json.dumps(resigned(content) if sign else content)
    return with_header(header, rest)


def mutate_file(file: Path, rng: random.Random, sign: bool) -> str:
    """Damage one file; returns how."""
    data = file.read_bytes()
    if rng.random() < 0.08:
        return replace_file(file, rng)
    if file.suffix in (".safetensors", ".pt") and rng.random() < 0.5 and data[:2] != b"PK":
        file.write_bytes(mutate_header(data, rng, sign))
        return "header"
    if file.suffix in (".json", ".jsonl", "") and data[:1] in (b"{", b"[") and rng.random() < 0.75:
        if rng.random() < 0.1:
            file.write_text(rng.choice(JUNK))
            return "junk"
        lines = data.split(b"\n")[:-1] if file.suffix == ".jsonl" else [data]
        k = rng.randrange(len(lines))
        content = changed_json(json.loads(lines[k]), rng)
        lines[k] = (json.dumps(resigned(content) if sign else content)).encode()
        file.write_bytes(b"\n".join(lines) + b"\n")
        return "json"
    if not data:
        file.write_bytes(rng.randbytes(10))
        return "filled"
    name = rng.choice(list(BYTES))
    file.write_bytes(BYTES[name](data, rng))
    return name


def replace_file(file: Path, rng: random.Random) -> str:
    """Something else in place of a file."""
    kind = rng.choice(("gone", "empty", "folder", "link", "device", "loop", "pipe", "pickle", "big"))
    file.unlink()
    if kind == "pipe" and file.parent.name == "refs":
        # The Hub's client itself would wait for it.
        kind = "gone"
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind in ("link", "device", "loop"):
        # Beside the folder, and never a file that matters: a reader that writes through it would destroy it.
        victim = next(parent for parent in file.parents if (parent / VICTIM).exists()) / VICTIM
        file.symlink_to({"link": victim, "device": "/dev/zero", "loop": file.name}[kind])
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "pickle":
        file.write_bytes(b"cos\nsystem\n(S'touch /tmp/sidetuning-campaign-owned'\ntR.")
    elif kind == "big":
        with file.open("wb") as opened:
            # Without a block on the disk.
            opened.truncate(1 << 33)
    return kind


def mutate(folder: Path, rng: random.Random) -> tuple[str, bool]:
    """Damage a folder; returns how, and whether it was signed anew, as its maker can do it."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    file = rng.choice(files)
    sign = rng.random() < 0.25
    how = mutate_file(file, rng, sign)
    if sign and file.name == "side.safetensors" and how == "header":
        # Both texts of a task agree.
        header = header_of(file.read_bytes())
        text = header and header[0].get("__metadata__", {}).get("sidetuning")
        with contextlib.suppress(ValueError, TypeError):
            (file.parent / "side.json").write_text(json_text(json.loads(text)))
    name = file.relative_to(folder)
    return f"{how} of {name}{', signed anew' if sign and how in ('json', 'header') else ''}", sign


# ---- workers

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
            answer = subject.read(folder)
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
        healthy[name] = folder, subject.read(copy)
        assert subject.read(copy) == healthy[name][1], name
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


def run(numbers: range, seed: int, keep: Callable[[Verdict], None]) -> None:
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
