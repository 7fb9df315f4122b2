"""`sidetuning bench demo`: five dense tasks in Doom, or with `--quick` ten digits, side-tuning beside fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from sidetuning.loading import load_base
from sidetuning.terminal import say, say_markdown
from sidetuning.training import evaluate
from sidetuning_bench.continual import AccuracyMatrix
from sidetuning_bench.dense import itaskonomy, render_doom
from sidetuning_bench.doom.engine import EngineError
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.options import Count, FineTuneOptions, Natural, Positive, check, with_values
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult, markdown_table

TASKS = ("normal", "depth_euclidean", "segment_semantic", "reshading", "edge_texture")
COUNTS = ("none", "one", "two", "three", "four", "five")
DIGITS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
# Images to train on and to test on, uint8 (n, 3, 32, 32), with labels 0 or 1.
Split = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class Settings:
    """See five dense tasks learned one after another in Doom: side-tuning forgets nothing, fine-tuning does."""

    quick: bool = False
    """Learn handwritten digits instead: a minute, and no Doom engine."""
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
        learn_digits(out / "digits", max(1, round(settings.epochs)), seed)
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
    galleries = [Path(run.run.out) / "gallery" for run in runs]
    finish(results, out / "report.html", "points of score", galleries)


def finish(results: Sequence[RunResult], file: Path, unit: str, galleries: Sequence[Path] = ()) -> None:
    """Write the report, and say what was lost."""
    report = write_report(results, file, title=headline(results), galleries=galleries, hero=True)
    lost = [100 * (0.0 - result.matrix.backward_transfer) for result in results]
    say(
        f"{headline(results)}\n"
        f"Lost on earlier tasks, on average: side-tuning {lost[0]:.1f} {unit}, fine-tuning {lost[1]:.1f}.\n"
        f"See it: open {report} in a browser."
    )


def headline(results: Sequence[RunResult]) -> str:
    """What each method forgot: tasks that are worse at the end than when they were learned, by a point at least."""
    texts = []
    for name, result in zip(("Side-tuning", "Fine-tuning"), results, strict=True):
        count = sum(forgotten > 0.01 for forgotten in result.matrix.forgetting)
        words = COUNTS[count] if count < len(COUNTS) else str(count)
        texts.append(f"{name} forgot {f'{words} of {COUNTS[len(result.tasks)]}' if count else 'nothing'}.")
    return " ".join(texts)


def digit_splits(seed: int) -> list[Split]:
    """Scikit-learn's digits as five tasks of two, three quarters of each to train on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install 'sidetuning-bench[demo]'") from error
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    small = images.view(-1, 1, 8, 8).float() * (255 / 16)
    large = F.interpolate(small, (32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    rgb = large.expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(rgb), generator=torch.Generator().manual_seed(seed))
    splits = []
    for pair in DIGITS:
        rows = order[torch.isin(labels[order], torch.tensor(pair))]
        x, y = rgb[rows], (labels[rows] == pair[1]).long()
        cut = len(rows) * 3 // 4
        splits.append((TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])))
    return splits


def learn_all(method: Method, splits: list[Split], out: Path, epochs: int, seed: int) -> RunResult:
    """Learn the tasks one after another; every task so far is tested after each."""
    matrix, seconds = AccuracyMatrix([f"{first}-or-{second}" for first, second in DIGITS]), []
    folder = out / ("tasks" if method.name == "sidetune" else method.name)
    for k, (name, pair, (train, _)) in enumerate(zip(matrix.tasks, DIGITS, splits, strict=True)):
        loader = DataLoader(train, 32, shuffle=True)
        recipe = Recipe(epochs * len(loader), lr=1e-3, optimizer=torch.optim.AdamW, seed=seed)
        learning = method.learn(Task(name, 2, labels=[str(digit) for digit in pair], seed=seed + k), loader, recipe)
        seconds.append(learning.seconds)
        learned = zip(matrix.tasks[: k + 1], splits, strict=False)
        matrix.add([evaluate(method, n, DataLoader(test, 256))["accuracy"] for n, (_, test) in learned])
        method.save(folder, metrics={"accuracy": matrix.final[-1]})
    return RunResult(
        method=method.name,
        variant="",
        seed=seed,
        tasks=matrix.tasks,
        accuracy=matrix.rows,
        alone=None,
        alphas=[None] * len(matrix.tasks),
        parameters=[method.added(task) for task in matrix.tasks],
        shared_parameters=method.shared(),
        seconds=seconds,
        base_seconds=0.0,
        peak_memory_mb=None,
        settings={"data": "scikit-learn's digits", "epochs": epochs, "seed": seed},
    )


def learn_digits(out: Path, epochs: int, seed: int) -> None:
    """Learn the digits with both methods on a base that never saw one, and write the report."""
    splits, base = digit_splits(seed), load_base("resnet44-cifar10")
    options = {"side": "fcn4", "merge": "mlp2", "init": "distilled"}
    side = learn_all(METHODS.build("sidetune", base, options=options), splits, out, epochs, seed)
    tuned = learn_all(METHODS["finetune"](base), splits, out, epochs, seed)
    side.matrix.save(out / "matrix.json")
    say_markdown(table("Side-tuning: a frozen base and small sides", side.matrix))
    say_markdown(table("Fine-tuning: one network, task after task", tuned.matrix))
    finish([side, tuned], out / "report.html", "points of accuracy")
    say(f"The five tasks are in {out}/tasks; ask them all about an image: sidetuning predict {out} IMAGE")


def table(title: str, matrix: AccuracyMatrix) -> str:
    """A matrix in percent, one row per task learned; what was forgotten is bold."""
    from pandas import DataFrame

    rows = [{"after learning": task} for task in matrix.tasks]
    for row, accuracies in zip(rows, matrix.rows, strict=True):
        for task, value, learned in zip(matrix.tasks, accuracies, matrix.learned, strict=False):
            row[task] = f"**{100 * value:.0f}**" if value < learned - 0.1 else f"{100 * value:.0f}"
    return f"{title}, in %\n\n{markdown_table(DataFrame(rows).fillna(''))}"
