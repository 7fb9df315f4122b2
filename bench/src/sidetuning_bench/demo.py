"""`sidetuning bench demo`: five dense tasks in Doom, side-tuning beside fine-tuning one network, and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sidetuning.terminal import say
from sidetuning_bench import digits
from sidetuning_bench.dense import itaskonomy, render_doom
from sidetuning_bench.doom.engine import EngineError
from sidetuning_bench.options import Count, FineTuneOptions, Natural, Positive, check, with_values
from sidetuning_bench.report import write_report

TASKS = ("normal", "depth_euclidean", "segment_semantic", "reshading", "edge_texture")


@dataclass(frozen=True)
class Settings:
    """See five dense tasks learned one after another in Doom: side-tuning forgets nothing, fine-tuning does."""

    quick: bool = False
    """Learn handwritten digits instead: half a minute, and no Doom engine."""
    out: str = "runs/demo"
    """Folder for frames, runs and the report; the same command run again resumes there."""
    frames: Count = 870
    """Number of frames to render."""
    epochs: Positive = 3.0
    """Passes over the training frames, per task."""
    seed: Natural = 0
    """Seed for frames, initial weights and data order."""


def main(settings: Settings) -> None:
    """Render, learn with both methods, write the report."""
    check(settings)
    out, seed = Path(settings.out), settings.seed
    if settings.quick:
        epochs = max(1, round(settings.epochs))
        digits.main(digits.Settings(out=str(out / "digits"), epochs=epochs, seed=seed))
        return
    frames = str(out / "frames")
    try:
        count = render_doom.run(render_doom.Settings(out=frames, frames=settings.frames, seed=seed))
    except EngineError as error:
        raise EngineError(f"{error} (sidetuning bench demo --quick needs no Doom engine)") from error
    say(f"{count} labelled frames of Doom in {frames}")
    source = itaskonomy.FrameOptions(data=frames, test_frames=100)
    given = itaskonomy.Settings(source=source, tasks=TASKS, epochs=settings.epochs)
    given = with_values(given, {"batch": 16, "seed": seed, "cache": str(out / "cache")})
    runs = [
        with_values(given, {"recipe": "best", "out": str(out / "sidetune")}),
        with_values(given, {"method": FineTuneOptions(), "out": str(out / "finetune")}),
    ]
    results = []
    for run in runs:
        say(f"{run.method.name}: {len(TASKS)} tasks one after another")
        results.append(itaskonomy.run(run))
        itaskonomy.show(results[-1], run)
    title = "Five dense tasks in Doom: side-tuning and fine-tuning"
    galleries = [Path(run.run.out) / "gallery" for run in runs]
    report = write_report(results, out / "report.html", title=title, galleries=galleries)
    lost = [100 * (0.0 - result.matrix.backward_transfer) for result in results]
    say(
        f"Lost on earlier tasks, on average: side-tuning {lost[0]:.1f} points of score, fine-tuning {lost[1]:.1f}.\n"
        f"See it: open {report} in a browser."
    )
