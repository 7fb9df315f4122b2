"""`sidetuning bench report RUN…`: one page of any finished runs of a scenario, beside each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sidetuning.errors import SideTuningError
from sidetuning.terminal import say
from sidetuning_bench.charts import Chart, write_charts
from sidetuning_bench.report import flat_settings, write_report
from sidetuning_bench.results import RunResult, as_texts, estimate
from sidetuning_bench.runs import read_run

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Family:
    """How finished runs of a scenario are read and shown.

    Attributes:
        title: Name of the scenario on the page.
        read: Reads a `result.json`: a `RunResult`, or a dataclass with `method`, `seed` and `settings`.
        columns: Headings of the table of results that are no `RunResult`, and what they show of one.
        charts: Makes the charts of such results, by their `method`.
        axis: Setting that is the horizontal axis of these charts.
    """

    title: str
    read: Callable[[Path], Any]
    columns: Mapping[str, Callable[[Any], float | None]] = field(default_factory=dict)
    charts: Callable[[Sequence[Any]], Sequence[Chart]] = lambda results: ()
    axis: str = ""


# Scenarios add themselves by the name that their run.json has.
FAMILIES: dict[str, Family] = {}


def scaled(name: str, scale: float = 1.0) -> Callable[[Any], float | None]:
    """A column's function: a number of a result, where it has one, times a scale."""
    return lambda result: None if (value := getattr(result, name)) is None else scale * value


@dataclass(frozen=True)
class Settings:
    """Write a page of finished runs: tables, curves, pictures, costs."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs of one scenario, or the folder of a comparison."""
    out: str | None = None
    """The page; report.html in the folder of the first run by default."""


def report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of runs, with their pictures where they have some.

    Raises:
        SideTuningError: A folder holds no finished run, or runs that do not fit into one page.
    """
    runs = [run for folder in map(Path, folders) for run in _runs_in(folder)]
    # Scenarios and fingerprints of data and base, which all runs must share.
    shared: dict[str, str] = {}
    for run in runs:
        content = content_of(run)
        for what, mark in {"scenario": content["scenario"], **content.get("fingerprints", {})}.items():
            if shared.setdefault(what, mark) != mark:
                raise SideTuningError(f"the run in {run} is of another {what} than the others; give runs of one")
    if not runs:
        raise SideTuningError("give the folder of at least one run")
    family = FAMILIES[shared["scenario"]]
    results = [family.read(run / "result.json") for run in runs]
    title = f"{family.title}: {results[0].method if len(results) == 1 else f'{len(results)} runs'}"
    page = out or Path(folders[0]) / "report.html"
    variants = told_apart(results)
    if isinstance(results[0], RunResult):
        named = [replace(run, variant=variant) for run, variant in zip(results, variants, strict=True)]
        return write_report(named, page, title=title, galleries=[run / "gallery" for run in runs])
    charts = family.charts(_named(results, told_apart(results, family.axis)))
    return write_charts(charts, page, title=title, table=_table(_named(results, variants), family))


def content_of(
    run: str | Path, scenarios: Collection[str] = FAMILIES, read: Callable[[dict[str, Any]], Any] = dict
) -> dict[str, Any]:
    """The content of run.json, with its "scenario", and with its "settings" as `read` makes them of JSON values.

    Raises:
        SideTuningError: There is no run, a damaged one, or one of another scenario than these.
    """
    content, folder = read_run(run), Path(run)
    if content["scenario"] not in scenarios:
        like = "".join(f", such as {file.parent}" for file in sorted(folder.glob("*/run.json"))[:1])
        known = " or of ".join(scenarios)
        raise SideTuningError(f"{run} holds a run of {content['scenario']}; give one of {known}{like}")
    try:
        return {**content, "settings": read(content["settings"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SideTuningError(f"{run} holds no run that can be read ({error}); give the folder of a run") from error


def _runs_in(folder: Path) -> list[Path]:
    """The folder of a run, or those of the finished runs of a comparison."""
    if (folder / "result.json").exists():
        return [folder]
    runs = [file.parent for file in folder.glob("*/result.json") if (folder / "run.json").exists()]
    if not runs:
        content_of(folder)
        raise SideTuningError(f"the run in {folder} is not finished; its command resumes it")
    # Numbers in names are sorted as numbers.
    return sorted(runs, key=lambda run: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", run.name)])


def told_apart(results: Sequence[Any], axis: str = "") -> list[str]:
    """For each run the settings, but for seed and axis, in which it differs from others of its method."""
    settings = flat_settings(results).drop(columns=["seed", axis], errors="ignore")
    variants = []
    for run, own in zip(results, settings.to_dict("records"), strict=True):
        same = settings[[other.method == run.method for other in results]]
        keys = [key for key in settings if same[key].nunique() > 1]
        variants.append(", ".join(f"{key.rpartition('.')[2]}={own[key]}" for key in keys))
    return variants


def _named(results: Sequence[Any], variants: Sequence[str]) -> list[Any]:
    """The results with their variants in the names of their methods."""
    labels = [f"{r.method} · {v}" if v else r.method for r, v in zip(results, variants, strict=True)]
    return [replace(result, method=label) for result, label in zip(results, labels, strict=True)]


def _table(results: Sequence[Any], family: Family) -> DataFrame:
    """Means and standard errors over seeds."""
    import pandas as pd

    rows = []
    for method in dict.fromkeys(run.method for run in results):
        runs = [run for run in results if run.method == method]
        if len({run.seed for run in runs}) < len(runs):
            raise SideTuningError(f"{method} has two results of seed {runs[0].seed}; give one of them")
        found = {name: [v for r in runs if (v := value(r)) is not None] for name, value in family.columns.items()}
        rows.append({"Method": method, **{k: estimate(v) for k, v in found.items()}, "Seeds": len(runs)})
    return as_texts(pd.DataFrame(rows).dropna(axis=1, how="all"))


def main(settings: Settings) -> None:
    """Write the page and print its path."""
    say(f"report: {report(settings.runs, settings.out)}")
