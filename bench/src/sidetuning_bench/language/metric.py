"""The official metric of SQuAD v2: exact match and F1 of words, over all questions, those with and those without an answer."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

PUNCTUATION = set(string.punctuation)


class Scores(NamedTuple):
    """All in %; NaN where there are no such questions.

    Attributes:
        exact, f1: over all questions, with the predictions as they are.
        has_answer, no_answer: F1 of the questions with and without an answer (for these F1 is the exact match).
        has_answer_exact: exact match of those with an answer.
        best_exact, best_f1: with the best threshold on the odds of there being no answer.
        best_threshold: that of best_f1.
    """

    exact: float
    f1: float
    has_answer: float
    no_answer: float
    best_exact: float
    best_f1: float
    best_threshold: float
    has_answer_exact: float


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous space."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(gold: str, given: str) -> float:
    """Whether they are the same, once normalised."""
    return float(normalise(gold) == normalise(given))


def f1(gold: str, given: str) -> float:
    """Harmonic mean of precision and recall of words; two empty answers are the same."""
    wanted, words = normalise(gold).split(), normalise(given).split()
    if not wanted or not words:
        return float(wanted == words)
    common = sum((Counter(wanted) & Counter(words)).values())
    return 2 * common / (len(wanted) + len(words)) if common else 0.0


def against(golds: Sequence[str], given: str) -> tuple[float, float]:
    """Exact match and F1 against the best of several answers; answers that normalise to nothing do not count, none at all means ""."""
    wanted = [g for g in golds if normalise(g)] or [""]
    return max(exact(g, given) for g in wanted), max(f1(g, given) for g in wanted)


def score(
    golds: Sequence[Sequence[str]], given: Sequence[str], null_odds: Sequence[float], threshold: float = 0.0
) -> Scores:
    """The metric.

    Args:
        golds: for each question its answers, none where there is none.
        given: for each question the answer that a system would give if it had to.
        null_odds: how likely each system thinks that there is no answer; above `threshold` the answer counts as none.
    """
    spans = [against(g, a) for g, a in zip(golds, given, strict=True)]
    values = [  # not to answer is right where there is no answer, whatever the answers normalise to
        (float(not g), float(not g)) if odds > threshold else span
        for g, span, odds in zip(golds, spans, null_odds, strict=True)
    ]
    has = [v[1] for v, g in zip(values, golds, strict=True) if g]
    none = [v[1] for v, g in zip(values, golds, strict=True) if not g]
    # what answering instead of staying silent gains or loses: where there is no answer, any text loses
    gains = [
        [span[i] if g else -float(bool(a)) for span, g, a in zip(spans, golds, given, strict=True)] for i in (0, 1)
    ]
    best_exact, _ = _best(gains[0], len(none), null_odds)
    best_f1, at = _best(gains[1], len(none), null_odds)
    return Scores(
        _percent([v[0] for v in values]), _percent([v[1] for v in values]), _percent(has), _percent(none), best_exact, best_f1, at,
        _percent([v[0] for v, g in zip(values, golds, strict=True) if g]),
    )  # fmt: skip


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else float("nan")


def _best(gains: Sequence[float], silent: float, odds: Sequence[float]) -> tuple[float, float]:
    """The best mean over all thresholds, and that threshold: questions with odds up to it are answered."""
    total = best = silent
    threshold = 0.0
    for k in sorted(range(len(odds)), key=lambda k: odds[k]):
        total += gains[k]
        if total > best:
            best, threshold = total, odds[k]
    return 100 * best / len(odds), threshold
