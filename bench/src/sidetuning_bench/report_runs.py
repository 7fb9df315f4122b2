"""`sidetuning report RUN …`: one page of any finished runs of icifar or itaskonomy, of several beside each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from sidetuning.errors import SideTuningError
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult

NAMES = {"icifar": "iCIFAR", "itaskonomy": "iTaskonomy"}


@dataclass(frozen=True)
class Settings:
    """Write a page of finished runs: tables, curves, pictures, what they cost."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs of icifar or of itaskonomy, on the same tasks."""
    out: str | None = None
    """The page; report.html in the folder of the first run by default."""


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of runs, with their pictures where they have some.

    Raises:
        SideTuningError: a folder holds no finished run, or runs that do not fit into one page.
    """
    results, scenarios = [], set()
    marks: dict[str, str] = {}  # fingerprints of what all runs must share
    for folder in map(Path, folders):
        try:
            content = json.loads((folder / "run.json").read_text())
            scenario, own = content["scenario"], content.get("fingerprints", {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SideTuningError(f"{folder} holds no run ({error}); give the folder of a run") from error
        if scenario not in NAMES:
            raise SideTuningError(f"{folder} holds a run of {scenario}; pages are of {' and of '.join(NAMES)}")
        if not (folder / "result.json").exists():
            raise SideTuningError(f"the run in {folder} is not finished; its command goes on where it stopped")
        for what, mark in own.items():
            if marks.setdefault(what, mark) != mark:
                raise SideTuningError(f"the run in {folder} is of another {what} than the others; give runs of one")
        scenarios.add(scenario)
        results.append(RunResult.load(folder / "result.json"))
    if len(scenarios) != 1:
        raise SideTuningError("give runs of one scenario, at least one")
    results = told_apart(results)
    name = NAMES[scenarios.pop()]
    title = f"{name}: {results[0].method}" if len(results) == 1 else f"{name}: {len(results)} runs"
    galleries = [g if (g := Path(folder) / "gallery").is_dir() else None for folder in folders]
    return write_report(
        results, out or Path(folders[0]) / "report.html", title=title, galleries=galleries if any(galleries) else ()
    )


def told_apart(results: Sequence[RunResult]) -> list[RunResult]:
    """Runs of one method get as their variant the settings, but for the seed, in which they differ."""
    named = []
    for run in results:
        same = [other.settings for other in results if other.method == run.method]
        keys = [k for k in run.settings if k != "seed" and any(s.get(k) != run.settings[k] for s in same)]
        named.append(replace(run, variant=", ".join(f"{k}={run.settings[k]}" for k in keys)))
    return named


def main(settings: Settings) -> None:
    """Write it and say where."""
    print(f"report: {report(settings.runs, settings.out)}")
