"""`load_base("hf:NAME_OR_FOLDER")`: any encoder of transformers as a base, and `load_tokenizer`, its tokenizer."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sidetuning.base import Base, Input
from sidetuning.errors import ShapeError, SideTuningError, UnknownNameError
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
    """Build a base from an encoder; of a model with a decoder, from its encoder.

    Images are normalised as the model's `preprocessor_config.json` says, where there is one.

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
    # A model that is cached loads in a moment.
    logging.disable_progress_bar()
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
    if config.is_encoder_decoder:
        net = net.get_encoder()
    mean, std = normalisation(name, revision) if getattr(net, "main_input_name", "") == "pixel_values" else (None, None)
    # A checkpoint in half precision is loaded as it is.
    net = net.float()
    return from_model(net, taps=taps, output=output, mean=mean, std=std)


def from_model(
    net: Any,
    *,
    taps: Sequence[str] = (),
    output: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Base:
    """Wrap a model that is loaded already. Text models take a mapping; image models take a tensor, normalised."""
    return Base(net, example=example_of(net), output=output or "last_hidden_state", taps=taps, mean=mean, std=std)


def normalisation(name: str, revision: str | None) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of the pictures that an image model was trained with; None where not recorded."""
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


def load_tokenizer(base: Base, length: int | None = None) -> Any:
    """The tokenizer of a base made by `load_base("hf:…")`, of the same revision; it gives what the network takes.

    Args:
        base: a text encoder.
        length: the longest text that it shall read, in tokens.

    Raises:
        SideTuningError: there is none, or it is another network's.
        ShapeError: the network cannot read so many tokens.
    """
    from transformers import AutoTokenizer

    spec = base.spec
    if spec is None or not spec.name.startswith("hf:"):
        raise SideTuningError("only bases of transformers (hf:NAME or hf:FOLDER) come with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.name.removeprefix("hf:"), revision=spec.revision or "main")
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SideTuningError(
            f"{spec.name} has no tokenizer that can be loaded ({first}); give a base that comes with its own"
        ) from error
    net: Any = base.net
    words, known = max(tokenizer.get_vocab().values()) + 1, net.get_input_embeddings().num_embeddings
    if words > known:
        raise SideTuningError(
            f"the tokenizer of {spec.name} has {words:,} tokens and its network knows {known:,}: it belongs to another "
            "network"
        )
    taken = inspect.signature(net.forward).parameters
    tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n in taken]
    if length is not None:
        ids = torch.full((1, length), tokenizer.sep_token_id or 0, device=base.device)
        try:
            base({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        except (RuntimeError, IndexError) as error:
            most = getattr(net.config, "max_position_embeddings", None)
            limit = f", {most} at most" if most else ""
            raise ShapeError(
                f"{spec.name} cannot read {length} tokens at once{limit}; make --length smaller"
            ) from error
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 of its tokens and of how it cuts a sample text."""
    sample = tokenizer("Né en 1832, Gustave's tower was built IN Paris.")["input_ids"]
    return hashlib.sha256(repr((sorted(tokenizer.get_vocab().items()), sample)).encode()).hexdigest()
