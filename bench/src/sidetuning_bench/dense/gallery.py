"""Pictures for the report: a method's predictions on a few test frames, right after a task and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor

from sidetuning_bench.dense.taskonomy import Taskonomy
from sidetuning_bench.dense.tasks import Categories, DenseTask
from sidetuning_bench.methods import Method


class Gallery:
    """A folder with `input.png`, and `<task>.truth.png`, `<task>.learned.png`, `<task>.end.png` for each task.

    `<task>.after<k>.png` is what was seen when k tasks were learned.

    Each file is a strip of square pictures side by side, one per frame.

    Args:
        folder: made where it does not exist.
        frames: the test frames; pictures are of some spread evenly over them.
        count: how many frames.
    """

    def __init__(self, folder: Path, frames: Taskonomy, count: int) -> None:
        self.folder, self.frames = folder, frames
        count = min(count, len(frames))
        self.rows = [(2 * i + 1) * len(frames) // (2 * count) for i in range(count)]

    @torch.no_grad()
    def add(self, method: Method, learned: str, tasks: Mapping[str, DenseTask]) -> None:
        """Keep the predictions of the task just learned, and of all so far as the latest ones."""
        if not self.rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        images = torch.stack([self.frames.read(i, "rgb") for i in self.rows])
        masks = torch.stack([self.frames.read(i, "mask") for i in self.rows])
        write_strip(self.folder / "input.png", images)
        for name in method.tasks:
            task = tasks[name]
            if isinstance(task, Categories):
                continue  # no picture
            output = method(send_to_device(images, method.base.device), name).float().cpu()
            seen = task.picture(output)
            moments = [f"after{len(method.tasks)}", "end", *(["learned"] if name == learned else [])]
            for moment in moments:
                write_strip(self.folder / f"{name}.{moment}.png", seen)
            if name == learned:
                labels = task.labels(torch.stack([self.frames.read(i, task.domain) for i in self.rows]), masks)
                write_strip(self.folder / f"{name}.truth.png", task.picture(labels))


def write_strip(path: Path, pictures: Tensor) -> None:
    """Pictures side by side, uint8 (n, 3, h, w)."""
    Image.fromarray(torch.cat(list(pictures), -1).movedim(0, -1).contiguous().numpy()).save(path)
