"""Your own network, side, merge and head: all are plain modules, and parts that want more derive from `Side` or `Head`.

python examples/own_module.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from pictures import SHAPES, draw


class TapSide(st.Side):
    """A side that reads an inner activation of the base and sees no picture at all."""

    taps = ("2",)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())

    def forward(self, inputs: st.Input, features: st.Features) -> Tensor:
        """The activation (b, 16, 16, 16) to the shape of the base's output, (b, 16)."""
        out: Tensor = self.layers(features.taps["2"])
        return out


class Average(st.Merge):
    """R = (B + c S) / 2 with a learned number c per channel."""

    def __init__(self, width: int) -> None:
        super().__init__("vector", width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, base: Tensor, side: Tensor, laterals: Sequence[Tensor] = ()) -> Tensor:
        """B and S, (b, 16) each, to (b, 16)."""
        return (base + self.scale * side) / 2


def main(samples: int = 600, epochs: int = 6) -> float:
    """Learn shapes on a network of one's own.

    Args:
        samples: how many pictures to train on.
        epochs: passes over them.

    Returns:
        The accuracy on new pictures, in [0, 1].
    """
    x, shapes, _ = draw(samples, seed=0)
    new, new_shapes, _ = draw(200, seed=1)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    # An example input tells the shapes; "2" is the name of the second convolution in `net`.
    base = st.Base(net, example=x[:1], taps=["2"], mean=[0.5] * 3, std=[0.25] * 3)
    model = st.SideTuner(base)
    model.add_task("shape", side=TapSide(), merge=Average(16), head=nn.Linear(16, len(SHAPES)))
    loader = DataLoader(TensorDataset(x, shapes), batch_size=32, shuffle=True)
    st.fit(model, "shape", loader, epochs=epochs, lr=1e-2)

    # What is saved names no code: the same modules are given again to read it.
    with tempfile.TemporaryDirectory() as folder:
        model.save_task("shape", folder)
        again = st.SideTuner(base)
        again.load_task(folder, side=TapSide(), merge=Average(16), head=nn.Linear(16, len(SHAPES)))
    accuracy = st.accuracy(again(new, "shape"), new_shapes).mean().item()
    print(f"{100 * accuracy:.0f} %")
    return accuracy


if __name__ == "__main__":
    main()
