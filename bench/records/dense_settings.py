"""What iTaskonomy's settings were chosen by, on the validation levels of Doom: `python benchmarks/dense_settings.py --data FOLDER`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import tyro

from common import RESULTS, record
from sidetuning_bench.dense import itaskonomy
from sidetuning_bench.results import RunResult, markdown, measures_table, summary_table

FUSION = {"side": "fusion", "taps": ("layer2", "layer3"), "init": None}
ROWS: dict[str, dict[str, object]] = {
    "features": {"method": "features"},
    "fcn5, mlp2": {"merge": "mlp2"},
    "fusion, sum": {**FUSION, "merge": "sum"},
    "fusion, mlp2": {**FUSION, "merge": "mlp2"},
    "piggyback": {"method": "piggyback"},
    "independent": {"method": "independent", "lr": 3e-4},  # better than at 1e-3
}
NAME = "itaskonomy-settings"


@dataclass(frozen=True)
class Settings:
    """Run and record as itaskonomy-settings.json."""

    data: str = "runs/doom"
    """Frames of render-doom."""
    out: str = "runs/benchmarks/itaskonomy-settings"
    """Folder of the runs; one that is there is not run again."""
    table: bool = False
    """Only print the table of the result."""


def run(given: Settings) -> list[RunResult]:
    """The rows, each a run of four tasks."""
    found = []
    for name, settings in ROWS.items():
        whole = itaskonomy.Settings(
            data=given.data, out=f"{given.out}/{name.replace(', ', '-')}", frames=5000, test_split="val", epochs=1, batch=16,
            precision="bf16", tasks=("reshading", "normal", "class_object", "segment_semantic"), **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        result = itaskonomy.run(whole)
        found.append(replace(result, variant="" if result.method == name else name))
    return found


if __name__ == "__main__":
    given = tyro.cli(Settings)
    file = RESULTS / f"{NAME}.json"
    if not given.table:
        record(
            NAME, {"what": "four tasks on the validation levels, seed 0", "rows": [asdict(row) for row in run(given)]}
        )
    rows = [RunResult(**row) for row in json.loads(file.read_text())["rows"]]
    print(markdown(summary_table(rows)))
    print(measures_table(rows))
