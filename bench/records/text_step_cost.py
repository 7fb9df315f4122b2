"""What a step of training costs on texts, in seconds and memory.

Batches of 16 windows of up to 384 tokens, every method in a process of its own, in rounds one after another. Base
features are cached before. Memory is the peak while training above what the process held before, less the weights that
a method builds: it is gradients, the optimiser's state and activations.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from record import Record, read, write
from sidetuning.cache import token_loader
from sidetuning.loading import load_base
from sidetuning_bench import grid
from sidetuning_bench.grid import Cell
from sidetuning_bench.language import methods, squad
from sidetuning_bench.language.questions import Windows, make_windows, read_questions
from sidetuning_bench.language.tokenizer import load_tokenizer
from sidetuning_bench.methods import Recipe, Task
from sidetuning_bench.options import Count, with_values
from sidetuning_bench.runs import peak_memory_mb

BATCH = 16
# The first step warms up.
STEPS = 6
SIDES = {"match": {}, "slim": {"side": "slim"}, "convolutional": {"side": "convolutional"}}
TOPS = {"top layer": {"side": "top", "layers": 1}, "two top layers": {"side": "top", "layers": 2}}
# The values of METHODS are a method, and its own settings.
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "features": ("features", {}),
    **{f"sidetune, {name}": ("sidetune", dict(own)) for name, own in SIDES.items()},
    "ladder": ("ladder", {}),
    **{f"sidetune, {name}": ("sidetune", dict(own)) for name, own in TOPS.items()},
    "lora": ("lora", {}),
    "finetune": ("finetune", {}),
}


@dataclass(frozen=True)
class Settings:
    """Seconds and memory of a training step on texts, by method."""

    data: str = squad.Settings.data
    """A SQuAD folder."""
    base: str = "hf:sentence-transformers/all-MiniLM-L6-v2"
    """Base network; recorded by the last part of its name."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    rounds: Count = 3
    """Number of rounds of all methods."""


def longest(windows: Windows, count: int) -> Windows:
    """The longest windows alone."""
    rows = np.argsort(-windows.lengths(), kind="stable")[:count].tolist()
    lists: dict[str, Any] = {
        name: [getattr(windows, name)[row] for row in rows] for name in ("ids", "types", "offsets")
    }
    return replace(windows, **lists, question=windows.question[rows], labels=windows.labels[rows])


def measure(settings: squad.Settings) -> dict[str, float]:
    """Seconds of a step, and memory in MB, of one method."""
    base = load_base(settings.base, taps=squad.taps_of(settings))
    questions = read_questions(settings.data, "train", 3000)
    windows = longest(make_windows(questions.items, load_tokenizer(base)), STEPS * BATCH)
    data = squad.prepare(settings, base, windows)
    times: list[float] = []

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        # Once a step.
        times.append(time.perf_counter())
        return squad.span_loss(scores, labels)

    # Before the method, since some methods copy the base when they are made.
    before = peak_memory_mb(anew=True)
    method = settings.method.build(base, settings.run.seed)
    loader = token_loader(data, windows.lengths(), BATCH)
    method.learn(Task("squad", "span", loss), loader, Recipe(STEPS, 1e-4, optimizer=torch.optim.AdamW), progress=False)
    after = peak_memory_mb()
    assert before is not None and after is not None
    weights = sum(p.numel() * p.element_size() for p in method["squad"].parameters()) / 2**20
    step = statistics.median(np.diff(times[1:]).tolist())
    return {"seconds": step, "memory_mb": after - before - weights, "tokens": float(windows.lengths().mean())}


def run(given: Settings) -> None:
    """Measure in rounds, and record the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    # The first round fills the caches.
    for k in range(given.rounds + 1):
        cells = []
        for name, (method, own) in METHODS.items():
            values = {"data": given.data, "base": given.base, "cache": given.cache, "progress": False, **own}
            settings = with_values(replace(squad.Settings(), method=methods.METHODS[method]), values)
            cells.append(Cell(name, Path(), settings))
        for cell, row in grid.run(cells, measure, lambda cell: None):
            found[cell.name] += [row] if k else []
    medians = {name: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for name, rows in found.items()}
    about = {"base": Path(given.base).name, "batch": BATCH, "rounds": given.rounds}
    write("squad-cost", {**about, "methods": medians, "seeds": [0]})


def table(given: Settings) -> str:
    """The result, beside LoRA and fine-tuning."""
    rows = read("squad-cost")["methods"]
    lora, whole = rows["lora"], rows["finetune"]
    text = "| | s per step | of lora | memory, MB | of lora | of fine-tuning |\n| --- |" + " ---: |" * 5 + "\n"
    for name, row in rows.items():
        seconds, memory = row["seconds"], row["memory_mb"]
        cells = [name, f"{seconds:.2f}", f"{seconds / lora['seconds']:.0%}", f"{memory:,.0f}"]
        cells += [f"{memory / lora['memory_mb']:.0%}", f"{memory / whole['memory_mb']:.0%}"]
        text += f"| {' | '.join(cells)} |\n"
    return text


SQUAD_COST = Record(Settings(), run, table)
