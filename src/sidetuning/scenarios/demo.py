"""`sidetuning demo`: handwritten digits as five tasks of two, side-tuning beside fine-tuning one network in sequence."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sidetuning.base import Base, load_base
from sidetuning.continual import AccuracyMatrix
from sidetuning.training import accuracy, evaluate, fit, seeded, train
from sidetuning.tuner import SideTuner

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


@dataclass(frozen=True)
class Settings:
    """Learn scikit-learn's digits as five tasks of two digits: side-tuning forgets nothing, fine-tuning does."""

    out: str = "runs/demo"
    """Folder for the five learned tasks."""
    base: str = "resnet44-cifar10"
    """Base network; it never saw a digit."""
    epochs: int = 4
    """Passes over the images of each task."""
    seed: int = 0
    """Of the split, the initial weights and the order of the images."""


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
        raise ImportError("the demo needs scikit-learn: pip install 'sidetuning[demo]'") from error
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


def side_tune(s: Settings, splits: list[Split]) -> AccuracyMatrix:
    """A side per task on one frozen base."""
    model = SideTuner(load_base(s.base))
    matrix = AccuracyMatrix([name(pair) for pair in TASKS])
    for k, task in enumerate(matrix.tasks):
        with seeded(s.seed + k):
            model.add_task(task, side="fcn4", merge="mlp2", head=2, init="distilled", labels=[str(d) for d in TASKS[k]])
        fit(model, task, DataLoader(splits[k].train, 32, shuffle=True), epochs=s.epochs, seed=s.seed)
        matrix.add(
            [
                evaluate(model, t, DataLoader(splits[j].test, 256))["accuracy"]
                for j, t in enumerate(matrix.tasks[: k + 1])
            ]
        )
        model.save_task(task, Path(s.out) / "tasks" / task, metrics={"accuracy": matrix.learned[-1]})
    return matrix


class Tuned(nn.Module):
    """Fine-tuning: one network for all tasks, a head for each; `forward` is the loss of the task being learned."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        assert isinstance(base.net, nn.Module)
        self.net = copy.deepcopy(base.net).requires_grad_(True)
        self.heads = nn.ModuleList(nn.Linear(base.width, 2) for _ in TASKS)
        self.task = 0
        self._base = (base,)  # for its normalisation only

    def logits(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](self.net(self._base[0].prepare(x)))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.logits(batch[0], self.task), batch[1])


def fine_tune(s: Settings, splits: list[Split]) -> AccuracyMatrix:
    """The same base, tuned through the tasks one after another."""
    matrix = AccuracyMatrix([name(pair) for pair in TASKS])
    with seeded(s.seed):
        model = Tuned(load_base(s.base))
    for k, task in enumerate(matrix.tasks):
        model.task = k
        loader = DataLoader(splits[k].train, 32, shuffle=True)
        trained = [*model.net.parameters(), *model.heads[k].parameters()]
        train(
            model, loader, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0), steps=s.epochs * len(loader), clip=1.0,
            seed=s.seed, progress=f"fine-tuning {task}",
        )  # fmt: skip
        row = []
        for j in range(k + 1):
            x, y = splits[j].test.tensors
            with torch.no_grad():
                row.append(float(accuracy(model.logits(x, j), y).mean()))
        matrix.add(row)
    return matrix


def name(pair: tuple[int, int]) -> str:
    """The name of a task."""
    return f"{pair[0]}-or-{pair[1]}"


def main(settings: Settings) -> None:
    """Run both and print their accuracy matrices."""
    from rich.console import Console

    console = Console()
    splits = digits(settings.seed)
    side, tuned = side_tune(settings, splits), fine_tune(settings, splits)
    side.save(Path(settings.out) / "matrix.json")
    for title, matrix in (
        ("Side-tuning: a frozen base and small sides", side),
        ("Fine-tuning: one network, task after task", tuned),
    ):
        console.print(table(title, matrix))
    lost = [100 * sum(m.forgetting) / len(TASKS) for m in (side, tuned)]
    console.print(
        f"Accuracy lost on earlier tasks, on average: side-tuning {lost[0]:.1f} points, fine-tuning {lost[1]:.1f} points.\n"
        f"The five tasks are in {settings.out}/tasks; ask them all about an image: sidetuning predict {settings.out} IMAGE",
        highlight=False,
    )


def table(title: str, matrix: AccuracyMatrix) -> object:
    """A matrix in percent, one row per task learned."""
    from rich.table import Table

    out = Table(title=f"{title}, in %", title_justify="left")
    out.add_column("after learning")
    for task in matrix.tasks:
        out.add_column(task, justify="right")
    for task, row in zip(matrix.tasks, matrix.rows, strict=True):
        cells = [
            f"[bold red]{100 * v:.0f}[/]" if v < matrix.learned[j] - 0.1 else f"{100 * v:.0f}"
            for j, v in enumerate(row)
        ]
        out.add_row(task, *cells)
    return out
