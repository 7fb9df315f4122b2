"""`load_base("timm:NAME")`: any timm model as a base, with the normalisation of its pretrained configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sidetuning.base import Base
from sidetuning.errors import UnknownNameError
from sidetuning.inputs import dtype_of
from sidetuning.outputs import Taps
from sidetuning.registry import unknown
from sidetuning.sides.initialise import load_weights
from sidetuning.transforms import CROPS, INTERPOLATIONS, ImageTransform


def load(
    name: str,
    *,
    taps: Taps = (),
    output: str | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    dtype: str | None = None,
) -> Base:
    """Build the base.

    Args:
        name: a timm model, "resnet50" or "resnet50.a1_in1k"; one of the Hub with a revision is "hf_hub:repo@revision".
        taps: names of its submodules.
        output: None for the pooled features (b, d); "map" for the last feature map (b, c, h, w), or the tokens
            (b, t, d) of a transformer without one.
        pretrained: False for random weights.
        weights: a safetensors file of the network, with its classifier or without.
        dtype: type of the network's weights, "float32" by default.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm models need timm: pip install 'sidetuning[timm]'") from error
    if not timm.is_model(name.split(".")[0]) and ":" not in name:
        raise UnknownNameError(unknown("timm model", name, timm.list_models(), verb="known"))
    if output not in (None, "map"):
        raise UnknownNameError(f"output '{output}' is not known for timm models; leave it out, or give 'map'")
    try:
        net: Any = timm.create_model(name, pretrained=pretrained and weights is None, num_classes=0)
    except RuntimeError as error:
        # What timm raises for a name or tag without weights.
        raise UnknownNameError(
            f"timm cannot build '{name}' ({error}); pretrained=False builds it without weights"
        ) from error
    except OSError as error:
        raise OSError(
            f"the weights of timm model '{name}' could not be downloaded ({error}); check the network, give weights= "
            "the path of a safetensors file, or pretrained=False for random weights"
        ) from error
    config: dict[str, Any] = net.pretrained_cfg
    if weights is not None:
        with torch.device("meta"):
            # What it has more with a classifier, whatever that is called.
            whole = timm.create_model(name, pretrained=False).state_dict()
        load_weights(net, weights, f"timm model '{name}'", spare=[key for key in whole if key not in net.state_dict()])
    size = config.get("input_size", (3, 224, 224))
    channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
    if output == "map":
        net.forward = net.forward_features
    return Base(
        net.to(dtype_of(dtype)),
        example=torch.zeros(1, *size),
        taps=taps,
        channels_last=channels_last,
        mean=config.get("mean"),
        std=config.get("std"),
        transform=transform_of(config),
    )


def transform_of(config: Mapping[str, Any]) -> ImageTransform:
    """The preprocessing of a model's pretrained configuration."""
    wanted, modes = config.get("interpolation"), (config.get("crop_mode"), "center")
    red, green, blue = (round(255 * value) for value in config.get("mean") or (0.0, 0.0, 0.0))
    return ImageTransform(
        size=tuple(config.get("input_size", (3, 224, 224))[-2:]),
        # Shares above 1 are of configurations that pad.
        crop_pct=min(1.0, float(config.get("crop_pct") or 0.875)),
        crop_mode=next(mode for mode in CROPS if mode in modes),
        interpolation=wanted if wanted in INTERPOLATIONS else "bicubic",
        fill=(red, green, blue),
    )
