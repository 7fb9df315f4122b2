"""SQuAD v1.1 and v2: questions about paragraphs, some without an answer; read, cut into windows, answered from scores."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetuning.errors import DataError
from sidetuning_bench.from_hub import local_folder

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val")}
HUB = "rajpurkar/squad_v2"
LONGEST = 30  # tokens of an answer
BEST = 20  # starts and ends that are tried with each other


class Answer(NamedTuple):
    """An answer and where it starts in the context, in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        answers: all that were given, in order; none where there is no answer.
        lost: answers that were given and are nowhere in the context: nothing to learn from, but right all the same.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    lost: tuple[str, ...] = ()

    @property
    def golds(self) -> list[str]:
        """What the metric compares with."""
        return [*(a.text for a in self.answers), *self.lost]

    @property
    def teaches(self) -> bool:
        """Whether the place of its answer is known, or that there is none."""
        return bool(self.answers) or not self.lost


@dataclass(frozen=True)
class Questions:
    """A split, and what was found wrong in it.

    Attributes:
        items: in their order in the file.
        problems: how often what was met, with what was done about it.
    """

    items: list[Question]
    problems: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)


def read_questions(source: str | Path, split: str = "train", limit: int | None = None) -> Questions:
    """Read a split.

    Args:
        source: a SQuAD file (.json), a folder with `train*.json` and `dev*.json` or with parquet files in the layout of the Hub's
            `rajpurkar/squad_v2`, or such a name on the Hub.
        split: "train" or "dev".
        limit: take so many questions, spread evenly.

    An answer that is not where `answer_start` says is taken from where its text is nearest; where its text is nowhere, it is kept for the
    metric alone. Contexts and questions without text are left out. All is counted in `problems`.

    Raises:
        DataError: no such data, several files of one split, damaged, or two questions of one id.
    """
    path = local_folder(source, HUB)
    if path.is_dir():
        found = (
            [f for f in sorted(path.rglob(f"{name}*")) if f.suffix in (".json", ".parquet")] for name in SPLITS[split]
        )
        files = next((f for f in found if f), [])
        if not files:
            raise DataError(
                f"{path} has no {split}*.json and no {split}*.parquet; give the folder of SQuAD or a Hub name such as {HUB}"
            )
        if files[0].suffix == ".json" and len(files) > 1:
            names = ", ".join(f.name for f in files)
            raise DataError(
                f"{path} has several files of {split} ({names}); keep the one that you mean in a folder of its own"
            )
    else:
        files = [path]
    problems: Counter[str] = Counter()
    items: list[Question] = []
    seen: set[str] = set()
    for file in files:
        for raw in _from_json(file) if file.suffix == ".json" else _from_parquet(file):
            question = _checked(raw, file, problems)
            if raw[0] in seen:
                raise DataError(
                    f"{file} has two questions with the id {raw[0]}; ids tell predictions apart: make them differ"
                )
            seen.add(raw[0])
            if question is not None:
                items.append(question)
    if not items:
        raise DataError(f"{files[0]} holds no question")
    if limit is not None and limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    return Questions(items, dict(problems))


def fingerprint(*splits: Questions) -> str:
    """sha256 of all questions, contexts and answers."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr([(q.id, q.question, q.context, q.answers, q.lost) for q in split.items]).encode())
    return digest.hexdigest()


Raw = tuple[str, str, str, list[Answer]]  # id, question, context, answers


def _from_json(file: Path) -> Iterator[Raw]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    answers = [Answer(a["text"], a["answer_start"]) for a in entry.get("answers") or []]
                    if entry.get("is_impossible"):
                        answers = []  # some files keep plausible ones there
                    yield str(entry["id"]), entry["question"], paragraph["context"], answers
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is no SQuAD file ({type(error).__name__}: {error}); download it again") from error


def _from_parquet(file: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(file).iter_batches(2000, columns=["id", "question", "context", "answers"]):
            for row in batch.to_pylist():
                texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
                yield row["id"], row["question"], row["context"], [Answer(*a) for a in zip(texts, starts, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is no parquet file of SQuAD ({error}); download it again") from error


def _checked(raw: Raw, file: Path, problems: Counter[str]) -> Question | None:
    name, question, context, answers = raw
    if (
        not isinstance(question, str)
        or not isinstance(context, str)
        or not all(isinstance(a.text, str) and isinstance(a.start, int) for a in answers)
    ):
        raise DataError(
            f"{file}: the question {name} has no text, no context, or an answer without a place; mend the file"
        )
    if not context.strip() or not question.strip():
        problems["questions or contexts without text, left out"] += 1
        return None
    kept, lost = [], []
    for answer in answers:
        text = answer.text.strip()  # space is in no token
        start = answer.start + answer.text.find(text)
        if not text:
            problems["answers without text, left out"] += 1
            continue
        if start < 0 or context[start : start + len(text)] != text:
            places = [i for i in range(len(context)) if context.startswith(text, i)]
            if not places:
                problems["answers that are not in their context, kept for the metric alone"] += 1
                lost.append(text)
                continue
            start = min(places, key=lambda i: abs(i - answer.start))
            problems["answers that start elsewhere, found again"] += 1
        kept.append(Answer(text, start))
    return Question(name, question, context, tuple(kept), tuple(lost))


@dataclass(frozen=True)
class Windows:
    """Questions and pieces of their contexts as token ids: what a network reads.

    Attributes:
        ids, types: token ids and segment ids of each window, without padding.
        question: the number of its question.
        offsets: the characters of the context that each token covers, (t, 2); -1 for tokens of the question and special ones.
        labels: start and end token of the answer, 0 and 0 where this window has none, (n, 2).
        problems: how often what was met.
        typed: whether the network takes segment ids.
    """

    ids: list[NDArray[np.int32]]
    types: list[NDArray[np.int8]]
    question: NDArray[np.int64]
    offsets: list[NDArray[np.int32]]
    labels: NDArray[np.int64]
    problems: dict[str, int]
    typed: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each window."""
        return np.array([len(i) for i in self.ids])

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Windows padded to the longest of them, as transformers take them."""
        longest = max(len(self.ids[r]) for r in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for k, r in enumerate(rows):
            n = len(self.ids[r])
            ids[k, :n], types[k, :n], mask[k, :n] = torch.from_numpy(self.ids[r]), torch.from_numpy(self.types[r]), 1
        return {"input_ids": ids, "attention_mask": mask, **({"token_type_ids": types} if self.typed else {})}

    def fingerprint(self) -> str:
        """sha256 of all tokens."""
        digest = hashlib.sha256(self.lengths().tobytes())
        for ids in self.ids:
            digest.update(ids.tobytes())
        return digest.hexdigest()


def make_windows(questions: Sequence[Question], tokenizer: Any, length: int = 384, stride: int = 128) -> Windows:
    """Cut contexts into overlapping windows of `length` tokens, the question and three special tokens included.

    Args:
        questions: what to cut.
        tokenizer: a fast tokenizer of transformers.
        length: of a window.
        stride: tokens that two successive windows of a context share.

    A question that leaves the context less than `stride` + 16 tokens is cut at its end, and counted.

    Raises:
        DataError: the tokenizer knows no offsets, or the windows are too small.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "answers are found by the tokens' places in the text, which only fast tokenizers know; give another base"
        )
    most = length - stride - 16 - 3
    if most < 8:
        raise DataError(f"windows of {length} tokens that share {stride} have no room for a question; make them longer")
    problems: Counter[str] = Counter()
    ids, types, owners, offsets, labels = [], [], [], [], []
    for k, q in enumerate(questions):
        # A separator that somebody wrote is text like any other.
        asked = tokenizer(q.question, add_special_tokens=False, truncation=False, split_special_tokens=True)[
            "input_ids"
        ]
        text = q.question
        if len(asked) > most:
            problems["questions longer than their window, cut"] += 1
            text = tokenizer.decode(asked[:most])
        coded = tokenizer(
            text, q.context, max_length=length, stride=stride, truncation="only_second", return_overflowing_tokens=True,
            return_offsets_mapping=True, split_special_tokens=True,
        )  # fmt: skip
        found = False
        for i in range(len(coded["input_ids"])):
            part = coded.sequence_ids(i)
            place = np.array(
                [p if s == 1 else (-1, -1) for p, s in zip(coded["offset_mapping"][i], part, strict=True)], np.int32
            )
            ids.append(np.array(coded["input_ids"][i], np.int32))
            types.append(
                np.array([s == 1 or (s is None and j > 0 and j == len(part) - 1) for j, s in enumerate(part)], np.int8)
            )
            owners.append(k)
            offsets.append(place)
            labels.append(_label(q.answers, place))
            found = found or labels[-1] != (0, 0)
        if q.answers and not found:
            problems["answers longer than their window, learned as none"] += 1
    typed = "token_type_ids" in tokenizer.model_input_names
    return Windows(
        ids, types, np.array(owners), offsets, np.array(labels, np.int64).reshape(-1, 2), dict(problems), typed
    )


def _label(answers: Sequence[Answer], place: NDArray[np.int32]) -> tuple[int, int]:
    """First and last token of the first answer, (0, 0) where it is not all in the window."""
    if not answers:
        return 0, 0
    first, last = answers[0].start, answers[0].start + len(answers[0].text)
    inside = np.flatnonzero((place[:, 0] >= 0) & (place[:, 1] > first) & (place[:, 0] < last))
    if not len(inside) or place[inside[0], 0] > first or place[inside[-1], 1] < last:
        return 0, 0
    return int(inside[0]), int(inside[-1])


class Prediction(NamedTuple):
    """The best answer to a question.

    Attributes:
        text: of the best span of the context.
        start, end: its characters.
        score: of the span, as the sum of the scores of its first and its last token.
        null: the score of there being no answer, the smallest of all windows.
    """

    text: str
    start: int
    end: int
    score: float
    null: float

    @property
    def null_odds(self) -> float:
        """How much more likely than the span no answer is: what the official metric looks for a threshold in."""
        return self.null - self.score


def n_best(
    questions: Sequence[Question], windows: Windows, scores: Mapping[int, NDArray[np.float32]], n: int
) -> list[list[Prediction]]:
    """The n best spans of each question over all its windows, best first; one without text where the context has no token.

    Args:
        questions: all of them.
        windows: of these questions.
        scores: of each window, (t, 2): of its tokens being the first and the last of the answer; token 0 stands for none.
        n: how many; spans that overlap count as different ones.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    nulls = [float("inf")] * len(questions)
    for w, k in enumerate(windows.question.tolist()):
        start, end = scores[w][:, 0], scores[w][:, 1]
        place = windows.offsets[w]
        nulls[k] = min(nulls[k], float(start[0] + end[0]))
        pairs = [(i, j) for i in _top(start, place) for j in _top(end, place) if i <= j < i + LONGEST]
        pairs += [(i, i) for i in _top(start + end, place)[:1]]  # every likely start may lie after every likely end
        for i, j in pairs:
            where = int(place[i, 0]), int(place[j, 1])
            spans[k][where] = max(spans[k].get(where, -np.inf), float(start[i] + end[j]))
    found = []
    for question, known, null in zip(questions, spans, nulls, strict=True):
        best = sorted(known.items(), key=lambda item: -item[1])[:n]
        answers = [Prediction(question.context[a:b], a, b, score, null) for (a, b), score in best]
        found.append(answers or [Prediction("", 0, 0, null, null)])
    return found


def _top(scores: NDArray[np.float32], place: NDArray[np.int32]) -> list[int]:
    """Tokens of the context with the highest scores."""
    allowed = np.where(place[:, 0] >= 0, scores, -np.inf)
    return [int(i) for i in np.argsort(-allowed, kind="stable")[:BEST] if np.isfinite(allowed[i])]
