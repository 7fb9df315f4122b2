"""Bases that ship with the library: architecture, weights (safetensors) and a card each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sidetuning.base import Base
from sidetuning.bases.resnet_cifar import resnet44
from sidetuning.sides.initialise import load_weights

FOLDER = Path(__file__).parent
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resnet44_cifar10(*, taps: Sequence[str] = (), weights: str | Path | None = None) -> Base:
    """ResNet-44 pretrained on CIFAR-10; 32-pixel images, uint8 or in [0, 1] -> (b, 64).

    Args:
        taps: "layer1", "layer2", "layer3" or any inner block.
        weights: another safetensors file of the same network, such as the original authors'.
    """
    net = resnet44()
    load_weights(net, weights or FOLDER / "resnet44-cifar10.safetensors", "base 'resnet44-cifar10'")
    example = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    base = Base(net, example=example, taps=taps, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    base.distilled = {"fcn4": (FOLDER / "fcn4-cifar10-distilled.safetensors", {})}
    return base
