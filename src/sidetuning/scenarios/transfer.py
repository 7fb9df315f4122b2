"""Transfer (paper, section 4.2): from curvature to one other dense task, with few and with many frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from sidetuning.artifacts import write_json
from sidetuning.continual import mean_and_error
from sidetuning.results import Estimate, RunResult, number_text
from sidetuning.scenarios import compare, itaskonomy
from sidetuning.scenarios.runs import Run


@dataclass(frozen=True)
class Settings:
    """Learn single dense tasks from so many frames, by side-tuning, fine-tuning, fixed features and from scratch."""

    data: str = "runs/doom"
    """A folder in Taskonomy's layout."""
    out: str = "runs/transfer"
    """Folder of the runs; the same command run again goes on where it stopped."""
    targets: tuple[str, ...] = ("normal", "class_object")
    """The tasks."""
    frames: tuple[int, ...] = (20, 100, 500, 2000, 5000)
    """How many training frames; fewer ones are among the more."""
    methods: tuple[str, ...] = ("sidetune", "independent", "features", "scratch")
    """Methods; "independent" fine-tunes a copy of the base for its one task."""
    steps: int = 800
    """Optimiser steps of every run, so that few frames are seen often."""
    seeds: int = 3
    """Runs of every cell, with seeds 0, 1, …"""
    base_weights: str | None = None
    """A safetensors file of the base's weights to use instead of the packaged ones."""
    init: str | None = "distilled"
    """How sides start."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""


def cells(settings: Settings) -> Iterator[compare.Cell]:
    """The runs, seed by seed; a variant is a target with a number of frames."""
    s = settings
    for seed in range(s.seeds):
        for target in s.targets:
            for frames in s.frames:
                for method in s.methods:
                    name = compare.folder_name(target, frames, method, seed)
                    plain = itaskonomy.Settings(tasks=(target,), frames=frames, method=method, seed=seed)
                    yield compare.Cell(
                        variant(target, frames),
                        replace(
                            plain, data=s.data, out=str(Path(s.out) / name), epochs=s.steps * plain.batch / frames, cache=s.cache,
                            base_weights=s.base_weights, init=s.init, precision=s.precision, progress=False,
                        ),
                    )  # fmt: skip


def variant(target: str, frames: int) -> str:
    """Names the cells of one target and number of frames."""
    return f"{target}, {frames} frames"


def run(settings: Settings) -> list[RunResult]:
    """Run the cells that have no result yet, each in a process of its own, and write `table.md`.

    Raises:
        SideTuningError: a cell failed; the others' results stay.
    """
    todo = list(cells(settings))
    Run(settings.out, "transfer", settings, free=("data", "out", "cache", "seeds", "methods", "frames", "targets"))
    results = []
    with tqdm(total=len(todo), unit="run", dynamic_ncols=True) as bar:
        for cell in todo:
            bar.set_description(cell.folder.name)
            results.append(replace(compare.one(cell, bar), variant=cell.variant))
            (Path(settings.out) / "table.md").write_text(
                tables(results, settings.targets, settings.frames), encoding="utf-8"
            )
    write_json(Path(settings.out) / "curves.json", {t: curves(results, t, settings.frames) for t in settings.targets})
    return results


def curves(results: Sequence[RunResult], target: str, frames: Sequence[int]) -> dict[str, list[list[float] | None]]:
    """For each method and number of frames the mean value over seeds and its standard error; None where nothing was run."""
    found: dict[str, list[list[float] | None]] = {}
    for method in dict.fromkeys(r.method for r in results):
        found[method] = []
        for n in frames:
            runs = [r for r in results if r.method == method and r.variant == variant(target, n)]
            values = [r.values[-1][-1] for r in runs if r.values is not None]
            found[method].append([*mean_and_error(values), len(values)] if values else None)
    return found


def tables(results: Sequence[RunResult], targets: Sequence[str], frames: Sequence[int]) -> str:
    """A table in Markdown per target: methods as rows, numbers of frames as columns."""
    text = ""
    for target in targets:
        measures = [r.measures[0] for r in results if r.measures and r.variant.startswith(f"{target},")]
        if not measures:
            continue
        text += f"| curvature → {target}: {measures[0]} | " + " | ".join(f"{n:,} frames" for n in frames) + " |\n"
        text += "| --- |" + " ---: |" * len(frames) + "\n"
        for method, points in curves(results, target, frames).items():
            decimals = 2 if measures[0] == "mean angle, °" else 4
            cells = [number_text(Estimate(p[0], p[1]) if p else None, decimals) for p in points]
            text += f"| {method} | " + " | ".join(cells) + " |\n"
        text += "\n"
    return text


def main(settings: Settings) -> None:
    """Run and print the tables."""
    from rich.console import Console
    from rich.markdown import Markdown

    results = run(settings)
    console = Console()
    console.print(Markdown(tables(results, settings.targets, settings.frames)))
    console.print(f"tables: {settings.out}/table.md; numbers: {settings.out}/curves.json", highlight=False)
