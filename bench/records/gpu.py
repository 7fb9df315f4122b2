"""One CUDA device: whether it agrees with the processor, and what learning and answering cost on it.

The networks and ways are those of `peers.py`; every measurement runs in a process of its own. About six minutes.

- agreement, without TF32: codes and taps of the base; the losses of a few steps and the answers after them; a task that
  was saved by one and is asked by the other. Where they differ by more than `LIMITS` allows, the record fails.
- step: seconds of one training step and the memory that it takes on the device at its peak, in fp32 and under bf16.
- answers: images or texts answered per second by 1, 10 and 100 tasks, all tasks for each.

`--device cpu` tries the script itself where there is no device, on small batches, and records nothing.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sidetuning as st
from peers import CLASSES, SUBJECTS, TASKS, WAYS, Peer, Rows, base_of
from record import Record, read, write
from sidetuning.errors import SideTuningError
from sidetuning.terminal import say
from sidetuning_bench import grid
from sidetuning_bench.grid import Cell
from sidetuning_bench.options import Count

# What CUDA and CPU may differ by: |a - b| / |b|, or of losses the largest (a - b) / b.
LIMITS = {"base": 1e-4, "losses": 1e-3, "answers": 1e-2, "saved": 1e-4}
# Steps of the agreement, and steps and rounds that are timed.
STEPS, TIMED, ROUNDS = 10, 10, 3
# Peers, and rows of a batch as multiples of those of the CPU's record, which a device does not notice.
COSTS = ("base alone", "cached", "live", "closed form, live", "lora", "finetune")
LARGER = 4
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What learning and answering cost on a CUDA device, and whether it agrees with the CPU."""

    device: str = "cuda"
    """Device; cpu tries the script itself, and records nothing."""
    steps: Count = TIMED
    """Training steps that are timed."""


@dataclass(frozen=True)
class Asked:
    """One measurement: a network, a way or "agreement", a device, a precision; devices share tasks in `folder`."""

    subject: str
    way: str
    device: str
    precision: str
    steps: int
    folder: str


def batch_of(asked: Asked) -> int:
    """Rows of a batch."""
    return SUBJECTS[asked.subject][0] * LARGER if asked.device == "cuda" else 4


def moved(x: Any, device: str) -> Any:
    """Inputs on a device."""
    return {name: value.to(device) for name, value in x.items()} if isinstance(x, dict) else x.to(device)


def agreement(asked: Asked) -> dict[str, list[float]]:
    """Learn a task and save what it and the base give; on the second device compare with what the first saved."""
    base, side = base_of(asked.subject), SUBJECTS[asked.subject][2]
    model = st.SideTuner(base)
    model.add_task("0", head=CLASSES, seed=0, **side)
    rows = Rows(base, asked.subject, 8)
    loader = DataLoader(rows, 4)
    losses = st.fit(model, "0", loader, steps=STEPS, seed=0, progress=False).losses
    x, _ = next(iter(loader))
    with torch.no_grad():
        features = model.base(moved(x, asked.device))
        found = {"out": features.out, **features.taps, "answers": model(moved(x, asked.device), "0")}
    found = {name: value.float().cpu().contiguous() for name, value in found.items()}
    file, task = Path(asked.folder, "first.safetensors"), Path(asked.folder, "task")
    if not file.exists():
        model.save_task("0", task)
        save_file({**found, "losses": torch.tensor(losses)}, file)
        return {}
    first = load_file(file)
    saved = st.SideTuner(base)
    saved.load_task(task)
    with torch.no_grad():
        again = saved(moved(x, asked.device), "0").float().cpu()
    steps = [abs(a - b) / b for a, b in zip(losses, first["losses"].tolist(), strict=True)]
    codes = [distance(found[name], first[name]) for name in found if name != "answers"]
    answers = [distance(found["answers"], first["answers"])]
    return {"base": codes, "losses": steps, "answers": answers, "saved": [distance(again, first["answers"])]}


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def waited(device: str) -> float:
    """The time when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def held(device: str) -> int:
    """Bytes that the device holds now, from which the peak is counted anew."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def step_of(asked: Asked, base: st.Base, model: st.SideTuner, loader: Any) -> Callable[[], Any]:
    """What is timed: as many training steps as are asked for, or as many passes."""
    x, y = (moved(part, asked.device) for part in (loader[0][0], loader[0][-1]))
    if asked.way == "base alone":
        return lambda: [base(x) for _ in range(asked.steps)]
    if asked.way in ("cached", "live"):
        bf16: dict[str, Any] = {"precision": "bf16"} if asked.precision == "bf16" else {}
        return lambda: st.fit(model, "0", loader, steps=asked.steps, progress=False, **bf16)
    if asked.way.startswith("closed"):
        return lambda: st.solve(model, "0", loader * asked.steps, progress=False)
    peer = Peer(base, asked.way).to(asked.device)
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)

    def steps() -> None:
        for _ in range(asked.steps):
            inputs = base.prepare(x)
            with torch.autocast(asked.device, torch.bfloat16, enabled=asked.precision == "bf16"):
                loss = nn.functional.cross_entropy(peer(inputs).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def costs(asked: Asked) -> dict[str, Any]:
    """Seconds and memory of a step, and answers per second where the way answers."""
    base, batch = base_of(asked.subject), batch_of(asked)
    model, side = st.SideTuner(base), SUBJECTS[asked.subject][2]
    closed: dict[str, Any] = {"side": None, "merge": "base-only"}
    parts = closed if asked.way.startswith("closed") else side
    for i in range(TASKS[-1] if asked.way in ("cached", "closed form, live") else 1):
        model.add_task(str(i), head=CLASSES, seed=i, **parts)
    model.to(asked.device)
    x, y = next(iter(DataLoader(Rows(base, asked.subject, batch), batch)))
    x, y = moved(x, asked.device), y.to(asked.device)
    loader: Any = [(x, y)]
    if asked.way == "cached":
        loader = [(x, base.features(base.prepare(x)), y)]
    work = step_of(asked, base, model, loader)
    with torch.no_grad() if asked.way == "base alone" else torch.enable_grad():
        work()
        waited(asked.device)
        before = held(asked.device)
        spent = []
        for _ in range(ROUNDS):
            started = waited(asked.device)
            work()
            spent.append((waited(asked.device) - started) / asked.steps)
    peak = torch.cuda.max_memory_allocated() if asked.device == "cuda" else 0
    found: dict[str, Any] = {"seconds": statistics.median(spent), "memory_mb": (peak - before) / 1e6}
    if asked.way in ("cached", "closed form, live") and asked.precision == "fp32":
        found["answers"] = {str(count): batch / answering(model, x, count, asked.device) for count in TASKS}
    return found


@torch.no_grad()
def answering(model: st.SideTuner, x: Any, count: int, device: str) -> float:
    """Seconds of the answers of some tasks to a batch."""
    ask = partial(model.forward_all, x, tasks=model.tasks[:count])
    spent = []
    for _ in range(ROUNDS + 1):
        started = waited(device)
        ask()
        spent.append(waited(device) - started)
    return statistics.median(spent[1:])


def measure(asked: Asked) -> dict[str, Any]:
    """One measurement, in this process."""
    if asked.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # Both are on by default somewhere, and are another arithmetic.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return agreement(asked) if asked.way == "agreement" else costs(asked)


def run(given: Settings) -> None:
    """Compare with the CPU, then measure, and record all."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SideTuningError("there is no CUDA device here; --device cpu tries the script itself")
    agreed: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            asked = Asked(subject, "agreement", "cpu", "fp32", given.steps, folder)
            cells = [Cell(f"{subject}, {d}", Path(), replace(asked, device=d)) for d in ("cpu", given.device)]
            apart = [row for _, row in grid.run(cells, measure, lambda cell: None)][1]
        agreed[subject] = {name: max(values) for name, values in apart.items()}
        asked = replace(asked, device=given.device, folder="")
        todo = [replace(asked, way=way, precision=precision) for way in COSTS for precision in PRECISIONS]
        # The base and sums in closed form run as they are.
        todo = [ask for ask in todo if ask.precision == "fp32" or ask.way in ("cached", "live", "lora", "finetune")]
        cells = [Cell(f"{subject}, {ask.way}, {ask.precision}", Path(), ask) for ask in todo]
        for cell, row in grid.run(cells, measure, lambda cell: None):
            found.setdefault(subject, {})[f"{cell.settings.way}, {cell.settings.precision}"] = row
    wrong = [f"{s}: {n} {v:.2g}" for s, row in agreed.items() for n, v in row.items() if not v <= LIMITS[n]]
    content = {"agreement": agreed, "limits": LIMITS, "results": found, "larger": LARGER, "steps": given.steps}
    if given.device == "cuda":
        write("gpu", {**content, "device": torch.cuda.get_device_name()})
    say(tables(content))
    if wrong:
        raise SideTuningError(f"{given.device} and CPU differ by more than is allowed: {'; '.join(wrong)}")


def tables(content: dict[str, Any]) -> str:
    """A table of the differences, and one of the costs for each network."""
    names = list(LIMITS)
    lines = [f"| difference | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {s} | {' | '.join(f'{row[n]:.1g}' for n in names)} |" for s, row in content["agreement"].items()]
    lines.append(f"| allowed | {' | '.join(f'{LIMITS[n]:.0e}' for n in names)} |")
    for subject, rows in content["results"].items():
        lora = rows["lora, fp32"]["seconds"]
        head = ["a step, ms", "of LoRA in fp32", "memory, MB", *(f"{n} tasks, /s" for n in TASKS)]
        lines += ["", f"**{subject}**", "", f"| | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
        for name, row in rows.items():
            way, precision = name.rsplit(", ", 1)
            rates = [f"{row['answers'][str(n)]:,.0f}" if "answers" in row else "" for n in TASKS]
            step, memory = row["seconds"], row["memory_mb"]
            cells = [f"{1000 * step:,.2f}", f"{step / lora:.1%}", f"{memory:,.0f}", *rates]
            lines.append(f"| {WAYS[way]}, {precision} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(given: Settings) -> str:
    """The tables of the record."""
    return tables(read("gpu"))


GPU = Record(Settings(), run, table)
