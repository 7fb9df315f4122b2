"""Batch norms of sequential methods at the end of iCIFAR: `python benchmarks/batch_statistics.py --data FOLDER --runs RUN …`.

Of finished runs of finetune, ewc and psp (with `--psp_statistics task`): the accuracy of every task at the end with the running statistics
that training left, and with those of the test batch (500 images of one task).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from common import record
from sidetuning.loading import load_base
from sidetuning_bench import icifar
from sidetuning_bench.cifar import load_images
from sidetuning_bench.methods import load_method


@dataclass(frozen=True)
class Settings:
    """Evaluate and record."""

    data: str
    """A folder with CIFAR-100."""
    runs: tuple[str, ...]
    """Folders of runs."""


@contextmanager
def batch_statistics() -> Iterator[None]:
    """Batch norms take the statistics of their batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    kept, nn.BatchNorm2d.forward = nn.BatchNorm2d.forward, forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.BatchNorm2d.forward = kept  # type: ignore[method-assign]


if __name__ == "__main__":
    given = tyro.cli(Settings, config=(tyro.conf.OmitArgPrefixes,))
    base = load_base("resnet44-cifar10")
    found = {}
    for run in given.runs:
        method = load_method(Path(run) / "tasks", base)
        test = icifar.views_of(
            icifar.prepare(method, base, load_images(given.data, "test"), icifar.Settings(method=method.name))
        )

        def accuracies(method: Any = method, test: Any = test) -> list[float]:
            return [icifar.test_accuracy(method, name, test, k).value for k, name in enumerate(method.tasks)]

        running = accuracies()
        with batch_statistics():
            batch = accuracies()
        found[method.name] = {
            "running": running, "batch": batch,
            "average": {"running": sum(running) / len(running), "batch": sum(batch) / len(batch)},
        }  # fmt: skip
    record("batch-statistics", found)
