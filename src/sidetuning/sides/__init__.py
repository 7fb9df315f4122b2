"""Side networks S(x). A side is built from the base (its input and output shapes) and trained; the base is not.

A registered side is a function `(base, **options) -> nn.Module`. A plain module is called as the base is, `side(x)`;
one that reads more derives from `Side`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sidetuning.base import Features, Input
from sidetuning.inputs import call, map_input, original
from sidetuning.registry import Registry


class Side(nn.Module):
    """A side that reads what the base made of the input: its inner activations, or its code.

    Attributes:
        taps: names of the taps that it reads, in its own order. The base of its model returns them, among others.
        tokenwise: its output for a token reads what the base gave for that token alone, so that texts which are
            written token by token need nothing of it but the last.
    """

    taps: tuple[str, ...] = ()
    tokenwise = False

    def forward(self, inputs: Input, features: Features) -> Tensor:
        """S(x), of the shape of `features.out`.

        Args:
            inputs: the prepared input, a tensor or a mapping with such entries as "attention_mask" (b, t).
            features: the base's code `out`, and its inner activations `taps` by name.
        """
        raise NotImplementedError


def run_side(side: nn.Module, inputs: Input, features: Features) -> Tensor:
    """Call a side as its kind wants it, with floats of the type of the features.

    A function may take others, which a prepared input then holds.
    """
    kind = features.out.dtype
    inputs = map_input(inputs, lambda x: x.to(kind) if x.dtype == torch.float64 != kind else x)
    out: Tensor = side(inputs, features) if isinstance(original(side), Side) else call(side, inputs)
    return out


SIDES: Registry[Callable[..., nn.Module]] = Registry(
    "side",
    {
        "fcn3": "sidetuning.sides.fcn:FCN3",
        "fcn4": "sidetuning.sides.fcn:FCN4",
        "fcn5": "sidetuning.sides.fcn:FCN5",
        "fcn8": "sidetuning.sides.fcn:FCN8",
        "copy": "sidetuning.sides.copy:copy",
        "mlp": "sidetuning.sides.generic:mlp",
        "transformer": "sidetuning.sides.generic:Transformer",
        "ladder": "sidetuning.sides.ladder:Ladder",
        "fusion": "sidetuning.sides.fusion:Fusion",
    },
    group="sidetuning.sides",
)

__all__ = ["SIDES", "Side", "run_side"]
