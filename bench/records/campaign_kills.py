"""Writers that are killed with SIGKILL at random, and must lose nothing and end where they would have ended.

Every writer works in a process that is forked here. Half of the kills come after a random time, half right at a random
file operation (open, rename, remove, fsync), where the windows are in which something could be lost.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from campaign_mutations import writes
from campaign_writers import WRITERS, Writer


@dataclass(frozen=True)
class Outcome:
    """What became of a writer that was killed.

    Attributes:
        kills: how often; 0 where it ended before.
        where: the moment of each kill.
        wrong: what is wrong, or nothing.
    """

    number: int
    writer: str
    kills: int
    where: str
    wrong: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.wrong)


class Counter:
    """Counts file operations of this process, and kills it at one of them."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.count, self.last = limit, 0, ""

    def hit(self, what: str) -> None:
        self.count += 1
        if self.count == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.truncate") or (event == "open" and writes(arguments)):
            self.hit(event)

    def watch(self) -> None:
        """From here on."""
        sync = os.fsync

        def synced(fd: Any) -> None:
            self.hit("before fsync")
            sync(fd)
            self.hit("after fsync")

        os.fsync = synced
        sys.addaudithook(self.hook)


def forked(function: Callable[[], Any], seconds: float | None = None, limit: int | None = None) -> tuple[str, Any]:
    """Call a function in a process of its own, which is killed after some seconds or at a file operation.

    Returns:
        "done" and (result, number of file operations), "killed" and None, or "failed" and a traceback.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        counter = Counter(limit)
        message: tuple[str, Any]
        with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            try:
                counter.watch()
                message = "done", (function(), counter.count)
            except BaseException:
                message = "failed", traceback.format_exc(limit=-6)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(message, pipe)
        os._exit(0)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    # Processes that it started end with it.
    for _ in range(600):
        try:
            os.killpg(child, 0)
        except (ProcessLookupError, PermissionError):
            break
        time.sleep(0.05)
    else:
        return "failed", "processes that it started go on"
    return pickle.loads(content) if content else ("killed", None)


@dataclass(frozen=True)
class Whole:
    """A writer that nobody killed: its answer, time and number of file operations."""

    answer: Any
    seconds: float
    operations: int


def whole(writer: Writer, folder: Path) -> Whole:
    """Let a writer end."""
    started = time.monotonic()
    state, found = forked(lambda: writer.work(folder))
    if state != "done":
        raise RuntimeError(f"fails without a kill: {found}")
    seconds = time.monotonic() - started
    state, answer = forked(lambda: writer.answer(folder))
    if state != "done":
        raise RuntimeError(f"has no answer: {answer}")
    return Whole(answer[0], seconds, found[1])


def judge(number: int, seed: int, name: str, right: Whole, prepared: Path, folder: Path) -> Outcome:
    """Kill a writer once or twice, and let it end."""
    rng, writer, where = random.Random(f"{seed} {number}"), WRITERS[name], []
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            limit, seconds = rng.randint(1, max(1, right.operations)), None
            where.append(f"at operation {limit} of {right.operations}")
        else:
            limit, seconds = None, rng.uniform(0, right.seconds)
            where.append(f"after {seconds:.3f} of {right.seconds:.3f} s")
        state, found = forked(lambda: writer.work(folder), seconds, limit)
        if state == "failed":
            return Outcome(number, name, len(where), "; ".join(where), f"going on: {found}")
        if state == "done":
            where.pop()
            continue
        state, found = forked(lambda: writer.holds(folder))
        if state != "done":
            return Outcome(number, name, len(where), "; ".join(where), f"lost: {found}")
    moments = "; ".join(where)
    for what in (writer.work, writer.answer):
        state, found = forked(lambda what=what: what(folder))  # type: ignore[misc]
        if state != "done":
            return Outcome(number, name, len(where), moments, f"going on: {found}")
    left = [str(file.relative_to(folder)) for file in folder.rglob(".*.tmp")]
    wrong = f"another end: {found[0]}" if found[0] != right.answer else f"left: {left}" if left else ""
    return Outcome(number, name, len(where), moments, wrong[:2000])


def warm_up() -> None:
    """Import here what every forked process would import again; no thread may start before a fork."""
    import accelerate  # noqa: F401
    import pandas  # noqa: F401

    from sidetuning.launch import default_accelerator

    default_accelerator()
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        weights = torch.nn.Parameter(torch.zeros(1))
        weights.grad = torch.ones(1)
        kind([weights], lr=0.1).step()
