"""Transfer (paper, section 4.2): from curvature to one other dense task, with few and with many frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning.files import write_json, write_text
from sidetuning.registry import unknown
from sidetuning_bench import compare, grid
from sidetuning_bench.charts import COLOURS, Chart, Line, Point, write_charts
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.grid import Cell, cell_name
from sidetuning_bench.options import Count, GridOptions, Names, Once, SideOptions, check
from sidetuning_bench.results import Estimate, MeasureRow, RunResult, measure_rows, number_text
from sidetuning_bench.runs import Run, dated

COPY = "sidetune-copy"
BEST = "sidetune-best"
SIDES: dict[str, dict[str, Any]] = {
    COPY: {"side": "copy", "side_width": 1.0, "init": None},
    BEST: {"recipe": "best", **itaskonomy.BEST},
}
# What other methods are compared with, seed by seed.
REFERENCE = "sidetune"
FREE = (*compare.FREE, "frames", "targets")


@dataclass(frozen=True)
class Settings:
    """Learn single dense tasks from few to many frames: side-tuning, fine-tuning, fixed features, from scratch."""

    targets: Names = ("normal", "class_object")
    """Tasks to learn."""
    frames: Annotated[tuple[Count, ...], Once] = (20, 100, 500, 2000, 5000)
    """Numbers of training frames; a smaller set is part of each larger one."""
    methods: Names = ("sidetune", BEST, COPY, "finetune", "features", "scratch")
    """Methods; sidetune-best has itaskonomy's best recipe, sidetune-copy the paper's side of this experiment, a copy of
    the base."""
    steps: Count = 400
    """Optimiser steps of every run, so that few frames are seen often."""
    source: itaskonomy.FrameOptions = field(default=itaskonomy.FrameOptions())
    shared: compare.Shared = field(default=compare.Shared(merge="mlp2", batch=16))
    run: GridOptions = field(default=GridOptions(out="runs/transfer"))
    """Each seed draws its own frames."""


def cells(settings: Settings) -> Iterator[Cell[itaskonomy.Settings]]:
    """The runs, seed by seed; a variant is a target with a number of frames."""
    every = product(range(settings.run.seeds), settings.targets, settings.frames, settings.methods)
    for seed, target, frames, method in every:
        name = cell_name(target, frames, method, seed)
        folder = Path(settings.run.out) / name
        plain = itaskonomy.Settings(source=settings.source, tasks=(target,), frames=frames, draw=seed)
        values: dict[str, Any] = {
            "method": itaskonomy.METHODS["sidetune" if method in SIDES else method],
            "epochs": settings.steps * (settings.shared.batch or plain.training.batch) / frames,
            **SIDES.get(method, {}),
            "seed": seed,
            "out": str(folder),
        }
        yield Cell(name, folder, settings.shared.applied(plain, values), variant(target, frames))


def variant(target: str, frames: int) -> str:
    """Names the cells of one target and number of frames."""
    return f"{target}, {frames} frames"


def run(settings: Settings) -> list[RunResult]:
    """Run the cells that have no result yet, and write `table.md`, `curves.json` and `report.html`.

    Raises:
        SideTuningError: a cell failed; the others' results stay.
    """
    names = [*itaskonomy.METHODS, *SIDES]
    settings = dated(settings, settings.run.out)
    check(settings)
    for method in settings.methods:
        if method not in names:
            raise UnknownNameError(unknown("method", method, names, verb="registered"))
    if len(settings.methods) > COLOURS:
        raise SideTuningError(f"--methods: at most {COLOURS} fit into one comparison")
    todo = list(cells(settings))
    # What is missing is found now, not after hours.
    most = replace(todo[0].settings, tasks=settings.targets, frames=max(settings.frames))
    for seed in range(settings.run.seeds):
        train, test = itaskonomy.frames_of(replace(most, draw=seed))
    itaskonomy.tell_absent(train, test)
    compare.dry_run(todo)
    folder = Run(settings.run.out, "transfer", settings, free=FREE)
    for target in settings.targets:
        # One frame for training: the fingerprint is of what all numbers of frames share.
        few = itaskonomy.frames_of(replace(most, tasks=(target,), frames=1, draw=0))
        folder.belongs(**{f"data of {target}": itaskonomy.fingerprint(*few)})
    results, out = [], folder.folder
    for cell, result in grid.run(todo, itaskonomy.run, compare.finished, progress=settings.run.progress):
        results.append(named(cell, result))
        write_text(out / "table.md", tables(results, settings.targets, settings.frames))
    write_json(out / "curves.json", {t: curves(results, t, settings.frames) for t in settings.targets})
    shown = list(charts(results, settings.targets, settings.frames))
    write_charts(shown, out / "report.html", title="Transfer from curvature", lead=lead(settings.steps))
    return results


def lead(steps: int) -> str:
    """First sentence of the report."""
    return (
        f"Single tasks, learned from few and from many frames, each in {steps:,} optimiser steps, and measured on "
        "buildings that no training frame shows."
    )


def named(cell: Cell[itaskonomy.Settings], result: RunResult) -> RunResult:
    """A cell's result, under the names of the comparison."""
    options = cell.settings.method
    copied = isinstance(options, SideOptions) and options.side == "copy"
    method = BEST if cell.settings.recipe == "best" else COPY if copied else options.name
    return replace(result, variant=cell.variant, method=method)


def measure_of(results: Sequence[RunResult], target: str) -> MeasureRow | None:
    """The measure of a target over all its runs; None where there are none."""
    runs = [r for r in results if r.tasks == [target]]
    return measure_rows(runs)[0] if runs else None


def charts(results: Sequence[RunResult], targets: Sequence[str], frames: Sequence[int]) -> Iterator[Chart]:
    """For each target its measure over the number of training frames, a line per method."""
    for target in targets:
        if row := measure_of(results, target):
            lines = [
                Line(method, [Point(n, *p) for n, p in zip(frames, points, strict=True) if p])
                for method, points in curves(results, target, frames).items()
            ]
            note = f"{'Lower' if row.lower_is_better else 'Higher'} is better."
            yield Chart(target, "training frames", row.measure, lines, log_x=True, decimals=row.decimals, note=note)


class Value(NamedTuple):
    """The mean over seeds, its standard error, and how many seeds."""

    mean: float
    error: float
    runs: int


def curves(results: Sequence[RunResult], target: str, frames: Sequence[int]) -> dict[str, list[Value | None]]:
    """For each method of a target, and number of frames, the value at the end; None where nothing was run."""
    found: dict[str, list[Value | None]] = {}
    for method in dict.fromkeys(r.method for r in results if r.tasks == [target]):
        runs = [[r for r in results if (r.method, r.variant) == (method, variant(target, n))] for n in frames]
        values = [[r.values[-1][-1] for r in some if r.values] for some in runs]
        found[method] = [Value(*mean_and_error(v), len(v)) if v else None for v in values]
    return found


def tables(results: Sequence[RunResult], targets: Sequence[str], frames: Sequence[int]) -> str:
    """A table in Markdown per target: methods and their differences from side-tuning by numbers of frames."""
    text = ""
    for target in targets:
        if row := measure_of(results, target):
            text += f"| curvature → {target}: {row.measure} | " + " | ".join(f"{n:,} frames" for n in frames) + " |\n"
            text += "| --- |" + " ---: |" * len(frames) + "\n"
            for method, points in curves(results, target, frames).items():
                cells = [number_text(p and Estimate(p.mean, p.error), row.decimals) for p in points]
                text += f"| {method} | " + " | ".join(cells) + " |\n"
            for method in list(curves(results, target, frames)):
                cells = [number_text(d, row.decimals) for d in differences(results, target, frames, method)]
                if method != REFERENCE and set(cells) != {number_text(None)}:
                    text += f"| {method} less {REFERENCE} | " + " | ".join(cells) + " |\n"
            text += "\n"
    return text


def differences(results: Sequence[RunResult], target: str, frames: Sequence[int], method: str) -> list[Estimate | None]:
    """For each number of frames a method's value less side-tuning's, over the seeds that both have.

    A seed draws the same frames for all methods.
    """
    found: list[Estimate | None] = []
    for n in frames:
        ours, other = (
            {r.seed: r.values[-1][-1] for r in results if (r.method, r.variant) == (m, variant(target, n)) and r.values}
            for m in (REFERENCE, method)
        )
        both = [other[seed] - ours[seed] for seed in sorted(ours.keys() & other.keys())]
        found.append(Estimate(*mean_and_error(both)) if both else None)
    return found


def main(settings: Settings) -> None:
    """Run and print the tables."""
    grid.print_tables(tables(run(settings), settings.targets, settings.frames), settings.run.out)
