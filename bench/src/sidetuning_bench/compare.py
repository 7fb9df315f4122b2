"""`sidetuning compare icifar` and `compare itaskonomy`: methods, or variants of one, on the same data with the same budget, and a report of them."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from sidetuning.base import Base
from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning.files import write_text
from sidetuning.loading import load_base
from sidetuning.registry import unknown
from sidetuning_bench import icifar
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.dense.tasks import ORDER
from sidetuning_bench.methods import METHODS, Task
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult, gaps_table, markdown, measures_table, summary_table
from sidetuning_bench.runs import Run, at_least_one, end_with_parent

Grid = Literal["methods", "merge", "init", "side", "order", "dense", "base", "data", "boosting"]
MERGES = ("base-only", "side-only", "sum", "product", "fixed", "alpha", "film", "mlp", "mlp2", "res-mlp", "concat")
DENSE_GRIDS = ("methods", "merge", "init", "side", "order", "dense", "base")
Given = icifar.Settings | itaskonomy.Settings
SCENARIOS: dict[str, Any] = {"icifar": icifar, "itaskonomy": itaskonomy}
OTHERS = {  # settings of the other scenario
    "icifar": ("frames", "subset", "test_frames", "size", "epochs"), "itaskonomy": ("samples", "shares"),
}  # fmt: skip
ALONE = "alone"  # the variant in which every task is learned first, of methods where only a run of its own tells that
ALL = (
    "sidetune", "features", "independent", "finetune", "ewc", "psp", "pnn", "scratch", "residual-adapter", "lora", "piggyback",
    "boosting",
)  # fmt: skip
FIRST = {"finetune": ("independent", ""), "ewc": ("independent", ""), "psp": ("psp", ALONE), "pnn": ("pnn", ALONE)}


@dataclass(frozen=True)
class Settings:
    """Compare methods on one scenario, cell by cell; the same command again goes on where it stopped."""

    scenario: Annotated[Literal["icifar", "itaskonomy"], tyro.conf.Positional]
    """What is learned."""
    grid: Grid = "methods"
    """What varies: the method, or for an ablation of side-tuning its merge, initialisation (init), side, the order of tasks,
    dense laterals, what is heard (base, side, or both), the share of the training data, or boosting against bigger sides."""
    methods: tuple[str, ...] = ()
    """Methods of the grids methods, order and data; by default those that the grid is about."""
    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Parts of the training data, of the grid data."""
    seeds: int = 3
    """Runs of every cell, with seeds 0, 1, …"""
    data: str | None = None
    """As the scenario's own --data; by default the scenario's."""
    out: str = "runs/compare"
    """Folder of the cells' runs, the table and the report."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    init: str | None = "distilled"
    """How sides start, where the grid does not say."""
    merge: str | None = None
    """How sides and base are fused, where the grid does not say; by default the scenario's."""
    lr: float | None = None
    """Learning rate of all methods; by default the scenario's for each."""
    batch: int | None = None
    """Images or frames per step; by default the scenario's."""
    ewc_coefficient: float | None = None
    """Of the penalty of ewc; by default the scenario's."""
    samples: int = 20_000
    """Training images per task, repetitions included (icifar)."""
    frames: int | None = None
    """Training frames, None for all (itaskonomy)."""
    subset: str | None = None
    """Which buildings train and test, as itaskonomy's own --subset."""
    test_frames: int | None = 300
    """Test frames, None for all (itaskonomy)."""
    size: int | None = None
    """Resize frames to this width and height; None keeps them (itaskonomy)."""
    epochs: float = 3.0
    """Passes over them, per task (itaskonomy)."""
    tasks: int | None = None
    """Learn the first so many tasks alone."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of methods that train whole networks, and of decoders; fast where the processor knows bfloat16."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    variant: str
    settings: Given

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return Path(self.settings.out)

    @property
    def tasks(self) -> int:
        """How many tasks it learns."""
        tasks = self.settings.tasks
        return tasks if isinstance(tasks, int) else len(tasks)

    @property
    def scenario(self) -> Any:
        """The module that runs it."""
        return scenario_of(self.settings)


def scenario_of(settings: Given) -> Any:
    """The module whose settings these are."""
    return SCENARIOS["icifar" if isinstance(settings, icifar.Settings) else "itaskonomy"]


def cells(s: Settings) -> Iterator[Cell]:
    """The runs of the grid, seed by seed, so that an interrupted grid has whole seeds."""
    for seed in range(s.seeds):
        for variant, settings in GRIDS[s.grid](common(s, seed), s):
            whole = not METHODS[settings.method].uses_features  # type: ignore[attr-defined]
            name = folder_name(settings.method, variant, seed)
            precision = s.precision if whole or s.scenario == "itaskonomy" else "no"
            cell = replace(settings, out=str(Path(s.out) / name), precision=precision)
            yield Cell(variant, itaskonomy.with_rate(cell) if isinstance(cell, itaskonomy.Settings) else cell)


def common(s: Settings, seed: int) -> Given:
    """What all cells of a seed share."""
    plain: Given
    if s.scenario == "icifar":
        plain = icifar.Settings(samples=s.samples, tasks=s.tasks or icifar.Settings.tasks)
    elif s.grid in DENSE_GRIDS:
        plain = itaskonomy.Settings(
            frames=s.frames, epochs=s.epochs, tasks=ORDER[: s.tasks], subset=s.subset, test_frames=s.test_frames, size=s.size
        )  # fmt: skip
    else:
        raise SideTuningError(f"--grid {s.grid} is one of icifar's; itaskonomy has {', '.join(DENSE_GRIDS)}")
    return replace(
        plain, data=s.data or plain.data, base_weights=s.base_weights, init=s.init, seed=seed, cache=s.cache, progress=False,
        **{name: value for name in ("merge", "lr", "batch", "ewc_coefficient") if (value := getattr(s, name)) is not None},
    )  # fmt: skip


def of_method(common: Any, method: str, **other: Any) -> Any:
    """The settings for a method: those that it does not read as they are by default."""
    readers = scenario_of(common).READERS
    unread = {f.name: f.default for f in fields(common) if method not in readers.get(f.name, (method,))}
    return replace(common, method=method, **(unread | other))


def folder_name(*parts: object) -> str:
    """A cell's name, of what tells it from the others."""
    return re.sub(r"[^\w.]+", "-", " ".join(map(str, parts)).replace("%", ""))


Variants = Iterator[tuple[str, Any]]


def methods_grid(common: Any, s: Settings) -> Variants:
    """Every method at the same budget."""
    for method in s.methods or ALL:
        yield "", of_method(common, method)
        if method == "sidetune" and isinstance(common, itaskonomy.Settings):
            yield "recipe=best", replace(of_method(common, method), recipe="best", **itaskonomy.BEST)
        if FIRST.get(method) == (method, ALONE) and isinstance(common, icifar.Settings):
            yield ALONE, of_method(common, method, alone=True)


def merge_grid(common: Any, s: Settings) -> Variants:
    """Every merge operator."""
    for merge in MERGES:
        yield f"merge={merge}", replace(common, merge=merge)


def init_grid(common: Any, s: Settings) -> Variants:
    """How the side starts; "copy" is a copy of the base, slimmed to a quarter of its width, as the side."""
    for init in ("distilled", "low-energy", "zero", "xavier"):
        yield f"init={init}", replace(common, init=common.init if init == "distilled" else init)
    yield "init=copy", replace(common, side="copy", side_width=0.25, init=None)


def side_grid(common: Any, s: Settings) -> Variants:
    """Sides of growing size, all from random weights, since distilled ones ship for fcn4 alone."""
    common = replace(common, init="xavier")
    for side in ("fcn4", "fcn5", "fcn8"):
        yield f"side={side}", replace(common, side=side)
    for width in (0.25, 0.5):
        yield f"side=copy, width={width}", replace(common, side="copy", side_width=width)


def order_grid(common: Any, s: Settings) -> Variants:
    """Label order and two random orders of the tasks."""
    for method in s.methods or ("sidetune", "finetune"):
        for order in (None, 1, 2):
            yield (
                f"order={'label' if order is None else f'random {order}'}",
                of_method(common, method, order=order),
            )


DENSE = ", dense"


def dense_grid(common: Any, s: Settings) -> Variants:
    """With and without the sides of earlier tasks."""
    for merge in ("alpha", "mlp2"):
        for dense in (False, True):
            yield f"merge={merge}{DENSE if dense else ''}", replace(common, merge=merge, dense=dense)


def base_grid(common: Any, s: Settings) -> Variants:
    """The base alone, the side alone, and both."""
    for name, merge in (("base alone", "base-only"), ("side alone", "side-only"), ("base and side", "mlp2")):
        yield name, replace(common, merge=merge)


def data_grid(common: Any, s: Settings) -> Variants:
    """A part of each task's images, 1, 10 and 100 %, at the same number of steps: who overfits?"""
    for method in s.methods or ("sidetune", "features", "independent", "finetune"):
        for share in s.shares:
            yield f"data={100 * share:g}%", of_method(common, method, share=share)


def boosting_grid(common: Any, s: Settings) -> Variants:
    """Several small sides, one after another, against one side with as many parameters, all from random weights."""
    common = replace(common, init="xavier")
    for stages in (1, 2, 3):
        yield f"stages={stages}", of_method(common, "boosting", stages=stages)
    for width in (1.875, 2.625):  # within 3 % of two and of three stages, merges included
        yield f"side=fcn4, width={width}", replace(common, side_width=width)


GRIDS: dict[str, Callable[[Any, Settings], Variants]] = {
    "methods": methods_grid, "merge": merge_grid, "init": init_grid, "side": side_grid, "order": order_grid,
    "dense": dense_grid, "base": base_grid, "data": data_grid, "boosting": boosting_grid,
}  # fmt: skip


def run(settings: Settings) -> list[RunResult]:
    """Run the cells that have no result yet, each in a process of its own, and write table and report.

    Returns:
        The results of all cells; `add_alone` makes rows for a table of them.

    Raises:
        SideTuningError: a cell failed; the others' results stay.
    """
    s = settings
    for method in s.methods:
        if method not in METHODS:
            raise UnknownNameError(unknown("method", method, METHODS.names(), verb="registered"))
    defaults = Settings(s.scenario)
    for name in OTHERS[s.scenario]:
        if getattr(s, name) != getattr(defaults, name):
            raise SideTuningError(f"--{name.replace('_', '-')} is not read by {s.scenario}; leave it out")
    at_least_one(s, "seeds", "batch", "samples", "frames", "test_frames", "size", "tasks")
    if len(set(s.methods)) < len(s.methods) or len(set(s.shares)) < len(s.shares):
        raise SideTuningError("--methods or --shares names one twice")
    if not all(0 < share <= 1 for share in s.shares):
        raise SideTuningError(f"--shares are parts of the data, above 0 and up to 1, not {s.shares}")
    todo = list(cells(s))
    base = dry_run(todo)
    folder = Run(s.out, f"compare {s.scenario}", s, free=("data", "out", "cache", "seeds", "methods", "shares"))
    first = todo[0].settings
    if isinstance(first, itaskonomy.Settings):
        frames = itaskonomy.frames_of(first)
        itaskonomy.tell_absent(*frames)
        data = itaskonomy.fingerprint(*frames)
    else:
        data = icifar.fingerprint_of(first)
    folder.belongs(data=data, base=base.identity().sha256)
    results: list[RunResult] = []
    bar = tqdm(total=sum(cell.tasks for cell in todo), unit="task", dynamic_ncols=True)
    with bar:
        for cell in todo:
            bar.set_description(cell.folder.name)
            result = one(cell, bar)
            results.append(replace(result, variant=cell.variant))
            galleries = [c.folder / "gallery" for c in todo[: len(results)] if c.variant != ALONE]
            if galleries:
                finish(s, results, galleries)
    return results


def dry_run(todo: Sequence[Cell]) -> Base:
    """Build the parts of every kind of cell, so that one that is missing is said before hours of work; returns the base, without taps."""
    first = todo[0].settings
    tapped = cache(partial(load_base, first.base, weights=first.base_weights))
    parts = ("method", "side", "side_width", "merge", "init", "stages", "taps")
    kinds = {tuple(getattr(c.settings, part, None) for part in parts): c for c in todo}
    for cell in kinds.values():
        base = tapped(taps=cell.settings.taps)
        cell.scenario.build_method(cell.settings, base).add(Task("dry-run", "identity"))
    return tapped(taps=())


def one(cell: Cell, bar: tqdm[Any]) -> RunResult:
    """The result of a cell: read where it is there, else run; a process of its own makes its peak memory its own."""
    file, metrics, start = cell.folder / "result.json", cell.folder / "metrics.jsonl", bar.n
    if file.exists():
        name = cell.scenario.__name__.rpartition(".")[2]
        Run(cell.folder, name, cell.settings, free=cell.scenario.FREE)  # refuses a run with other settings
        bar.update(cell.tasks)
        return RunResult.load(file)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(run_cell, cell)
        try:
            while not future.done():
                time.sleep(0.5)
                learned = len(metrics.read_text().splitlines()) if metrics.exists() else 0
                bar.update(start + learned - bar.n)
            bar.update(start + cell.tasks - bar.n)
            return future.result()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # where the interrupt was sent to this process alone
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise SideTuningError(
                f"the run in {cell.folder} was killed, perhaps for want of memory; the same command goes on from there"
            ) from error


def run_cell(cell: Cell) -> RunResult:
    """What the cell's process does; it ends with its parent, so that a killed grid leaves nothing running."""
    end_with_parent()
    result: RunResult = cell.scenario.run(cell.settings)
    return result


def finish(settings: Settings, results: Sequence[RunResult], galleries: Sequence[Path] = ()) -> None:
    """Write `table.md` and `report.html` of the results so far, with the pictures of dense tasks."""
    with_first = add_alone(results)
    table = markdown(summary_table(with_first))
    if with_first[0].measures is not None:
        table += "\n" + measures_table(with_first) + "\n" + gaps_table(with_first)
    out = Path(settings.out)
    write_text(out / "table.md", table)
    pictures = [folder if folder.is_dir() else None for folder in galleries]
    write_report(with_first, out / "report.html", title=title(settings), galleries=pictures if any(pictures) else ())


def title(settings: Settings) -> str:
    """Of the report."""
    name = "iCIFAR" if settings.scenario == "icifar" else "iTaskonomy"
    return f"{name}: {'methods compared' if settings.grid == 'methods' else settings.grid}"


def add_alone(results: Sequence[RunResult]) -> list[RunResult]:
    """Fill in how well each task is learned first, and leave out the runs that tell nothing else.

    For methods whose tasks do not touch that is what it got in the sequence. The first task of fine-tuning and EWC is a
    fine-tuned copy of the base, so theirs is the run of `independent` with the same seed; that of PSP and PNN is in runs
    with every task "alone"; that of dense laterals is the run without them. None where there is no such run.
    """
    runs = {(r.method, r.variant, r.seed): r for r in results}
    filled = []
    for r in results:
        if r.variant == ALONE:
            continue
        first: RunResult | None = r
        if r.method in FIRST:
            method, variant = FIRST[r.method]
            first = runs.get((method, variant or r.variant, r.seed))
        elif r.settings.get("dense"):
            first = runs.get((r.method, r.variant.removesuffix(DENSE), r.seed))
        alone = None if first is None else [first.matrix.learned[first.tasks.index(t)] for t in r.tasks]
        filled.append(replace(r, alone=alone))
    return filled


def main(settings: Settings) -> None:
    """Run the grid and print its table."""
    from rich.console import Console
    from rich.markdown import Markdown

    results = run(settings)
    console = Console(width=max(120, shutil.get_terminal_size().columns))
    console.print(Markdown(markdown(summary_table(add_alone(results)))))
    console.print(f"table: {settings.out}/table.md; report: {settings.out}/report.html", highlight=False)
