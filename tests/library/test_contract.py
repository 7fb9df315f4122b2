"""One contract for every base x side x merge x head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sidetuning as st
from conftest import BASES, TAPS, inputs, network, side_of, side_output
from sidetuning.merges import Alpha, lateral_merges

SIDES = {
    "conv": ["fcn4", "fcn5", "copy", "mlp", "transformer", "ladder", "fusion"],
    "map": ["fcn3", "fcn4", "fcn8", "copy", "mlp", "transformer", "ladder", "fusion"],
    "sequence": ["mlp", "transformer", "ladder", "copy"],
    "mlp": ["mlp", "transformer", "ladder", "copy"],
}
PAIRS = [(base, side) for base, sides in SIDES.items() for side in sides]


def build(kind: str) -> st.SideTuner:
    return st.SideTuner(BASES[kind](TAPS[kind]))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def batch(kind: str) -> tuple[st.Input, Tensor]:
    return inputs(kind, 4, seed=3), torch.tensor([0, 1, 2, 0])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "side"), PAIRS)
def test_nothing_is_forgotten_whatever_is_learned_later(kind: str, side: str) -> None:
    x = inputs(kind)
    for merge in st.MERGES.names():
        model = build(kind)
        with st.seeded(0):
            model.add_task("old", side=side, merge=merge, head=3)
        st.fit(model, "old", [batch(kind)], steps=1, progress=False)
        before, print_before = model(x, "old"), model.base.identity().sha256
        laterals = ["old"] if merge in lateral_merges() else []
        with st.seeded(1):
            model.add_task("new", side=side, merge=merge, head=3, laterals=laterals)
        st.fit(model, "new", [batch(kind)], steps=2, lr=0.1, weight_decay=0.1, progress=False)
        assert same(model(x, "old"), before), merge
        assert model.base.identity().sha256 == print_before
        if laterals:
            with pytest.raises(st.TaskError, match="a lateral of new"):
                st.fit(model, "old", [batch(kind)], steps=1, progress=False)
            model.remove_task("new")
        st.fit(model, "old", [batch(kind)], steps=1, lr=0.1, progress=False)
        assert not same(model(x, "old"), before), f"{merge}: training changes nothing"


@pytest.mark.parametrize(("kind", "side"), PAIRS)
def test_every_parameter_of_a_branch_is_used(kind: str, side: str) -> None:
    for merge in st.MERGES.names():
        model = build(kind)
        branch = model.add_task("t", side=side, merge=merge, head=3)
        model(inputs(kind), "t").square().sum().backward()
        unused = [name for name, p in branch.named_parameters() if p.grad is None and "classifier" not in name]
        assert not unused, (merge, unused)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("merge", st.MERGES.names())
def test_shapes_batches_and_modes(kind: str, merge: str) -> None:
    model = build(kind)
    model.add_task("t", side="mlp", merge=merge, head=3, prenorm=True)
    assert model(inputs(kind, 5), "t").shape == (5, 3)
    model["t"].train()
    model(inputs(kind, 1), "t").sum().backward()  # a batch of one, in training mode
    assert not model.base.training
    model.train()
    assert not model.base.training
    assert not network(model.base).training


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("merge", st.MERGES.names())
def test_zero_starts_at_the_base_and_still_learns(kind: str, merge: str) -> None:
    model = build(kind)
    branch = model.add_task("t", side="mlp", merge=merge, head="identity", init="zero")
    x = inputs(kind)
    base = model.base(x).out
    assert same(model(x, "t"), base)
    target = torch.randn(base.shape)
    for _ in range(2):
        loss = (model(x, "t") - target).square().mean()
        branch.zero_grad()
        loss.backward()
        for p in branch.parameters():
            assert p.grad is not None
            p.data -= 0.1 * p.grad
    moved = not same(model(x, "t"), base)
    assert moved == (merge != "base-only")


@pytest.mark.parametrize("kind", BASES)
def test_one_base_pass_serves_all_tasks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    passes: list[int] = []
    network(model.base).register_forward_hook(lambda *_: passes.append(1))
    model.add_task("a", side="mlp", head=3)
    model.add_task("b", side="ladder", head=2, merge="sum")
    model.add_task("c", side="mlp", head=4, merge="mlp2", laterals=["a", "b"])
    x = inputs(kind, 6)
    single = {task: model(x, task) for task in model.tasks}
    passes.clear()
    outputs = model.forward_all(x)
    assert len(passes) == 1
    assert all(same(outputs[t], single[t]) for t in model.tasks)
    passes.clear()
    mixed = model(x, tasks=["a", "b", "c", "a", "b", "c"])
    assert len(passes) == 1
    for i, task in enumerate(["a", "b", "c", "a", "b", "c"]):
        assert torch.allclose(mixed[i], single[task][i], atol=1e-5)
    features = model.base(x)
    passes.clear()
    again = model.forward_all(x, features=features)
    assert not passes
    assert all(same(again[t], single[t]) for t in model.tasks)


def test_mixed_batch_counts_samples_and_names() -> None:
    model = build("mlp")
    model.add_task("a", side="mlp", head=2)
    with pytest.raises(st.ShapeError, match="2 tasks for a batch of 4"):
        model(inputs("mlp"), tasks=["a", "a"])
    with pytest.raises(st.UnknownNameError, match="did you mean"):
        model(inputs("mlp"), tasks=["a", "a", "a", "aa"])


def test_the_base_is_shielded_from_its_parent() -> None:
    model = build("conv")
    model.add_task("a", side="fcn4", head=2)
    outer = nn.Sequential(model, nn.Linear(2, 2))
    before = model.base.identity().sha256

    def clear(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.zeros_(parameter)

    outer.apply(clear)
    outer.train()
    outer.requires_grad_(True)
    model(inputs("conv"), "a").sum().backward()
    assert model.base.identity().sha256 == before
    assert all(p.grad is None and not p.requires_grad for p in network(model.base).parameters())
    assert not any("base" in name for name in outer.state_dict())
    outer.load_state_dict(copy.deepcopy(outer.state_dict()), strict=True)
    outer.to(torch.float64)
    assert next(network(model.base).parameters()).dtype == torch.float64
    assert list(model["a"].parameters()) == list(model.parameters())


def test_alpha_learns_through_the_frozen_base() -> None:
    model = build("conv")
    branch = model.add_task("a", side="fcn4", head=3)
    assert branch.alpha == pytest.approx(0.5)
    st.fit(model, "a", [batch("conv")], steps=3, lr=0.05, progress=False)
    assert branch.alpha != pytest.approx(0.5)


def test_laterals_are_detached_and_weighted_equally_at_the_start() -> None:
    model = build("conv")
    first = model.add_task("a", side="fcn4", head=3)
    second = model.add_task("b", side="fcn4", head=3, laterals=["a"])
    assert isinstance(second.merge, Alpha)
    assert torch.allclose(second.merge.weights, torch.full((3,), 1 / 3))
    third = model.add_task("c", side="fcn4", head=3, laterals=["a"], merge_options={"init": 0.9})
    assert isinstance(third.merge, Alpha) and torch.allclose(third.merge.weights, torch.tensor([0.9, 0.05, 0.05]))
    model.forward_all(inputs("conv"), tasks=["b"])["b"].sum().backward()
    assert all(p.grad is None for p in first.parameters())


def test_padding_changes_neither_features_nor_outputs_of_a_sequence() -> None:
    model = build("sequence")
    for i, side in enumerate(("transformer", "ladder", "mlp")):
        model.add_task(side, side=side, head=2 if i else "span")
    short = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    ids = torch.tensor([[5, 6, 7, 8, 1, 1]])
    long = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])}
    a, b = model.forward_all(short), model.forward_all(long)
    assert torch.allclose(a["ladder"], b["ladder"], atol=1e-5)
    assert torch.allclose(a["mlp"], b["mlp"], atol=1e-5)
    assert torch.allclose(a["transformer"], b["transformer"][:, :4], atol=1e-5)
    assert b["transformer"][0, :, 0].argmax() < 4


def test_pixels_head_returns_images() -> None:
    model = build("map")
    model.add_task("depth", side="fcn5", head="pixels", head_options={"channels": 2})
    assert model(inputs("map"), "depth").shape == (4, 2, 32, 32)


def test_copy_is_the_base_at_first_and_slim_is_smaller() -> None:
    model = build("conv")
    whole = model.add_task("whole", side="copy", head=2)
    slim = model.add_task("slim", side="copy", head=2, side_options={"width": 0.5})
    x = inputs("conv")
    prepared = model.base.prepare(x)
    assert torch.allclose(side_output(whole, prepared, model.base(x)), model.base(x).out, atol=1e-6)
    counts = [sum(p.numel() for p in side_of(b).parameters()) for b in (whole, slim)]
    assert counts[1] < 0.7 * counts[0]


def test_xavier_and_low_energy() -> None:
    model = build("conv")
    x = inputs("conv")
    with st.seeded(0):
        plain = model.add_task("plain", side="mlp", head=2)
    with st.seeded(0):
        low = model.add_task("low", side="mlp", head=2, init="low-energy")
    prepared, features = model.base.prepare(x), model.base(x)
    assert torch.allclose(side_output(low, prepared, features), 0.01 * side_output(plain, prepared, features))
    xavier = model.add_task("xavier", side="mlp", head=2, init="xavier")
    layers = [m for m in side_of(xavier).modules() if isinstance(m, nn.Linear)]
    assert all(float(m.bias.detach().abs().max()) == 0 for m in layers)


def test_summary_and_freezing() -> None:
    model = build("conv")
    branch = model.add_task("a", side="fcn4", head=2)
    assert model.summary().tasks[0].total == sum(p.numel() for p in branch.parameters())
    assert f"{sum(p.numel() for p in network(model.base).parameters()):,} parameters, frozen" in str(model.summary())
    model.freeze_task("a")
    assert branch.frozen
    model.freeze_task("a", False)
    assert not branch.frozen
    model.remove_task("a")
    assert model.tasks == []


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_prenorm_leaves_narrow_codes_something_to_say(width: int) -> None:
    """A group of one number would always be 0."""
    model = st.SideTuner(st.Base(nn.Linear(4, width), example=torch.zeros(1, 4)))
    model.add_task("t", side=None, merge="base-only", head="identity", prenorm=True)
    out = model(torch.rand(3, 4), "t")
    assert float(out.detach().abs().min()) > 0
    with pytest.raises(st.TaskError, match="leave it out"):
        st.SideTuner(st.Base(nn.Linear(4, 1), example=torch.zeros(1, 4))).add_task(
            "t", side=None, merge="base-only", head="identity", prenorm=True
        )
