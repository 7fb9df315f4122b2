"""The head of a navigating agent: scores of its actions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning.errors import ShapeError, TaskError
from sidetuning.heads import Head
from sidetuning.inputs import entry


def policy(base: Base, actions: int = 4, extra: int = 0, hidden: int = 128, dropout: float = 0.0) -> nn.Module:
    """Build a head that scores actions from the code and from `extra` numbers, such as a compass -> (b, actions)."""
    if base.kind == "sequence" and not isinstance(base.example, Tensor):
        raise TaskError(
            "head 'policy' reads the whole code, and those of texts have many lengths; give a number of outputs, or a "
            "head of your own"
        )
    return Policy(math.prod(base.output_shape), actions, extra, hidden, dropout)


class Policy(Head):
    """Scores of the actions from the whole code, so that the head sees where things are, and from the extra numbers.

    Two layers widen the extra numbers to the width of the code's features: a few raw numbers would be drowned out by
    hundreds of features. Missing extra numbers count as 0. Dropout applies to the normalised code alone and keeps the
    policy from memorising few pictures.

    Shape: (b, …), (b, extra) -> (b, actions).
    """

    def __init__(self, width: int, actions: int, extra: int, hidden: int, dropout: float) -> None:
        super().__init__()
        if actions < 2:
            raise TaskError(f"a policy chooses among at least two actions, not {actions}")
        self.extra = extra
        self.code = nn.Sequential(
            nn.Flatten(), nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, hidden), nn.ReLU()
        )
        self.given: nn.Module | None = None
        joint = hidden
        if extra:
            self.given = nn.Sequential(nn.Linear(extra, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            joint = 2 * hidden
        self.actions = nn.Sequential(nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, actions))

    def forward(self, code: Tensor, inputs: Input) -> Tensor:
        extra = entry(inputs, "extra")
        if extra is None:
            extra = code.new_zeros(len(code), self.extra)
        if extra.shape != (len(code), self.extra):
            raise ShapeError(f"this policy takes {self.extra} extra numbers per sample, not {tuple(extra.shape)}")
        features = self.code(code)
        if self.given is not None:
            features = torch.cat([features, self.given(extra.to(code.dtype))], 1)
        scores: Tensor = self.actions(features)
        return scores
