"""Kills and damaged files: what must survive, and what must be refused in a sentence; for docs/reliability.md."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import campaign_mutations
from record import Record, read, write


@dataclass(frozen=True)
class Settings:
    """Kill writers and damage files, each at random; the same command resumes."""

    kills: int = 300
    """Number of kills."""
    mutations: int = 20_000
    """Number of damaged files."""
    seed: int = 0
    """Seed of both."""
    out: str = "runs/campaign"
    """Folder of the outcome of every one."""


def rows(file: Path) -> list[dict[str, Any]]:
    """What earlier calls found; a last line that was cut short is left out."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def keep(file: Path, row: dict[str, Any]) -> None:
    """Add an outcome."""
    with file.open("a") as opened:
        opened.write(json.dumps(row) + "\n")


def names() -> list[str]:
    """The order of the writers, in proportion to their shares."""
    from campaign_writers import WRITERS

    turns: Iterator[tuple[float, str]] = (
        ((k + 0.5) / writer.share, name) for name, writer in WRITERS.items() for k in range(writer.share)
    )
    return [name for _, name in sorted(turns)]


def kill(settings: Settings) -> None:
    """Kill the writers that were not killed yet."""
    # Forked processes must not ask the network, and threads do not survive a fork.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    import campaign_kills as kills
    from campaign_writers import WRITERS

    torch.set_num_threads(1)
    kills.warm_up()
    file = Path(settings.out) / "kills.jsonl"
    done, order = rows(file), names()
    whole: dict[str, tuple[kills.Whole, Path]] = {}
    with tempfile.TemporaryDirectory() as root:
        while sum(row["kills"] for row in done) < settings.kills:
            name = order[len(done) % len(order)]
            if name not in whole:
                writer, prepared = WRITERS[name], Path(root) / f"before-{len(whole)}"
                prepared.mkdir()
                kills.forked(lambda writer=writer, to=prepared: writer.prepare(to))  # type: ignore[misc]
                copy = Path(shutil.copytree(prepared, Path(root) / "whole"))
                whole[name] = kills.whole(writer, copy), prepared
                shutil.rmtree(copy)
            outcome = kills.judge(len(done), settings.seed, name, *whole[name], Path(root) / "box")
            done.append({**asdict(outcome), "failed": outcome.failed})
            keep(file, done[-1])


def mutate(settings: Settings) -> None:
    """Damage the files that were not damaged yet."""
    file = Path(settings.out) / "mutations.jsonl"
    done = {row["number"] for row in rows(file)}
    numbers = [number for number in range(settings.mutations) if number not in done]
    campaign_mutations.run(numbers, settings.seed, lambda v: keep(file, {**asdict(v), "failed": v.failed}))


def run(settings: Settings) -> None:
    """Do both, and write their counts."""
    out, started = Path(settings.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    # A process of its own: it forks.
    process = multiprocessing.get_context("spawn").Process(target=kill, args=(settings,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that kills others ended with {process.exitcode}")
    mutate(settings)
    record(settings, time.monotonic() - started)


def record(settings: Settings, seconds: float) -> None:
    """Write the counts of what was done so far."""
    out = Path(settings.out)
    kills, mutations = rows(out / "kills.jsonl"), rows(out / "mutations.jsonl")
    content = {
        "settings": {"seed": settings.seed},
        "kills": {
            "by_writer": counted(kills, "writer", lambda row: row["kills"]),
            "total": sum(row["kills"] for row in kills),
            "writers_ended": len(kills),
            "failed": [row for row in kills if row["failed"]],
        },
        "mutations": {
            "by_subject": {
                name: Counter(row["outcome"] for row in mutations if row["subject"] == name)
                for name in sorted({row["subject"] for row in mutations})
            },
            "total": len(mutations),
            "failed": [row for row in mutations if row["failed"]],
        },
        "seconds_of_last_call": round(seconds),
    }
    write("campaign", content)


def counted(found: list[dict[str, Any]], key: str, amount: Any) -> dict[str, int]:
    """Sums by the value of a key."""
    sums: Counter[str] = Counter()
    for row in found:
        sums[row[key]] += amount(row)
    return dict(sums)


def table(settings: Settings) -> str:
    """Both tables of the document."""
    found = read("campaign")
    kills, mutations = found["kills"], found["mutations"]
    failed = Counter(row["writer"] for row in kills["failed"])
    lines = ["| writer | SIGKILLs | lost, or another end |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {count} | {failed[name]} |" for name, count in kills["by_writer"].items()]
    lines += [f"| **all** | {kills['total']} | {len(kills['failed'])} |", ""]
    wrong = Counter(row["subject"] for row in mutations["failed"])
    lines += ["| files | damaged | refused | same answer | read otherwise | wrong |", f"| --- |{' ---: |' * 5}"]
    sums: Counter[str] = Counter()
    for name, counts in mutations["by_subject"].items():
        kinds = [counts.get(kind, 0) for kind in ("refused", "same", "other")]
        sums.update(counts)
        lines.append(f"| {name} | {sum(counts.values())} | {' | '.join(map(str, kinds))} | {wrong[name]} |")
    kinds = [sums[kind] for kind in ("refused", "same", "other")]
    lines.append(f"| **all** | {mutations['total']} | {' | '.join(map(str, kinds))} | {len(mutations['failed'])} |")
    return "\n".join(lines)


CAMPAIGN = Record(Settings(), run, table)
