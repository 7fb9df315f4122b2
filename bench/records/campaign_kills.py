"""Writers that are killed with SIGKILL at random, and must lose nothing and end where they would have ended.

Every writer works in a process that is forked here. Half of the kills come after a random time, half right at a random
file operation (open, rename, remove, fsync), where the windows are in which something could be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
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
from campaign_mutations import writes
from campaign_subjects import base, data, model, plain
from sidetuning.cache import cache_features, cache_tokens, features, tokens
from sidetuning_bench import compare, icifar
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


@dataclass(frozen=True)
class Outcome:
    """What became of a writer that was killed.

    Attributes:
        kills: how often; 0 where it ended before.
        where: the moment of each kill.
        wrong: what is wrong, or nothing.
    """

    number: int
    writer: str
    kills: int
    where: str
    wrong: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.wrong)


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
        method = METHODS[name](base(), **({"side": "mlp", "merge": "sum"} if name == "sidetune" else {}))
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
    grid = GridOptions(out=str(folder / "grid"), seeds=1, progress=False)
    shared = compare.Shared(cache=str(folder / "cache"))
    return compare.Settings(on=on, tasks=1, methods=("features", "finetune"), run=grid, shared=shared)


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
    for cell, found in record.grid.run(todo, work_of_cell, lambda cell: None, progress=False):
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


# ---- killing


class Counter:
    """Counts file operations of this process, and kills it at one of them."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.count, self.last = limit, 0, ""

    def hit(self, what: str) -> None:
        self.count += 1
        if self.count == self.limit:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.mkdir", "os.truncate") or (event == "open" and writes(arguments)):
            self.hit(event)

    def watch(self) -> None:
        """From here on."""
        sync = os.fsync

        def synced(handle: int) -> None:
            self.hit("before fsync")
            sync(handle)
            self.hit("after fsync")

        os.fsync = synced
        sys.addaudithook(self.hook)


def forked(function: Callable[[], Any], seconds: float | None = None, limit: int | None = None) -> tuple[str, Any]:
    """Call a function in a process of its own, which is killed after some seconds or at a file operation.

    Returns:
        "done" and (result, number of file operations), "killed" and None, or "failed" and a traceback.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        counter = Counter(limit)
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):  # noqa: PTH123
            try:
                counter.watch()
                message = "done", (function(), counter.count)
            except BaseException:
                message = "failed", traceback.format_exc(limit=-6)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(message, pipe)
        os._exit(0)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    # Processes that it started end with it.
    for _ in range(600):
        try:
            os.killpg(child, 0)
        except (ProcessLookupError, PermissionError):
            break
        time.sleep(0.05)
    else:
        return "failed", "processes that it started go on"
    return pickle.loads(content) if content else ("killed", None)


@dataclass(frozen=True)
class Whole:
    """A writer that nobody killed: its answer, time and number of file operations."""

    answer: Any
    seconds: float
    operations: int


def whole(writer: Writer, folder: Path) -> Whole:
    """Let a writer end."""
    started = time.monotonic()
    state, found = forked(lambda: writer.work(folder))
    if state != "done":
        raise RuntimeError(f"fails without a kill: {found}")
    seconds = time.monotonic() - started
    state, answer = forked(lambda: writer.answer(folder))
    if state != "done":
        raise RuntimeError(f"has no answer: {answer}")
    return Whole(answer[0], seconds, found[1])


def judge(number: int, seed: int, name: str, right: Whole, prepared: Path, folder: Path) -> Outcome:
    """Kill a writer once or twice, and let it end."""
    rng, writer, where = random.Random(f"{seed} {number}"), WRITERS[name], []
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            limit, seconds = rng.randint(1, max(1, right.operations)), None
            where.append(f"at operation {limit} of {right.operations}")
        else:
            limit, seconds = None, rng.uniform(0, right.seconds)
            where.append(f"after {seconds:.3f} of {right.seconds:.3f} s")
        state, found = forked(lambda: writer.work(folder), seconds, limit)
        if state == "failed":
            return Outcome(number, name, len(where), "; ".join(where), f"going on: {found}")
        if state == "done":
            where.pop()
            continue
        state, found = forked(lambda: writer.holds(folder))
        if state != "done":
            return Outcome(number, name, len(where), "; ".join(where), f"lost: {found}")
    moments = "; ".join(where)
    for what in (writer.work, writer.answer):
        state, found = forked(lambda what=what: what(folder))  # type: ignore[misc]
        if state != "done":
            return Outcome(number, name, len(where), moments, f"going on: {found}")
    left = [str(file.relative_to(folder)) for file in folder.rglob(".*.tmp")]
    wrong = f"another end: {found[0]}" if found[0] != right.answer else f"left: {left}" if left else ""
    return Outcome(number, name, len(where), moments, wrong[:2000])


def warm_up() -> None:
    """Import here what every forked process would import again; no thread may start before a fork."""
    import accelerate  # noqa: F401
    import pandas  # noqa: F401

    from sidetuning.launch import default_accelerator

    default_accelerator()
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        weights = torch.nn.Parameter(torch.zeros(1))
        weights.grad = torch.ones(1)
        kind([weights], lr=0.1).step()
