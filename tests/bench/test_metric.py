"""The official metric of SQuAD v2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sidetuning_bench.language import metric

DATA = Path(__file__).parent / "data"


def test_the_metric_is_the_official_one() -> None:
    """Predictions of a trained reader, and what the official script of SQuAD v2 (evaluate-v2.0.py) makes of them."""
    found = json.loads((DATA / "squad_official.json").read_text())
    # Answers, prediction, odds of there being none, official exact and F1.
    rows = found["rows"]
    assert len(rows) >= 1000
    golds, texts, odds = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    assert any(not g for g in golds) and any(not t for t in texts) and any(len(set(g)) > 2 for g in golds)
    assert any(any(ord(c) > 127 for c in t) for t in texts)
    for gold, text, _, exact, f1 in rows:
        found_exact, found_f1 = metric.against(gold, text)
        assert found_exact == exact and found_f1 == pytest.approx(f1, abs=1e-12), (gold, text)
    scores = metric.score(golds, texts, odds)._asdict()
    for name, value in found["official"].items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name


def test_the_area_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    # Some odds are equal.
    odds = random.integers(0, 20, 200).astype(float).tolist()
    golds = [["x"] if random.random() < 0.6 - value / 60 else [] for value in odds]
    expected = metrics.roc_auc_score([not gold for gold in golds], odds)
    assert metric.score(golds, ["x"] * 200, odds).area == pytest.approx(100 * expected)
    area = metric.score([["x"]], ["x"], [0.0]).area
    assert area != area


def test_edges_of_the_metric() -> None:
    assert metric.normalise("The  Cat's, a hat!") == "cats hat"
    # Answers of articles alone do not count.
    assert metric.against(["the"], "") == (1.0, 1.0)
    # Yet silence is wrong where an answer was given, as officially.
    assert metric.score([["the"]], ["x"], [1.0]).f1 == 0
    assert metric.against([], "x") == (0.0, 0.0) and metric.against([], "") == (1.0, 1.0)
    assert metric.against(["a b c", "x y"], "x") == pytest.approx((0.0, 2 / 3))
    scores = metric.score([["x"], []], ["x", "y"], [-1.0, 1.0])
    assert scores.exact == scores.f1 == scores.best_f1 == scores.has_answer_exact == 100
    assert metric.score([["x"], []], ["x", "y"], [-1.0, 1.0], threshold=-2.0).f1 == 50
    assert metric.score([["x"], []], ["x", "y"], [-1.0, 1.0], threshold=2.0).no_answer == 0
    # Silent, and wrongly so.
    scores = metric.score([["x"], ["y"]], ["x", "z"], [2.0, 3.0])
    assert (
        scores.f1 == 0
        and scores.best_f1 == 50
        and scores.best_threshold == 2.0
        and scores.no_answer != scores.no_answer
    )
