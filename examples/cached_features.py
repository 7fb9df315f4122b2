"""The base runs once per image, ever: its features lie on disk, and every later pass and task reads them.

python examples/cached_features.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import sidetuning as st
from pictures import COLOURS, SHAPES, draw


def mirror(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A second view of the pictures (b, 3, h, w): half of them are mirrored."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(-1), x)


def main(samples: int = 600, epochs: int = 6) -> dict[str, float]:
    """Learn two tasks from cached features of two views.

    Args:
        samples: how many pictures to train on.
        epochs: passes over them per task.

    Returns:
        The accuracy of each task on new pictures, in [0, 1].
    """
    x, shapes, colours = draw(samples, seed=0)
    new, new_shapes, new_colours = draw(200, seed=1)
    base = st.load_base("resnet44-cifar10")
    model = st.SideTuner(base)
    model.add_task("shape", side="fcn4", head=len(SHAPES))
    model.add_task("colour", side=None, merge="base-only", head=len(COLOURS))
    with tempfile.TemporaryDirectory() as folder:
        for task, y, views in (("shape", shapes, 2), ("colour", colours, 1)):
            started = time.monotonic()
            data = TensorDataset(x, y)
            augment = mirror if views > 1 else None
            cached = st.cache_features(base, data, Path(folder) / task, augment=augment, views=views)
            print(f"{task}: {views} views of {samples} pictures cached in {time.monotonic() - started:.1f} s")
            # Batches of (x, features, y): no base pass. A batch draws one of the views for each picture.
            st.fit(model, task, st.loader_over(cached, batch_size=32), epochs=epochs, lr=3e-3)
    outputs = model.forward_all(new)
    accuracy = {
        "shape": st.accuracy(outputs["shape"], new_shapes).mean().item(),
        "colour": st.accuracy(outputs["colour"], new_colours).mean().item(),
    }
    print({task: f"{100 * value:.0f} %" for task, value in accuracy.items()})
    return accuracy


if __name__ == "__main__":
    main()
