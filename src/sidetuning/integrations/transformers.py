"""`load_base("hf:NAME_OR_FOLDER")`: any encoder of transformers as a base, for text or images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sidetuning.base import Base, Input, Select
from sidetuning.errors import ShapeError, UnknownNameError
from sidetuning.inputs import call
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
    """Build the base; of an encoder with a decoder, the encoder.

    Images are normalised as `preprocessor_config.json` says, where there is one. Code of a repository is never run.

    Args:
        name: a model on the Hub or a local folder.
        taps: names of its submodules, such as "encoder.layer.3".
        output: the field of the model's output to use, "last_hidden_state" by default.
        revision: revision of the model on the Hub.
        pretrained: False builds it from its configuration with random weights.
        weights: a safetensors file to load instead.

    Raises:
        UnknownNameError: no such model, or its checkpoint lacks weights that the output depends on.
    """
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("transformers models need transformers: pip install 'sidetuning[transformers]'") from error
    # A model that is cached loads in a moment.
    logging.disable_progress_bar()
    missing: set[str] = set()
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **how)
        if pretrained and weights is None:
            loaded = AutoModel.from_pretrained(
                name, config=config, use_safetensors=True, output_loading_info=True, **how
            )
            net, missing = loaded[0], set(loaded[1]["missing_keys"])
        else:
            net = AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UnknownNameError(
            f"transformers cannot load '{name}' ({first}); check the name and the network, or give a local folder"
        ) from error
    if weights is not None:
        load_weights(net, weights, f"transformers model '{name}'")
    if config.is_encoder_decoder:
        net = net.get_encoder()
    mean, std = normalisation(name, revision) if getattr(net, "main_input_name", "") == "pixel_values" else (None, None)
    # A checkpoint in half precision is loaded as it is.
    net = net.float()
    _settle(net, missing, output or "last_hidden_state", f"the checkpoint of '{name}'")
    return from_model(net, taps=taps, output=output, mean=mean, std=std)


def _settle(net: Any, missing: set[str], output: str, checkpoint: str) -> None:
    """Set weights that a checkpoint lacks, which are drawn anew at each load, to 0 where the output does not read them.

    Checkpoints of masked language models and of classifiers hold no pooler.

    Raises:
        UnknownNameError: the output reads one, or may read one for another input, as of an expert that is not visited.
    """
    lacking = {name: p for name, p in net.named_parameters() if name in missing}
    if not lacking:
        return
    net.eval().requires_grad_(False)
    for parameter in lacking.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        code = Select(output, False)(call(net, example_of(net)))
        read = torch.autograd.grad(code.sum(), list(lacking.values()), allow_unused=True) if code.requires_grad else ()
    used = [name for name, gradient in zip(lacking, read, strict=False) if gradient is not None]
    used += [name for name in lacking if "expert" in name]
    if used:
        raise UnknownNameError(
            f"{checkpoint} holds no weights for {used[0]}, which the output '{output}' depends on: they would be "
            "random at every load; choose another output= or model, or give weights="
        )
    with torch.no_grad():
        for parameter in lacking.values():
            parameter.requires_grad_(False).zero_()


def from_model(
    net: Any,
    *,
    taps: Sequence[str] = (),
    output: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Base:
    """Wrap a loaded model; text models take a mapping, image models a tensor, normalised by mean and std."""
    return Base(net, example=example_of(net), output=output or "last_hidden_state", taps=taps, mean=mean, std=std)


def normalisation(name: str, revision: str | None) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of images that a model was trained with; None where its files do not tell."""
    from transformers import BaseImageProcessor

    try:
        told, _ = BaseImageProcessor.get_image_processor_dict(name, revision=revision or "main")
    except OSError:
        # No such file.
        return None, None
    if not told.get("do_normalize", True):
        return None, None
    return told.get("image_mean"), told.get("image_std")


def example_of(net: Any) -> Input:
    """A smallest input of a transformers model.

    Raises:
        ShapeError: it reads neither texts nor images alone.
    """
    config, main = net.config, getattr(net, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        return torch.zeros(1, getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    if main != "input_ids" or not hasattr(config, "vocab_size"):
        raise ShapeError(
            f"{type(net).__name__} reads neither texts nor images alone; wrap a part of it, or say what it reads: "
            "Base(net, example=…)"
        )
    ids = torch.arange(8).remainder(config.vocab_size).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
