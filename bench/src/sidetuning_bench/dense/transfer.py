"""Transfer (paper, section 4.2): from curvature to one other dense task, with few and with many frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from sidetuning.errors import SideTuningError, UnknownNameError
from sidetuning.files import write_json, write_text
from sidetuning.registry import unknown
from sidetuning_bench import compare
from sidetuning_bench.charts import COLOURS, Chart, Line, Point, write_charts
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.methods import METHODS
from sidetuning_bench.results import Estimate, MeasureRow, RunResult, measure_rows, number_text
from sidetuning_bench.runs import WITH_SIDES, Run, above_zero, at_least_one, not_twice


@dataclass(frozen=True)
class Settings:
    """Learn single dense tasks from so many frames, by side-tuning, fine-tuning, fixed features and from scratch."""

    data: str = "runs/doom"
    """A folder in Taskonomy's layout."""
    subset: str | None = None
    """As of itaskonomy."""
    out: str = "runs/transfer"
    """Folder of the runs; the same command run again goes on where it stopped."""
    targets: tuple[str, ...] = ("normal", "class_object")
    """The tasks."""
    frames: tuple[int, ...] = (20, 100, 500, 2000, 5000)
    """How many training frames; fewer ones are among the more."""
    methods: tuple[str, ...] = ("sidetune", "sidetune-best", "sidetune-copy", "finetune", "features", "scratch")
    """Methods; sidetune-best has itaskonomy's best recipe, sidetune-copy the paper's side of this experiment, a copy of the base."""
    merge: str = "alpha"
    """How base and side are fused; the best recipe has its own way."""
    steps: int = 400
    """Optimiser steps of every run, so that few frames are seen often."""
    batch: int = 16
    """Frames per step."""
    lr: float | None = None
    """Learning rate of all methods; by default itaskonomy's for each."""
    size: int | None = None
    """Resize frames to this width and height; None keeps them."""
    test_frames: int | None = 300
    """Test on at most so many frames; None for all."""
    seeds: int = 3
    """Runs of every cell, with seeds 0, 1, …, each on frames that are drawn anew."""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    init: str | None = "distilled"
    """How sides start."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""


COPY = "sidetune-copy"
BEST = "sidetune-best"
REFERENCE = "sidetune"  # what other methods are compared with, seed by seed


def cells(settings: Settings) -> Iterator[compare.Cell]:
    """The runs, seed by seed; a variant is a target with a number of frames."""
    s = settings
    for seed in range(s.seeds):
        for target in s.targets:
            for frames in s.frames:
                for method in s.methods:
                    name = compare.folder_name(target, frames, method, seed)
                    plain = itaskonomy.Settings(
                        tasks=(target,), frames=frames, draw=seed, method=method, seed=seed, init=s.init, data=s.data, subset=s.subset,
                        size=s.size, test_frames=s.test_frames, epochs=s.steps * s.batch / frames, batch=s.batch,
                        lr=s.lr, base_weights=s.base_weights, precision=s.precision, out=str(Path(s.out) / name), cache=s.cache,
                        progress=False,
                    )  # fmt: skip
                    if method in (*WITH_SIDES, COPY):
                        plain = replace(plain, merge=s.merge)
                    if method == COPY:
                        plain = replace(plain, method="sidetune", side="copy", side_width=1.0, init=None)
                    if method == BEST:
                        plain = replace(plain, method="sidetune", recipe="best", **itaskonomy.BEST)
                    yield compare.Cell(variant(target, frames), itaskonomy.with_rate(plain))


def variant(target: str, frames: int) -> str:
    """Names the cells of one target and number of frames."""
    return f"{target}, {frames} frames"


def run(settings: Settings) -> list[RunResult]:
    """Run the cells that have no result yet, each in a process of its own, and write `table.md`, `curves.json` and `report.html`.

    Raises:
        SideTuningError: a cell failed; the others' results stay.
    """
    s = settings
    at_least_one(s, "steps", "batch", "size", "test_frames", "seeds")
    above_zero(s, "lr")
    not_twice(s, "targets", "frames", "methods")
    for method in s.methods:
        if method not in (*METHODS.names(), COPY, BEST):
            raise UnknownNameError(unknown("method", method, [*METHODS.names(), COPY, BEST], verb="registered"))
    if len(s.methods) > COLOURS:
        raise SideTuningError(f"--methods: at most {COLOURS} fit into one comparison")
    if min(s.frames) < 1:
        raise SideTuningError(f"--frames must be 1 or more, not {min(s.frames)}")
    todo = list(cells(s))
    given = itaskonomy.Settings(data=s.data, subset=s.subset, size=s.size, test_frames=s.test_frames)
    for seed in range(s.seeds):  # what is missing is found now, not after hours
        train, test = itaskonomy.frames_of(replace(given, tasks=s.targets, frames=max(s.frames), draw=seed))
    itaskonomy.tell_absent(train, test)
    compare.dry_run(todo)
    folder = Run(s.out, "transfer", s, free=("data", "out", "cache", "seeds", "methods", "frames", "targets"))
    for target in s.targets:  # of what all numbers of frames share
        folder.belongs(**{f"data of {target}": itaskonomy.fingerprint_of(replace(given, tasks=(target,), frames=1))})
    out = Path(s.out)
    results = []
    with tqdm(total=len(todo), unit="run", dynamic_ncols=True) as bar:
        for cell in todo:
            bar.set_description(cell.folder.name)
            results.append(one(cell, bar))
            write_text(out / "table.md", tables(results, s.targets, s.frames))
    write_json(out / "curves.json", {t: curves(results, t, s.frames) for t in s.targets})
    write_charts(
        list(charts(results, s.targets, s.frames)), out / "report.html", title="Transfer from curvature",
        lead=lead(s.steps),
    )  # fmt: skip
    return results


def lead(steps: int) -> str:
    """What the report says first."""
    return (
        f"Single tasks, learned from few and from many frames, each in {steps:,} optimiser steps, and measured on buildings that no "
        "training frame shows."
    )


def one(cell: compare.Cell, bar: tqdm[Any]) -> RunResult:
    """The result of a cell, read where it is there, else run, under the names of a comparison."""
    s = cell.settings
    method = BEST if s.recipe == "best" else COPY if s.side == "copy" else s.method
    return replace(compare.one(cell, bar), variant=cell.variant, method=method)


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
    """For each method and number of frames the value at the end; None where nothing was run."""
    found: dict[str, list[Value | None]] = {}
    for method in dict.fromkeys(r.method for r in results):
        runs = [[r for r in results if (r.method, r.variant) == (method, variant(target, n))] for n in frames]
        values = [[r.values[-1][-1] for r in some if r.values] for some in runs]
        found[method] = [Value(*mean_and_error(v), len(v)) if v else None for v in values]
    return found


def tables(results: Sequence[RunResult], targets: Sequence[str], frames: Sequence[int]) -> str:
    """A table in Markdown per target: methods, and their differences from side-tuning, as rows, numbers of frames as columns."""
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
    """For each number of frames a method's value less side-tuning's, over the seeds that both have: each on the same frames."""
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
    from rich.console import Console
    from rich.markdown import Markdown

    results = run(settings)
    console = Console()
    console.print(Markdown(tables(results, settings.targets, settings.frames)))
    console.print(f"tables: {settings.out}/table.md; report: {settings.out}/report.html", highlight=False)
