"""A trainable copy of a text encoder's top layers, on what its lower layers made of the text."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ShapeError
from sidetuning.inputs import entry
from sidetuning.sides import Side
from sidetuning.sides.fit import masked_mean

EMBEDDINGS = "embeddings"  # what encoders of transformers call the module before their layers


class Top(Side):
    """The base's last layers with their weights, reading the last tap: S(x) starts as B(x).

    A copy of the base is one of the paper's ways to start a side. Copying its top alone keeps what pretraining knows of
    language, and the layers below, which are frozen and cached, are never run in training.

    Args:
        base: an encoder of transformers, whose last tap is the output of one of its layers (or its embeddings).

    Shape: taps (b, t, c) and a mask (b, t) -> as the base's output. What stands at padding never matters.

    Raises:
        ShapeError: the base is no such encoder, or no layer lies above the tap.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        tap = next(reversed(base.tap_shapes), "")
        self.taps = (tap,)
        where, layers = layers_of(base)
        below = 0 if tap == EMBEDDINGS else 1 + int(tap.rpartition(".")[2]) if tap in layers else None
        if below is None or below == len(layers):
            last = f"{where}.{len(layers) - 2}"
            raise ShapeError(f"the top side copies the layers above the last tap, '{tap}': take one such as '{last}'")
        net: Any = copy.deepcopy(base.net)
        net.set_submodule(where, net.get_submodule(where)[below:])
        net.set_submodule(EMBEDDINGS, Given())  # before training is asked for: the table is no part of the side
        if below and hasattr(net, "embeddings_project"):  # of ELECTRA: a tap above it has the layers' width already
            net.embeddings_project = nn.Identity()
        if getattr(net, "pooler", None) is not None:
            net.pooler = None
        self.net = net.requires_grad_(True)
        self.select = base.select
        self.kind = base.kind

    def forward(self, inputs: Input, features: Features) -> Tensor:
        mask = entry(inputs, "attention_mask")
        code = self.select(self.net(inputs_embeds=features.taps[self.taps[0]], attention_mask=mask))
        return masked_mean(code, mask) if self.kind == "vector" else code


class Given(nn.Module):
    """Stands for the embeddings and the layers that were left out: returns what it is given."""

    def forward(self, *given: Tensor | None, **named: Any) -> Tensor:
        return next(x for x in (named.get("inputs_embeds"), *given) if x is not None)


def layers_of(base: Base) -> tuple[str, list[str]]:
    """Where a text encoder's list of layers is in its network, and the names of the layers, in order.

    Raises:
        ShapeError: the base has none, or no embeddings.
    """
    modules = dict(base.net.named_modules()) if isinstance(base.net, nn.Module) else {}
    lists = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList)}
    if not lists or EMBEDDINGS not in modules:
        raise ShapeError("the base is no text encoder: it needs a list of layers after a module 'embeddings'")
    name, longest = max(lists.items(), key=lambda item: len(item[1]))
    return name, [f"{name}.{i}" for i in range(len(longest))]
