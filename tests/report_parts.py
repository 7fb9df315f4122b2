"""Results of runs, made up, and pages of them: what the tests of results and reports share."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult

HOSTILE = '<img src=x onerror="alert(1)">|</script><b>'


def result(method: str = "sidetune", **changes: Any) -> RunResult:
    """Two tasks; nothing is forgotten."""
    settings = {"lr": 0.001, "versions": {"torch": "2.4"}}
    values: dict[str, Any] = {"method": method, "variant": "", "seed": 0, "settings": settings}
    values |= {"tasks": ["cats", "dogs"], "accuracy": [[0.8], [0.8, 0.6]], "alone": None, "alphas": [0.5, 0.25]}
    values |= {"parameters": [100, 300], "shared_parameters": 5000}
    values |= {"seconds": [2.0, 4.0], "base_seconds": 10.0, "peak_memory_mb": 256.0}
    return RunResult(**{**values, **changes})


def comparison(methods: int = 12, seeds: int = 3, tasks: int = 10) -> list[RunResult]:
    """As `compare` makes them: half of the methods forget, one in three has alphas, some miss measures."""
    draw = random.Random(0)
    names = [f"classes-{10 * k}-{10 * k + 9}" for k in range(tasks)]
    results = []
    for m in range(methods):
        for seed in range(seeds):
            start = [0.85 - 0.01 * m + draw.uniform(-0.03, 0.03) for _ in names]
            loss = 0.03 * (m % 2)
            rows = [[max(0.1, start[j] - loss * (i - j)) for j in range(i + 1)] for i in range(tasks)]
            changes = {"variant": f"merge={m % 2}", "seed": seed, "tasks": names, "accuracy": rows}
            changes |= {"alone": start if m % 3 else None, "alphas": [None if m % 3 else draw.random() for _ in names]}
            changes |= {"parameters": [10 ** (2 + m % 5)] * tasks, "shared_parameters": 669_400}
            changes |= {"seconds": [draw.uniform(5, 50) for _ in names], "base_seconds": 30.0 * (m % 2 == 0)}
            changes |= {"peak_memory_mb": draw.uniform(200, 2000) if m % 4 else None}
            changes |= {"settings": {"lr": 1e-3, "seed": seed, "versions": {"torch": "2.4"}}}
            run = result(f"method-{m // 2}", **changes)
            results.append(run)
    return results


def dense(*methods: str) -> list[RunResult]:
    """Two dense tasks; every method but the first one forgets the first task."""
    measures = ["mean angle, °", "mean error, m"]
    runs = []
    for i, method in enumerate(methods):
        accuracy = [[0.7], [0.7 - 0.3 * (i > 0), 0.6]]
        values = [[20.0], [20.0 + 25 * (i > 0), 3.25 - i]]
        parameters = [100 * (i + 1)] * 2
        own = {"tasks": ["normal", "depth"], "measures": measures.copy(), "values": values}
        runs.append(result(method, accuracy=accuracy, parameters=parameters, **own))
    return runs


def seconds() -> list[RunResult]:
    """Of `dense`, a second seed of the first method."""
    return [replace(r, seed=1, values=[[21.0], [21.0, 3.45]]) for r in dense("sidetune")]


def gallery(folder: Path, shade: int) -> Path:
    """Strips of four squares."""
    folder.mkdir(parents=True)
    names = [f"{task}.{moment}" for task in ("normal", "depth") for moment in ("truth", "learned", "end")]
    for i, name in enumerate(["input", *names]):
        Image.linear_gradient("L").resize((512, 128)).point(lambda v, i=i: (v + 30 * i * (i > 0) * shade) % 256).save(
            folder / f"{name}.png"
        )
    return folder


def page(results: list[RunResult], folder: Path, **options: Any) -> str:
    return write_report(results, folder / "report.html", title=options.pop("title", "Report"), **options).read_text()
