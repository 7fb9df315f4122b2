"""What a training step costs. All comparisons are interleaved in one process.

- cached: `fit` on cached features, against a bare loop over side, merge and head on tensors in memory;
- tenth: `fit` of the tenth task against `fit` of the first, in one model;
- live: `fit` that runs the base in every step, against the cached one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from record import Record, write

STEPS, ROUNDS, BATCH = 30, 15, 128


@dataclass(frozen=True)
class Settings:
    """Milliseconds of a training step: cached, of the tenth task, live, and in a bare loop."""


def run(given: Settings) -> None:
    """Measure and record."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (STEPS * BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    y = torch.randint(0, 10, (len(x),), generator=generator)
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    for k in range(10):
        model.add_task(f"task-{k}", side="fcn4", merge="mlp2", head=10, init="distilled")
    with tempfile.TemporaryDirectory() as folder:
        cached = st.cache_features(model.base, TensorDataset(x, y), folder, progress=False)
        _, features, _ = cached.__getitems__(range(len(x)))

        def fit(task: str, loader: DataLoader[object]) -> float:
            return st.fit(model, task, loader, steps=STEPS, optimizer=torch.optim.Adam, progress=False).seconds

        def alone(task: str) -> float:
            branch = model[task].train()
            optimizer = torch.optim.Adam(branch.parameters(), lr=1e-3)
            started = time.monotonic()
            for rows in torch.randperm(len(x)).split(BATCH):
                inputs = model.base.prepare(x[rows])
                loss = F.cross_entropy(branch(inputs, st.Features(features.out[rows])), y[rows])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
                optimizer.step()
            return time.monotonic() - started

        times: dict[str, list[float]] = {"first": [], "tenth": [], "alone": [], "live": []}
        live = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)
        for i in range(ROUNDS + 1):
            row = {
                "first": fit("task-0", st.loader_over(cached)),
                "alone": alone("task-0"),
                "tenth": fit("task-9", st.loader_over(cached)),
                "live": fit("task-0", live) if i < 4 else None,
            }
            # The first round warms up.
            if i:
                for name, seconds in row.items():
                    times[name] += [] if seconds is None else [seconds / STEPS]
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {
        "cached_over_alone": statistics.median(a / b for a, b in zip(times["first"], times["alone"], strict=True)),
        "tenth_over_first": statistics.median(a / b for a, b in zip(times["tenth"], times["first"], strict=True)),
        "live_over_cached": median["live"] / median["first"],
    }
    milliseconds = {name: 1000 * seconds for name, seconds in median.items()}
    about = {"rounds": ROUNDS, "rounds_live": len(times["live"]), "seeds": [0]}
    write("cost", {"milliseconds_per_step": milliseconds, "ratios": ratios, **about})
    print(ratios)


STEP_COST = Record(Settings(), run)
