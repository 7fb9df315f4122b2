"""A tiny encoder, and files of questions, that the tests of language share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import sidetuning as st

WORDS = [
    "what",
    "is",
    "the",
    "number",
    "who",
    "?",
    ".",
    ",",
    "red",
    "green",
    "blue",
    "it",
    "was",
    "made",
    "in",
    "by",
    "a",
    "an",
    "of",
    "tower",
    "river",
    "old",
    "new",
    "big",
    "small",
]
NUMBERS = [str(n) for n in range(1800, 1860)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_tokenizer(folder: Path, vocabulary: Sequence[str]) -> None:
    """A tokenizer of whole words."""
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)


def write_encoder(folder: Path) -> None:
    """A BERT of three layers with random weights, as a folder of transformers."""
    import transformers

    vocabulary = [*SPECIAL, *WORDS, *NUMBERS]
    write_tokenizer(folder, vocabulary)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **shape)
    with st.seeded(0):
        transformers.BertModel(config).save_pretrained(folder, safe_serialization=True)


def tagged(count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Sentences of one to eight words or more, in which places and years are marked."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for kind in rng.integers(0, 4, int(rng.integers(1, 9))):
            some = [["old", "tower"], [str(rng.choice(NUMBERS))], [str(rng.choice(WORDS[:8]))]][min(kind, 2)]
            words += some
            tags += [["B-LOC", "I-LOC"], ["B-DATE"], ["O"]][min(kind, 2)]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """A file of JSON Lines."""
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def entry(
    name: str,
    question: str = "what is the number ?",
    context: str = "it was made in 1822 .",
    answers: Sequence[tuple[Any, Any]] = (("1822", 15),),
    **more: Any,
) -> tuple[str, dict[str, Any]]:
    """A question of a SQuAD file, with its context."""
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return context, {"id": name, "question": question, "answers": given, **more}


def squad_file(path: Path, *entries: tuple[str, dict[str, Any]]) -> Path:
    paragraphs = [{"context": context, "qas": [question]} for context, question in entries]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def number_questions(path: Path, count: int, seed: int) -> Path:
    """Sentences where the answer is the number, or there is none."""
    rng = np.random.default_rng(seed)
    entries = []
    for k in range(count):
        words = list(rng.choice(WORDS[8:], 12))
        has = k % 3 > 0
        if has:
            words[int(rng.integers(2, 10))] = str(rng.choice(NUMBERS))
        context = " ".join(words)
        year = next((w for w in words if w in NUMBERS), "")
        entries.append(entry(f"{seed}-{k}", context=context, answers=[(year, context.index(year))] if has else []))
    return squad_file(path, *entries)


class Lines:
    """Texts of different lengths."""

    def __init__(self, count: int = 40, vocabulary: int = 50) -> None:
        rng = np.random.default_rng(0)
        self.ids = [rng.integers(5, vocabulary, int(n)) for n in rng.integers(3, 30, count)]

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(ids) for ids in self.ids])

    def batch(self, rows: Sequence[int], pad: int = 0) -> dict[str, Tensor]:
        longest = max(len(self.ids[row]) for row in rows) + pad
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for k, row in enumerate(rows):
            ids[k, : len(self.ids[row])], mask[k, : len(self.ids[row])] = torch.from_numpy(self.ids[row]), 1
        return {"input_ids": ids, "attention_mask": mask}

    def fingerprint(self) -> str:
        return str(sum(int(ids.sum()) for ids in self.ids))
