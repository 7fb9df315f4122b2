"""What the campaign kills: everything that writes files, at its smallest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import campaign_subjects as subjects
import record
import sidetuning as st
from campaign_subjects import base, data, model, plain
from sidetuning.cache import cache_features, cache_tokens, features, tokens
from sidetuning_bench import compare, grid, icifar
from sidetuning_bench.agents import collect
from sidetuning_bench.agents.trajectories import read_steps
from sidetuning_bench.grid import Cell
from sidetuning_bench.methods import METHODS, Recipe, Task, load_method
from sidetuning_bench.options import GridOptions, RunOptions
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run, write_result

VERSIONS = 5
# Of what is measured and not computed.
MEASURED = ("seconds", "base_seconds", "peak_memory_mb", "memory_mb")


@dataclass(frozen=True)
class Writer:
    """Something that writes to a folder.

    Attributes:
        work: does all that is not done yet; called again after a kill.
        answer: what the finished folder says.
        holds: after a kill: reads what was there before, and raises where it is lost.
        prepare: what was there before.
        share: how many of 300 kills.
    """

    work: Callable[[Path], None]
    answer: Callable[[Path], Any]
    share: int
    holds: Callable[[Path], None] = lambda folder: None
    prepare: Callable[[Path], None] = lambda folder: None


# ---- tasks: each save replaces an older version


def version(k: int) -> st.SideTuner:
    found = model(base())
    found.remove_task("cars")
    found.add_task("cars", side="mlp", merge="sum", head=2, seed=1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(k / 8)
    found["pets"].labels = [f"{name} {k}" for name in ("cat", "dog", "cow")]
    return found


def said(found: st.SideTuner) -> dict[str, Any]:
    """What each task says, with its labels."""
    with torch.no_grad():
        return {name: plain([found[name].labels, found(subjects.vectors(), name)]) for name in found}


def save(k: int, folder: Path, names: tuple[str, ...]) -> None:
    found = version(k)
    for name in names:
        found.save_task(name, folder / "tasks" / name)


def save_all(folder: Path, names: tuple[str, ...]) -> None:
    for k in range(1, VERSIONS):
        save(k, folder, names)


def any_version(folder: Path) -> None:
    found = said(st.load(folder, base=base()))
    known = [said(version(k)) for k in range(VERSIONS)]
    for name, own in found.items():
        assert any(own == each[name] for each in known), f"task {name} is of no version"


def loaded(folder: Path) -> Any:
    return said(st.load(folder, base=base()))


def saving(*names: str) -> Writer:
    return Writer(
        lambda folder: save_all(folder, names),
        loaded,
        holds=any_version,
        prepare=lambda folder: save(0, folder, names),
        share=40,
    )


# ---- training


def fit(folder: Path) -> None:
    (folder / "answer").write_text(repr(subjects.fitted(folder / "r.pt")))


def distill(folder: Path) -> None:
    found = model(base())
    found.remove_task("cars")
    found.remove_task("pets")
    found.add_task("pets", side="mlp", head=3, seed=0)
    loader = DataLoader(data(), batch_size=4, shuffle=True)
    result = st.distill(found, "pets", loader, steps=12, resume=folder / "r.pt", save_every=0, progress=False)
    (folder / "answer").write_text(repr(plain([dict(found["pets"].state_dict()), result.losses])))


def text(folder: Path) -> str:
    return (folder / "answer").read_text()


def cache_vectors(folder: Path) -> None:
    features.CHUNK = 3
    cache_features(base(), data(40), folder, batch_size=2, progress=False)


def cached_vectors(folder: Path) -> Any:
    features.CHUNK = 3
    x, found, y = cache_features(base(), data(40), folder, progress=False).__getitems__(range(40))
    return plain([x, found.out, found.taps, y])


def cache_texts(folder: Path) -> None:
    tokens.CHUNK = 4
    cache_tokens(subjects.texts_base(), subjects.Texts(), torch.arange(24), folder, batch_size=2, progress=False)


def learn_method(name: str, folder: Path) -> None:
    """Learn two tasks, saving after each, as the scenarios do."""
    if (folder / "method" / "method.json").exists():
        method = load_method(folder / "method", base())
    else:
        method = METHODS.build(name, base(), options={"side": "mlp", "merge": "sum"} if name == "sidetune" else {})
    for k, task in enumerate(("pets", "cars")):
        if task not in method.tasks:
            loader = DataLoader(data(), batch_size=5, shuffle=True)
            how: dict[str, Any] = {"resume": folder / f"{task}.pt", "save_every": 0, "progress": False}
            method.learn(Task(task, 3, seed=k), loader, Recipe(steps=6), **how)
            method.save(folder / "method")


def method_holds(folder: Path) -> None:
    if (folder / "method" / "method.json").exists():
        load_method(folder / "method", base())


def methods(name: str, share: int) -> Writer:
    return Writer(
        lambda folder: learn_method(name, folder),
        lambda folder: subjects.read_method(folder / "method"),
        holds=method_holds,
        share=share,
    )


# ---- runs


def write_run(folder: Path) -> None:
    """Rows and results, as scenarios write them."""
    run = Run(folder / "run", "campaign", subjects.RunSettings())
    run.belongs(data="abc")
    have = {row["task"] for row in run.metrics()}
    for k in range(8):
        if f"task-{k}" not in have:
            run.append({"task": f"task-{k}", "accuracy": k / 8})
    subjects.result().save(folder / "run" / "result.json")
    write_result(folder / "run" / "other.json", subjects.RunSettings())


def run_says(folder: Path) -> Any:
    rows = Run(folder / "run", "campaign", subjects.RunSettings()).metrics()
    return rows, repr(RunResult.load(folder / "run" / "result.json"))


def images(folder: Path) -> None:
    """Twenty classes of small pictures, two tasks of ten."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        labels = [c for c in range(20) for _ in range(count)]
        cells = []
        for label in labels:
            buffer = io.BytesIO()
            pixels = (rng.random((32, 32, 3)) * 100 + 7 * label).astype(np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        folder.joinpath("data").mkdir(exist_ok=True)
        pq.write_table(pa.table({"img": cells, "fine_label": labels}), folder / "data" / f"{split}.parquet")


def icifar_settings(folder: Path) -> icifar.Settings:
    options = RunOptions(out=str(folder / "run"), cache=str(folder / "cache"), save_every=0, progress=False)
    found = icifar.Settings(data=str(folder / "data"), samples=200, tasks=2, run=options)
    return replace(found, training=replace(found.training, batch=20))


def measured(file: Path) -> dict[str, Any]:
    return {key: value for key, value in vars(RunResult.load(file)).items() if key not in MEASURED}


def icifar_says(folder: Path) -> Any:
    found = st.load(folder / "run")
    return plain([{name: dict(found[name].state_dict()) for name in found}, measured(folder / "run" / "result.json")])


def compare_settings(folder: Path) -> compare.Settings:
    on = compare.OnIcifar(data=str(folder / "data"), samples=100)
    where = GridOptions(out=str(folder / "grid"), seeds=1, progress=False)
    shared = compare.Shared(cache=str(folder / "cache"))
    return compare.Settings(on=on, tasks=1, methods=("features", "finetune"), run=where, shared=shared)


def compare_says(folder: Path) -> Any:
    return plain([measured(file) for file in sorted((folder / "grid").glob("*/result.json"))])


def walk(folder: Path) -> None:
    """Episodes from a world that needs no engine."""
    subjects.append_walks(folder, 6)


def collect_walks(folder: Path) -> None:
    collect.run(collect.Settings(out=str(folder / "walks-v0"), episodes=4, size=16, workers=1, progress=False))


def steps(folder: Path) -> Any:
    found = read_steps(folder / "walks-v0")
    return found.fingerprint(), plain(found.starts)


def work_of_cell(number: int) -> dict[str, int]:
    return {"square": number * number}


def write_records(folder: Path) -> None:
    record.RESULTS = folder
    cells = [Cell(f"square-{k}", folder, k) for k in range(2)]
    todo = [cell for cell in cells if not record.recorded(cell.name, {})]
    for cell, found in grid.run(todo, work_of_cell, lambda cell: None, progress=False):
        record.write(cell.name, {**found, "settings": {}})


def records_say(folder: Path) -> Any:
    return [json.loads((folder / f"square-{k}.json").read_text())["square"] for k in range(2)]


WRITERS: dict[str, Writer] = {
    "a task over its older self": saving("pets"),
    "a model folder": saving("pets", "cars"),
    "fit": Writer(fit, text, share=40),
    "distill": Writer(distill, text, share=20),
    "cache_features": Writer(cache_vectors, cached_vectors, share=40),
    "cache_tokens": Writer(cache_texts, subjects.read_tokens, share=20),
    "method sidetune": methods("sidetune", 20),
    "method ewc": methods("ewc", 20),
    "method finetune": methods("finetune", 10),
    "a run's files": Writer(write_run, run_says, share=20),
    "trajectories": Writer(walk, steps, share=20),
    "icifar": Writer(lambda f: void(icifar.run(icifar_settings(f))), icifar_says, prepare=images, share=30),
    "compare": Writer(lambda f: void(compare.run(compare_settings(f))), compare_says, prepare=images, share=8),
    "collect-trajectories": Writer(collect_walks, steps, share=6),
    "records": Writer(write_records, records_say, share=6),
}


def void(_: object) -> None:
    """Drop a result."""
