"""A thousand tasks on one base, and many candidates on one read of its features. All comparisons are interleaved."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import sidetuning as st
from record import Record, ratio, read, seconds, write

TASKS, BATCH, ROUNDS, ROWS = 1000, 64, 9, 5000
HEAD: dict[str, Any] = {"side": None, "merge": "base-only", "head": 10}
SIDE: dict[str, Any] = {"side": "fcn4", "merge": "mlp2", "head": 10}
# What is measured -> what it is, and the name of its number.
WORDS = {
    "add": ("adding 1,000 linear tasks", "s"),
    "save": ("saving them with `model.save`", "s"),
    "load": ("loading them with `st.load`", "s"),
    "open": ("opening the folder with `max_tasks_in_memory=50`", "s"),
    "remove": ("removing them", "s"),
    "linear_100": ("`forward_all` of 100 linear tasks, over the base alone", "times"),
    "linear_1000": ("`forward_all` of 1,000 linear tasks, over the base alone", "times"),
    "sides_10": ("`forward_all` of ten tasks with fcn4 and mlp2, over the base alone", "times"),
    "mixed": ("a batch of 64 samples of 64 tasks, over the same of one task", "times"),
    "closed_50": ("a sweep over 50 strengths in closed form, over one", "times"),
    "sides_16": ("a sweep over 16 learning rates of fcn4 and mlp2, over one", "times"),
    "linear_50": ("a sweep over 50 learning rates of a linear head, over one", "times"),
}


@dataclass(frozen=True)
class Settings:
    """Seconds for a thousand tasks, and times of many tasks and candidates over one."""


def remove_all(model: st.SideTuner) -> None:
    """Remove all tasks."""
    for name in model.tasks:
        model.remove_task(name)


def run(given: Settings) -> None:
    """Measure and record, on one thread."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = st.load_base("resnet44-cifar10").folded()
    plain = st.load_base("resnet44-cifar10")
    found: dict[str, Any] = {}
    model = st.SideTuner(plain)
    found["add"] = seconds(lambda: [model.add_task(f"t{i}", **HEAD) for i in range(TASKS)])
    with tempfile.TemporaryDirectory() as folder:
        found["save"] = seconds(lambda: model.save(folder))
        found["load"] = seconds(lambda: st.load(folder))
        found["open"] = seconds(lambda: st.load(folder, max_tasks_in_memory=50))
    found["remove"] = seconds(lambda: remove_all(model))
    # The base that a server would use: folded, channels last.
    model, sides = st.SideTuner(base), st.SideTuner(base)
    for i in range(TASKS):
        model.add_task(f"t{i}", **HEAD)
    for i in range(10):
        sides.add_task(f"t{i}", **SIDE)
    x = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    names = model.tasks
    with torch.no_grad():
        found["linear_100"] = ratio(lambda: model.forward_all(x, tasks=names[:100]), lambda: base(x), ROUNDS)
        found["linear_1000"] = ratio(lambda: model.forward_all(x), lambda: base(x), ROUNDS)
        found["sides_10"] = ratio(lambda: sides.forward_all(x), lambda: base(x), ROUNDS)
        mixed, same = names[: len(x)], names[:1] * len(x)
        found["mixed"] = ratio(lambda: model(x, tasks=mixed), lambda: model(x, tasks=same), ROUNDS)
    found |= sweeps(plain, generator)
    write("many-tasks", {"results": found, "rounds": ROUNDS, "rows": ROWS, "seeds": [0]})
    print(table(given))


def sweeps(base: st.Base, generator: torch.Generator) -> dict[str, Any]:
    """Times of many candidates over one, on cached features."""
    x = torch.randint(0, 256, (ROWS + 1000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 10, (len(x),), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        parts = [TensorDataset(x[rows], y[rows]) for rows in (slice(ROWS), slice(ROWS, None))]
        cached, held = (st.cache_features(base, part, Path(folder), progress=False) for part in parts)

        def sweep(candidates: list[st.Candidate]) -> Callable[[], Any]:
            return lambda: st.sweep(base, cached, candidates, validation=held, progress=False)

        closed = [st.Candidate(f"c{i}", HEAD, solve=True, strength=10 ** (i / 10 - 4)) for i in range(50)]
        trained = [st.Candidate(f"c{i}", SIDE, {"lr": 1e-4 * (i + 1)}) for i in range(16)]
        linear = [st.Candidate(f"c{i}", HEAD, {"lr": 1e-4 * (i + 1)}) for i in range(50)]
        return {
            "closed_50": ratio(sweep(closed), sweep(closed[:1]), 5),
            "sides_16": ratio(sweep(trained), sweep(trained[:1]), 2),
            "linear_50": ratio(sweep(linear), sweep(linear[:1]), 3),
        }


def table(given: Settings) -> str:
    """What was measured: seconds, or median (least to most) over rounds."""
    rows = ["| what | measured |", "| --- | ---: |"]
    for name, value in read("many-tasks")["results"].items():
        words, unit = WORDS[name]
        text = f"{value:.1f} s" if unit == "s" else "{:.2f} ({:.2f} to {:.2f})".format(*value)
        rows.append(f"| {words} | {text} |")
    return "\n".join(rows)


MANY_TASKS = Record(Settings(), run, table)
