"""What a target means decides its loss, what counts, its metrics and how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from conftest import conv_base, inputs, map_base, mlp_base, sequence_base
from sidetuning.callbacks import LOWER
from sidetuning.problems import PROBLEMS

NAN = float("nan")


def model_with(problem: str | None, head: Any = 3, base: st.Base | None = None, **options: Any) -> st.SideTuner:
    model = st.SideTuner(base or mlp_base())
    model.add_task("t", side="mlp", head=head, problem=problem, seed=0, **options)
    return model


def ask(call: Any, model: st.SideTuner, batches: Any) -> None:
    """Fit or evaluate."""
    call(model, "t", batches, **({"steps": 1, "progress": False} if call is st.fit else {}))


X: Any = inputs("mlp", 12)
CLASSES = torch.arange(12) % 3


@pytest.mark.parametrize(
    ("problem", "head", "targets"),
    [
        ("classes", 3, CLASSES),
        ("classes", 3, CLASSES.int()),
        ("classes", 3, CLASSES.to(torch.uint8)),
        ("classes", 3, CLASSES[:, None]),
        ("classes", 3, F.one_hot(CLASSES, 3).float()),
        ("labels", 3, F.one_hot(CLASSES, 3)),
        ("labels", 3, F.one_hot(CLASSES, 3).bool()),
        ("labels", 1, CLASSES % 2),
        ("labels", 2, torch.where(torch.rand(12, 2) < 0.2, NAN, (torch.rand(12, 2) < 0.5).float())),
        ("numbers", 1, torch.arange(20, 32)),
        ("numbers", 1, torch.arange(12.0) * 7),
        ("numbers", 2, torch.stack([torch.arange(12.0), torch.full((12,), NAN)], 1)),
    ],
)
def test_every_form_of_targets_is_learned(problem: str, head: int, targets: Tensor) -> None:
    model = model_with(problem, head)
    loader = [(X, targets)]
    before = st.evaluate(model, "t", loader)
    st.fit(model, "t", loader, steps=60, lr=2e-2, progress=False)
    after = st.evaluate(model, "t", loader)
    assert after["loss"] < 0.5 * before["loss"] and after["samples"] == 12
    assert after.keys() - {"loss", "samples"} == {"mae" if problem == "numbers" else "accuracy"}


@pytest.mark.parametrize(
    ("problem", "head", "targets", "sentence"),
    [
        ("classes", 3, CLASSES.float(), "class numbers must be integers.*'numbers'"),
        ("classes", 3, F.one_hot(CLASSES, 3), r"argmax\(1\), or problem='labels'"),
        ("classes", 3, CLASSES + 1, "label 3 is out of range"),
        ("classes", 3, CLASSES[:5], "do not belong together"),
        ("classes", 3, torch.zeros(12, 2, dtype=torch.long), r"takes targets \(12,\), not \(12, 2\)"),
        ("labels", 3, CLASSES, "for each label"),
        ("labels", 3, torch.randint(0, 5, (12, 3)) + 2, "between 0 and 1"),
        ("numbers", 2, torch.zeros(12), r"takes as many numbers, not \(12,\)"),
        ("span", 2, CLASSES, "spans have outputs"),
        ("tokens", 3, CLASSES, "tokens have outputs"),
    ],
)
def test_targets_of_another_form_are_a_sentence(problem: str, head: int, targets: Tensor, sentence: str) -> None:
    model = model_with(problem, head)
    for call in (st.fit, st.evaluate):
        with pytest.raises(st.DataError, match=sentence):
            ask(call, model, [(X, targets)])


def test_averages_run_over_what_counts_whatever_the_batches_are() -> None:
    model = model_with("classes")
    targets = model(X, "t").argmax(1)
    targets[[0, 1, 2, 3, 7]] = -100
    numbers = model_with("numbers")
    wanted = numbers(X, "t").detach() + torch.arange(12.0)[:, None]
    wanted[:3] = NAN
    for batch in (12, 5, 1):
        found = st.evaluate(model, "t", DataLoader(TensorDataset(X, targets), batch_size=batch))
        assert found["accuracy"] == 1.0 and found["loss"] == pytest.approx(
            F.cross_entropy(model(X, "t"), targets).item()
        )
        found = st.evaluate(numbers, "t", DataLoader(TensorDataset(X, wanted), batch_size=batch))
        assert found["mae"] == pytest.approx(7.0, rel=1e-5) and found["loss"] == pytest.approx(55.6667, rel=1e-4)
    nothing = torch.full((12,), -100)
    before = {k: v.clone() for k, v in model["t"].state_dict().items()}
    st.fit(model, "t", [(X, nothing)], steps=2, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model["t"].state_dict().items())


@pytest.mark.parametrize("tokens", [1, 3, 5, 6])
@pytest.mark.parametrize("last", [True, False])
def test_tokens_have_their_classes_last(tokens: int, last: bool) -> None:
    class PerToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 5)

        def forward(self, code: Tensor) -> Tensor:
            out: Tensor = self.linear(code)
            return out if last else out.transpose(1, 2)

    model = model_with("tokens" if last else "classes", PerToken(), sequence_base())
    x = {"input_ids": torch.randint(0, 50, (4, tokens)), "attention_mask": torch.ones(4, tokens, dtype=torch.long)}
    targets = model(x, "t").argmax(2 if last else 1)
    targets[0, 0] = -100
    assert st.evaluate(model, "t", [{**x, "labels": targets}])["accuracy"] == 1.0
    st.fit(model, "t", [{**x, "labels": targets}], steps=1, progress=False)


def test_tokens_with_their_classes_first_are_refused() -> None:
    output, target = torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(st.DataError, match="take problem='classes'"):
        PROBLEMS["tokens"]().prepare(output, target)


def test_spans_and_pixels() -> None:
    model = model_with(None, "span", sequence_base())
    x = inputs("sequence")
    assert isinstance(x, dict)
    targets = model(x, "t").argmax(1)
    targets[1, 0] = -100
    assert st.evaluate(model, "t", [{**x, "labels": targets}])["exact"] == 1.0
    images = model_with("pixels", "pixels", map_base())
    depth = images(inputs("map"), "t").detach() + 2
    depth[:, :, :7] = NAN
    for given in (depth, depth[:, 0]):
        assert st.evaluate(images, "t", [(inputs("map"), given)])["mae"] == pytest.approx(2.0, rel=1e-4)


def test_metrics_of_every_kind_are_averaged_right() -> None:
    model = model_with("classes")
    targets = model(X, "t").argmax(1)
    mean = lambda output, target: (output.argmax(1) == target).float().mean()  # noqa: E731
    metrics = {"mean": mean, "number": lambda *given: float(mean(*given)), "each": st.accuracy}
    for batch in (12, 5):
        found = st.evaluate(model, "t", DataLoader(TensorDataset(X, targets), batch_size=batch), metrics=metrics)
        assert [found[name] for name in metrics] == [1.0, 1.0, 1.0]
    numbers, wanted = model_with("numbers"), torch.rand(12, 3)
    expected = (numbers(X, "t") - wanted).abs().mean().item()
    for each in (lambda o, y: (o - y).abs(), lambda o, y: (o - y).abs().mean(1), lambda o, y: (o - y).abs().mean()):
        assert st.evaluate(numbers, "t", [(X, wanted)], metrics={"mae": each})["mae"] == pytest.approx(expected)
    plain = model_with(None)
    for each in (lambda o, y: (o - y).abs(), lambda o, y: (o - y).abs().mean(1)):
        found = st.evaluate(plain, "t", [(X, wanted)], loss=F.mse_loss, metrics={"mae": each})
        assert found["mae"] == pytest.approx((plain(X, "t") - wanted).abs().mean().item())
    with pytest.raises(st.DataError, match="return one number for each"):
        st.evaluate(numbers, "t", [(X, wanted)], metrics={"odd": lambda o, y: torch.ones(5)})


class Running:
    """As the metrics of torchmetrics are used."""

    def __init__(self) -> None:
        self.right, self.total = 0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.right += int((output.argmax(1) == target).sum())
        self.total += len(target)

    def compute(self) -> float:
        return self.right / self.total

    def reset(self) -> None:
        self.right, self.total = 0, 0


def of_torchmetrics() -> Any:
    return pytest.importorskip("torchmetrics").classification.MulticlassAccuracy(3, average="micro")


@pytest.mark.parametrize("made", [Running, of_torchmetrics])
def test_metrics_that_keep_a_state_are_updated_and_reset(made: Callable[[], Any]) -> None:
    model, running = model_with("classes"), made()
    loader = DataLoader(TensorDataset(X, CLASSES), batch_size=5)
    expected = st.evaluate(model, "t", loader)["accuracy"]
    for _ in range(2):
        found = st.evaluate(model, "t", loader, metrics={"running": running})["running"]
        assert found == pytest.approx(expected, abs=1e-7)
    assert not getattr(running, "total", 0) and not getattr(running, "update_count", 0)
    # Its owner used it, too.
    running.update(torch.eye(3), torch.tensor([1, 2, 0]))
    found = st.evaluate(model, "t", loader, metrics={"running": running})["running"]
    assert found == pytest.approx(expected, abs=1e-7)


def test_metrics_that_keep_a_state_get_the_rows_that_count_and_compute_one_number() -> None:
    model, targets = model_with("classes"), model_with("classes")(X, "t").argmax(1)
    targets[:6] = -100
    found = st.evaluate(model, "t", [(X, targets), (X[:2], targets[:2])], metrics={"running": Running()})
    assert found["running"] == 1
    running = Running()
    running.compute = lambda: torch.tensor(0.5)  # type: ignore[method-assign, assignment, return-value]
    assert st.evaluate(model, "t", [(X, targets)], metrics={"running": running})["running"] == 0.5
    running.compute = lambda: torch.tensor([1.0, 2.0])  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(st.DataError, match=r"'running' computes tensor.*; give one that computes a single number"):
        st.evaluate(model, "t", [(X, targets)], metrics={"running": running})


def test_pixels_that_a_loss_ignores_weigh_nothing() -> None:
    model = model_with(None, nn.Conv2d(16, 3, 1), map_base())
    x = inputs("conv", 2)
    targets = model(x, "t").argmax(1)
    targets[0] = 255
    targets[0, 0, 0] = (model(x, "t").argmax(1)[0, 0, 0] + 1) % 3
    found = st.evaluate(model, "t", [(x, targets)], loss=nn.CrossEntropyLoss(ignore_index=255))
    assert found["accuracy"] == pytest.approx(64 / 65)


def test_every_score_is_known_as_one_of_which_less_or_more_is_better() -> None:
    names = {name for problem in PROBLEMS.names() for name in PROBLEMS[problem]().metrics()}
    assert names - set(LOWER) == {"accuracy", "exact"} and {"mae", "perplexity"} <= names


class Half(nn.Module):
    """Numbers that half precision rounds by 8."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 1)
        nn.init.constant_(self.linear.bias, 2048.0)

    def forward(self, code: Tensor) -> Tensor:
        return self.linear(code)


def test_targets_are_not_rounded_to_half_precision() -> None:
    model, targets = model_with("numbers", Half()), torch.full((12, 1), 2051.0)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16")
    result = st.fit(model, "t", [(X, targets)], steps=1, lr=0.0, accelerator=accelerator, progress=False)
    assert result.losses[0] == pytest.approx(9, abs=3)
    # An accelerator of somebody else says nothing of this one.
    model = model_with("numbers", Half())
    plain = st.fit(model, "t", [(X, targets)], steps=1, lr=0.0, progress=False).losses[0]
    AcceleratorState._reset_state()
    assert st.fit(model, "t", [(X, targets)], steps=1, lr=0.0, progress=False).losses[0] == plain
    model.bfloat16()
    assert st.evaluate(model, "t", [(X.bfloat16(), targets)])["loss"] == pytest.approx(9, abs=3)


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(3, 8))

    def forward(self, code: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(code @ self.points.T, target)


def test_a_loss_of_ones_own_replaces_the_problems_and_learns() -> None:
    model, loss = model_with(None, 8), Prototypes()
    before = loss.points.detach().clone()
    result = st.fit(model, "t", [(X, CLASSES)], steps=30, lr=0.05, loss=loss, progress=False)
    assert not torch.equal(before, loss.points) and result.losses[-1] < 0.5 * result.losses[0]
    one = model_with(None, 1)
    bce = lambda o, y: F.binary_cross_entropy_with_logits(o.squeeze(1), y.float())  # noqa: E731
    st.fit(one, "t", [(X, CLASSES % 2)], steps=1, loss=bce, progress=False)
    st.fit(
        one,
        "t",
        [(X, CLASSES * 7 + 20)],
        steps=1,
        loss=lambda o, y: F.mse_loss(o.squeeze(1), y.float()),
        progress=False,
    )
    checked = model_with("labels", 3)
    with pytest.raises(st.DataError, match="for each label"):
        st.fit(checked, "t", [(X, CLASSES)], loss=bce, progress=False)


@pytest.mark.parametrize(
    ("loss", "problem", "shown"),
    [
        (F.binary_cross_entropy_with_logits, "labels", torch.sigmoid),
        (nn.BCEWithLogitsLoss(), "labels", torch.sigmoid),
        (partial(F.mse_loss), "numbers", lambda output: output),
        (nn.SmoothL1Loss(), "numbers", lambda output: output),
        (lambda o, y: F.mse_loss(o.sigmoid(), y), "own", lambda output: output),
    ],
)
def test_a_loss_of_ones_own_says_how_answers_are_shown(loss: Any, problem: str, shown: Any, tmp_path: Path) -> None:
    model = model_with(None, labels=["cat", "indoor", "night"])
    st.fit(model, "t", [(X, torch.ones(12, 3))], steps=20, lr=1e-2, loss=loss, progress=False)
    model.save_task("t", tmp_path)
    loaded = st.SideTuner(mlp_base())
    loaded.load_task(tmp_path)
    for branch in (model["t"], loaded["t"]):
        assert isinstance(branch.problem, PROBLEMS[problem]) and branch.own_problem is None  # type: ignore[arg-type]
        output = model(X, "t")[0]
        answers = dict(branch.problem.answers(output, branch.labels))
        assert [answers[name] for name in ("cat", "indoor", "night")] == pytest.approx(shown(output).tolist())
    if problem == "own":
        for call in (st.evaluate, st.fit):
            with pytest.raises(st.DataError, match="give it again, loss="):
                ask(call, loaded, [(X, torch.ones(12, 3))])
    st.evaluate(loaded, "t", [(X, torch.ones(12, 3))], loss=loss)
    st.fit(loaded, "t", [(X, CLASSES)], steps=1, loss=F.cross_entropy, progress=False)
    assert isinstance(loaded["t"].problem, PROBLEMS["classes"])  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [4, 5, 6])
def test_accuracy_never_takes_tokens_for_classes(tokens: int) -> None:
    """Outputs (b, t, classes): which are classes cannot be told where there are as many tokens."""
    loss = lambda output, target: F.cross_entropy(output.transpose(1, 2), target)  # noqa: E731
    x = {"input_ids": torch.randint(1, 19, (3, tokens)), "attention_mask": torch.ones(3, tokens).long()}
    for problem in (None, "tokens"):
        model = model_with(problem, nn.Linear(16, 5), sequence_base())
        found = st.evaluate(model, "t", [(x, right := model(x, "t").argmax(-1))], loss=loss)
        assert found.get("accuracy") == (1.0 if problem else None)
    with pytest.raises(st.DataError, match=r"takes outputs \(b, classes, …\).*problem='tokens'"):
        st.evaluate(
            model_with(None, nn.Linear(16, 5), sequence_base()),
            "t",
            [(x, right)],
            loss=loss,
            metrics={"accuracy": st.accuracy},
        )


@pytest.mark.parametrize(
    ("loss", "targets", "sentence"),
    [
        (
            F.binary_cross_entropy_with_logits,
            F.one_hot(CLASSES, 3),
            r"the loss does not take an output \(12, 3\).*int64",
        ),
        (nn.CrossEntropyLoss(reduction="none"), CLASSES, "reduction='mean'"),
        (F.mse_loss, torch.zeros(12, 4), r"compares an output \(12, 3\) with a target \(12, 4\)"),
        (nn.L1Loss(), torch.zeros(12), r"with a target \(12,\); they differ"),
        (nn.CrossEntropyLoss(), CLASSES + 3, "label 5 is out of range"),
        (nn.CrossEntropyLoss(ignore_index=9), CLASSES + 3, "label 5 is out of range"),
    ],
)
def test_what_a_loss_does_not_take_is_a_sentence(loss: Any, targets: Tensor, sentence: str) -> None:
    with pytest.raises(st.DataError, match=sentence):
        st.fit(model_with(None), "t", [(X, targets)], loss=loss, progress=False)


@pytest.mark.parametrize("loss", [nn.PoissonNLLLoss(), F.soft_margin_loss, nn.KLDivLoss(reduction="mean")])
def test_no_loss_of_torch_spreads_a_column_over_a_row(loss: Any) -> None:
    with pytest.raises(st.DataError, match=r"an output \(12, 1\) with a target \(12,\); they differ"):
        st.evaluate(model_with(None, 1), "t", [(X, torch.ones(12))], loss=loss)


def test_ignored_classes_of_a_loss_are_its_own() -> None:
    model, targets = model_with(None), CLASSES.clone()
    targets[:4] = 255
    loss = nn.CrossEntropyLoss(ignore_index=255)
    found = st.evaluate(model, "t", DataLoader(TensorDataset(X, targets), batch_size=5), loss=loss)
    assert found["loss"] == pytest.approx(loss(model(X, "t"), targets).item())


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        (TensorDataset(X, CLASSES), "is a data set, and batches are wanted"),
        ([(X, CLASSES, CLASSES * 0)], "features given"),
        ([(X,)], "a batch is .*not a tuple of 1"),
        ([X], "a batch is"),
        ([(["a", "b"], CLASSES)], "inputs of a batch are a list of 2, not a tensor"),
        ([(X, None)], "targets of a batch are a NoneType"),
    ],
)
def test_what_is_no_batch_is_a_sentence(batches: Any, sentence: str) -> None:
    for call in (st.fit, st.evaluate):
        with pytest.raises(st.SideTuningError, match=sentence):
            ask(call, model_with(None), batches)


def test_numpy_and_double_precision_are_taken() -> None:
    model = model_with(None)
    for x in (X.numpy(), X.double(), X.double().numpy()):
        st.fit(model, "t", [(x, CLASSES.numpy())], steps=1, progress=False)
        st.evaluate(model, "t", [(x, CLASSES.numpy())])


def test_the_problem_is_saved_and_unknown_ones_come_with_near_names(tmp_path: Path) -> None:
    model = model_with("numbers", 2)
    model.save_task("t", tmp_path)
    again = st.load(tmp_path, base=mlp_base())
    assert again["t"].config.problem == "numbers"
    with pytest.raises(st.DataError, match="takes as many numbers"):
        st.fit(again, "t", [(X, CLASSES)], progress=False)
    with pytest.raises(st.UnknownNameError, match=r"problem 'numbrs'.*'numbers'"):
        model_with("numbrs")


def test_an_optimizers_own_weight_decay_is_kept_and_merges_have_none() -> None:
    seen: list[float] = []

    def adamw(groups: Any, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.5)
        seen.extend(group["weight_decay"] for group in optimizer.param_groups)
        return optimizer

    model = model_with(None)
    st.fit(model, "t", [(X, CLASSES)], steps=1, optimizer=adamw, progress=False)
    st.fit(model, "t", [(X, CLASSES)], steps=1, optimizer=adamw, weight_decay=0.1, progress=False)
    assert seen == [0.5, 0.0, 0.1, 0.0]


def test_a_plateau_follows_the_validation() -> None:
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1)
    with pytest.raises(st.TaskError, match="give validate="):
        st.fit(model_with(None), "t", [(X, CLASSES)], scheduler=plateau, progress=False)
    held: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        held.append(plateau(optimizer))
        return held[0]

    options: dict[str, Any] = {"epochs": 12, "lr": 0.5, "validate": [(X, CLASSES.flip(0))], "progress": False}
    st.fit(model_with(None), "t", [(X, CLASSES)], scheduler=schedule, **options)
    assert held[0].get_last_lr()[0] < 0.5


def test_fitting_again_draws_other_orders_and_a_seed_repeats_the_script() -> None:
    def script() -> tuple[list[Any], dict[str, Tensor]]:
        orders: list[Any] = []

        class Data(TensorDataset):
            def __getitem__(self, i: int) -> Any:
                orders.append(i)
                return super().__getitem__(i)

        model = st.SideTuner(mlp_base())
        model.add_task("t", side="mlp", head=3, seed=5)
        for _ in range(3):
            loader = DataLoader(Data(X, CLASSES), batch_size=4, shuffle=True)
            st.fit(model, "t", loader, epochs=1, progress=False)
        return [tuple(orders[i : i + 12]) for i in range(0, 36, 12)], model["t"].state_dict()

    first, weights = script()
    torch.rand(7)
    second, again = script()
    assert len(set(first)) == 3 and first == second and all(torch.equal(v, again[k]) for k, v in weights.items())


def test_conv_base_reads_uint8() -> None:
    model = st.SideTuner(conv_base())
    model.add_task("t", side="fcn4", head=2, problem="labels")
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    st.fit(model, "t", [{"x": x, "labels": torch.ones(4, 2)}], steps=1, progress=False)


def test_a_batch_of_one_weighs_as_one_sample() -> None:
    model, wanted = model_with("numbers", 5), torch.rand(7, 5)
    expected = (model(X[:7], "t") - wanted).abs().sum(1).mean().item()
    for batch in (7, 3, 2):
        loader = DataLoader(TensorDataset(X[:7], wanted), batch_size=batch)
        found = st.evaluate(model, "t", loader, metrics={"sum": lambda o, y: (o - y).abs().sum(1)})
        assert found["sum"] == pytest.approx(expected)


def test_classes_without_weight_and_ignored_ones_of_a_partial_loss_weigh_nothing() -> None:
    model = model_with(None, 2)
    targets = torch.tensor([0, 0, 1, 1])
    for loss, ignored in (
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0])), targets),
        (partial(F.cross_entropy, ignore_index=1), targets),
        (partial(F.cross_entropy, ignore_index=-1), torch.tensor([0, 0, -1, -1])),
    ):
        whole = loss(model(X[:4], "t"), ignored).item()
        for batch in (4, 2, 1):
            loader = DataLoader(TensorDataset(X[:4], ignored), batch_size=batch)
            assert st.evaluate(model, "t", loader, loss=loss)["loss"] == pytest.approx(whole)


@pytest.mark.parametrize("metrics", [["accuracy"], {"loss": st.accuracy}, {"samples": st.accuracy}])
def test_metrics_without_a_name_of_their_own_are_refused(metrics: Any) -> None:
    with pytest.raises(st.DataError, match="metrics are given by name"):
        st.evaluate(model_with(None), "t", [(X, CLASSES)], metrics=metrics)


def test_a_loss_that_sums_is_refused() -> None:
    for loss in (nn.CrossEntropyLoss(reduction="sum"), partial(F.cross_entropy, reduction="sum")):
        with pytest.raises(st.DataError, match="reduction='mean'"):
            st.fit(model_with(None), "t", [(X, CLASSES)], loss=loss, progress=False)
