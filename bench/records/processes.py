"""What a second process, and a second host, are worth: seconds of caching and of training a side as large as a ViT.

One process, two on one host and two on two hosts take turns, each process on one thread. The hosts are network
namespaces of this machine, joined by a virtual cable: `torchrun --nnodes 2` crosses a network stack as machines do.
They need Linux, `ip` of iproute2 and root; without these the row is left out, and said.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import Record, public, read, recorded, write

PORT = 29577


@dataclass(frozen=True)
class Settings:
    """Seconds of caching and of training on one process, two, and two hosts.

    Attributes:
        model: name of a timm model, with random weights.
        images: images to cache and to learn from.
        batch: images of a step, over all processes.
        steps: training steps that are timed.
        rounds: how often the layouts take turns.
    """

    model: str = "vit_tiny_patch16_224"
    images: int = 256
    batch: int = 32
    steps: int = 8
    rounds: int = 3


def cannot_join() -> str | None:
    """Why two hosts cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "there is no command ip (package iproute2)"
    if subprocess.run(["ip", "netns", "add", "sidetuning-try"], capture_output=True).returncode:
        return "this user may not make network namespaces"
    subprocess.run(["ip", "netns", "del", "sidetuning-try"], check=True)
    return None


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a virtual cable, 10.77.0.1 and 10.77.0.2; their names."""
    names = [f"sidetuning-{os.getpid()}-{k}" for k in (1, 2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for k, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{k}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def launched(script: list[str], processes: int = 1, hosts: tuple[str, ...] = ()) -> str:
    """Run a script under torchrun, on this host or a process on each of `hosts`; what all printed.

    Raises:
        RuntimeError: a process failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    commands = [[*torchrun, "--standalone", "--nproc_per_node", str(processes), *script]]
    if hosts:
        environment["GLOO_SOCKET_IFNAME"] = environment["TP_SOCKET_IFNAME"] = "cable"
        about = ["--nnodes", str(len(hosts)), "--nproc_per_node", "1", "--master_addr", "10.77.0.1"]
        commands = [
            ["ip", "netns", "exec", host, *torchrun, *about, "--master_port", str(PORT), "--node_rank", str(k), *script]
            for k, host in enumerate(hosts)
        ]
    running = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    said = [process.communicate() for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(errors[-2000:] for _, errors in said))
    return "".join(out for out, _ in said)


def one(given: Settings, number: int, processes: int = 1, hosts: tuple[str, ...] = ()) -> dict[str, Any]:
    """What one layout took."""
    worker = Path(__file__).parent / "jobs" / "shared_batches.py"
    numbers = [given.images, given.batch, given.steps, number]
    said = launched([str(worker), given.model, *map(str, numbers)], processes, hosts)
    return json.loads(next(line for line in said.splitlines() if line.startswith("RESULT")).removeprefix("RESULT"))


def run(given: Settings) -> None:
    """Measure and record."""
    if recorded("processes", public(given)):
        return
    missing = cannot_join()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("one", "two", *([] if missing else ["hosts"]))}
    for number in range(given.rounds):
        rows["one"].append(one(given, 10 * number))
        rows["two"].append(one(given, 10 * number + 1, processes=2))
        if not missing:
            with two_hosts() as hosts:
                rows["hosts"].append(one(given, 10 * number + 2, hosts=hosts))
        print({name: {k: found[-1][k] for k in ("caching", "training")} for name, found in rows.items()}, flush=True)
    ratios = {
        name: {
            what: [a[what] / b[what] for a, b in zip(rows["one"], found, strict=True)]
            for what in ("caching", "training")
        }
        for name, found in rows.items()
        if name != "one"
    }
    apart = {
        what: max(abs(row[what] / rows["one"][0][what] - 1) for found in rows.values() for row in found)
        for what in ("features", "weights", "loss")
    }
    content = {"rows": rows, "ratios": ratios, "apart": apart, "left_out": missing, "threads": 1}
    write("processes", content, given)


def table(given: Settings) -> str:
    """How many times as fast, medians with the least and the most."""
    content = read("processes")
    names = {"two": "two processes on one host", "hosts": "two hosts, a process on each"}
    lines = ["| over one process | caching | training |", "| --- | ---: | ---: |"]
    for name, found in content["ratios"].items():
        cells = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in found.values()]
        lines.append(f"| {names[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


PROCESSES = Record(Settings(), run, table)
