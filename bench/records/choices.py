"""What settings were chosen by: EWC's coefficient on iCIFAR, and iTaskonomy's side on the validation levels of Doom."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from record import Record, read, write
from sidetuning_bench import compare, grid, icifar
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.grid import Cell
from sidetuning_bench.options import EWCOptions, Positive, with_values
from sidetuning_bench.results import RunResult, markdown, measures_table, summary_table

FUSION = {"side": "fusion", "taps": ("layer2", "layer3"), "init": None}
# For each row its method, and other settings.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "features": ("features", {}),
    "fcn5, mlp2": ("sidetune", {"merge": "mlp2"}),
    "fusion, sum": ("sidetune", {**FUSION, "merge": "sum"}),
    "fusion, mlp2": ("sidetune", {**FUSION, "merge": "mlp2"}),
    "piggyback": ("piggyback", {}),
    # Better than at 1e-3.
    "independent": ("independent", {"lr": 3e-4}),
}


@dataclass(frozen=True)
class Coefficients:
    """EWC's coefficient on the first three tasks of iCIFAR, at a quarter of the budget."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    out: str = "runs/records/ewc"
    """Folder of the runs."""
    coefficients: tuple[Positive, ...] = (1.0, 10.0, 100.0, 1e3, 1e4)
    """Coefficients of the penalty."""


@dataclass(frozen=True)
class Sides:
    """iTaskonomy's side, by four tasks on the validation levels."""

    data: str = itaskonomy.FrameOptions.data
    """Frames of render-doom."""
    out: str = "runs/records/itaskonomy-settings"
    """Folder of the runs."""


def run_coefficients(given: Coefficients) -> None:
    """Record the accuracy of each task after each task, by the coefficient."""
    common = {"data": given.data, "tasks": 3, "samples": 5120, "precision": "bf16", "progress": False}
    cells = []
    for coefficient in given.coefficients:
        folder = Path(given.out) / f"{coefficient:g}"
        values = {**common, "method": EWCOptions(coefficient), "out": str(folder)}
        cells.append(Cell(folder.name, folder, with_values(icifar.Settings(), values), size=3))
    rows = []
    for cell, result in grid.run(cells, icifar.run, compare.finished, unit="task"):
        percent = [[round(100 * accuracy, 1) for accuracy in row] for row in result.matrix.rows]
        average = round(100 * result.matrix.average, 2)
        rows.append({"coefficient": float(cell.name), "accuracy": percent, "average": average})
    what = "accuracy in % of each task after each task, seed 0, by the coefficient"
    write("ewc-coefficient", {"what": what, "cells": rows})


def run_sides(given: Sides) -> None:
    """Record the rows, each a run of four tasks."""
    tasks = ("reshading", "normal", "class_object", "segment_semantic")
    plain = itaskonomy.Settings(tasks=tasks, frames=5000, test_split="val", epochs=1)
    # The choice was made in these units, and is run again as it was.
    common = {"units": "range", "data": given.data, "batch": 16, "precision": "bf16", "progress": False}
    cells = []
    for name, (method, own) in ROWS.items():
        folder = Path(given.out) / name.replace(", ", "-")
        values = {"method": itaskonomy.METHODS[method], "out": str(folder), **common, **own}
        settings = with_values(plain, values)
        settings = with_values(settings, {"lr": itaskonomy.rate_of(settings)})
        cells.append(Cell(name, folder, settings, "" if name == method else name, len(tasks)))
    found = grid.run(cells, itaskonomy.run, compare.finished, unit="task")
    rows = [asdict(replace(result, variant=cell.variant)) for cell, result in found]
    write("itaskonomy-settings", {"what": "four tasks on the validation levels, seed 0", "rows": rows})


def table(given: Sides) -> str:
    """All rows, and their measures."""
    rows = [RunResult(**row) for row in read("itaskonomy-settings")["rows"]]
    return f"{markdown(summary_table(rows))}\n{measures_table(rows)}"


EWC_COEFFICIENT = Record(Coefficients(), run_coefficients)
ITASKONOMY_SETTINGS = Record(Sides(), run_sides, table)
