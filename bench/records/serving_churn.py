"""Two servers of one model folder under load, while its tasks come, change and go, and one server is killed.

Each version of a task answers a number of its own, and every answer is compared with the version that it names. A
client that loses its server asks the other one. Counted are wrong answers, requests that neither server answered, and
the memory of the server that lives, at the start and at the end.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sidetuning as st
from record import Record, read, write
from serving import picture, process, wait_for
from sidetuning import folder
from sidetuning.artifacts import tensors_sha256

BASE = "resnet44-cifar10"


@dataclass(frozen=True)
class Settings:
    """Wrong and lost answers while tasks come and go and a server is killed."""

    seconds: float = 600.0
    """Duration of the load."""
    clients: int = 8
    """Clients that ask at a time, the half for all tasks and the half for one."""
    pause: float = 0.5
    """Seconds between two changes of the folder."""


@dataclass
class Seen:
    """What the clients count."""

    answers: int = 0
    wrong: int = 0
    lost: int = 0
    retried: int = 0
    versions: set[str] = field(default_factory=set)


class Writer:
    """Saves, replaces, renames and removes tasks of a model folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.base = path, st.load_base(BASE)
        self.numbers: dict[str, float] = {}
        self.draw, self.changes = random.Random(0), 0
        for i in range(5):
            self.save(f"task-{i}")

    def save(self, name: str) -> None:
        """Save a task that answers a number that no task answered before."""
        model = st.SideTuner(self.base)
        branch = model.add_task(name, side=None, merge="base-only", head=1, problem="numbers", seed=0)
        number = float(len(self.numbers))
        with torch.no_grad():
            for parameter in branch.head.parameters():
                parameter.fill_(number if parameter.ndim == 1 else 0.0)
        # Known before anybody can be answered.
        self.numbers[tensors_sha256(branch)[:12]] = number
        model.save_task(name, self.path / "tasks" / name)

    def change(self) -> None:
        """One change; "task-0" is replaced and never goes."""
        found = [name for name in folder.saved_tasks(self.path) if name != "task-0"]
        kind = self.draw.choice(("replace", "replace", "add", "remove", "rename"))
        name, new = self.draw.choice([*found, "task-0"]), f"task-{self.draw.randrange(5, 10_000)}"
        if kind == "replace" or len(found) < 2:
            self.save(name)
        elif kind == "add" and len(found) < 10:
            self.save(new)
        elif kind == "rename" and name != "task-0" and new not in found:
            folder.rename(self.path, name, new)
        else:
            folder.remove(self.path, self.draw.choice(found))
        self.changes += 1


async def ask(addresses: list[str], numbers: dict[str, float], given: Settings) -> Seen:
    """Ask until the time is over."""
    import httpx

    seen, until = Seen(), time.monotonic() + given.seconds
    inputs = [{"image": picture()}]

    async def client(number: int) -> None:
        question: dict[str, Any] = {"inputs": inputs} if number % 2 else {"inputs": inputs, "tasks": ["task-0"]}
        async with httpx.AsyncClient(timeout=60) as web:
            while time.monotonic() < until:
                for attempt in range(2):
                    try:
                        reply = await web.post(f"{addresses[(number + attempt) % 2]}/predict", json=question)
                        break
                    except httpx.TransportError:
                        # It was killed, or is being started again.
                        seen.retried += 1
                else:
                    seen.lost += 1
                    continue
                if reply.status_code != 200:
                    seen.lost += 1
                    continue
                content = reply.json()
                for task, answers in content["answers"][0].items():
                    version = content["versions"][task]
                    seen.answers += 1
                    seen.wrong += answers != [{"label": "0", "value": numbers.get(version)}]
                    seen.versions.add(version)

    await asyncio.gather(*(client(number) for number in range(given.clients)))
    return seen


def resident(server: subprocess.Popen[bytes]) -> float:
    """Megabytes of memory of a process."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")) / 1024


def run(given: Settings) -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        writer = Writer(Path(place) / "model")
        command = ["-m", "sidetuning", "serve", str(writer.path), "--quiet", "--watch=0.2"]
        servers = [stack.enter_context(process(command, 1)) for _ in range(2)]
        addresses = [address for address, _ in servers]
        wait_for(addresses)
        stop, memory = threading.Event(), list[float]()

        def disturb() -> None:
            started, killed = time.monotonic(), False
            while not stop.wait(given.pause):
                writer.change()
                passed = time.monotonic() - started
                if passed > given.seconds / 10:
                    # Warm by then.
                    memory.append(resident(servers[0][1]))
                if not killed and passed > given.seconds / 2:
                    servers[1][1].kill()
                    killed = True
                    port = addresses[1].rpartition(":")[2]
                    servers[1] = stack.enter_context(process(command, 1, int(port)))

        thread = threading.Thread(target=disturb)
        thread.start()
        seen = asyncio.run(ask(addresses, writer.numbers, given))
        stop.set()
        thread.join()
    tenth = max(1, len(memory) // 10)
    write(
        "serving-churn",
        {
            "seconds": given.seconds,
            "clients": given.clients,
            "changes": writer.changes,
            "servers_killed": 1,
            "answers": seen.answers,
            "versions_seen": len(seen.versions),
            "wrong": seen.wrong,
            "lost": seen.lost,
            "asked_again": seen.retried,
            "megabytes_start": round(sum(memory[:tenth]) / tenth, 1),
            "megabytes_end": round(sum(memory[-tenth:]) / tenth, 1),
        },
    )


def table(given: Settings) -> str:
    """The sentence of docs/serve.md."""
    found = read("serving-churn")
    return (
        f"{found['seconds']:.0f} s, {found['changes']:,} changes of the folder, one of two servers killed and started "
        f"again: {found['answers']:,} answers of {found['versions_seen']:,} versions of tasks, {found['wrong']} of "
        f"them wrong; {found['lost']} requests lost ({found['asked_again']} were asked again at the other server). "
        f"The server that lived took {found['megabytes_start']:.0f} MB at first and "
        f"{found['megabytes_end']:.0f} MB at the end."
    )


SERVING_CHURN = Record(Settings(), run, table)
