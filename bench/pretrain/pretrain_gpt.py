"""Make the small generator of the record "generators", a GPT of 3 million weights: run this file.

It learns English of documentation: the docstrings of packages under free licences, as they are installed here. Its
domains, which it never sees, are Python, C++ and web pages. Resumable; about 20 minutes on one CPU core of its own. The
weights and the tokenizer land in `--out`, as `load_base("hf:…")` takes them, and are not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sidetuning.loop import train
from sidetuning.seeding import seeded
from sidetuning_bench.language.corpora import END, prose, tokens


@dataclass(frozen=True)
class Settings:
    """Make the small generator."""

    out: str = "runs/pretrain-gpt"
    """Folder for the weights and the resume file."""
    steps: int = 1200
    """Optimiser steps."""
    batch: int = 8
    """Texts of `context` tokens per step."""
    lr: float = 2e-3
    """The peak learning rate."""
    vocabulary: int = 2048
    """Byte pairs of the tokenizer."""
    context: int = 256
    """Tokens that the net sees."""
    width: int = 192
    """Channels of the net."""
    layers: int = 6
    """Layers of the net."""
    seed: int = 0
    """Seed for initial weights and data order."""


def make_tokenizer(texts: Sequence[str], settings: Settings) -> Any:
    """A tokenizer of byte pairs, which reads any text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bytes_ = ByteLevelBPETokenizer()
    bytes_.train_from_iterator(texts[::5], settings.vocabulary, special_tokens=[END], show_progress=False)
    # Texts are longer than the net's context before they are cut.
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=END, pad_token=END, model_max_length=10**9)


class Objective(nn.Module):
    """The mean loss of the next tokens."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (b, t) to their loss."""
        loss: Tensor = self.net(input_ids=ids, labels=ids).loss
        return loss


def main(settings: Settings) -> None:
    """Train the tokenizer and the net."""
    from transformers import GPT2Config, GPT2LMHeadModel

    out, texts = Path(settings.out), prose()
    tokenizer = make_tokenizer(texts, settings)
    tokenizer.save_pretrained(out)
    rows = tokens(tokenizer, texts, settings.context, settings.seed)
    held, rows = rows[:64], rows[64:]
    print(f"{sum(map(len, texts)):,} characters, {rows.numel():,} tokens")
    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.width // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with seeded(settings.seed):
        net = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.1)
    # Warms up over a twentieth, then falls in a line to a tenth.
    share = partial(lambda steps, k: min(1, 20 * (k + 1) / steps, 1.1 - k / steps), settings.steps)
    data: Any = rows
    loader: Any = DataLoader(data, batch_size=settings.batch, shuffle=True)
    train(
        Objective(net),
        loader,
        optimizer,
        steps=settings.steps,
        scheduler=LambdaLR(optimizer, share),
        clip=1.0,
        seed=settings.seed,
        resume=out / "state.resume",
        progress="gpt",
    )
    net.eval().save_pretrained(out)
    with torch.no_grad():
        loss = torch.stack([net(input_ids=part, labels=part).loss for part in held.split(16)]).mean()
    print(f"perplexity of held-out prose: {float(loss.exp()):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
