"""EWC's coefficient on the first three tasks of iCIFAR, at a quarter of the budget: `python benchmarks/ewc.py --data CIFAR100_FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from common import record
from sidetuning_bench import icifar


@dataclass(frozen=True)
class Settings:
    """Run and record as ewc-coefficient.json."""

    data: str = "uoft-cs/cifar100"
    """A folder with the parquet files, or a data set on the Hub."""
    out: str = "runs/benchmarks/ewc"
    """Folder of the runs."""
    coefficients: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4)
    """Of the penalty."""


if __name__ == "__main__":
    given = tyro.cli(Settings)
    cells = []
    for coefficient in given.coefficients:
        settings = icifar.Settings(
            data=given.data, out=f"{given.out}/{coefficient:g}", method="ewc", ewc_coefficient=coefficient,
            tasks=3, samples=5120, precision="bf16", progress=False,
        )  # fmt: skip
        matrix = icifar.run(settings).matrix
        percent = [[round(100 * a, 1) for a in row] for row in matrix.rows]
        cells.append({"coefficient": coefficient, "accuracy": percent, "average": round(100 * matrix.average, 2)})
        print(cells[-1], flush=True)
    record("ewc-coefficient", {
        "what": "accuracy in % of each task after each task, seed 0, by the coefficient", "cells": cells,
    })  # fmt: skip
