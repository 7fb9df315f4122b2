"""What runs the frozen base how fast, how far from torch in fp32, in how much memory, and what tasks on it are worth.

Three networks: the packaged ResNet-44 on images of CIFAR-100, a ViT-Tiny of timm at 224 pixels and a BERT of
MiniLM-L6's size on windows of 128 tokens; the weights of the last two are random, and so are their errors.

- speed: passes over one batch, all engines in turn in one process; time of the processor on one core, of the clock on
  more;
- memory: the most that a process holds while it makes passes, Python and torch included, each in its own;
- accuracy: ten tasks of ten classes of CIFAR-100 in closed form, learned and asked on the base as it runs.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

import sidetuning as st
from peers import Rows, base_of
from record import Record, public, read, recorded, write
from sidetuning.files import write_json
from sidetuning_bench import grid, icifar
from sidetuning_bench.cifar import load_images
from sidetuning_bench.grid import Cell
from sidetuning_bench.options import Count
from sidetuning_bench.runs import peak_memory_mb

# Rows of a batch of each network, and the ways that it has beside those of all.
SUBJECTS = {"resnet44": 64, "vit-tiny": 8, "minilm": 8}
ALL = [("torch", "fp32"), ("compile", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32"), ("torch", "bf16")]
STATIC = [("onnxruntime", "int8"), ("openvino", "int8")]
CONVOLUTIONS = [("folded", "fp32"), *ALL, ("folded", "bf16"), *STATIC]
LINEAR = [*ALL, *STATIC, ("torch", "int8"), ("torch", "int4")]
# Ways whose tasks are learned and asked.
ASKED = [("torch", "fp32"), ("onnxruntime", "fp32"), ("folded", "bf16"), *STATIC]
TRAIN, TASKS = 10_000, 10


@dataclass(frozen=True)
class Settings:
    """Speed, memory and accuracy of the base by each engine, and in fewer bits."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    cache: Path = Path("engines-cache")
    """Folder that keeps what was measured, so that a run goes on where it was stopped."""
    rounds: Count = 9
    """Rounds of all engines, after one that warms up."""
    cores: tuple[int, ...] = (1,)
    """Numbers of cores; more than one only where nothing else runs on the machine."""
    rows: Count = TRAIN
    """Training images of the tasks; all test images are asked."""


@dataclass(frozen=True)
class Asked:
    """One measurement, in a process of its own."""

    what: str
    subject: str
    settings: Settings
    threads: int = 1
    way: tuple[str, str] = ("torch", "fp32")


def ways_of(subject: str) -> list[tuple[str, str]]:
    """The ways to run a network: norms are folded, and weights of linear layers quantised, where there are such."""
    # The library refuses OpenVINO's int8 of the ViT: it differs by more than a quarter of the features.
    refused = [("openvino", "int8")] if subject == "vit-tiny" else []
    return CONVOLUTIONS if subject == "resnet44" else [way for way in LINEAR if way not in refused]


def batch_of(base: st.Base, subject: str, data: str) -> Any:
    """Inputs of a network, as a data set has them, or at random."""
    if subject == "resnet44" and data:
        images = load_images(data, "train")
        return torch.stack([images[i][0] for i in range(256)])
    x: Any = Rows(base, subject, SUBJECTS[subject]).x
    return {name: value[:, :128] for name, value in x.items()} if isinstance(x, dict) else x


def plain_base(subject: str) -> st.Base:
    """A network without taps."""
    return base_of(subject).with_taps([])


def run_by(base: st.Base, way: tuple[str, str], x: Any) -> st.Base:
    """The base by an engine."""
    return st.with_engine(base, way[0], precision=way[1], calibration=x if way in STATIC else None)


def measure(asked: Asked) -> dict[str, Any]:
    """One cell."""
    torch.set_num_threads(asked.threads)
    found = {"speed": speed, "accuracy": accuracy, "memory": memory}[asked.what](asked)
    write_json(file_of(asked), found)
    return found


def memory(asked: Asked) -> dict[str, Any]:
    """What the process holds at its peak; the plain base is let go where the engine does not need it."""
    base = plain_base(asked.subject)
    x = batch_of(base, asked.subject, "")
    base = run_by(base, asked.way, x)
    inputs = base.prepare(rows_of(x, SUBJECTS[asked.subject]))
    gc.collect()
    peak_memory_mb(anew=True)
    for _ in range(3):
        base.encode(inputs)
    return {"memory_mb": peak_memory_mb()}


def rows_of(x: Any, count: int) -> Any:
    """The first rows of a batch."""
    return {name: value[:count] for name, value in x.items()} if isinstance(x, dict) else x[:count]


def speed(asked: Asked) -> dict[str, Any]:
    """Seconds of passes over one batch, interleaved, and errors."""
    base = plain_base(asked.subject)
    x = batch_of(base, asked.subject, asked.settings.data)
    inputs = base.prepare(rows_of(x, SUBJECTS[asked.subject]))
    bases = {" ".join(way): run_by(base, way, x) for way in ways_of(asked.subject)}
    times: dict[str, list[float]] = {name: [] for name in bases}
    # What else the machine does costs no time of this processor.
    clock = time.process_time if asked.threads == 1 else time.perf_counter
    for turn in range(asked.settings.rounds + 1):
        for name, other in bases.items():
            started = clock()
            other.encode(inputs)
            if turn:
                times[name].append(clock() - started)
    return {"seconds": times, "errors": {name: other.engine.error for name, other in bases.items()}}


def accuracy(asked: Asked) -> dict[str, Any]:
    """Mean accuracy of the tasks, each learned and asked on features of the base as it runs."""
    settings, base = asked.settings, plain_base(asked.subject)
    run = run_by(base, asked.way, batch_of(base, asked.subject, settings.data))
    model, scores = st.SideTuner(run), []
    with tempfile.TemporaryDirectory() as folder:
        cached = {}
        for split in ("train", "test"):
            images = load_images(settings.data, split)
            some = Subset(images, range(len(images) if split == "test" else settings.rows))
            cached[split] = st.cache_features(run, some, folder, progress=False)
        for task in range(TASKS):
            first, name = task * TASKS, f"task-{task}"
            model.add_task(name, side=None, merge="base-only", head=TASKS)
            loaders = {}
            for split, features in cached.items():
                own = ((features.labels >= first) & (features.labels < first + TASKS)).nonzero().flatten()
                loaders[split] = st.loader_over(
                    features, batch_size=500, indices=own, relabel=partial(torch.add, other=-first)
                )
            st.solve(model, name, loaders["train"], progress=False)
            scores.append(st.evaluate(model, name, loaders["test"])["accuracy"])
    return {"accuracy": statistics.mean(scores), "accuracies": scores}


def cells_of(given: Settings, subject: str) -> list[Cell[Asked]]:
    """All measurements of a network; those of speed come last."""
    asked = [Asked("memory", subject, given, way=way) for way in ways_of(subject)]
    asked += [Asked("accuracy", subject, given, way=way) for way in (ASKED if subject == "resnet44" else ())]
    asked += [Asked("speed", subject, given, threads) for threads in given.cores]
    return [Cell(name_of(one), given.cache, one) for one in asked]


def name_of(asked: Asked) -> str:
    """What a measurement is called in the result."""
    return str(asked.threads) if asked.what == "speed" else f"{asked.what} {' '.join(asked.way)}"


def finished(cell: Cell[Asked]) -> dict[str, Any] | None:
    """The result of a cell that an earlier call has measured."""
    file = file_of(cell.settings)
    return json.loads(file.read_text()) if file.exists() else None


def file_of(asked: Asked) -> Path:
    """Where the result of a cell is kept."""
    asked_for = f"{asked.settings.rows}-{asked.settings.rounds}"
    return asked.settings.cache / f"{asked.subject}-{name_of(asked).replace(' ', '-')}-{asked_for}.json"


def run(given: Settings) -> None:
    """Measure the networks that have no result."""
    for subject in SUBJECTS:
        if recorded(f"engines-{subject}", public(given), ("cache",)):
            continue
        found = {cell.name: row for cell, row in grid.run(cells_of(given, subject), measure, finished)}
        settings = {"batch": SUBJECTS[subject], "rounds": given.rounds, "rows": given.rows, "cores": given.cores}
        content = {**settings, "measured": found}
        write(f"engines-{subject}", content, given)


def table(given: Settings) -> str:
    """A table for each network: medians over the rounds, against torch in fp32 on as many cores."""
    parts = []
    for subject in SUBJECTS:
        content = read(f"engines-{subject}")
        found, what = content["measured"], "texts" if subject == "minilm" else "images"
        head = [title for n in content["cores"] for title in (f"{n} core{'s'[: n - 1]}, × torch", f"{what}/s")]
        head += ["error", "memory, MB"]
        head += ["accuracy"] if subject == "resnet44" else []
        lines = [f"**{subject}**, batches of {content['batch']}:", "", f"| engine | {' | '.join(head)} |"]
        lines.append("| --- |" + " ---: |" * len(head))
        for way in ways_of(subject):
            name, cells = " ".join(way), []
            for cores in content["cores"]:
                seconds = found[str(cores)]["seconds"]
                spent = statistics.median(seconds[name])
                ratios = [a / b for a, b in zip(seconds["torch fp32"], seconds[name], strict=True)]
                cells += [f"{statistics.median(ratios):.2f}", f"{content['batch'] / spent:,.0f}"]
            error = found["1"]["errors"][name]
            cells += [f"{error:.1e}" if error else "", f"{found[f'memory {name}']['memory_mb']:,.0f}"]
            if subject == "resnet44":
                cells.append(f"{100 * found[f'accuracy {name}']['accuracy']:.2f} %" if way in ASKED else "")
            lines.append(f"| {way[0]}, {way[1]} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


ENGINES = Record(Settings(), run, table)
