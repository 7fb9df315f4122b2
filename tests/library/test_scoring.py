"""Scores of rows are those of scikit-learn, and mistakes come with the most certain one first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn import metrics

from sidetuning.data import Rows
from sidetuning.scoring import Scored, interval


def scored(problem: str, n: int = 60, k: int = 4) -> Scored:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, k, generator=generator)
    if problem == "classes":
        outputs, targets = logits.softmax(1), (logits + torch.randn(n, k, generator=generator)).argmax(1)
    elif problem == "labels":
        outputs, targets = logits.sigmoid(), (torch.rand(n, k, generator=generator) < logits.sigmoid()).float()
    else:
        outputs, targets = logits, logits + 0.3 * torch.randn(n, k, generator=generator)
    places = [str(i) for i in range(n)]
    return Scored(Rows(places, targets, places), outputs, problem, list("abcd"), [])


def test_classes_are_scored_as_scikit_learn_does() -> None:
    found = scored("classes")
    truth, said, scores = found.rows.targets.numpy(), found.predicted.numpy(), found.scores()
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(truth, said))
    assert scores["balanced accuracy"] == pytest.approx(metrics.balanced_accuracy_score(truth, said))
    assert scores["f1"] == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    assert scores["loss"] == pytest.approx(metrics.log_loss(truth, found.outputs.numpy()), rel=1e-5)
    assert np.array_equal(found.confusion().numpy(), metrics.confusion_matrix(truth, said))
    precision, recall, f1, rows = metrics.precision_recall_fscore_support(truth, said)
    table = found.table()
    assert [row["rows"] for row in table] == rows.tolist()
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [row[name] for row in table] == pytest.approx(values.tolist())


def test_labels_and_numbers_are_scored_as_scikit_learn_does() -> None:
    found = scored("labels")
    truth, said, scores = found.rows.targets.numpy(), found.predicted.numpy(), found.scores()
    assert scores["all right"] == pytest.approx(metrics.accuracy_score(truth, said))
    assert scores["f1"] == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    found = scored("numbers")
    truth, said, scores = found.rows.targets.numpy(), found.outputs.numpy(), found.scores()
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(truth, said), rel=1e-5)
    assert scores["rmse"] == pytest.approx(metrics.mean_squared_error(truth, said) ** 0.5, rel=1e-5)
    assert scores["r2"] == pytest.approx(metrics.r2_score(truth, said), rel=1e-4)


def test_small_numbers_are_explained_as_large_ones_are() -> None:
    found = scored("numbers")
    small = replace(found, outputs=found.outputs * 1e-9, rows=replace(found.rows, targets=found.rows.targets * 1e-9))
    assert small.scores()["r2"] == pytest.approx(found.scores()["r2"], rel=1e-3)
    one = replace(found, outputs=found.outputs[:1], rows=found.rows.take([0]))
    assert "r2" not in one.scores()


def test_mistakes_are_the_most_certain_first() -> None:
    found = scored("classes")
    rows = found.mistakes(5)
    sure = found.outputs.max(1).values
    assert not found.right[rows].any() and sure[rows].tolist() == sorted(sure[~found.right].tolist(), reverse=True)[:5]
    errors = (scored("numbers").outputs - scored("numbers").rows.targets).abs().sum(1)
    assert scored("numbers").mistakes(1) == [int(errors.argmax())]


def test_calibration_is_the_gap_between_probability_and_share() -> None:
    outputs, places = torch.tensor([[0.9, 0.1]] * 10), ["x"] * 10
    found = Scored(Rows(places, torch.tensor([0] * 6 + [1] * 4), places), outputs, "classes", ["a", "b"], [])
    ((probability, share, rows),) = found.calibration()
    assert (probability, share) == pytest.approx((0.9, 0.6)) and rows == 10
    assert found.calibration_error() == pytest.approx(0.3)


INTERVALS = [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1)]


@pytest.mark.parametrize(("right", "n", "low", "high"), INTERVALS)
def test_intervals_are_wilsons(right: int, n: int, low: float, high: float) -> None:
    assert interval(right, n) == pytest.approx((low, high), abs=1e-4)
