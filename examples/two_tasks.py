"""Two tasks on one frozen base: learning the second changes no bit of the first.

python examples/two_tasks.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from pictures import COLOURS, SHAPES, draw


def main(samples: int = 300, epochs: int = 8) -> dict[str, float]:
    """Learn shapes, then colours, and print what became of both.

    Args:
        samples: how many pictures to train on.
        epochs: passes over them per task.

    Returns:
        The accuracy of each task on new pictures, in [0, 1].
    """
    x, shapes, colours = draw(samples, seed=0)
    new, new_shapes, new_colours = draw(200, seed=1)

    # The base is a ResNet that was trained on CIFAR-10; it comes with the package and is never trained here.
    model = st.SideTuner(st.load_base("resnet44-cifar10"))

    model.add_task("shape", side="fcn4", merge="alpha", head=len(SHAPES), labels=SHAPES)
    st.fit(model, "shape", loader(x, shapes), epochs=epochs, lr=3e-3)
    before = model(new, "shape")

    # The second task also reads the side of the first, which stays as it is.
    model.add_task("colour", side="fcn4", merge="mlp2", head=len(COLOURS), labels=COLOURS, laterals=["shape"])
    st.fit(model, "colour", loader(x, colours), epochs=epochs, lr=3e-3)
    assert torch.equal(model(new, "shape"), before), "side-tuning forgets nothing"

    # Both answers from one pass of the base.
    outputs = model.forward_all(new)
    accuracy = {
        "shape": st.accuracy(outputs["shape"], new_shapes).mean().item(),
        "colour": st.accuracy(outputs["colour"], new_colours).mean().item(),
    }
    print(model.summary())
    print({task: f"{100 * value:.0f} %" for task, value in accuracy.items()})

    # A task is a small file; its base is recorded by name and identity.
    with tempfile.TemporaryDirectory() as folder:
        model.save_task("shape", folder)
        assert torch.equal(st.load(folder)(new, "shape"), before)
        print({file.name: f"{file.stat().st_size / 1000:.0f} kB" for file in Path(folder).iterdir()})
    return accuracy


def loader(x: torch.Tensor, y: torch.Tensor) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Shuffled batches of 32."""
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)


if __name__ == "__main__":
    main()
