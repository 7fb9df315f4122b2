"""`load_base("hf:NAME_OR_FOLDER")`: any encoder of transformers as a base, for text or images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sidetuning.base import Base, PlainInput
from sidetuning.errors import UnknownNameError
from sidetuning.sides.initialise import load_weights


def load(
    name: str,
    *,
    taps: Sequence[str] = (),
    output: str | None = None,
    revision: str | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
) -> Base:
    """Build the base.

    Args:
        name: a model on the Hub or a local folder.
        taps: names of its submodules, such as "encoder.layer.3".
        output: the field of the model's output to use, "last_hidden_state" by default.
        revision: of the model on the Hub.
        pretrained: False builds it from its configuration with random weights.
        weights: a safetensors file to load instead.
    """
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("transformers models need transformers: pip install 'sidetuning[transformers]'") from error
    logging.disable_progress_bar()  # a model that is cached loads in a moment
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if pretrained and weights is None:
            net = AutoModel.from_pretrained(name, config=config, revision=revision, use_safetensors=True)
        else:
            net = AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UnknownNameError(
            f"transformers cannot load '{name}' ({first}); check the name and the network, or give a local folder"
        ) from error
    if weights is not None:
        load_weights(net, weights, f"transformers model '{name}'")
    return from_model(net, taps=taps, output=output)


def from_model(net: Any, *, taps: Sequence[str] = (), output: str | None = None) -> Base:
    """Wrap a model that is loaded already; text models take a mapping, image models a tensor."""
    return Base(net, example=example_of(net), output=output or "last_hidden_state", taps=taps)


def example_of(net: Any) -> PlainInput:
    """A smallest input of a transformers model."""
    config = net.config
    if getattr(net, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return torch.zeros(1, getattr(config, "num_channels", 3), size, size)
    ids = torch.arange(8).remainder(config.vocab_size).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
