"""The tokenizer that belongs to a base of transformers."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch

from sidetuning.base import Base
from sidetuning.errors import ShapeError, SideTuningError


def load_tokenizer(base: Base, length: int | None = None) -> Any:
    """The tokenizer that came with a base made by `load_base("hf:…")`; it gives what the network takes.

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
            f"the tokenizer of {spec.name} has {words:,} tokens, its network {known:,}: it belongs to another network"
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
