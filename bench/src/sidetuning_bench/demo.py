"""`sidetuning demo`: five dense tasks in Doom, side-tuning beside fine-tuning one network, and a report to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sidetuning.errors import EngineError
from sidetuning_bench import digits
from sidetuning_bench.dense import itaskonomy, render_doom
from sidetuning_bench.report import write_report

TASKS = ("normal", "depth_euclidean", "segment_semantic", "reshading", "edge_texture")


@dataclass(frozen=True)
class Settings:
    """See five dense tasks learned one after another in Doom: side-tuning forgets nothing, fine-tuning does."""

    quick: bool = False
    """Learn handwritten digits instead: half a minute, and no Doom engine."""
    out: str = "runs/demo"
    """Folder for frames, runs and the report; the same command run again goes on where it stopped."""
    frames: int = 870
    """Frames to render."""
    epochs: float = 3.0
    """Passes over the training frames, per task."""
    seed: int = 0
    """Of frames, initial weights and order."""


def main(settings: Settings) -> None:
    """Render, learn with both methods, write the report."""
    s, out = settings, Path(settings.out)
    if s.quick:
        digits.main(digits.Settings(out=str(out / "digits"), epochs=max(1, round(s.epochs)), seed=s.seed))
        return
    frames = str(out / "frames")
    try:
        count = render_doom.run(render_doom.Settings(out=frames, frames=s.frames, seed=s.seed))
    except EngineError as error:
        raise EngineError(f"{error} (sidetuning demo --quick needs no Doom engine)") from error
    print(f"{count} labelled frames of Doom in {frames}", flush=True)
    given = itaskonomy.Settings(
        data=frames, tasks=TASKS, epochs=s.epochs, batch=16, test_frames=100, seed=s.seed, cache=str(out / "cache")
    )
    runs = [
        replace(given, recipe="best", out=str(out / "sidetune")),
        replace(given, method="finetune", out=str(out / "finetune")),
    ]
    results = []
    for run in runs:
        print(f"{run.method}: {len(TASKS)} tasks one after another", flush=True)
        results.append(itaskonomy.run(run))
        itaskonomy.show(results[-1], run)
    report = write_report(
        results, out / "report.html", title="Five dense tasks in Doom: side-tuning and fine-tuning",
        galleries=[Path(run.out) / "gallery" for run in runs],
    )  # fmt: skip
    lost = [100 * (0.0 - r.matrix.backward_transfer) for r in results]
    print(
        f"Lost of earlier tasks, on average: side-tuning {lost[0]:.1f} points of score, fine-tuning {lost[1]:.1f}.\n"
        f"See it: open {report} in a browser."
    )
