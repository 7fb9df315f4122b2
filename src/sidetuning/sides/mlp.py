"""A two-layer perceptron: on the flattened input, or on each token of a sequence."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sidetuning.base import Base
from sidetuning.errors import ShapeError
from sidetuning.sides.embed import Embed
from sidetuning.sides.fit import FitTokens


def mlp(base: Base, hidden: int = 64) -> nn.Module:
    """A perceptron of one hidden layer.

    Args:
        base: gives the input and output shapes.
        hidden: width of the hidden layer.
    """
    x = base.example
    ids = not isinstance(x, Tensor) or not x.is_floating_point()
    sequence = isinstance(x, Tensor) and x.ndim == 3
    if ids or (sequence and base.kind != "map"):
        return TokenMLP(base, hidden)
    assert isinstance(x, Tensor)
    return FlatMLP(math.prod(x.shape[1:]), hidden, base.output_shape)


class FlatMLP(nn.Module):
    """Shape: (b, …), flattened -> (b, *shape)."""

    def __init__(self, inputs: int, hidden: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inputs, self.shape = inputs, shape
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, math.prod(shape)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.inputs:
            raise ShapeError(f"the mlp side was built for inputs of {self.inputs} numbers, not {x.shape[1]}")
        return self.net(x).unflatten(1, self.shape)


class TokenMLP(nn.Module):
    """Shape: ids (b, t) or a sequence (b, t, c) -> (b, t, d), or (b, d) where the base returns vectors."""

    def __init__(self, base: Base, hidden: int) -> None:
        super().__init__()
        self.embed = Embed(base, hidden)
        self.net = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        self.fit = FitTokens(base, hidden)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Only the ids (or the sequence) and the mask are used; the rest is what transformers' tokenizers add."""
        return self.fit(self.net(self.embed(input_ids)), attention_mask)
