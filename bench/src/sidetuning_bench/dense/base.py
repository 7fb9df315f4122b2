"""The packaged base of dense tasks: a ResNet that estimates curvature in Doom, and the side distilled from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sidetuning.base import Base
from sidetuning.bases import IMAGENET_MEAN, IMAGENET_STD
from sidetuning.sides.initialise import load_weights
from sidetuning_bench.dense.resnet_map import ResNetMap

WEIGHTS = Path(__file__).parent / "weights"
# The side that ships for this base: a quarter of FCN5's width, without its last ReLUs, since the code has both signs.
SIDE_OPTIONS = {"width": 0.25, "signed": True}


def resnet_doom_curvature(*, taps: Sequence[str] = (), weights: str | Path | None = None) -> Base:
    """Build the base: 128-pixel images, uint8 or in [0, 1] -> (b, 32, 8, 8).

    Args:
        taps: "layer1", "layer2", "layer3" or any inner block.
        weights: another safetensors file of the same network.
    """
    net = ResNetMap()
    load_weights(net, weights or WEIGHTS / "resnet-doom-curvature.safetensors", "base 'resnet-doom-curvature'")
    example = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    base = Base(net, example=example, taps=taps, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    base.distilled = {"fcn5": (WEIGHTS / "fcn5-doom-curvature-distilled.safetensors", SIDE_OPTIONS)}
    return base
