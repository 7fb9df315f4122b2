"""Batch norms of sequential methods at the end of iCIFAR.

Of finished runs of finetune, ewc and psp (with `--statistics task`): the accuracy of every task at the end with the
running statistics that training left, and with those of the test batch (500 images of one task).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from record import Record, write
from sidetuning.loading import load_base
from sidetuning_bench import icifar
from sidetuning_bench.cifar import load_images
from sidetuning_bench.methods import load_method


@dataclass(frozen=True)
class Settings:
    """Accuracies at the end with running statistics of batch norms, and with those of the test batch."""

    runs: tuple[str, ...] = ()
    """Folders of runs of icifar."""
    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""


@contextmanager
def batch_statistics() -> Iterator[None]:
    """Batch norms take the statistics of their batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    kept, nn.BatchNorm2d.forward = nn.BatchNorm2d.forward, forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.BatchNorm2d.forward = kept  # type: ignore[method-assign]


def run(given: Settings) -> None:
    """Measure both, and record."""
    base, images = load_base("resnet44-cifar10"), load_images(given.data, "test")
    found = {}
    for folder in given.runs:
        method = load_method(Path(folder) / "tasks", base)
        test = icifar.views_of(icifar.prepare(method, base, images, icifar.Settings()))
        tasks = list(enumerate(method.tasks))
        running = [icifar.test_accuracy(method, name, test, k).value for k, name in tasks]
        with batch_statistics():
            batch = [icifar.test_accuracy(method, name, test, k).value for k, name in tasks]
        average = {"running": sum(running) / len(running), "batch": sum(batch) / len(batch)}
        found[method.name] = {"running": running, "batch": batch, "average": average}
    write("batch-statistics", found)


BATCH_STATISTICS = Record(Settings(), run)
