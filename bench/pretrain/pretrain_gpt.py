"""Make the small generator of the record "generators", a GPT of 3 million weights: run this file.

It learns English of documentation: the docstrings of packages under free licences, as they are installed here. Its
domains, which it never sees, are Python, C++ and web pages. Resumable; about 20 minutes on one CPU core of its own. The
weights and the tokenizer land in `--out`, as `load_base("hf:…")` takes them, and are not published.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
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

PACKAGES = Path(sysconfig.get_paths()["purelib"])
STANDARD = Path(sysconfig.get_paths()["stdlib"])
# Where prose is read, with its licence.
PROSE = {
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torch": "BSD-3-Clause",
}
# What is learned later: files by folder, their licence. Python is the standard library's (PSF-2.0).
CPP = {"torch/include/torch/csrc": "BSD-3-Clause", "torch/include/c10": "BSD-3-Clause"}
WEB = {"material": "MIT", "mkdocs": "BSD-2-Clause", "werkzeug": "BSD-3-Clause", "torch/utils": "BSD-3-Clause"}
END = "<|endoftext|>"


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


def trees(root: Path) -> Iterator[ast.Module]:
    """The Python files below a folder, parsed, in one order on every machine; no tests, and nothing installed there."""
    for file in sorted(root.rglob("*.py")):
        if not re.search(r"/(site-packages|test\w*|idlelib|lib2to3)/", file.as_posix().removeprefix(str(root))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    yield ast.parse(file.read_text(encoding="utf-8"))
                except (SyntaxError, ValueError):
                    continue


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def prose() -> list[str]:
    """The long docstrings of the packages, each once."""
    found = [
        ast.get_docstring(n)
        for p in PROSE
        for t in trees(PACKAGES / p)
        for n in ast.walk(t)
        if isinstance(n, DOCUMENTED)
    ]
    return sorted({text for text in found if text and len(text) > 200})


def python() -> list[str]:
    """The standard library's code, without docstrings and comments."""
    texts = []
    for tree in trees(STANDARD):
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        texts.append(ast.unparse(tree))
    return texts


def files(folders: Sequence[str], ends: Sequence[str]) -> list[str]:
    """The files below folders of packages with these ends, without comments of C and without what a machine packed."""
    paths = [f for folder in folders for f in sorted((PACKAGES / folder).rglob("*")) if f.suffix in ends]
    texts = [
        re.sub(r"/\*.*?\*/|^\s*//.*$", "", f.read_text(errors="ignore"), flags=re.DOTALL | re.MULTILINE) for f in paths
    ]
    return [text for text in texts if text and max(map(len, text.splitlines())) < 400]


DOMAINS = {
    "Python": python,
    "C++": partial(files, [*CPP], [".h"]),
    "web": partial(files, [*WEB], [".html", ".js", ".css"]),
}


def tokens(tokenizer: Any, texts: Sequence[str], length: int, seed: int) -> Tensor:
    """Texts in random order, one after the other, cut into rows (n, length)."""
    mixed = random.Random(seed).sample(list(texts), len(texts))
    ids = [i for text in mixed for i in tokenizer(text + END).input_ids]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


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
    loader: Any = DataLoader(list(rows), batch_size=settings.batch, shuffle=True)
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
