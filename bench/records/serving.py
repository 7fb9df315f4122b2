"""What serving costs on two cores: requests per second and latency at 1, 10 and 100 tasks, over HTTP on loopback.

Four servers with one and the same HTTP stack and base (a ViT-Tiny; its weights, which are random, do not matter here):

- batched: `sidetuning serve`;
- single: `sidetuning serve --max-batch 1`;
- processes: a process of `sidetuning serve` per task (not at 100 tasks, which do not fit into memory);
- peft: LoRA adapters of PEFT on the same base, and a pass for each task of a batch.

Two loads, of clients that ask again as soon as they are answered: each request asks one task, drawn at random, or all
tasks about one image. A time ends when all that was asked in it is answered. The servers of one number of tasks run
side by side and are asked in turn; the clients share the two cores with them.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

import sidetuning as st
from record import Record, read, write
from sidetuning.terminal import say

BASE = "timm:vit_tiny_patch16_224"
TAPS = ("blocks.3", "blocks.7", "blocks.11")
SERVERS = ("batched", "single", "processes", "peft")
LOADS = ("one", "all")
PEFT = Path(__file__).with_name("serving_peft.py")


@dataclass(frozen=True)
class Settings:
    """Requests per second and latency of four servers at several numbers of tasks."""

    tasks: tuple[int, ...] = (1, 10, 100)
    """Numbers of tasks."""
    rounds: int = 3
    """Times that each server is asked with each load."""
    seconds: float = 6.0
    """Duration of each time."""
    clients: int = 16
    """Clients that ask at a time."""
    most_processes: int = 10
    """Processes of one task each at most."""


def make_model(folder: Path, count: int) -> Path:
    """A model folder with tasks of ten classes, on one base of random weights; returns it."""
    weights = folder / "base.safetensors"
    if not weights.exists():
        with st.seeded(0):
            net: Any = st.load_base(BASE, pretrained=False).net
        save_file(net.state_dict(), weights)
    model = st.SideTuner(st.load_base(BASE, taps=TAPS, weights=weights))
    for i in range(count):
        model.add_task(f"task-{i}", side="ladder", head=10, seed=i)
    path = folder / f"model-{count}"
    model.save(path)
    return path


@contextmanager
def process(arguments: Sequence[str], threads: int, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server and its address, at a free port by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *arguments, f"--port={port}"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.kill()


def wait_for(addresses: Sequence[str]) -> None:
    """Return when all servers answer."""
    import httpx

    for address in addresses:
        for _ in range(3000):
            try:
                if httpx.get(f"{address}/readyz", timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        else:
            raise TimeoutError(address)


def picture() -> str:
    """A JPEG of 256 x 256 pixels in base64."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


async def ask(addresses: Sequence[str], load: str, count: int, given: Settings, seed: int) -> tuple[list[float], float]:
    """Latencies of all requests, and the time until the last was answered, in s; `addresses` has one a task, or one."""
    import httpx

    image, latencies = picture(), list[float]()
    began = time.perf_counter()
    until = began + given.seconds

    async def one(web: httpx.AsyncClient, address: str, tasks: list[str] | None) -> None:
        question: dict[str, Any] = {"inputs": [{"image": image}], "top": 1}
        reply = await web.post(f"{address}/predict", json=question if tasks is None else {**question, "tasks": tasks})
        assert reply.status_code == 200, reply.text

    async def client(number: int) -> None:
        draw = random.Random(1000 * seed + number)
        async with httpx.AsyncClient(timeout=600) as web:
            while time.perf_counter() < until:
                started, task = time.perf_counter(), draw.randrange(count)
                if load == "one":
                    await one(web, addresses[task % len(addresses)], [f"task-{task}"])
                else:
                    # Of a process per task, all are asked at once.
                    await asyncio.gather(*(one(web, address, None) for address in addresses))
                latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(client(number) for number in range(given.clients)))
    return latencies, time.perf_counter() - began


def memory(server: subprocess.Popen[bytes]) -> float:
    """Megabytes of a process that it shares with no other."""
    text = Path(f"/proc/{server.pid}/smaps_rollup").read_text()
    values = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return sum(int(values[name]) for name in ("Private_Clean", "Private_Dirty")) / 1024


def commands(name: str, count: int, folder: Path, model: Path) -> list[list[str]]:
    """The command of a server, or one per task."""
    serve = ["-m", "sidetuning", "serve"]
    options = ["--quiet", "--watch=0", "--timeout=600", "--max-waiting=100000"]
    if name == "processes":
        return [[*serve, str(model / "tasks" / f"task-{i}"), *options] for i in range(count)]
    if name == "peft":
        return [[str(PEFT), str(folder / "base.safetensors"), f"--tasks={count}"]]
    return [[*serve, str(model), *options, *(["--max-batch=1"] if name == "single" else [])]]


def measure(count: int, folder: Path, given: Settings) -> list[dict[str, Any]]:
    """All servers at one number of tasks, asked in turn."""
    model = make_model(folder, count)
    names = [name for name in SERVERS if name != "processes" or count <= given.most_processes]
    found: dict[tuple[str, str], list[tuple[list[float], float]]] = {
        (name, load): [] for name in names for load in LOADS
    }
    sizes: dict[str, float] = {}
    with ExitStack() as stack:
        places: dict[str, list[tuple[str, subprocess.Popen[bytes]]]] = {}
        for name in names:
            threads = 1 if name == "processes" and count > 1 else 2
            each = commands(name, count, folder, model)
            places[name] = [stack.enter_context(process(command, threads)) for command in each]
            wait_for([address for address, _ in places[name]])
        addresses = {name: [address for address, _ in servers] for name, servers in places.items()}
        for turn in range(given.rounds + 1):
            for (name, load), rounds in found.items():
                short = given if turn else Settings(seconds=1.0, clients=4)
                latencies, spent = asyncio.run(ask(addresses[name], load, count, short, turn))
                # The first turn warms up.
                rounds += [(latencies, spent)] if turn else []
                say(f"{count} tasks, {name}, {load}: {len(latencies) / spent:.1f} requests a second")
        sizes = {name: sum(memory(server) for _, server in servers) for name, servers in places.items()}
    return [
        {"tasks": count, "server": name, "load": load, "megabytes": round(sizes[name]), **numbers(rounds)}
        for (name, load), rounds in found.items()
    ]


def numbers(rounds: Sequence[tuple[list[float], float]]) -> dict[str, Any]:
    """The median over the rounds of requests per second, and the latencies of all rounds."""
    every = sorted(latency for latencies, _ in rounds for latency in latencies)
    rates = [len(latencies) / spent for latencies, spent in rounds]
    at = {f"p{p}_ms": round(1000 * every[min(len(every) - 1, p * len(every) // 100)], 1) for p in (50, 99)}
    return {"per_second": round(statistics.median(rates), 2), "rates": [round(r, 2) for r in rates], **at}


def run(given: Settings) -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for count in given.tasks for row in measure(count, Path(folder), given)]
    about = {"base": BASE, "side": "ladder", "rounds": given.rounds, "seconds": given.seconds, "clients": given.clients}
    write("serving", {**about, "rows": rows})


def table(given: Settings) -> str:
    """The table of docs/serve.md."""
    names = {"one": "one task a request", "all": "all tasks a request"}
    lines = ["| tasks | load | server | requests a second | p50, ms | p99, ms | memory, MB |", "|" + " --- |" * 7]
    for row in read("serving")["rows"]:
        cells = [row["tasks"], names[row["load"]], row["server"], f"{row['per_second']:.2g}"]
        cells += [f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", f"{row['megabytes']:,}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


SERVING = Record(Settings(), run, table)
