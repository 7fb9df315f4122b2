"""What a step of training costs on texts, in seconds and memory: `python benchmarks/squad_cost.py --data FOLDER --base hf:FOLDER`.

Batches of 16 windows of up to 384 tokens, every method in a process of its own, in rounds one after another. Base features are cached before.
Memory is the peak while training above what the process held before, less the weights that a method builds; so it is gradients, the
optimiser's state and activations.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from common import RESULTS, record
from sidetuning.cache import token_loader
from sidetuning.integrations.transformers import load_tokenizer
from sidetuning.loading import load_base
from sidetuning_bench.language import squad
from sidetuning_bench.language.questions import Windows, make_windows, read_questions
from sidetuning_bench.methods import Recipe, Task
from sidetuning_bench.runs import peak_memory_mb

BATCH, STEPS = 16, 6  # the first step warms up
METHODS = {
    "features": {"method": "features"},
    "sidetune, match": {"method": "sidetune"},
    "sidetune, slim": {"method": "sidetune", "side": "slim"},
    "sidetune, convolutional": {"method": "sidetune", "side": "convolutional"},
    "ladder": {"method": "ladder"},
    "sidetune, top layer": {"method": "sidetune", "side": "top", "layers": 1},
    "sidetune, two top layers": {"method": "sidetune", "side": "top", "layers": 2},
    "lora": {"method": "lora"},
    "finetune": {"method": "finetune"},
}


@dataclass(frozen=True)
class Settings:
    """Measure and record."""

    data: str = "rajpurkar/squad_v2"
    """A SQuAD folder."""
    base: str = "hf:sentence-transformers/all-MiniLM-L6-v2"
    """The base; recorded by the last part of its name."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    rounds: int = 3
    """Of all methods."""
    one: str | None = None
    """Measure this method in this process, and print it."""
    table: bool = False
    """Only print the recorded table."""


def longest(windows: Windows, count: int) -> Windows:
    """The longest windows alone."""
    rows = np.argsort(-windows.lengths(), kind="stable")[:count].tolist()
    return replace(
        windows, ids=[windows.ids[r] for r in rows], types=[windows.types[r] for r in rows], question=windows.question[rows],
        offsets=[windows.offsets[r] for r in rows], labels=windows.labels[rows],
    )  # fmt: skip


def one(given: Settings, name: str) -> dict[str, float]:
    """Seconds of a step, and memory in MB."""
    s = squad.settings_of({"base": given.base, "cache": given.cache, "progress": False, **METHODS[name]})
    base = load_base(s.base, taps=squad.taps_of(s))
    questions = read_questions(given.data, "train", 3000)
    windows = longest(make_windows(questions.items, load_tokenizer(base)), STEPS * BATCH)
    data = squad.prepare(s, base, windows)
    times: list[float] = []

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        times.append(time.perf_counter())  # once a step
        return squad.span_loss(scores, labels)

    before = peak_memory_mb(anew=True)  # before the method, some of which copy the base when they are made
    method = s.method.build(base, s.run.seed)
    method.learn(
        Task("squad", "span", loss), token_loader(data, windows.lengths(), BATCH),
        Recipe(STEPS, 1e-4, optimizer=torch.optim.AdamW), progress=False,
    )  # fmt: skip
    after = peak_memory_mb()
    assert before is not None and after is not None
    weights = sum(p.numel() * p.element_size() for p in method["squad"].parameters()) / 2**20
    step = statistics.median(np.diff(times[1:]).tolist())
    return {"seconds": step, "memory_mb": after - before - weights, "tokens": float(windows.lengths().mean())}


def main(given: Settings) -> None:
    """All rounds, and the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(given.rounds + 1):
        for name, rows in found.items():
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], check=True, capture_output=True, text=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        n: {k: statistics.median(r[k] for r in rs[1:]) for k in rs[0]} for n, rs in found.items()
    }  # the first fills the caches
    record(
        "squad-cost",
        {"base": Path(given.base).name, "batch": BATCH, "rounds": given.rounds, "methods": rows, "seeds": [0]},
    )
    print(table())


def table() -> str:
    """What was recorded, beside LoRA and fine-tuning."""
    rows = json.loads((RESULTS / "squad-cost.json").read_text())["methods"]
    lora, whole = rows["lora"], rows["finetune"]
    text = "| | s per step | of lora | memory, MB | of lora | of fine-tuning |\n| --- | ---: | ---: | ---: | ---: | ---: |\n"
    for name, row in rows.items():
        seconds, memory = row["seconds"], row["memory_mb"]
        text += f"| {name} | {seconds:.2f} | {seconds / lora['seconds']:.0%} | {memory:,.0f} | {memory / lora['memory_mb']:.0%} "
        text += f"| {memory / whole['memory_mb']:.0%} |\n"
    return text


if __name__ == "__main__":
    settings = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    if settings.table:
        print(table())
    elif settings.one is None:
        main(settings)
    else:
        print(json.dumps(one(settings, settings.one)))
