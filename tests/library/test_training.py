"""Training: it learns, it repeats bitwise, it resumes bitwise, and it changes nothing but its task."""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import sidetuning as st
from conftest import conv_base, inputs, mlp_base, network
from sidetuning.callbacks import Best
from sidetuning.distillation import _Imitation
from sidetuning.objective import parameter_groups
from sidetuning.seeding import seed_loader

State = dict[str, Tensor]


def toy(n: int = 256, seed: int = 0) -> TensorDataset:
    """Vectors of three far-apart clouds."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.eye(12)[:3] * 3
    return TensorDataset(centres[y] + torch.randn(n, 12, generator=generator) * 0.5, y)


def loader(batch: int = 32, n: int = 256) -> DataLoader[Any]:
    return DataLoader(toy(n), batch_size=batch, shuffle=True)


def build(dropout: bool = False, merge: str = "alpha") -> st.SideTuner:
    model = st.SideTuner(mlp_base())
    with st.seeded(0):
        side = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 16)) if dropout else "mlp"
        model.add_task("t", side=side, merge=merge, head=3)
    return model


def state(module: nn.Module) -> State:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("merge", ["alpha", "mlp2", "film", "side-only", "base-only"])
def test_a_task_that_can_be_learned_is(merge: str) -> None:
    model = build(merge=merge)
    test = DataLoader(toy(90, seed=1), batch_size=32)
    result = st.fit(model, "t", loader(), epochs=8, lr=1e-2, progress=False)
    assert st.evaluate(model, "t", test)["accuracy"] > 0.9
    assert result.steps == len(result.losses) == 64
    assert sum(result.losses[-8:]) < 0.6 * sum(result.losses[:8])


def test_the_seed_decides_everything_and_nothing_else_does() -> None:
    ends = []
    for seed, outside in ((0, 1), (0, 2), (1, 1)):
        model = build(dropout=True)
        torch.manual_seed(outside)
        random.seed(outside)
        st.fit(model, "t", loader(), epochs=2, seed=seed, progress=False)
        ends.append(state(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


class Stop(Exception):
    """What stands for a kill."""


class StopAfter(st.Callback):
    """Kills a run in the step after some."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step(self, step: int, loss: float) -> None:
        if step == self.steps + 1:
            raise Stop


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)


@pytest.mark.parametrize("after", [1, 7, 8, 9, 19])  # a pass has 8 steps
@pytest.mark.parametrize("merge", ["alpha", "mlp2"])
def test_an_interrupted_run_ends_bitwise_as_one_that_was_not(after: int, merge: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "lr": 1e-2, "scheduler": decay, "weight_decay": 0.1, "save_every": 0.0}
    options["progress"] = False
    whole = build(dropout=True, merge=merge)
    expected = st.fit(whole, "t", loader(), **options)
    file = tmp_path / "resume.pt"
    with pytest.raises(Stop):
        st.fit(build(dropout=True, merge=merge), "t", loader(), resume=file, callbacks=[StopAfter(after)], **options)
    model = build(dropout=True, merge=merge)
    result = st.fit(model, "t", loader(), resume=file, **options)
    assert same(state(model), state(whole))
    assert result.losses == expected.losses and result.steps == 20
    calls = [StopAfter(0)]  # nothing is left to do
    again = build(dropout=True, merge=merge)
    assert st.fit(again, "t", loader(), resume=file, callbacks=calls, **options).losses == expected.losses
    assert same(state(again), state(whole))


def test_a_run_resumes_over_cached_random_views(tmp_path: Path) -> None:
    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.randn(x.shape, generator=generator)

    ends = []
    for stop in (None, 11):
        model = build(dropout=True)  # data and objective draw from one generator, in turn
        cached = st.cache_features(model.base, toy(), tmp_path, views=3, augment=augment, progress=False)
        options: dict[str, Any] = {"steps": 20, "save_every": 0.0, "progress": False}
        if stop:
            loader = st.loader_over(cached, batch_size=32)
            with pytest.raises(Stop):
                st.fit(model, "t", loader, resume=tmp_path / "r", callbacks=[StopAfter(stop)], **options)
            model = build(dropout=True)
        resume = tmp_path / "r" if stop else None
        st.fit(model, "t", st.loader_over(cached, batch_size=32), resume=resume, **options)
        ends.append(state(model))
    assert same(*ends)


def test_python_and_numpy_draws_go_on_in_the_middle_of_a_pass(tmp_path: Path) -> None:
    """A loss that draws from all three generators, as augmentations do."""

    def noisy() -> Any:
        noise = lambda: 1 + random.random() + np.random.rand() + torch.rand(())  # noqa: E731
        return lambda output, target: F.cross_entropy(output, target) * noise()

    options: dict[str, Any] = {"steps": 20, "save_every": 0.0, "progress": False}
    whole = build()
    st.fit(whole, "t", loader(), loss=noisy(), **options)
    with pytest.raises(Stop):
        st.fit(build(), "t", loader(), loss=noisy(), resume=tmp_path / "r", callbacks=[StopAfter(11)], **options)
    model = build()
    st.fit(model, "t", loader(), loss=noisy(), resume=tmp_path / "r", **options)
    assert same(state(model), state(whole))


def edited(line: str) -> Any:
    """A loss as somebody writes it, and changes a number in it."""
    space: dict[str, Any] = {"F": F}
    exec(f"def loss(o, t): return {line}", space)
    return space["loss"]


def decayed(decays: list[float], parameters: Any, lr: float, **options: Any) -> torch.optim.Optimizer:
    every = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
    groups = [{"params": every[k::2], "weight_decay": decay} for k, decay in enumerate(decays)]
    return torch.optim.SGD(groups, lr=lr)


WHATS = ["batches", "data", "schedule", "clip", "loss", "smoothing", "weights", "momentum", "precision", "kept", "best"]
WHATS += ["code", "decay"]


@pytest.mark.parametrize("what", WHATS)
def test_a_run_with_other_batches_data_schedule_clip_or_loss_is_not_gone_on_with(what: str, tmp_path: Path) -> None:
    def schedule(gamma: float) -> Any:
        return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma)

    first: dict[str, Any] = {"steps": 20, "scheduler": schedule(0.5), "save_every": 0.0, "progress": False}
    then = dict(first)
    if what == "schedule":
        then["scheduler"] = schedule(0.9)
    elif what == "clip":
        then["clip"] = None
    elif what == "loss":
        then["loss"] = F.multi_margin_loss
    elif what == "momentum":
        first["optimizer"], then["optimizer"] = (partial(torch.optim.SGD, momentum=m) for m in (0.9, 0.5))
    elif what == "code":
        first["loss"], then["loss"] = (edited(f"F.cross_entropy(o, t, label_smoothing={k})") for k in (0.1, 0.2))
    elif what == "decay":
        first["optimizer"], then["optimizer"] = (partial(decayed, decays) for decays in ([0.1, 0.0], [0.1, 0.1]))
    elif what == "precision":
        then["precision"] = "bf16"
    elif what in ("kept", "best"):
        first["validate"] = then["validate"] = loader()
        first["keep_best"], then["keep_best"] = what == "best", True
        then["monitor"] = "accuracy"
    elif what in ("smoothing", "weights"):
        given: list[dict[str, Any]] = [{"label_smoothing": 0.1}, {"label_smoothing": 0.2}]
        if what == "weights":
            given = [{"weight": torch.tensor([1.0, 2, i])} for i in (3, 4)]
        first["loss"], then["loss"] = (partial(F.cross_entropy, **options) for options in given)
    st.fit(build(), "t", loader(), resume=tmp_path / "r", **first)
    model = build()
    before = state(model)
    batches = loader(16) if what == "batches" else loader(n=240) if what == "data" else loader()
    with pytest.raises(st.TrainingError, match=r"give another resume file, or delete this one"):
        st.fit(model, "t", batches, resume=tmp_path / "r", **then)
    assert same(state(model), before)
    st.fit(model, "t", loader(), resume=tmp_path / "r", **first)


@pytest.mark.slow
def test_a_run_is_told_by_texts_that_are_the_same_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, torch.nn.functional as F\n"
        "from functools import partial\n"
        "from torch import nn\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from sidetuning.resume import description\n"
        "optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), lr=0.1)\n"
        "schedules = torch.optim.lr_scheduler\n"
        "loader = DataLoader(TensorDataset(torch.arange(12.0), torch.arange(12)), batch_size=4)\n"
        "weight = torch.tensor([1.0, 2.0])\n"
        "for schedule in (schedules.LambdaLR(optimizer, lambda step: 0.9**step), schedules.StepLR(optimizer, 2),\n"
        "                 schedules.OneCycleLR(optimizer, 0.1, total_steps=9),\n"
        "                 schedules.CosineAnnealingLR(optimizer, 3)):\n"
        "    for loss in (F.cross_entropy, partial(F.cross_entropy, weight=weight), nn.CrossEntropyLoss(weight)):\n"
        "        print(description(optimizer, schedule, 1.0, loss, loader))\n"
    )
    runs = [
        subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(set(runs[0].splitlines())) == 12 and " at 0x" not in runs[0]


def test_whatever_bit_of_a_resume_file_is_flipped_nothing_is_loaded(tmp_path: Path) -> None:
    file, options = tmp_path / "r", {"steps": 4, "progress": False}
    st.fit(build(), "t", loader(), resume=file, **options)  # type: ignore[arg-type]
    data = file.read_bytes()
    for place in range(0, len(data), len(data) // 40):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :])
        model = build()
        before = state(model)
        with pytest.raises(st.TrainingError, match=r"cannot be read as a resume file"):
            st.fit(model, "t", loader(), resume=file, **options)  # type: ignore[arg-type]
        assert same(state(model), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_two_steps_and_loses_none(number: int, tmp_path: Path) -> None:
    calls = 0
    options: dict[str, Any] = {"steps": 20, "save_every": 999.0, "progress": False}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), number)
        return F.cross_entropy(output, target)

    whole = build(dropout=True)
    st.fit(whole, "t", loader(), loss=F.cross_entropy, **options)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as stopped:
        st.fit(build(dropout=True), "t", loader(), loss=loss, resume=tmp_path / "r", **options)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before  # type: ignore[attr-defined]
    assert calls == 7
    model = build(dropout=True)
    st.fit(model, "t", loader(), loss=loss, resume=tmp_path / "r", **options)
    assert same(state(model), state(whole)) and calls == 20


def test_the_resume_file_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "resume.pt"
    st.fit(build(), "t", loader(), steps=2, resume=file, progress=False)
    others: list[dict[str, Any]] = [{"steps": 3}, {"steps": 2, "seed": 1}]
    for other in others:
        with pytest.raises(st.TrainingError, match="belongs to a run of 2 steps with seed 0"):
            st.fit(build(), "t", loader(), resume=file, progress=False, **other)
    others = [{"lr": 0.5}, {"scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o)}]
    for other in others:
        with pytest.raises(st.TrainingError, match=r"holds the state of AdamW at 0\.001, 0\.001, not of AdamW at"):
            st.fit(build(), "t", loader(), steps=2, resume=file, progress=False, **other)
    with pytest.raises(st.TrainingError, match="a run on a base, parts and laterals with the hash"):
        st.fit(build(merge="film"), "t", loader(), steps=2, resume=file, progress=False)


@pytest.mark.parametrize("what", ["base", "merge", "lateral"])
def test_a_run_of_another_model_of_the_same_shapes_is_refused(what: str, tmp_path: Path) -> None:
    def made(other: bool) -> st.SideTuner:
        base = mlp_base()
        if other and what == "base":
            with torch.no_grad():
                network(base)[0].weight.mul_(2)  # type: ignore[index, operator, union-attr]
        model = st.SideTuner(base)
        for seed, name in enumerate("ab"):
            model.add_task(name, side="mlp", head=3, seed=seed)
        merge = "product" if other and what == "merge" else "sum"
        laterals = ["b" if other and what == "lateral" else "a"]
        model.add_task("t", side="mlp", merge=merge, laterals=laterals, head=3, seed=9)
        return model

    how: dict[str, Any] = {"steps": 3, "resume": tmp_path / "r", "progress": False}
    st.fit(made(False), "t", loader(), **how)
    with pytest.raises(st.TrainingError, match="a run on a base, parts and laterals with the hash"):
        st.fit(made(True), "t", loader(), **how)
    assert st.fit(made(False), "t", loader(), **how).steps == 3


class Weighted(nn.Module):
    """A loss that learns a number, and holds others in its own way."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held, self.learned = held, nn.Parameter(torch.rand(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * (1 + self.learned), target)


def held_in(form: str, number: float) -> Any:
    """A loss that depends on a number."""
    model, given = nn.Linear(3, 3), argparse.Namespace(number=number, started=random.random())
    forms: dict[str, Any] = {
        "tensor": lambda: Weighted(torch.tensor(number)),
        "list": lambda: Weighted([number]),
        "part": lambda: Weighted(nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, number]))),
        "array": lambda: partial(_scaled, factor=np.array([number])),
        "closure": lambda: lambda output, target: F.cross_entropy(output * number, target) + 0 * model.weight.sum(),
        "arguments": lambda: lambda output, target: F.cross_entropy(output * given.number, target),
        "method": lambda: Scaled(number).loss,
    }
    return forms[form]()


def _scaled(output: Tensor, target: Tensor, factor: Any) -> Tensor:
    return F.cross_entropy(output * float(factor[0]), target)


class Scaled:
    """An experiment, with its own model and notes."""

    def __init__(self, number: float) -> None:
        self.number, self.model, self.notes = number, build(), [random.random()]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * self.number, target)


@pytest.mark.parametrize("form", ["tensor", "list", "part", "array", "closure", "arguments", "method"])
def test_whatever_a_loss_holds_makes_it_another(form: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 2, "resume": tmp_path / "r", "progress": False}
    st.fit(build(), "t", loader(), loss=held_in(form, 2.0), **how)
    with pytest.raises(st.TrainingError, match="holds a run with the loss of"):
        st.fit(build(), "t", loader(), loss=held_in(form, 3.0), **how)
    # What it learns, and a model that it looks at, start anew.
    assert st.fit(build(), "t", loader(), loss=held_in(form, 2.0), **how).steps == 2


@pytest.mark.parametrize("form", ["lambda", "chained", "sequential"])
def test_whatever_a_schedule_is_made_of_makes_it_another(form: str, tmp_path: Path) -> None:
    schedules = torch.optim.lr_scheduler

    def made(number: int) -> Any:
        parts: dict[str, Any] = {
            "lambda": lambda o: schedules.LambdaLR(o, (lambda e: 0.9**e) if number == 4 else (lambda e: 0.5**e)),
            "chained": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, number)]),
            "sequential": lambda o: schedules.SequentialLR(
                o, [schedules.ConstantLR(o, total_iters=number), schedules.StepLR(o, 2)], [2]
            ),
        }
        return parts[form]

    how: dict[str, Any] = {"steps": 3, "resume": tmp_path / "r", "progress": False}
    st.fit(build(), "t", loader(), scheduler=made(4), **how)
    with pytest.raises(st.TrainingError, match="holds a run with the schedule of"):
        st.fit(build(), "t", loader(), scheduler=made(5), **how)
    assert st.fit(build(), "t", loader(), scheduler=made(4), **how).steps == 3


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_a_damaged_resume_file_is_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "resume.pt"
    st.fit(build(), "t", loader(), steps=2, resume=file, progress=False)
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "text": b"hello"}[damage])
    model = build()
    before = state(model)
    with pytest.raises(st.TrainingError, match="delete it to start over"):
        st.fit(model, "t", loader(), steps=2, resume=file, progress=False)
    assert same(state(model), before)


def test_fit_changes_its_task_and_nothing_else() -> None:
    model = st.SideTuner(conv_base())
    with st.seeded(0):
        model.add_task("old", side="fcn4", merge="mlp2", head=3)
        model.add_task("new", side="fcn4", merge="mlp2", head=3, laterals=["old"])
        model.add_task("later", side="fcn4", merge="mlp2", head=3, laterals=["old"])
    before = {name: state(model[name]) for name in model.tasks}
    print_before, base_before = model.base.identity().sha256, state(network(model.base))
    y = torch.tensor([0, 1, 2, 0])
    st.fit(model, "new", [(inputs("conv"), y)], steps=3, lr=0.1, weight_decay=0.5, progress=False)
    assert same(state(model["old"]), before["old"]) and same(state(model["later"]), before["later"])
    assert model.base.identity().sha256 == print_before and same(state(network(model.base)), base_before)
    changed = {k for k, v in model["new"].state_dict().items() if not torch.equal(v, before["new"][k])}
    assert changed >= {k for k, _ in model["new"].named_parameters()}
    assert any("running_mean" in k for k in changed)
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for name in ("old", "later") for p in model[name].parameters())


@pytest.mark.parametrize("merge", ["alpha", "mlp2", "film"])
def test_merges_and_vectors_get_no_weight_decay(merge: str) -> None:
    branch = build(merge=merge)["t"]
    groups = parameter_groups(branch.parameters(), 0.3, branch.merge.parameters())
    decayed = {id(p) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    free = {id(p) for g in groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert decayed | free == {id(p) for p in branch.parameters()} and not decayed & free
    assert {id(p) for p in branch.merge.parameters()} <= free
    head = dict(branch.head.named_parameters())
    assert id(head["linear.weight"]) in decayed and id(head["linear.bias"]) in free
    branch.head.requires_grad_(False)
    assert sum(len(g["params"]) for g in parameter_groups(branch.parameters(), 0.3)) == sum(
        p.requires_grad for p in branch.parameters()
    )


def test_weight_decay_alone_shrinks_sides_and_heads_only() -> None:
    model = build(merge="mlp2")
    before = state(model["t"])
    batch = [(inputs("mlp"), torch.tensor([0, 1, 2, 0]))]
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "clip": None, "loss": lambda output, _: 0.0 * output.sum()}
    st.fit(model, "t", batch, steps=1, lr=0.1, weight_decay=1.0, progress=False, **options)
    after = state(model["t"])
    for name in before:
        if "running" in name or "num_batches" in name:
            continue
        factor = 0.9 if not name.startswith("merge.") and before[name].ndim > 1 else 1.0
        torch.testing.assert_close(after[name], factor * before[name], msg=name)


def test_distilling_brings_the_side_to_the_base_and_touches_nothing_else() -> None:
    model = build()
    data = toy()
    x = data.tensors[0]

    def distance() -> float:
        with torch.no_grad():
            features = model.base(x)
            side = model["t"].side_output(model.base.prepare(x), features)
            assert side is not None
            return float(F.mse_loss(side, features.out))

    before, head, merge = distance(), state(model["t"].head), state(model["t"].merge)
    result = st.distill(model, "t", loader(), steps=80, lr=1e-2, progress=False)
    assert distance() < 0.3 * before
    assert result.losses[-1] < result.losses[0]
    assert same(state(model["t"].head), head) and same(state(model["t"].merge), merge)


def test_distilling_reads_no_padding_and_weighs_batches_by_what_they_hold(text_base: st.Base) -> None:
    model = st.SideTuner(text_base)
    model.add_task("t", side="transformer", head=2, seed=0)
    objective = _Imitation(model, "t", F.mse_loss).eval()
    ids = torch.randint(5, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: F.pad(values, (0, 9)) for name, values in alone.items()}
    loss, weight = objective((alone, torch.zeros(2)))
    again, same_weight = objective((padded, torch.zeros(2)))
    assert torch.allclose(loss, again, rtol=1e-4) and int(weight) == int(same_weight) == 14
    images = build()
    assert int(_Imitation(images, "t", F.mse_loss)((toy().tensors[0][:5], torch.zeros(5)))[1]) == 5


def test_evaluate_is_what_a_hand_counts() -> None:
    model = build()
    x, y = toy(50, seed=3).tensors
    output = model(x, "t").detach()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    scores = st.evaluate(model, "t", loader, metrics={"right": st.accuracy, "top": lambda o, t: o.max(1).values})
    assert scores["samples"] == 50
    assert scores["right"] == pytest.approx(sum(int(o.argmax()) == int(t) for o, t in zip(output, y)) / 50)
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(output, y)), rel=1e-5)
    assert scores["top"] == pytest.approx(float(output.max(1).values.mean()), rel=1e-5)
    assert st.evaluate(model, "t", DataLoader(TensorDataset(x, y), batch_size=7)).keys() == {
        "loss",
        "accuracy",
        "samples",
    }


def test_accuracy_of_maps_is_a_share_of_pixels_and_of_numbers_there_is_none() -> None:
    base = st.Base(nn.Conv2d(3, 8, 3, padding=1), example=torch.zeros(1, 3, 8, 8))
    model = st.SideTuner(base)
    model.add_task("map", side=nn.Conv2d(3, 8, 1), head="pixels", head_options={"channels": 5})
    x, y = torch.rand(6, 3, 8, 8), torch.randint(0, 5, (6, 8, 8))
    y[:, :4] = -100  # half of the pixels have no label
    found = st.evaluate(model, "map", DataLoader(TensorDataset(x, y), batch_size=4))
    right = (model(x, "map").argmax(1) == y).sum() / (y != -100).sum()
    assert found["accuracy"] == pytest.approx(float(right), rel=1e-5) and 0 < found["accuracy"] < 1
    numbers = DataLoader(TensorDataset(x, torch.rand(6, 5, 8, 8)), batch_size=4)
    assert st.evaluate(model, "map", numbers, loss=F.mse_loss).keys() == {"loss", "samples"}


def test_a_gradient_that_is_not_finite_leaves_the_weights() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + (output.sum() * 0).sqrt()  # finite, its gradient is not

    for clip in (1.0, None):
        model = build()
        before = state(model)
        with pytest.raises(st.TrainingError, match="norm of the gradient is nan at step 0"):
            st.fit(model, "t", loader(), steps=3, loss=loss, clip=clip, progress=False)
        assert same(state(model), before)


def test_what_fit_cannot_do_is_said(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(toy(8))

    model = build()
    for match, options in (("epochs must be 1 or more", {"epochs": 0}), ("steps must be 1 or more", {"steps": -1})):
        with pytest.raises(st.TaskError, match=match):
            st.fit(model, "t", loader(), progress=False, **options)  # type: ignore[arg-type]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("epochs must be .* not 1.5", {"epochs": 1.5}),
        ("steps must be .* not 2.5", {"steps": 2.5}),
        ("'no' or 'bf16', not 'fp16'", {"precision": "fp16"}),
        ("clip must be more than 0, not -1", {"clip": -1.0}),
        ("clip must be more than 0, not nan", {"clip": math.nan}),
        ("give validate=", {"metrics": {"accuracy": st.accuracy}}),
        ("give keep_best=True", {"monitor": "accuracy"}),
    ]
    for match, refused in wrong:
        with pytest.raises(st.TaskError, match=match):
            st.fit(model, "t", loader(), progress=False, **refused)
    empty: list[Any] = [[], DataLoader(toy(20), batch_size=32, drop_last=True)]
    for data in empty:
        with pytest.raises(st.DataError, match="the loader has no batches"):
            st.fit(model, "t", data, progress=False)
    with pytest.raises(st.DataError, match="but not 'loss', 'samples' or 'step'"):
        st.evaluate(model, "t", loader(), metrics={"step": st.accuracy})
    seed: Any = np.int64(3)
    assert st.fit(model, "t", loader(), seed=seed, resume=tmp_path / "r", progress=False).steps == 8
    with pytest.raises(st.TaskError, match="needs steps="):
        st.fit(model, "t", DataLoader(Stream(), batch_size=4), epochs=1, progress=False)
    with pytest.raises(st.TaskError, match="accumulates gradients by itself"):
        st.fit(model, "t", loader(), steps=1, accelerator=Accelerator(gradient_accumulation_steps=4), progress=False)


def test_what_was_learned_is_kept_where_a_validation_fails(tmp_path: Path) -> None:
    def metric(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("a mistake in a metric")

    whole, broken, file = build(dropout=True), build(dropout=True), tmp_path / "run.pt"
    st.fit(whole, "t", loader(), steps=5, progress=False)
    again: dict[str, Any] = {"steps": 5, "resume": file, "validate": loader(), "progress": False}
    with pytest.raises(RuntimeError, match="a mistake"):
        st.fit(broken, "t", loader(), metrics={"wrong": metric}, **again)
    resumed = build(dropout=True)
    result = st.fit(resumed, "t", loader(), **again)
    assert same(state(resumed), state(whole)) and [row["step"] for row in result.validation] == [5]
    assert len(st.fit(resumed, "t", loader(), **again).validation) == 1
    with pytest.raises(st.TrainingError, match="weight decay"):
        st.fit(build(dropout=True), "t", loader(), weight_decay=0.5, **again)


def test_evaluate_runs_in_evaluation_mode_and_changes_nothing() -> None:
    model = build(dropout=True, merge="mlp2")
    model["t"].train()
    before = state(model)
    scores = [st.evaluate(model, "t", DataLoader(toy(50), batch_size=16)) for _ in range(2)]
    assert scores[0] == scores[1] and same(state(model), before)
    assert model["t"].training


def test_validation_follows_every_pass() -> None:
    model = build()
    held_out = DataLoader(toy(50, seed=1), batch_size=25)
    result = st.fit(model, "t", loader(), steps=20, validate=held_out, progress=False)
    assert [row["step"] for row in result.validation] == [8, 16, 20]
    last = st.evaluate(model, "t", held_out)
    assert {k: result.validation[-1][k] for k in last} == last


def test_validation_does_not_change_what_is_learned() -> None:
    a, b = build(dropout=True), build(dropout=True)
    st.fit(a, "t", loader(), epochs=2, progress=False)
    st.fit(b, "t", loader(), epochs=2, validate=loader(), progress=False)
    assert same(state(a), state(b))


def test_fit_takes_mappings_features_and_bare_tensors() -> None:
    x, y = toy(64).tensors
    model = build()
    features = model.base(x)
    ends = []
    for batch in ((x, y), (x, features, y), (x, features.out, y), [x, y]):
        model = build()
        st.fit(model, "t", [batch], steps=2, progress=False)
        ends.append(state(model))
    assert all(same(end, ends[0]) for end in ends)


def test_clipping_bounds_the_step() -> None:
    moved = []
    for clip in (None, 1e-3):
        model = build()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        st.fit(model, "t", loader(), steps=1, lr=1.0, clip=clip, optimizer=torch.optim.SGD, progress=False)
        moved.append(float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()))
    assert moved[1] == pytest.approx(1e-3, rel=0.01) and moved[0] > 0.1


def test_the_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    model = build(dropout=True)
    st.fit(model, "t", loader(), epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]
    with pytest.raises(Stop):
        st.fit(model, "t", loader(), epochs=1, callbacks=[StopAfter(2)], progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])


def test_seeded_repeats_and_puts_the_generators_back() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    before = torch.get_rng_state()
    with st.seeded(3):
        first = draw()
    with st.seeded(3):
        assert draw() == first
    with st.seeded(4):
        assert all(a != b for a, b in zip(draw(), first, strict=True))
    with pytest.raises(Stop), st.seeded(5):
        draw()
        raise Stop
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampler_inside_a_batch_sampler_hears_the_seed() -> None:
    data = toy(40)

    def order(seed: int) -> list[int]:
        sampler = RandomSampler(
            data, generator=torch.Generator().manual_seed(77)
        )  # as accelerate puts in, for processes
        batches = DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
        seed_loader(batches, seed)
        return [int(i) for i in sampler]

    assert order(1) == order(1) != order(2)


def test_train_minimises_any_objective() -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Parameter(torch.zeros(2))

        def forward(self, batch: Tensor) -> Tensor:
            return (self.point - batch).square().sum()

    objective = Distance()
    target = torch.tensor([1.0, -2.0])
    st.train(objective, [target], torch.optim.SGD(objective.parameters(), lr=0.2), steps=40)
    torch.testing.assert_close(objective.point.detach(), target, rtol=1e-4, atol=1e-4)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/library"]
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader
import sidetuning as st
from test_training import build, loader, toy

model = build(merge="mlp2")
result = st.fit(model, "t", loader(), epochs=4, lr=1e-2, progress=False)
scores = st.evaluate(model, "t", DataLoader(toy(90, seed=1), batch_size=32))
state = PartialState()
if state.is_main_process:
    print("RESULT", state.num_processes, scores["accuracy"], int(scores["samples"]), result.steps, result.losses[0])
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    # `accelerate launch --cpu --num_processes 2` starts one process without MPI; torchrun starts two.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    rows = []
    for how in ([], launch):
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 180, "cwd": tmp_path}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run([sys.executable, *how, str(script)], env=environment, check=False, **options)
        lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert done.returncode == 0 and len(lines) == 1, done.stderr[-3000:]
        rows.append(lines[0])
    one, two = rows
    assert (one[1], two[1]) == ("1", "2")
    assert one[3] == two[3] == "90" and one[4] == two[4] == "32"
    assert float(one[2]) > 0.9
    assert abs(float(one[2]) - float(two[2])) <= 0.02


class Recorder(st.Callback):
    """Notes what it is told, and stops after some steps."""

    def __init__(self, most: int) -> None:
        self.most, self.steps, self.rows, self.ended = most, list[int](), list[float](), 0

    def on_step(self, step: int, loss: float) -> bool:
        self.steps.append(step)
        return step == self.most

    def on_evaluate(self, scores: Mapping[str, float]) -> None:
        self.rows.append(scores["step"])

    def on_end(self) -> None:
        self.ended += 1


def small_run() -> tuple[st.SideTuner, list[tuple[Tensor, Tensor]]]:
    model = st.SideTuner(mlp_base())
    model.add_task("kind", side="mlp", head=2, seed=0)
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    return model, [(x[i : i + 4], (x[i : i + 4, 0] > 0).long()) for i in range(0, 16, 4)]


def test_callbacks_hear_of_steps_and_validations_and_may_stop(tmp_path: Path) -> None:
    model, batches = small_run()
    recorder = Recorder(6)
    how: dict[str, Any] = {"epochs": 3, "validate": batches, "resume": tmp_path / "state", "progress": False}
    result = st.fit(model, "kind", batches, callbacks=[recorder], **how)
    assert recorder.steps == [1, 2, 3, 4, 5, 6] and recorder.rows == [4, 6] and recorder.ended == 1
    assert result.steps == 6
    # What has ended does not go on.
    assert st.fit(model, "kind", batches, callbacks=[recorder], **how).steps == 6 and len(recorder.steps) == 6


@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_validation_is_kept_and_patience_stops(tmp_path: Path, resumed: bool) -> None:
    model, batches = small_run()
    state = tmp_path / "state" if resumed else None
    how: dict[str, Any] = {"epochs": 40, "lr": 0.5, "seed": 1, "keep_best": True, "patience": 3, "progress": False}
    result = st.fit(model, "kind", batches, validate=batches, resume=state, **how)
    losses = [row["loss"] for row in result.validation]
    assert len(losses) == losses.index(min(losses)) + 4 < 40
    assert st.evaluate(model, "kind", batches)["loss"] == pytest.approx(min(losses), rel=1e-5)
    if resumed:
        other, _ = small_run()
        assert st.fit(other, "kind", batches, validate=batches, resume=state, **how).validation == result.validation
        assert st.evaluate(other, "kind", batches)["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_weights_of_the_best_that_were_lost_are_missed(tmp_path: Path) -> None:
    model, batches = small_run()
    how: dict[str, Any] = {"epochs": 2, "keep_best": True, "validate": batches, "resume": tmp_path / "r"}
    st.fit(model, "kind", batches, progress=False, **how)
    (tmp_path / "r.best").unlink()
    with pytest.raises(st.TrainingError, match="is missing, which held the weights of the best"):
        st.fit(small_run()[0], "kind", batches, progress=False, **how)


def test_what_a_loss_learned_is_kept_with_the_best_weights() -> None:
    model, batches = small_run()
    loss, flipped = Weighted(0), [(x, 1 - y) for x, y in batches]
    how: dict[str, Any] = {"epochs": 5, "lr": 0.1, "keep_best": True, "validate": flipped, "progress": False}
    rows = st.fit(model, "kind", batches, loss=loss, **how).validation
    best = min(row["loss"] for row in rows)
    assert st.evaluate(model, "kind", flipped, loss=loss)["loss"] == pytest.approx(best, rel=1e-5)
    assert rows[-1]["loss"] > best


def test_a_fit_that_fails_leaves_a_task_that_was_trained() -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("t", side="mlp", head=3, seed=0)
    data = [(x, F.one_hot(y, 3).float()) for x, y in loader()]
    with pytest.raises(Stop):
        st.fit(model, "t", data, epochs=3, loss=F.mse_loss, callbacks=[StopAfter(9)], progress=False)
    assert (model["t"].passes, model["t"].trained_as) == (2, "numbers")
    untouched = build()
    with pytest.raises(st.TaskError, match="no number 'mae'; monitor= is one of loss, accuracy"):
        st.fit(untouched, "t", loader(), validate=loader(), keep_best=True, monitor="mae", progress=False)
    assert untouched["t"].passes == 0


def test_a_number_that_is_none_is_never_the_best() -> None:
    model, batches = small_run()
    best, kept = Best(model["kind"], "score", 2, None), list[bool]()
    for value in (math.nan, 0.2, 0.5, math.nan):
        with torch.no_grad():
            next(model["kind"].parameters()).fill_(float(len(kept)))
        kept.append(best.on_evaluate({"score": value}))
    assert not any(kept) and best.on_evaluate({"score": 0.4})
    best.restore()
    assert bool((next(model["kind"].parameters()) == 2).all()) and len(batches)


def test_half_precision_learns_nearly_the_same() -> None:
    losses = []
    for precision in ("no", "bf16"):
        model, batches = small_run()
        st.fit(model, "kind", batches, epochs=5, precision=precision, progress=False)  # type: ignore[arg-type]
        losses.append(st.evaluate(model, "kind", batches)["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_what_cannot_be_kept_is_said() -> None:
    model, batches = small_run()
    with pytest.raises(st.TaskError, match="give validate="):
        st.fit(model, "kind", batches, keep_best=True)
    with pytest.raises(st.TaskError, match="patience must be 1 or more"):
        st.fit(model, "kind", batches, validate=batches, patience=0)
    with pytest.raises(st.TaskError, match="monitor= is one of loss, accuracy"):
        st.fit(model, "kind", batches, validate=batches, keep_best=True, monitor="f1", progress=False)
    with pytest.raises(st.TaskError, match="tracker 'nothing' cannot be used"):
        st.fit(model, "kind", batches, tracker="nothing", progress=False)


@pytest.mark.parametrize("ignored", [False, True])
def test_batches_of_one_step_learn_what_a_larger_one_does(ignored: bool) -> None:
    weights = []
    for size, accumulate in ((16, 1), (4, 4)):
        model, batches = small_run()
        x, y = (torch.cat(part) for part in zip(*batches))
        if ignored:
            y[:3] = -100
        parts = list(zip(x.split(size), y.split(size)))
        result = st.fit(model, "kind", parts, epochs=5, accumulate=accumulate, progress=False)
        assert result.steps == 5
        weights.append(torch.cat([p.detach().flatten() for p in model["kind"].parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-5)


def test_the_last_step_of_a_pass_may_have_fewer_batches(tmp_path: Path) -> None:
    model, batches = small_run()
    assert st.fit(model, "kind", batches, epochs=2, accumulate=3, resume=tmp_path / "a", progress=False).steps == 4
    with pytest.raises(st.TaskError, match="accumulate must be 1 or more"):
        st.fit(model, "kind", batches, accumulate=0)


def test_a_tracker_logs_losses_and_validations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    model, batches = small_run()
    st.fit(model, "kind", batches, epochs=2, validate=batches, tracker="tensorboard", progress=False)
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents*")
    content = events.read_bytes()
    assert content.count(b"loss") >= 10 and b"validation/accuracy" in content


@pytest.mark.parametrize("form", ["cached", "relabelled", "collated"])
def test_a_run_on_other_rows_behind_their_numbers_is_not_gone_on_with(form: str, tmp_path: Path) -> None:
    x, y = torch.randn(60, 12), torch.arange(60) % 3
    base = mlp_base()

    def made(shift: int) -> Any:
        if form == "collated":
            numbers: Any = range(60)
            return DataLoader(numbers, 16, collate_fn=lambda rows: (x[rows] + shift, y[rows]))
        rows = TensorDataset(x + (shift if form == "cached" else 0), y)
        cached = st.cache_features(base, rows, tmp_path / "cache", progress=False)
        relabel = (lambda y: (y + shift) % 3) if form == "relabelled" else None
        return st.loader_over(cached, batch_size=16, relabel=relabel)

    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head=3, seed=0)
    how: dict[str, Any] = {"steps": 6, "resume": tmp_path / "r", "progress": False}
    st.fit(model, "t", made(0), **how)
    assert st.fit(model, "t", made(0), **how).steps == 6
    with pytest.raises(st.TrainingError, match="holds a run on features with the hash"):
        st.fit(model, "t", made(1), **how)
