"""`sidetuning bench demo --quick`: handwritten digits as five tasks of two, side-tuning beside fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from sidetuning.loading import load_base
from sidetuning.terminal import say, say_markdown
from sidetuning.training import evaluate
from sidetuning_bench.continual import AccuracyMatrix
from sidetuning_bench.methods import METHODS, Method, Recipe, Task
from sidetuning_bench.options import Count, Natural, check
from sidetuning_bench.results import markdown_table

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


@dataclass(frozen=True)
class Settings:
    """Learn scikit-learn's digits as five tasks of two digits: side-tuning forgets nothing, fine-tuning does."""

    out: str = "runs/digits"
    """Folder for the five learned tasks."""
    base: str = "resnet44-cifar10"
    """Base network; it never saw a digit."""
    epochs: Count = 4
    """Passes over the images of each task."""
    seed: Natural = 0
    """Seed for the split, initial weights and data order."""


@dataclass(frozen=True)
class Split:
    """Two digits: images uint8 (n, 3, 32, 32) and labels 0 or 1, to train on and to test on."""

    train: TensorDataset
    test: TensorDataset


def digits(seed: int) -> list[Split]:
    """The five tasks, three quarters of each to train on."""
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
    for pair in TASKS:
        rows = order[torch.isin(labels[order], torch.tensor(pair))]
        x, y = rgb[rows], (labels[rows] == pair[1]).long()
        cut = len(rows) * 3 // 4
        splits.append(Split(TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])))
    return splits


def learn_all(method: Method, splits: list[Split], settings: Settings) -> AccuracyMatrix:
    """Learn the tasks one after another; every task so far is tested after each."""
    matrix = AccuracyMatrix([f"{first}-or-{second}" for first, second in TASKS])
    folder = Path(settings.out) / ("tasks" if method.name == "sidetune" else method.name)
    for k, (name, pair, split) in enumerate(zip(matrix.tasks, TASKS, splits, strict=True)):
        loader = DataLoader(split.train, 32, shuffle=True)
        recipe = Recipe(settings.epochs * len(loader), lr=1e-3, optimizer=torch.optim.AdamW, seed=settings.seed)
        task = Task(name, 2, labels=[str(digit) for digit in pair], seed=settings.seed + k)
        method.learn(task, loader, recipe)
        learned = zip(matrix.tasks[: k + 1], splits, strict=False)
        matrix.add([evaluate(method, n, DataLoader(other.test, 256))["accuracy"] for n, other in learned])
        method.save(folder, metrics={"accuracy": matrix.final[-1]})
    return matrix


def main(settings: Settings) -> None:
    """Run both and print their accuracy matrices."""
    check(settings)
    splits = digits(settings.seed)
    base = load_base(settings.base)
    options = {"side": "fcn4", "merge": "mlp2", "init": "distilled"}
    side = learn_all(METHODS.build("sidetune", base, options=options), splits, settings)
    tuned = learn_all(METHODS["finetune"](base), splits, settings)
    side.save(Path(settings.out) / "matrix.json")
    say_markdown(table("Side-tuning: a frozen base and small sides", side))
    say_markdown(table("Fine-tuning: one network, task after task", tuned))
    lost = [100 * (0.0 - m.backward_transfer) for m in (side, tuned)]
    say(
        f"Accuracy lost on earlier tasks, on average: side-tuning {lost[0]:.1f} points, "
        f"fine-tuning {lost[1]:.1f} points.\n"
        f"The five tasks are in {settings.out}/tasks; ask them all about an image: "
        f"sidetuning predict {settings.out} IMAGE"
    )


def table(title: str, matrix: AccuracyMatrix) -> str:
    """A matrix in percent, one row per task learned; what was forgotten is bold."""
    from pandas import DataFrame

    rows = [{"after learning": task} for task in matrix.tasks]
    for row, accuracies in zip(rows, matrix.rows, strict=True):
        for task, value, learned in zip(matrix.tasks, accuracies, matrix.learned, strict=False):
            row[task] = f"**{100 * value:.0f}**" if value < learned - 0.1 else f"{100 * value:.0f}"
    return f"{title}, in %\n\n{markdown_table(DataFrame(rows).fillna(''))}"
