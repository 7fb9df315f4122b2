"""`load_base("hf:NAME_OR_FOLDER")`: any encoder of transformers as a base, for text or images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sidetuning.base import Base, Input
from sidetuning.errors import DataError, ShapeError, UnknownNameError
from sidetuning.inputs import call, dtype_of
from sidetuning.language import LanguageModel
from sidetuning.outputs import Select, Taps
from sidetuning.sides.initialise import load_weights
from sidetuning.transforms import INTERPOLATIONS, MOST_TOKENS, ImageTransform, TextTransform, Transform


def load(
    name: str,
    *,
    taps: Taps = (),
    output: str | None = None,
    revision: str | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    dtype: str | None = None,
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
        dtype: type of the network's weights, "float32" by default.

    Raises:
        UnknownNameError: no such model, or its checkpoint lacks weights that the output depends on.
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("transformers models need transformers: pip install 'sidetuning[transformers]'") from error
    # A model that is cached loads in a moment.
    logging.disable_progress_bar()
    # The tokenizer is read later, when the process may be in another folder.
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    missing: set[str] = set()
    how: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **how)
        writes = _writes(config)
        build: Any = AutoModelForCausalLM if writes else AutoModel
        if pretrained and weights is None:
            loaded = build.from_pretrained(name, config=config, use_safetensors=True, output_loading_info=True, **how)
            net, missing = loaded[0], set(loaded[1]["missing_keys"])
        else:
            net = build.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise UnknownNameError(
            f"transformers cannot load '{name}' ({first}); check the name and the network, or give a local folder"
        ) from error
    # A checkpoint in half precision is loaded as it is.
    whole = net = net.float()
    lm = LanguageModel(whole) if writes else None
    headed = lm is not None and (weights is None or config.tie_word_embeddings)
    if lm is not None:
        net, before = lm.backbone, f"{lm.name}."
        headed = headed and all(name.startswith(before) for name in missing)
        missing = {name.removeprefix(before) for name in missing}
    if weights is not None:
        load_weights(net, weights, f"transformers model '{name}'")
    if config.is_encoder_decoder:
        net = net.get_encoder()
    images = getattr(net, "main_input_name", "") == "pixel_values"
    trained = normalisation(name, revision) if images else {"transform": text_transform(net, name, revision)}
    _settle(net, missing, output or "last_hidden_state", f"the checkpoint of '{name}'")
    whole.to(dtype_of(dtype))
    base = from_model(net, taps=taps, output=output, **trained)
    # What is drawn at random at every load is no output embedding.
    base.lm = lm if headed and base.causal else None
    return base


def _writes(config: Any) -> bool:
    """Whether a model is a decoder of texts, loaded with its output embedding; an encoder only if saved as such."""
    from transformers.models.auto import modeling_auto as known

    kind, saved = type(config), str(config.architectures or "")
    alone = kind in known.MODEL_MAPPING and config.get_text_config() is config and not config.is_encoder_decoder
    decoder = kind not in known.MODEL_FOR_MASKED_LM_MAPPING or "CausalLM" in saved or "LMHeadModel" in saved
    return alone and decoder and kind in known.MODEL_FOR_CAUSAL_LM_MAPPING


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
    taps: Taps = (),
    output: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    bgr: bool = False,
    transform: Transform | None = None,
) -> Base:
    """Wrap a loaded model; text models take a mapping, image models a tensor, normalised by mean and std."""
    how: dict[str, Any] = {"mean": mean, "std": std, "bgr": bgr, "transform": transform}
    return Base(net, example=example_of(net), output=output or "last_hidden_state", taps=taps, **how)


def text_transform(net: Any, name: str, revision: str | None) -> TextTransform | None:
    """Texts to what a network reads, by the tokenizer that comes with it, loaded when it is first used."""
    words = getattr(net.config, "vocab_size", None)
    if words is None:
        return None
    table = next((m for key, m in net.named_modules() if key.endswith("position_embeddings")), None)
    positions = getattr(net.config, "max_position_embeddings", None) or MOST_TOKENS
    # XLNet says -1: any number.
    positions = positions if isinstance(positions, int) and positions > 0 else MOST_TOKENS
    # RoBERTa counts positions from after the padding's.
    offset = getattr(table, "padding_idx", None)
    most = min(MOST_TOKENS, positions - (0 if offset is None else offset + 1))
    read = inspect.signature(net.forward).parameters
    names = tuple(key for key in ("input_ids", "attention_mask", "token_type_ids") if key in read)
    return TextTransform(most, names, partial(tokenizer_of, name, revision, words, stamps_of(name)))


def stamps_of(name: str) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the files of a local model's tokenizer; nothing for a model on the Hub."""
    parts = ("token", "vocab", "merges", "template", ".model")
    files = [(f.name, f.stat()) for f in sorted(Path(name).glob("*")) if any(part in f.name for part in parts)]
    return tuple((file, about.st_mtime_ns, about.st_size) for file, about in files)


@lru_cache(maxsize=8)
def tokenizer_of(name: str, revision: str | None, words: int, stamps: tuple[tuple[str, int, int], ...]) -> Any:
    """The tokenizer of a model, which has `words` embeddings and had files with these stamps when it was loaded.

    Raises:
        DataError: there is none, it is another network's, or its files changed since.
    """
    from transformers import AutoTokenizer

    if stamps_of(name) != stamps:
        raise DataError(f"the files of the tokenizer of hf:{name} changed after the model was loaded; load it again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(
            f"hf:{name} has no tokenizer that can be loaded ({first}); give batches of token ids"
        ) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        # What transformers makes of a folder without the files of one.
        raise DataError(f"hf:{name} has no files of a tokenizer; put them beside the model, or give batches of ids")
    if (highest := max(tokenizer.get_vocab().values()) + 1) > words:
        raise DataError(f"the tokenizer of hf:{name} has {highest:,} tokens, its network {words:,}: it is another's")
    if tokenizer.pad_token is None:
        # Its place is masked; a token of words would leave the vocabulary.
        tokenizer.pad_token = tokenizer.eos_token or next(iter(tokenizer.all_special_tokens), None)
    if tokenizer.pad_token is None:
        raise DataError(f"the tokenizer of hf:{name} has no token to pad texts with; save it with a pad_token")
    return tokenizer


def normalisation(name: str, revision: str | None) -> dict[str, Any]:
    """How a model's own processor turns images into what it was trained with, as arguments of `Base`.

    All of it is one shift and one scale of values in [0, 1]; without a file, or without a change, there is nothing.
    """
    from transformers import BaseImageProcessor

    try:
        told, _ = BaseImageProcessor.get_image_processor_dict(name, revision=revision or "main")
    except OSError:
        # No such file.
        return {}
    kind = str(told.get("image_processor_type") or told.get("feature_extractor_type") or "")
    # What these three do unless they are told not to, and no other.
    offset = told.get("offset", kind.startswith("Vivit")) or told.get("rescale_offset", False)
    twice = told.get("include_top", kind.startswith("EfficientNet"))
    bgr = bool(told.get("do_flip_channel_order", kind.startswith("MobileViT")))
    scale = 255 * float(told.get("rescale_factor") or 1 / 255) if told.get("do_rescale", True) else 255.0
    mean, std = told.get("image_mean"), told.get("image_std")
    if not told.get("do_normalize", True) or mean is None or std is None:
        mean, std, twice = [0.0] * 3, [1.0] * 3, False
    mean, std = ([value] * 3 if isinstance(value, (int, float)) else list(value) for value in (mean, std))
    # ((scale x - offset) - mean) / std, and once more through std.
    if offset or abs(scale - 1) > 1e-6:
        mean = [(value + bool(offset)) / scale for value in mean]
        std = [value / scale for value in std]
    if twice:
        std = [value * float(own) for value, own in zip(std, told["image_std"], strict=True)]
    plain = not any(mean) and all(value == 1 for value in std)
    how = {"bgr": bgr, "transform": image_transform(told)}
    return how if plain else {"mean": mean, "std": std, **how}


def image_transform(told: Mapping[str, Any]) -> ImageTransform:
    """How an image processor resizes and crops, from what its file says; the size is that of the base's example."""

    def edges(name: str) -> tuple[int, int] | None:
        size = told.get(name)
        size = {"shortest_edge": size} if isinstance(size, int) else size or {}
        short = size.get("shortest_edge")
        high, wide = size.get("height", short), size.get("width", short)
        return (high, wide) if isinstance(high, int) and isinstance(wide, int) and min(high, wide) > 0 else None

    size, crop = edges("size") or (1, 1), edges("crop_size")
    keeps = isinstance(told.get("size"), int) or "shortest_edge" in (told.get("size") or {})
    share = 1.0
    if crop is not None and told.get("do_center_crop", False):
        share = min(1.0, crop[0] / size[0])
    elif told.get("crop_pct") and size[0] < 384:
        # ConvNeXt's: the size is that after the crop.
        share = float(told["crop_pct"])
    # Pillow's numbers; most processors that name none are bilinear.
    kind = dict(enumerate(INTERPOLATIONS)).get(told.get("resample", 2), "bilinear")
    return ImageTransform(size, share, "center" if keeps else "squash", kind)


def example_of(net: Any) -> Input:
    """A smallest input of a transformers model.

    Raises:
        ShapeError: it reads neither texts nor images alone.
    """
    config, main = net.config, getattr(net, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        frames = [config.num_frames] if hasattr(config, "num_frames") else []
        channels = getattr(config, "num_channels", 3)
        return torch.zeros(1, *frames, channels, *((size, size) if isinstance(size, int) else size))
    if main != "input_ids" or not hasattr(config, "vocab_size"):
        raise ShapeError(
            f"{type(net).__name__} reads neither texts nor images alone; wrap a part of it, or say what it reads: "
            "Base(net, example=…)"
        )
    ids = torch.arange(8).remainder(config.vocab_size).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
