"""iCIFAR (paper, section 4.1): CIFAR-100 as ten tasks of ten classes, learned one after another from one frozen base."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch.utils.data import DataLoader

from sidetuning.base import load_base
from sidetuning.branch import build_branch
from sidetuning.cache import CachedFeatures, cache_features, loader_over
from sidetuning.continual import AccuracyMatrix
from sidetuning.data.cifar import load_images
from sidetuning.errors import DataError
from sidetuning.scenarios.runs import Run
from sidetuning.training import evaluate, fit, seeded
from sidetuning.tuner import SideTuner

CLASSES_PER_TASK = 10


@dataclass(frozen=True)
class Settings:
    """Learn CIFAR-100 as ten tasks of ten classes, one after another; the defaults are the paper's protocol."""

    data: str = "uoft-cs/cifar100"
    """A folder with train*.parquet and test*.parquet in the Hub's layout, or a data set on the Hub."""
    out: str = "runs/icifar"
    """Folder of the run; the same command run again goes on where it stopped."""
    merge: str = "mlp2"
    """How base and side are fused: mlp2, alpha, base-only, side-only, …"""
    side: str = "fcn4"
    """Side network."""
    init: str | None = "distilled"
    """How the side starts: distilled, xavier, low-energy, zero, or a safetensors file of its weights."""
    dense: bool = False
    """Feed the sides of all earlier tasks into the merge (the paper's dense variant)."""
    base: str = "resnet44-cifar10"
    """Base network."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    samples: int = 20_000
    """Training images per task, repetitions included (four passes over 5,000)."""
    batch: int = 128
    """Images per step."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    weight_decay: float = 0.0
    """Weight decay of sides and heads."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    prenorm: bool = False
    """Group-normalise the merged code before the head, as the original code does."""
    tasks: int = 10
    """How many of the ten tasks to learn."""
    seed: int = 0
    """Of initial weights and of the order of the images."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    save_every: Annotated[float, tyro.conf.arg(help="Seconds between two resume files while a task is trained.")] = 10.0


@dataclass(frozen=True)
class Result:
    """What a run measured; the content of its table."""

    matrix: AccuracyMatrix
    alphas: list[float | None]
    parameters_per_task: int
    base_parameters: int
    base_seconds: float
    task_seconds: list[float]


def run(settings: Settings) -> Result:
    """Learn the tasks in order, saving each as it is done; evaluates every task after every task."""
    s = settings
    folder = Run(s.out, "icifar", s, free=("data", "out", "cache", "save_every"))
    base = load_base(s.base, weights=s.base_weights)
    train_set, test_set = load_images(s.data, "train"), load_images(s.data, "test")
    classes = len(train_set.names)
    if classes < s.tasks * CLASSES_PER_TASK:
        raise DataError(f"{s.data} has {classes} classes; {s.tasks} tasks of ten need {s.tasks * CLASSES_PER_TASK}")

    build_branch(base, side=s.side, merge=s.merge, head=1, init=s.init)  # an unknown part is found before the long work

    started = time.perf_counter()
    cached = {"train": cache_features(base, train_set, Path(s.cache).expanduser()),
              "test": cache_features(base, test_set, Path(s.cache).expanduser())}  # fmt: skip
    base_seconds = time.perf_counter() - started

    model = SideTuner(base)
    names = [f"classes-{10 * k}-{10 * k + 9}" for k in range(s.tasks)]
    matrix = AccuracyMatrix(names)
    steps = -(-s.samples // s.batch)
    done = {row["task"]: row for row in folder.metrics() if "accuracy" in row}
    seconds: list[float] = []
    for k, name in enumerate(names):
        laterals = names[:k] if s.dense else []
        if name in done:
            model.load_task(folder.task(name))
            seconds.append(done[name]["seconds"])
            matrix.add(done[name]["accuracy"])
            continue
        with seeded(s.seed * 1000 + k):
            model.add_task(
                name, side=s.side, merge=s.merge, head=CLASSES_PER_TASK, init=s.init, prenorm=s.prenorm,
                laterals=laterals, labels=train_set.names[10 * k : 10 * k + 10],
            )  # fmt: skip
        loader = task_loader(cached["train"], k, s.batch, shuffle=True)
        result = fit(
            model, name, loader, steps=steps, lr=s.lr, weight_decay=s.weight_decay, clip=s.clip, optimizer=torch.optim.Adam,
            seed=s.seed, resume=folder.resume(name), save_every=s.save_every,
        )  # fmt: skip
        seconds.append(result.seconds)
        row = [
            evaluate(model, t, task_loader(cached["test"], j, 500, shuffle=False))["accuracy"]
            for j, t in enumerate(names[: k + 1])
        ]
        matrix.add(row)
        model.save_task(name, folder.task(name), metrics={"accuracy": row[-1]})
        folder.append({"task": name, "accuracy": row, "seconds": result.seconds, "loss": result.losses[-1]})
        folder.resume(name).unlink(missing_ok=True)
    matrix.save(folder.folder / "matrix.json")
    summary = model.summary()
    return Result(
        matrix,
        [model[n].alpha for n in names],
        max(t.total for t in summary.tasks),
        summary.base,
        base_seconds,
        seconds,
    )


def task_loader(cached: CachedFeatures, task: int, batch: int, *, shuffle: bool) -> DataLoader[object]:
    """The images of one task's ten classes, with labels 0 … 9."""
    first = CLASSES_PER_TASK * task
    labels = cached.labels
    indices = ((labels >= first) & (labels < first + CLASSES_PER_TASK)).nonzero().flatten()
    return loader_over(cached, batch_size=batch, shuffle=shuffle, indices=indices, relabel=lambda y: y - first)  # type: ignore[return-value]


def main(settings: Settings) -> None:
    """Run and print the table."""
    show(run(settings), settings)


def show(result: Result, settings: Settings) -> None:
    """The table of a run."""
    from rich.console import Console
    from rich.table import Table

    matrix = result.matrix
    table = Table(title=f"iCIFAR, {settings.merge}, seed {settings.seed}: accuracy in %", caption_justify="left")
    for column in ("task", "when learned", "at the end", "forgotten", "alpha", "seconds"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for i, name in enumerate(matrix.tasks):
        alpha = result.alphas[i]
        table.add_row(
            name, f"{100 * matrix.learned[i]:.1f}", f"{100 * matrix.final[i]:.1f}", f"{100 * matrix.forgetting[i]:.1f}",
            "–" if alpha is None else f"{alpha:.3f}", f"{result.task_seconds[i]:.1f}",
        )  # fmt: skip
    average = [sum(v) / len(v) for v in (matrix.learned, matrix.final, matrix.forgetting)]
    table.add_section()
    table.add_row("average", *(f"{100 * v:.1f}" for v in average), "", f"{sum(result.task_seconds):.1f} in all")
    console = Console()
    console.print(table)
    share = result.parameters_per_task / result.base_parameters
    console.print(
        f"base: {result.base_parameters:,} parameters, frozen; each task adds at most {result.parameters_per_task:,} ({share:.1%}).\n"
        f"base features: {result.base_seconds:.1f} s; sides: {sum(result.task_seconds):.1f} s. Run folder: {settings.out}",
        highlight=False,
    )
