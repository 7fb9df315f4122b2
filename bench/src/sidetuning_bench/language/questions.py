"""SQuAD v1.1 and v2, with questions that have no answer: read, cut into windows, and answered from scores."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import ArrowException
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sidetuning.errors import DataError
from sidetuning.files import decode_text, read_bytes
from sidetuning_bench.from_hub import local_folder, open_parquet, split_files

SPLITS = {"train": ("train",), "dev": ("dev", "validation", "val")}
HUB = "rajpurkar/squad_v2"
# The longest file of JSON, in bytes; SQuAD's have 40 MB.
LARGEST = 1 << 30
# The longest answer, in tokens.
LONGEST = 30
# How many of the most likely starts and ends are tried with each other.
BEST = 20


class Answer(NamedTuple):
    """An answer and where it starts in the context, in characters."""

    text: str
    start: int


# Id, question, context, answers.
Raw = tuple[str, str, str, list[Answer]]


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        answers: all that were given, in order; none where there is no answer.
        lost: answers that are nowhere in the context: they cannot be learned, but count as right.
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
    """A split.

    Attributes:
        items: the questions, in the order of the file.
        problems: what was wrong in the file and what was done about it, with its count.
    """

    items: list[Question]
    problems: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)


def read_questions(
    source: str | Path, split: str = "train", limit: int | None = None, answerable: bool = False
) -> Questions:
    """Read a split.

    Where the data are wrong, this is done, and counted in `problems`:

    - an answer is not where `answer_start` says: the nearest place of its text is taken;
    - an answer differs from its context in white space alone: the context's text is taken;
    - an answer is nowhere in its context: it is kept for the metric alone;
    - a context, a question or an answer has no text: it is left out.

    Args:
        source: a SQuAD file (.json, or .jsonl with a question a line), a folder with `train*.json` and `dev*.json`
            or with parquet files in the layout of the Hub's `rajpurkar/squad_v2`, or such a name on the Hub.
        split: "train" or "dev".
        limit: number of questions to take, spread evenly; None for all.
        answerable: take only questions that have an answer.

    Raises:
        DataError: no such data, several files of one split, damaged, or two questions of one id.
    """
    files = _files(local_folder(source, HUB), split)
    problems: Counter[str] = Counter()
    items: dict[str, Question | None] = {}
    for file in files:
        for raw in _rows(file):
            question = _checked(raw, file, problems)
            if raw[0] in items:
                raise DataError(f"{file} has two questions with the id {raw[0]}; make the ids of questions differ")
            items[raw[0]] = question
    found = [question for question in items.values() if question is not None and (question.golds or not answerable)]
    if not found:
        raise DataError(f"{files[0]} holds no question")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return Questions(found, dict(problems))


def fingerprint(*splits: Questions) -> str:
    """sha256 of all questions, contexts and answers."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr([(q.id, q.question, q.context, q.answers, q.lost) for q in split.items]).encode())
    return digest.hexdigest()


def _files(path: Path, split: str) -> list[Path]:
    """The files of a split."""
    if not path.is_dir():
        return [path]
    for name in SPLITS[split]:
        if files := split_files(path, name, (".json", ".jsonl", ".parquet")):
            return files
    raise DataError(
        f"{path} has no {split}*.json and no {split}*.parquet; give the folder of SQuAD or a Hub name such as {HUB}"
    )


def _rows(file: Path) -> Iterator[Raw]:
    """The questions of a file, as they are."""
    parquet = file.suffix == ".parquet"
    try:
        if parquet:
            with open_parquet(file) as opened:
                yield from _entries(opened.read(["id", "question", "context", "answers"]).to_pylist())
            return
        text = decode_text(read_bytes(file, LARGEST))
        try:
            content = json.loads(text)
        except ValueError:
            # JSON lines: not `splitlines`, which knows ends of lines that texts may hold.
            content = [json.loads(line) for line in text.split("\n") if line.strip()]
        yield from _entries(content)
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ArrowException) as error:
        kind = "parquet file of SQuAD" if parquet else "SQuAD file"
        raise DataError(f"{file} is no {kind} ({type(error).__name__}: {error}); download it again") from error


def _entries(value: Any, context: str | None = None) -> Iterator[Raw]:
    """The questions of SQuAD's own nesting, of rows as the Hub has them, or of a list of either."""
    for name in ("data", "paragraphs", "qas"):
        if isinstance(value, dict) and name in value:
            value, context = value[name], value.get("context")
            break
    if isinstance(value, list):
        for item in value:
            yield from _entries(item, context)
        return
    # Some files keep plausible answers where there is none.
    answers = [] if value.get("is_impossible") else value.get("answers") or []
    if isinstance(answers, dict):
        found = [Answer(*answer) for answer in zip(answers["text"], answers["answer_start"], strict=True)]
    else:
        found = [Answer(answer["text"], answer["answer_start"]) for answer in answers]
    yield str(value["id"]), value["question"], value.get("context", context), found


def _checked(raw: Raw, file: Path, problems: Counter[str]) -> Question | None:
    name, question, context, answers = raw
    placed = all(isinstance(answer.text, str) and isinstance(answer.start, int) for answer in answers)
    if not (isinstance(question, str) and isinstance(context, str) and placed):
        raise DataError(f"{file}: question {name} has no text, no context, or an answer without a place; mend the file")
    if not context.strip() or not question.strip():
        problems["questions or contexts without text, left out"] += 1
        return None
    kept, lost = [], []
    for answer in answers:
        # No token holds space.
        text = answer.text.strip()
        start = answer.start + answer.text.find(text)
        if not text:
            problems["answers without text, left out"] += 1
        elif start >= 0 and context.startswith(text, start):
            kept.append(Answer(text, start))
        elif places := _places(text, context):
            same = any(place.text == text for place in places)
            problems[f"answers that {'start elsewhere' if same else 'differ in white space'}, found again"] += 1
            kept.append(min(places, key=lambda place: abs(place.start - answer.start)))
        else:
            problems["answers that are not in their context, kept for the metric alone"] += 1
            lost.append(text)
    return Question(name, question, context, tuple(kept), tuple(lost))


def _places(text: str, context: str) -> list[Answer]:
    """Where a context has a text, or else has it with other white space, in whole words."""
    if text in context:
        return [Answer(text, i) for i in range(len(context)) if context.startswith(text, i)]
    spaced = r"\s*".join(map(re.escape, "".join(text.split())))
    return [Answer(match[0], match.start()) for match in re.finditer(rf"(?<!\w){spaced}(?!\w)", context)]


@dataclass(frozen=True)
class Windows:
    """Questions and pieces of their contexts as token ids: what a network reads.

    Attributes:
        ids: token ids of each window, without padding.
        types: segment ids of each window; none where the network takes none.
        question: number of each window's question, (n,).
        offsets: characters of the context that each token covers, (t, 2); -1 for special tokens and the question's.
        labels: start and end token of the answer, 0 and 0 where this window has none, (n, 2).
        problems: what was met, with its count.
    """

    ids: list[NDArray[np.int32]]
    types: list[NDArray[np.int8]]
    question: NDArray[np.int64]
    offsets: list[NDArray[np.int32]]
    labels: NDArray[np.int64]
    problems: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each window."""
        return np.array([len(ids) for ids in self.ids])

    def __getitems__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], None, Tensor]:
        """A batch `(inputs, no features, labels)`."""
        return self.batch(rows), None, torch.from_numpy(self.labels[list(rows)])

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Windows padded to the longest of them, as transformers take them."""
        ids = [torch.from_numpy(self.ids[row]).long() for row in rows]
        inputs = {"input_ids": ids, "attention_mask": [torch.ones_like(each) for each in ids]}
        if self.types:
            inputs["token_type_ids"] = [torch.from_numpy(self.types[row]).long() for row in rows]
        return {name: pad_sequence(values, batch_first=True) for name, values in inputs.items()}

    def fingerprint(self) -> str:
        """sha256 of all tokens."""
        digest = hashlib.sha256(self.lengths().tobytes())
        for ids in self.ids:
            digest.update(ids.tobytes())
        return digest.hexdigest()


def make_windows(questions: Sequence[Question], tokenizer: Any, length: int = 384, stride: int = 128) -> Windows:
    """Cut contexts into overlapping windows.

    A question that leaves the context less than `stride` + 16 tokens is cut at its end, and counted.

    Args:
        questions: questions with the contexts to cut.
        tokenizer: a fast tokenizer of transformers.
        length: tokens of a window, the question and three special tokens included.
        stride: tokens that two successive windows of a context share.

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
    # A separator that somebody wrote is text like any other.
    plain = {"add_special_tokens": False, "truncation": False, "split_special_tokens": True}
    cut = {"max_length": length, "stride": stride, "truncation": "only_second", "split_special_tokens": True}
    typed = "token_type_ids" in tokenizer.model_input_names
    problems: Counter[str] = Counter()
    found = Windows([], [], np.zeros(0, np.int64), [], np.zeros((0, 2), np.int64), {})
    owners, labels = [], []
    for k, question in enumerate(questions):
        asked, text = tokenizer(question.question, **plain)["input_ids"], question.question
        if len(asked) > most:
            problems["questions longer than their window, cut"] += 1
            text = tokenizer.decode(asked[:most])
        coded = tokenizer(text, question.context, return_overflowing_tokens=True, return_offsets_mapping=True, **cut)
        for i, ids in enumerate(coded["input_ids"]):
            pairs = zip(coded["offset_mapping"][i], coded.sequence_ids(i), strict=True)
            found.offsets.append(np.array([place if part == 1 else (-1, -1) for place, part in pairs], np.int32))
            found.ids.append(np.array(ids, np.int32))
            if typed:
                found.types.append(np.array(coded["token_type_ids"][i], np.int8))
            owners.append(k)
            labels.append(_label(question.answers, found.offsets[-1]))
        if question.answers and not any(map(any, labels[-len(coded["input_ids"]) :])):
            problems["answers longer than their window, learned as none"] += 1
    return replace(
        found, question=np.array(owners), labels=np.array(labels, np.int64).reshape(-1, 2), problems=dict(problems)
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
        text: text of the best span of the context.
        start, end: its first character, and the one after its last.
        score: the sum of the scores of the span's first and last token.
        null: score of there being no answer, the smallest of all windows.
    """

    text: str
    start: int
    end: int
    score: float
    null: float

    @property
    def null_odds(self) -> float:
        """How much higher no answer scores than the span; the official metric looks for a threshold on it."""
        return self.null - self.score


def n_best(
    questions: Sequence[Question], windows: Windows, scores: Mapping[int, NDArray[np.float32]], n: int
) -> list[list[Prediction]]:
    """The best spans of each question over all its windows, best first; one without text where there is no token.

    Args:
        questions: all of them.
        windows: the windows of these questions.
        scores: for each window, (t, 2), the scores of its tokens as first and last one of the answer; token 0 stands
            for none.
        n: number of spans; spans that overlap count as different ones.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    nulls = [float("inf")] * len(questions)
    for w, k in enumerate(windows.question.tolist()):
        start, end = scores[w][:, 0], scores[w][:, 1]
        place = windows.offsets[w]
        nulls[k] = min(nulls[k], float(start[0] + end[0]))
        pairs = [(i, j) for i in _top(start, place) for j in _top(end, place) if i <= j < i + LONGEST]
        # Every likely start may lie after every likely end.
        pairs += [(i, i) for i in _top(start + end, place)[:1]]
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
