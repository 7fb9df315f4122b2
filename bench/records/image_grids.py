"""Grids of runs on images: iCIFAR by merges and recipes, and the grids of `compare` and of `transfer`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from record import PRIVATE, Record, read_all, read_results, run_cells
from sidetuning_bench import compare, icifar
from sidetuning_bench.charts import write_charts
from sidetuning_bench.continual import mean_and_error
from sidetuning_bench.dense import itaskonomy, transfer
from sidetuning_bench.grid import Cell, cell_name
from sidetuning_bench.methods import METHODS
from sidetuning_bench.options import GridOptions, IndependentOptions, Names, PSPOptions, with_values
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult
from sidetuning_bench.sequence import with_recipe

MERGES = ("mlp2", "alpha", "base-only", "side-only")
ONE_RATE = {name: value for name, value in icifar.BEST.items() if name not in icifar.BEST_SIDE and name != "lr"}
OTHERS: dict[str, dict[str, Any]] = {
    "best": {"recipe": "best"},
    # A fine-tuned copy of the base per task, with the recipe's passes, augmentation, label smoothing and schedule.
    "ceiling": {"method": IndependentOptions(), **ONE_RATE},
    "psp-running-statistics": {"method": PSPOptions("task")},
}


@dataclass(frozen=True)
class Icifar:
    """Runs of iCIFAR: side-tuning with four merges, the best recipe, its ceiling, and PSP with statistics per task."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    what: Names = MERGES
    """Merges, or other variants: best, ceiling, psp-running-statistics."""
    weights: str | None = None
    """Folder with the base and the distilled side of the original authors; the packaged ones by default."""
    tasks: int = 10
    """Number of tasks."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training."""
    cold: bool = False
    """One run with nothing cached, for its time."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features."""
    run: GridOptions = field(default=GridOptions(out="runs/records/icifar"))


def icifar_cells(given: Icifar) -> Iterator[Cell[icifar.Settings]]:
    """The runs, seed by seed."""
    shared = {"data": given.data, "cache": given.cache, "tasks": given.tasks, "precision": given.precision}
    label = "original" if given.weights else "packaged"
    weights: dict[str, Any] = {}
    if given.weights:
        files = [str(Path(given.weights) / f"{n}.safetensors") for n in ("resnet44-cifar10", "fcn4-cifar10-distilled")]
        weights = {"base_weights": files[0], "init": files[1]}
    for seed in range(1 if given.cold else given.run.seeds):
        for what in given.what[:1] if given.cold else given.what:
            name = f"{what}-{seed}" if what in OTHERS else f"icifar-{label}-{what}-{seed}"
            if given.cold:
                name = "whole-icifar" if what in MERGES else f"{what}-cold"
            folder = Path(given.run.out) / name
            values = OTHERS.get(what, {"merge": what, **weights})
            shared |= {"seed": seed, "out": str(folder)}
            settings = with_recipe(with_values(icifar.Settings(), {**shared, **values}), icifar.BEST)
            yield Cell(name, folder, settings, size=given.tasks)


def timed(settings: icifar.Settings) -> tuple[RunResult, float]:
    """A run with its seconds; it finds its own result where it is done."""
    started = time.perf_counter()
    return icifar.run(settings), time.perf_counter() - started


def run_icifar(given: Icifar) -> None:
    """Run and record."""

    def content(cell: Cell[icifar.Settings], timed: tuple[RunResult, float]) -> dict[str, Any]:
        result, seconds = timed
        told = {"weights": "original" if given.weights else "packaged", "average": result.matrix.average}
        return {**of_run(result, cell.name), **told, "whole_seconds": seconds}

    with tempfile.TemporaryDirectory() as folder:
        cold = with_values(given, {"out": folder, "cache": folder}) if given.cold else given
        run_cells(icifar_cells(cold), timed, lambda cell: None, lambda cell: cell.name, content)


def of_run(result: RunResult, variant: str) -> dict[str, Any]:
    """A result without paths of the machine."""
    settings = {name: value for name, value in result.settings.items() if name not in PRIVATE}
    return asdict(replace(result, variant=variant, settings=settings))


def icifar_table(given: Icifar) -> str:
    """Mean and standard error of the average accuracy per weights and merge, in Markdown."""
    cells: dict[tuple[str, str], list[float]] = {}
    for result in read_all("icifar-*.json"):
        cells.setdefault((result["settings"]["merge"], result["weights"]), []).append(100 * result["average"])
    text = "| merge | original weights | packaged weights |\n|---|---|---|\n"
    for merge in MERGES:
        row = [merge]
        for values in (cells.get((merge, weights), []) for weights in ("original", "packaged")):
            mean, error = mean_and_error(values) if values else (0.0, 0.0)
            row.append(f"{mean:.1f} ± {error:.1f} ({len(values)} seeds)" if values else "–")
        text += f"| {' | '.join(row)} |\n"
    return text


# Tasks without numbers, which have no units.
UNITLESS = ("class_object", "segment_semantic")


def units(given: Any) -> str:
    """What a result's numbers were learned in, by its settings; "range" in those that are older than the choice."""
    return str(given.settings.get("units") or "range") if isinstance(given, RunResult) else given.units or "labels"


def prefix(given: compare.Settings) -> str:
    """The start of the names of a grid's results; those of numbers in the files' range came first."""
    if isinstance(given.on, compare.OnIcifar):
        return f"compare-{given.grid}"
    return f"compare-itaskonomy-{given.grid}" + ("-labels" if units(given.on.source) == "labels" else "")


def run_compare(given: compare.Settings) -> None:
    """Run and record a grid."""
    small = isinstance(given.on, compare.OnIcifar)
    if isinstance(given.on, compare.OnITaskonomy):
        given = with_values(given, {"units": units(given.on.source)})
    # The precision of small images was not part of a comparison.
    free = {"seed", *({"precision"} if small else ())}
    work = given.on.scenario.run
    name, content = (lambda cell: f"{prefix(given)}-{cell.name}"), (lambda cell, result: of_run(result, cell.variant))
    run_cells(compare.cells(given), work, compare.finished, name, content, free)


def compared(given: compare.Settings) -> list[RunResult]:
    """All recorded runs of a grid, in the grid's order, of the given methods alone where there are some."""
    results = read_results(RunResult, f"{prefix(given)}-*.json")
    if isinstance(given.on, compare.OnITaskonomy):
        results = [r for r in results if units(r) == units(given.on.source)]
    found = {(r.method, r.variant, r.seed): r for r in results}
    for what in ("data", "base"):
        if len({run.settings.get("fingerprints", {}).get(what, "") for run in found.values()} - {""}) > 1:
            sys.exit(f"the results of {prefix(given)} are of more than one {what}; move those of the other away")
    whole = with_values(replace(given, methods=()), {"seeds": 9})
    order = [(c.settings.method.name, c.variant, c.settings.run.seed) for c in compare.cells(whole)]
    runs = compare.add_alone([found[key] for key in order if key in found])
    return [run for run in runs if run.method in (given.methods or compare.ALL)]


def report_compared(given: compare.Settings, file: Path) -> None:
    """Write a page of a grid, with the pictures of runs whose folders are still there."""
    runs = compared(given)
    folders = [Path(given.run.out) / cell_name(r.method, r.variant, r.seed) / "gallery" for r in runs]
    write_report(runs, file, title=compare.title(given), galleries=folders)


def run_transfer(given: transfer.Settings) -> None:
    """Run and record."""

    def content(cell: Cell[itaskonomy.Settings], result: RunResult) -> dict[str, Any]:
        return of_run(transfer.named(cell, result), cell.variant)

    def name(cell: Cell[itaskonomy.Settings]) -> str:
        old = units(cell.settings.source) == "range" or cell.settings.tasks[0] in UNITLESS
        return f"transfer-{cell.name}" if old else f"transfer-labels-{cell.name}"

    cells = transfer.cells(with_values(given, {"units": units(given.source)}))
    run_cells(cells, itaskonomy.run, compare.finished, name, content)


def transferred(given: transfer.Settings) -> list[RunResult]:
    """All recorded runs of transfer, in the order of methods; of numbers those in the given units."""
    order = [*transfer.Settings.methods, *METHODS.names()]
    runs = read_results(RunResult, "transfer-*.json")
    runs = [run for run in runs if run.tasks[0] in UNITLESS or units(run) == units(given.source)]
    return sorted(runs, key=lambda run: (order.index(run.method), run.variant, run.seed))


def report_transferred(given: transfer.Settings, file: Path) -> None:
    """Write a page of the curves."""
    charts = list(transfer.charts(transferred(given), given.targets, given.frames))
    write_charts(charts, file, title="Transfer from curvature", lead=transfer.lead(given.steps))


ICIFAR = Record(Icifar(), run_icifar, icifar_table)
COMPARE = Record(
    with_values(compare.Settings(compare.OnIcifar()), {"out": "runs/records/compare"}),
    run_compare,
    lambda given: compare.tables(compared(given)),
    report_compared,
)
TRANSFER = Record(
    with_values(transfer.Settings(), {"out": "runs/records/transfer"}),
    run_transfer,
    lambda given: transfer.tables(transferred(given), given.targets, given.frames),
    report_transferred,
)
