"""The official metric of SQuAD v2: exact match and F1 of words, over questions with and without an answer."""

from __future__ import annotations

import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scores(NamedTuple):
    """All in %; NaN where there are no such questions.

    Attributes:
        exact, f1: over all questions, with the predictions as they are.
        has_answer, no_answer: F1 of the questions with and without an answer (for these F1 is the exact match).
        best_exact, best_f1: with the best threshold on the odds of there being no answer.
        best_threshold: that of best_f1.
        has_answer_exact: exact match of the questions with an answer.
        area: area under the curve of the receiver: how often a question without an answer has higher odds of having
            none than one with an answer.
    """

    exact: float
    f1: float
    has_answer: float
    no_answer: float
    best_exact: float
    best_f1: float
    best_threshold: float
    has_answer_exact: float
    area: float


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split())


def f1(gold: str, given: str) -> float:
    """Harmonic mean of precision and recall of words; two empty answers are the same."""
    wanted, words = normalise(gold).split(), normalise(given).split()
    if not wanted or not words:
        return float(wanted == words)
    common = sum((Counter(wanted) & Counter(words)).values())
    return 2 * common / (len(wanted) + len(words)) if common else 0.0


def against(golds: Sequence[str], given: str) -> tuple[float, float]:
    """Exact match and F1 against the best of several answers.

    Answers that normalise to nothing do not count; where none counts, the right answer is "".
    """
    wanted = [gold for gold in golds if normalise(gold)] or [""]
    return float(normalise(given) in map(normalise, wanted)), max(f1(gold, given) for gold in wanted)


def score(
    golds: Sequence[Sequence[str]], given: Sequence[str], null_odds: Sequence[float], threshold: float = 0.0
) -> Scores:
    """Compute the metric.

    Args:
        golds: for each question its answers, none where there is none.
        given: for each question the answer that a system would give if it had to.
        null_odds: for each question how likely it is that there is no answer; above `threshold` the system gives none.
    """
    rows = list(zip(golds, given, null_odds, strict=True))
    spans = [against(gold, text) for gold, text, _ in rows]
    # No answer is right where there is none, whatever the answers normalise to.
    values = [
        (float(not gold),) * 2 if odds > threshold else span for (gold, _, odds), span in zip(rows, spans, strict=True)
    ]
    has = [value for value, gold in zip(values, golds, strict=True) if gold]
    none = [value for value, gold in zip(values, golds, strict=True) if not gold]
    # What an answer gains over none: where there is no answer, any text loses.
    gains = [span if gold else (-float(bool(text)),) * 2 for (gold, text, _), span in zip(rows, spans, strict=True)]
    best_exact, _ = _best([gain[0] for gain in gains], len(none), null_odds)
    best_f1, at = _best([gain[1] for gain in gains], len(none), null_odds)
    exact_all, f1_all, exact_has, f1_has, _, f1_none = (
        100 * sum(part) / len(part) if part else float("nan")
        for group in (values, has, none)
        for part in ([value[0] for value in group], [value[1] for value in group])
    )
    known = [odds for gold, odds in zip(golds, null_odds, strict=True) if gold]
    others = [odds for gold, odds in zip(golds, null_odds, strict=True) if not gold]
    return Scores(exact_all, f1_all, f1_has, f1_none, best_exact, best_f1, at, exact_has, 100 * area(known, others))


def area(known: Sequence[float], others: Sequence[float]) -> float:
    """How often one of `others` is larger than one of `known`, in [0, 1]; equal ones count half.

    It is the area under the curve of the receiver (Mann and Whitney, 1947); NaN where one of the two is empty.
    """
    if not known or not others:
        return float("nan")
    values = sorted(known)
    lower = sum(bisect_left(values, value) + bisect_right(values, value) for value in others)
    return lower / (2 * len(values) * len(others))


def _best(gains: Sequence[float], silent: float, odds: Sequence[float]) -> tuple[float, float]:
    """The best mean over all thresholds, and that threshold: questions with odds up to it are answered."""
    total = best = silent
    threshold = 0.0
    for k in sorted(range(len(odds)), key=lambda k: odds[k]):
        total += gains[k]
        if total > best:
            best, threshold = total, odds[k]
    return 100 * best / len(odds), threshold
