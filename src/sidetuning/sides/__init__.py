"""Side networks S(x). A side is built from the base (its input and output shapes) and trained; the base is not.

A registered side is a function `(base, **options) -> nn.Module`. Its module is called like the base, or, where it has
`uses_taps = True`, as `side(taps, mask)` with the base's inner activations, or as `side(taps, mask, ids)` with the token ids too
where it also has `uses_ids = True`.
"""

from collections.abc import Callable

from torch import nn

from sidetuning.registry import Registry

SIDES: Registry[Callable[..., nn.Module]] = Registry(
    "side",
    {
        "fcn3": "sidetuning.sides.fcn:FCN3",
        "fcn4": "sidetuning.sides.fcn:FCN4",
        "fcn5": "sidetuning.sides.fcn:FCN5",
        "fcn8": "sidetuning.sides.fcn:FCN8",
        "copy": "sidetuning.sides.copy:copy",
        "mlp": "sidetuning.sides.mlp:mlp",
        "transformer": "sidetuning.sides.transformer:Transformer",
        "slim": "sidetuning.sides.tokens:Slim",
        "convolutional": "sidetuning.sides.tokens:Convolutional",
        "match": "sidetuning.sides.match:Match",
        "top": "sidetuning.sides.top:Top",
        "ladder": "sidetuning.sides.ladder:Ladder",
        "fusion": "sidetuning.sides.fusion:Fusion",
    },
)

__all__ = ["SIDES"]
