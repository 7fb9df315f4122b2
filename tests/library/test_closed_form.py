"""A task learned in closed form: the ridge regression of its targets, whatever the batches, and nothing else moves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from conftest import BASES, inputs, mlp_base, sequence_base
from sidetuning.sums import Sums

# 12 numbers decide, with noise, between 3 classes.
generator = torch.Generator().manual_seed(0)
X = torch.randn(600, 12, generator=generator)
SCORES = X @ torch.randn(12, 3, generator=generator) + torch.randn(600, 3, generator=generator)
CLASSES = SCORES.argmax(1)
TARGETS: dict[str, Tensor] = {"classes": CLASSES, "labels": (SCORES > 1).float(), "numbers": SCORES * 50 + 7}


def model_with(problem: str | None, head: Any = 3, base: st.Base | None = None, **parts: Any) -> st.SideTuner:
    model = st.SideTuner(base or mlp_base())
    model.add_task("t", problem=problem, seed=0, head=head, **(parts or {"side": None, "merge": "base-only"}))
    return model


def batches(targets: Tensor, size: int = 100, rows: slice = slice(0, 400)) -> Any:
    return DataLoader(TensorDataset(X[rows], targets[rows]), batch_size=size)


@pytest.mark.parametrize("size", [400, 96, 1])
def test_the_solution_is_that_of_ridge_regression(size: int) -> None:
    model = model_with("numbers")
    result = st.solve(model, "t", batches(TARGETS["numbers"], size), strength=0.01, progress=False)
    code = model.base(X[:400]).out.double()
    centred, target = code - code.mean(0), TARGETS["numbers"][:400].double()
    xx = centred.T @ centred
    ridge = xx + 0.01 * xx.diagonal().mean() * torch.eye(16)
    weight = torch.linalg.solve(ridge, centred.T @ (target - target.mean(0)))
    expected = (code - code.mean(0)) @ weight + target.mean(0)
    torch.testing.assert_close(model(X[:400], "t").double(), expected, rtol=1e-5, atol=1e-4)
    assert result.rows == 400 and result.strength == 0.01


@pytest.mark.slow
@pytest.mark.parametrize("problem", TARGETS)
def test_it_learns_about_what_gradients_learn(problem: str) -> None:
    held = batches(TARGETS[problem], rows=slice(400, 600))
    solved, fitted = model_with(problem), model_with(problem)
    st.solve(solved, "t", batches(TARGETS[problem]), progress=False)
    st.fit(fitted, "t", batches(TARGETS[problem]), steps=800, lr=2e-2, progress=False)
    ours, theirs = (st.evaluate(model, "t", held) for model in (solved, fitted))
    if problem == "numbers":
        assert ours["mae"] < 1.05 * theirs["mae"]
    else:
        assert ours["loss"] < 1.08 * theirs["loss"]
        assert ours["accuracy"] > theirs["accuracy"] - 0.04


@pytest.mark.parametrize("problem", ["classes", "labels"])
def test_its_probabilities_are_about_what_they_say(problem: str) -> None:
    model = model_with(problem)
    st.solve(model, "t", batches(TARGETS[problem]), progress=False)
    output = model(X[400:], "t").detach()
    said = output.softmax(1).max(1).values if problem == "classes" else output.sigmoid()
    right = (output.argmax(1) == CLASSES[400:]).float() if problem == "classes" else TARGETS["labels"][400:]
    assert abs(float(said.mean() - right.mean())) < 0.05
    sure = said > said.median()
    assert abs(float(said[sure].mean() - right[sure].mean())) < 0.08


def test_the_strength_is_the_one_with_the_least_error_on_rows_that_were_not_seen() -> None:
    """More features than rows, nearly: without a strength it learns the noise by heart."""
    with st.seeded(0):
        base = st.Base(nn.Sequential(nn.Linear(12, 180), nn.ReLU()), example=torch.zeros(1, 12))
    errors, model = {}, model_with("numbers", base=base)
    held, target = slice(300, 600), TARGETS["numbers"]
    for strength in (None, 1e-5, 1e-3, 1e-1, 1e1):
        result = st.solve(model, "t", batches(target, rows=slice(0, 200)), strength=strength, progress=False)
        errors[strength] = float((model(X[held], "t") - target[held]).square().mean().detach())
        if strength is None:
            assert result.error == pytest.approx(errors[None], rel=0.25)
    assert errors[None] <= 1.02 * min(errors.values()) and errors[None] < 0.5 * errors[1e-5]


def test_many_features_are_solved_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the decomposition, whose traces are then estimated."""
    outputs = []
    for exact in (1024, 4):
        monkeypatch.setattr("sidetuning.closed_form.EXACT", exact)
        model = model_with("classes")
        outputs.append((st.solve(model, "t", batches(CLASSES), progress=False).strength, model(X, "t").detach()))
    assert outputs[0][0] == outputs[1][0]
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-2, atol=1e-2)


def test_few_rows_of_many_features_are_solved_and_a_strength_that_rounding_swallows_is_refused() -> None:
    with st.seeded(0):
        base = st.Base(nn.Sequential(nn.Linear(12, 1500), nn.ReLU()), example=torch.zeros(1, 12))
    model = model_with("classes", base=base)
    few = [(X[:30], CLASSES[:30])]
    st.solve(model, "t", few, progress=False)
    assert float((model(X[400:], "t").argmax(1) == CLASSES[400:]).float().mean()) > 0.4
    with pytest.raises(st.TaskError, match="lost in rounding"):
        st.solve(model, "t", [(X[:400], CLASSES[:400])] * 3, strength=1e-9, progress=False)


@pytest.mark.parametrize(("rows", "features", "exact"), [(20, 64, 1024), (40, 64, 1024), (20, 64, 50), (60, 64, 50)])
def test_a_strength_is_chosen_where_rows_are_fewer_than_features(
    rows: int, features: int, exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest fits every row, which says nothing of others."""
    monkeypatch.setattr("sidetuning.closed_form.EXACT", exact)
    generator = torch.Generator().manual_seed(0)
    way = torch.randn(features, 2, generator=generator) / 8
    x, more = (torch.randn(count, features, generator=generator) for count in (rows, 500))
    y, truth = (z @ way + 0.5 * torch.randn(len(z), 2, generator=generator) for z in (x, more))
    errors = {}
    for strength in (None, 1e-5, 0.1, 1.0, 10.0):
        model = st.SideTuner(st.Base(nn.Identity(), example=x[:1]))
        model.add_task("t", side=None, merge="base-only", head=2, problem="numbers")
        result = st.solve(model, "t", [(x, y)], strength=strength, progress=False)
        errors[strength] = float((model(more, "t").detach() - truth).square().mean())
        if strength is None:
            assert result.strength > 1e-3 and result.error > 0.1
    assert errors[None] < 1.15 * min(errors.values())


def test_a_frozen_layer_and_settings_of_other_types_are_refused() -> None:
    model = model_with("classes")
    for how in ({"strength": "1"}, {"strength": float("nan")}, {"views": "2"}, {"views": 0}):
        with pytest.raises(st.TaskError, match="must be"):
            st.solve(model, "t", batches(CLASSES), progress=False, **how)
    model = model_with("classes", side="mlp")
    model["t"].head.requires_grad_(False)
    with pytest.raises(st.TaskError, match="last layer of task 't' is frozen"):
        st.solve(model, "t", batches(CLASSES), progress=False)


def test_sums_are_not_rounded_under_autocast() -> None:
    found = []
    for low in (False, True):
        sums = Sums.zeros(16, 3, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            sums.add(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), torch.ones(50, 3), exact=False)
        found.append(sums.xx)
    assert torch.equal(*found)


def test_what_is_ignored_does_not_count() -> None:
    models = [model_with("classes") for _ in range(2)]
    ignored = CLASSES.clone()
    ignored[::3] = -100
    st.solve(models[0], "t", batches(ignored), progress=False)
    rows = torch.arange(400)[ignored[:400] != -100]
    st.solve(models[1], "t", [(X[rows], CLASSES[rows])], progress=False)
    torch.testing.assert_close(models[0](X, "t"), models[1](X, "t"))
    numbers = TARGETS["numbers"].clone()
    numbers[5, 1] = float("nan")
    with pytest.raises(st.DataError, match="ignored in part"):
        st.solve(model_with("numbers"), "t", batches(numbers), progress=False)


def test_tokens_are_solved() -> None:
    model = model_with("tokens", nn.Linear(16, 5), sequence_base())
    x: Any = inputs("sequence", 40)
    target = x["input_ids"] % 5
    target[:, 3] = -100
    assert st.solve(model, "t", [{**x, "labels": target}], progress=False).rows == 40 * 5
    assert st.evaluate(model, "t", [{**x, "labels": target}])["accuracy"] > 0.5


@pytest.mark.parametrize("kind", BASES)
def test_fit_goes_on_where_it_ended(kind: str) -> None:
    """A gate at 0: the side learns on top of the solved head without hurting it."""
    model = model_with(None, 3, BASES[kind](), side="mlp", init="zero")
    x, y = inputs(kind, 40), torch.arange(40) % 3
    loader: Any = [{**x, "labels": y}] if not isinstance(x, Tensor) else [(x, y)]
    st.solve(model, "t", loader, progress=False)
    solved = st.evaluate(model, "t", loader)["loss"]
    result = st.fit(model, "t", loader, steps=20, lr=3e-3, progress=False)
    assert result.losses[0] == pytest.approx(solved, rel=1e-5) and result.losses[-1] < solved


def test_other_tasks_do_not_move_and_threads_are_served(tmp_path: Path) -> None:
    model = model_with(None)
    st.solve(model, "t", batches(CLASSES), progress=False)
    expected, wrong = model(X, "t").detach(), []
    model.add_task("other", side="mlp", head=3)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            wrong.append(not torch.equal(model(X, "t"), expected))
            model(X[:7], "other")

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(5):
        st.solve(model, "other", batches(CLASSES), progress=False)
    stop.set()
    thread.join()
    assert wrong and not any(wrong)
    model.save_task("t", tmp_path)
    loaded = st.SideTuner(mlp_base())
    loaded.load_task(tmp_path)
    assert torch.equal(loaded(X, "t"), expected)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)

    def forward(self, code: Tensor) -> Tensor:
        return 2 * self.linear(code)


@pytest.mark.parametrize(
    ("head", "error", "sentence"),
    [
        (nn.LayerNorm(16), st.TaskError, "ends in no linear layer with a bias"),
        (nn.Linear(16, 3, bias=False), st.TaskError, "ends in no linear layer with a bias"),
        (Scaled(), st.TaskError, "does not end in its last linear layer"),
        (nn.Sequential(nn.Linear(16, 3), nn.ReLU()), st.TaskError, "does not end in its last linear layer"),
    ],
)
def test_heads_that_end_otherwise_are_refused(head: nn.Module, error: Any, sentence: str) -> None:
    model = model_with(None, head)
    before = {key: value.clone() for key, value in model["t"].state_dict().items()}
    with pytest.raises(error, match=sentence):
        st.solve(model, "t", batches(CLASSES), progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model["t"].state_dict().items())


def test_mistakes_are_sentences_and_change_nothing() -> None:
    model = model_with(None)
    before = model(X, "t").detach()
    nothing: Any = []
    broken = X.clone()
    broken[3, 3] = float("nan")
    mistakes: list[tuple[Any, type[Exception], str]] = [
        (nothing, st.DataError, "gave no rows that count"),
        ([(X, torch.full((600,), -100))], st.DataError, "gave no rows that count"),
        ([(broken, CLASSES)], st.TrainingError, "not finite"),
        (TensorDataset(X, CLASSES), st.DataError, "is a data set"),
        ([(X, CLASSES + 1)], st.DataError, "label 3 is out of range"),
    ]
    for loader, error, sentence in mistakes:
        with pytest.raises(error, match=sentence):
            st.solve(model, "t", loader, progress=False)
    for strength in (0.0, -1.0, float("nan")):
        with pytest.raises(st.TaskError, match="strength must be a positive number"):
            st.solve(model, "t", batches(CLASSES), strength=strength, progress=False)
    spans, texts = model_with(None, "span", sequence_base()), inputs("sequence", 4)
    assert isinstance(texts, dict)
    with pytest.raises(st.DataError, match="'span' is not solved in closed form"):
        st.solve(spans, "t", [{**texts, "labels": torch.zeros(4, 2).long()}], progress=False)
    model.freeze_task("t")
    with pytest.raises(st.TaskError, match="frozen"):
        st.solve(model, "t", batches(CLASSES), progress=False)
    assert torch.equal(model(X, "t"), before)


def test_one_row_and_equal_rows_are_learned() -> None:
    for rows in (1, 2, 50):
        model = model_with("classes")
        st.solve(model, "t", [(X[:1].expand(rows, -1), torch.ones(rows).long())], progress=False)
        output = model(X[:5], "t")
        assert bool(output.isfinite().all()) and output.argmax(1).tolist() == [1] * 5


def test_a_linear_layer_within_a_head_is_solved_too() -> None:
    head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    model = model_with("classes", head)
    weights = {key: value.clone() for key, value in head[0].state_dict().items()}
    st.solve(model, "t", batches(CLASSES), progress=False)
    assert all(torch.equal(value, weights[key]) for key, value in head[0].state_dict().items())
    assert float((model(X[400:], "t").argmax(1) == CLASSES[400:]).float().mean()) > 0.6
    assert F.cross_entropy(model(X[400:], "t"), CLASSES[400:]) < 0.9


def test_a_task_that_was_fitted_keeps_its_units() -> None:
    model = model_with("numbers")
    st.fit(model, "t", batches(TARGETS["numbers"]), steps=1, progress=False)
    units = model["t"].units
    assert units is not None
    st.solve(model, "t", batches(TARGETS["numbers"]), progress=False)
    assert model["t"].units is units
    other = model_with("numbers")
    st.solve(other, "t", batches(TARGETS["numbers"]), progress=False)
    torch.testing.assert_close(model(X, "t"), other(X, "t"), rtol=1e-3, atol=0.5)


@pytest.mark.parametrize("targets", [TARGETS["numbers"], TARGETS["numbers"] * 1e-3 + 0.97])
def test_fit_goes_on_from_solved_numbers_in_their_units(targets: Tensor) -> None:
    """Units that `fit` measured after the layer was solved would have moved all answers."""
    model = model_with("numbers", side="mlp", merge="alpha", init="zero")
    st.solve(model, "t", batches(targets), progress=False)
    assert model["t"].units is not None
    before = model(X, "t").detach()
    solved = st.evaluate(model, "t", batches(targets, 400))["loss"]
    result = st.fit(model, "t", batches(targets, 400), steps=1, lr=1e-9, progress=False)
    assert result.losses[0] == pytest.approx(solved, rel=1e-4)
    torch.testing.assert_close(model(X, "t"), before, rtol=1e-4, atol=1e-4)


def test_few_rows_give_no_certainty() -> None:
    """With more features than rows all of them are told apart; nobody knows more than so many rows can tell."""
    for problem in ("classes", "labels"):
        model = model_with(problem)
        st.solve(model, "t", [(X[:6], TARGETS[problem][:6])], progress=False)
        output = model(X[6:], "t").detach()
        said = output.softmax(1) if problem == "classes" else output.sigmoid()
        assert bool(output.isfinite().all()) and float(output.abs().max()) < 100 and float(said.mean()) < 0.99


def test_parts_keep_their_mode() -> None:
    model = model_with("numbers")
    model["t"].training = True
    st.solve(model, "t", batches(TARGETS["numbers"]), progress=False)
    assert model["t"].training and not model["t"].head.training


def test_half_precision_with_many_features_is_solved_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidetuning.sums.EXACT", 4)
    x = torch.randn(200, 12).bfloat16()
    sums = Sums.zeros(12, 1, torch.device("cpu"))
    sums.add(x, torch.ones(200, 1), exact=False)
    torch.testing.assert_close(sums.xx, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
