"""Every method: the one contract over kinds of bases, and an oracle for what each claims."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import sidetuning as st
from conftest import BASES, GOLDEN, TAPS, conv_base, conv_net, inputs, mlp_base, network
from sidetuning.errors import TaskError
from sidetuning.files import signed
from sidetuning.heads import run_head
from sidetuning_bench.methods import METHODS, Method, Recipe, Task, load_method, saved_tasks
from sidetuning_bench.methods.ewc import EWC
from sidetuning_bench.methods.lora import LoRA
from sidetuning_bench.methods.piggyback import THRESHOLD, Piggyback
from sidetuning_bench.methods.pnn import Lateral
from sidetuning_bench.methods.psp import PSP, superpose
from sidetuning_bench.methods.residual_adapter import ResidualAdapter
from sidetuning_bench.methods.sidetune import Boosting
from sidetuning_bench.methods.trunk import Trunk

SIDES = {"conv": "fcn4", "map": "fcn5", "sequence": "transformer", "mlp": "mlp"}
# Methods that need them.
CONVOLUTIONS = {"residual-adapter"}
CELLS = [
    (kind, name)
    for kind, name in itertools.product(("conv", "map", "sequence", "mlp"), METHODS.names())
    if kind in ("conv", "map") or name not in CONVOLUTIONS
]
# Those that take steps.
TRAINED = [name for name in METHODS.names() if name != "solve"]
QUIET = Recipe(5, lr=1e-2)


def build(kind: str, name: str, base: st.Base | None = None) -> Any:
    options: dict[str, Any] = {"side": SIDES[kind]} if name in ("sidetune", "boosting") else {}
    return METHODS.build(name, base or BASES[kind](TAPS[kind]), options=options)


def batches(kind: str, seed: int = 0) -> list[Any]:
    x = inputs(kind, 8, seed)
    y = torch.arange(8) % 3
    return [{**x, "labels": y}] if isinstance(x, dict) else [(x, y)]


def learn(method: Method, kind: str, *names: str, recipe: Recipe = QUIET) -> None:
    for i, name in enumerate(names):
        method.learn(Task(name, 3, seed=i), batches(kind, i), recipe, progress=False)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_contract(kind: str, name: str, tmp_path: Path) -> None:
    """Learns; leaves the base alone; forgets only where it says so; the saved method answers the same."""
    method = build(kind, name)
    fingerprint, x = method.base.identity().sha256, inputs(kind, 8)
    first = method.learn(Task("a", 3), batches(kind), Recipe(12, lr=1e-2), progress=False)
    assert first.losses[-1] < first.losses[0] or name not in TRAINED
    before = method(x, "a").detach()
    assert before.shape == (8, 3)
    learn(method, kind, "b")
    assert method.base.identity().sha256 == fingerprint
    assert torch.equal(method(x, "a").detach(), before) == (not method.sequential)
    assert method.added("b") > 0
    assert method.shared() >= 0
    assert not method.training

    method.save(tmp_path / "saved", metrics={"accuracy": 0.5})
    again = load_method(tmp_path / "saved", method.base)
    assert list(again.tasks) == ["a", "b"]
    for task in ("a", "b"):
        assert torch.equal(again(x, task), method(x, task))
    # A loaded method goes on.
    learn(again, kind, "c")
    learn(method, kind, "c")
    assert torch.equal(again(x, "c"), method(x, "c"))


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_that_was_cut_short_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    """In the second task, in the process that was interrupted and in another that reads the first task from disk."""
    recipe, second = Recipe(8, lr=1e-2), Task("b", 3, seed=1)
    whole, cut = build("conv", name), build("conv", name)
    for method in (whole, cut):
        learn(method, "conv", "a")
    cut.save(tmp_path / "saved")
    whole.learn(second, batches("conv"), recipe, progress=False)

    class Cut(Exception):
        pass

    class Loader:
        def __init__(self) -> None:
            self.reads = 0

        def __iter__(self) -> Any:
            self.reads += 1
            if self.reads == 6:
                raise Cut
            return iter(batches("conv"))

    resume = tmp_path / "resume.pt"
    with pytest.raises(Cut):
        cut.learn(second, Loader(), recipe, resume=resume, save_every=0.0, progress=False)
    assert list(cut.tasks) == ["a"]
    for method in (cut, load_method(tmp_path / "saved", whole.base)):
        method.learn(second, batches("conv"), recipe, resume=resume, progress=False)
        for task in ("a", "b"):
            assert torch.equal(method(inputs("conv", 8), task), whole(inputs("conv", 8), task))


@pytest.mark.parametrize("width", [0, 40])
def test_solve_is_the_closed_form_of_the_library(width: int) -> None:
    base = BASES["conv"](TAPS["conv"])
    method = METHODS.build("solve", base, options={"width": width})
    x, y = inputs("conv", 8), torch.arange(8) % 3
    method.learn(Task("a", 3, seed=4), [(x, y)], QUIET, progress=False)
    model = st.SideTuner(base)
    options = {"outputs": 3, "width": width, "grid": 4, "seed": 4}
    head: dict[str, Any] = {"head": "random", "head_options": options} if width else {"head": 3}
    model.add_task("a", side=None, merge="base-only", problem="classes", **head)
    st.solve(model, "a", [(x, y)], progress=False)
    assert torch.equal(method(x, "a"), model(x, "a"))
    with pytest.raises(st.TaskError, match="learns classes"):
        method.learn(Task("b", 3, F.mse_loss), [(x, y)], QUIET, progress=False)


@pytest.mark.parametrize("name", ["finetune", "ewc", "psp"])
def test_the_next_task_starts_from_what_the_ones_before_it_left(name: str) -> None:
    method = build("conv", name)
    learn(method, "conv", "a", recipe=Recipe(30, lr=1e-2))
    before = {n: p.detach().clone() for n, p in method.trunk.named_parameters()}
    started = build("conv", name).trunk.state_dict()
    learn(method, "conv", "b", recipe=Recipe(1, lr=1e-7))
    for n, p in method.trunk.named_parameters():
        assert torch.allclose(p, before[n], atol=1e-6) and not torch.allclose(p, started[n], atol=1e-4), n


@pytest.mark.parametrize(
    ("name", "part"), [("sidetune", "side"), ("boosting", "side"), ("sidetune", "merge"), ("features", "head")]
)
def test_parts_are_given_by_name(name: str, part: str) -> None:
    """One module would be shared by all tasks, and what was learned would not be the same after the next."""
    own: Any = nn.Linear(6, 6)
    method = METHODS.build(name, mlp_base(), options={} if part == "head" else {"side": "mlp", part: own})
    with pytest.raises(TaskError, match=f"{part} is a Linear"):
        method.learn(Task("a", own if part == "head" else 3), batches("mlp"), QUIET, progress=False)
    assert list(method.tasks) == []


def test_methods_that_do_not_use_features_ignore_them() -> None:
    x = inputs("conv", 8)
    for name in METHODS.names():
        method = build("conv", name)
        learn(method, "conv", "a")
        known = method.base(x)
        assert torch.equal(method(x, "a", features=known), method(x, "a")), name
        other = method(x, "a", features=st.Features(known.out + 1, known.taps))
        assert torch.equal(other, method(x, "a")) == (not method.uses_features), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "sequence"])
def test_threads_get_their_own_answers(kind: str) -> None:
    """Four threads ask every method for different tasks of different inputs at once."""
    for name in [name for k, name in CELLS if k == kind]:
        method = build(kind, name)
        learn(method, kind, "a", "b", recipe=Recipe(2, lr=1e-2))
        cells = [("ab"[i % 2], inputs(kind, 4, seed=i)) for i in range(4)]
        expected = [method(x, task).detach() for task, x in cells]

        def ask(cell: int, method: Method = method, cells: Any = cells, expected: Any = expected) -> bool:
            task, x = cells[cell]
            return all(torch.equal(method(x, task), expected[cell]) for _ in range(15))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(4))), name


def test_sidetune_is_fit() -> None:
    """The method and the public API train bitwise the same branch."""
    base = conv_base()
    method = METHODS.build("sidetune", base, options={"side": "fcn4", "merge": "mlp2"})
    method.learn(Task("a", 3, seed=7), batches("conv"), Recipe(6, seed=3), progress=False)
    model = st.SideTuner(base)
    with st.seeded(7):
        model.add_task("a", side="fcn4", merge="mlp2", head=3)
    st.fit(model, "a", batches("conv"), steps=6, optimizer=torch.optim.Adam, seed=3, progress=False)
    assert torch.equal(model(inputs("conv"), "a"), method(inputs("conv"), "a"))


def test_the_first_task_of_sequential_methods_is_an_independent_copy() -> None:
    """What `compare` builds rigidity on."""
    outputs = {}
    for name in ("independent", "finetune", "ewc", "psp"):
        method = build("conv", name) if name != "psp" else PSP(BASES["conv"](TAPS["conv"]), statistics="task")
        learn(method, "conv", "a")
        outputs[name] = method(inputs("conv"), "a")
    for name, output in outputs.items():
        assert torch.equal(output, outputs["independent"]), name


def test_scratch_starts_from_nothing_of_the_base() -> None:
    base = conv_base()
    with st.seeded(0):
        trunk = Trunk(base, pretrained=False)
    for (name, a), b in zip(trunk.net.named_parameters(), network(base).parameters(), strict=True):
        if a.ndim > 1:
            assert not torch.equal(a, b), name
            assert abs(float(torch.corrcoef(torch.stack([a.detach().flatten(), b.flatten()]))[0, 1])) < 0.35, name


# ---- EWC


def linear_ewc(**options: Any) -> Any:
    with st.seeded(1):
        base = st.Base(nn.Linear(2, 2, bias=False), example=torch.zeros(1, 2))
        method: Any = EWC(base, **options)
        method._add(Task("a", 2, seed=5), method.add)
    return method


def test_ewc_fisher_by_hand() -> None:
    """For logits = H W x: d log p(y) / dW = H^T (onehot(y) - p) x^T, squared per sample, then averaged."""
    method = linear_ewc(labels="data")
    x, y = torch.tensor([[1.0, 2.0], [-0.5, 1.5], [2.0, -1.0]]), torch.tensor([0, 1, 1])
    fisher = method.fisher(method.tasks["a"], [(x, y)])
    weight, head = method.trunk.net[0].weight, method.heads["a"].linear
    expected = torch.zeros(2, 2)
    for i in range(3):
        p = (head(weight @ x[i])).softmax(0)
        gradient = head.weight.T @ (F.one_hot(y[i], 2).float() - p)
        expected += torch.outer(gradient, x[i]) ** 2 / 3
    assert torch.allclose(fisher, expected.flatten(), atol=1e-6)
    together = torch.autograd.grad(F.cross_entropy(head(x @ weight.T), y), weight)[0] ** 2
    # What the original code computes.
    assert not torch.allclose(fisher, together.flatten(), rtol=0.1)


@pytest.mark.parametrize(
    "y", [[[0.3], [-1.0]], [[0.3, 1.0], [-1.0, 0.5]]], ids=["one number", "two, which are no classes"]
)
def test_ewc_fisher_of_a_regression_by_hand(y: list[list[float]]) -> None:
    """For mean((H W x - y)^2) over m outputs: d loss / dW = 2 / m H^T (H W x - y) x^T, squared, then averaged."""
    with st.seeded(1):
        method: Any = EWC(st.Base(nn.Linear(2, 2, bias=False), example=torch.zeros(1, 2)))
    x, target = torch.tensor([[1.0, 2.0], [-0.5, 1.5]]), torch.tensor(y)
    m = target.shape[1]
    task = Task("a", m, F.mse_loss)
    method._add(task, method.add)
    weight, head = method.trunk.net[0].weight, method.heads["a"].linear
    expected = torch.zeros(2, 2)
    for i in range(2):
        error = head(weight @ x[i]) - target[i]
        expected += torch.outer(2 / m * head.weight.T @ error, x[i]) ** 2 / 2
    assert torch.allclose(method.fisher(task, [(x, target)]), expected.flatten(), atol=1e-6)


def test_ewc_fisher_of_the_models_own_labels() -> None:
    """E_y [(d log p(y))^2] by summing over both classes, against sampled labels."""
    method = linear_ewc(labels="model", samples=1500)
    x = torch.tensor([[1.0, 2.0]])
    weight, head = method.trunk.net[0].weight, method.heads["a"].linear
    p = head(weight @ x[0]).softmax(0)
    expected = sum(
        p[c] * torch.outer(head.weight.T @ (F.one_hot(torch.tensor(c), 2).float() - p), x[0]) ** 2 for c in (0, 1)
    )
    with st.seeded(0):
        fisher = method.fisher(method.tasks["a"], [(x.expand(1500, 2), torch.zeros(1500, dtype=torch.long))])
    assert torch.allclose(fisher, expected.detach().flatten(), rtol=0.1)


def test_ewc_one_quadratic_is_the_sum_of_n_penalties() -> None:
    """Its gradient equals that of sum_k F_k (w - w_k)^2, kept task by task."""
    method: Any = EWC(mlp_base(), coefficient=3.0, samples=8)
    kept = []
    for i, name in enumerate(("a", "b", "c")):
        before = method.precision.clone()
        learn(method, "mlp", name)
        weights = torch.cat([p.detach().reshape(-1) for p in method.trunk.parameters()])
        kept.append((method.precision - before, weights))
        assert i == 0 or not torch.equal(before, method.precision)
    with torch.no_grad():
        for parameter in method.trunk.parameters():
            parameter.add_(0.1)
    weights = torch.cat([p.detach().reshape(-1) for p in method.trunk.parameters()]).requires_grad_(True)
    (expected,) = torch.autograd.grad(3.0 * sum((f * (weights - w) ** 2).sum() for f, w in kept), weights)
    penalty = method.penalty()
    assert isinstance(penalty, Tensor)
    gradients = torch.autograd.grad(penalty, list(method.trunk.parameters()))
    assert torch.allclose(torch.cat([g.reshape(-1) for g in gradients]), expected, rtol=1e-3, atol=1e-6)


def test_ewc_running_penalty() -> None:
    method: Any = EWC(mlp_base(), samples=8, running=0.5)
    learn(method, "mlp", "a")
    first = method.precision.clone()
    learn(method, "mlp", "b")
    weights = torch.cat([p.detach().reshape(-1) for p in method.trunk.parameters()])
    assert torch.equal(method.centre, weights)
    # The seed of the task, which drew the labels.
    with st.seeded(0):
        second = method.fisher(method.tasks["b"], batches("mlp"))
    assert torch.allclose(method.precision, 0.5 * first + second, rtol=1e-4, atol=1e-9)


def test_a_strong_ewc_moves_less_than_fine_tuning() -> None:
    x = inputs("mlp", 64)
    drift = {}
    for name, options in (("finetune", {}), ("ewc", {"coefficient": 1e4, "samples": 8})):
        method = METHODS.build(name, mlp_base(), options=options)
        method.learn(Task("a", 3), batches("mlp"), Recipe(50, lr=1e-2), progress=False)
        before = method(x, "a").detach()
        method.learn(Task("b", 3, seed=1), batches("mlp", 1), Recipe(50, lr=1e-2), progress=False)
        drift[name] = float((method(x, "a").detach() - before).norm())
    assert drift["ewc"] < 0.5 * drift["finetune"]


# ---- PSP


def test_psp_equals_the_original() -> None:
    golden = load_file(GOLDEN)
    x, weight, context = golden["psp/input"], golden["psp/state/weight"], golden["psp/state/context"]
    for k in range(3):
        seen = superpose(weight, context[:, k].view(1, *weight.shape[1:]))
        assert torch.allclose(F.conv2d(x, seen, padding=1), golden[f"psp/out_task{k}"], atol=1e-5)


def test_psp_at_orthogonal_contexts_is_independent_networks() -> None:
    """Inputs (s, s) seen through (1, 1) and (1, -1) are orthogonal: learning one task cannot move the other."""
    base = st.Base(nn.Linear(2, 3, bias=False), example=torch.zeros(1, 2))
    scale = torch.tensor([[0.5], [1.0], [2.0]])
    x, y = scale.expand(3, 2), torch.arange(3)
    sgd = Recipe(20, lr=0.1, optimizer=torch.optim.SGD, clip=None)

    class Orthogonal(PSP):
        def contexts(self, index: int) -> dict[str, Tensor]:
            return {"net.0.weight": torch.tensor([[1.0, 1.0], [1.0, -1.0]][index])[None]}

    together = Orthogonal(base)
    for i, name in enumerate(("a", "b")):
        together.learn(Task(name, 3, seed=i), [(x, y)], sgd, progress=False)
    for i, name in enumerate(("a", "b")):
        alone = Orthogonal(base)
        # Its context is the second one: a first task that learns nothing takes the first.
        if i:
            alone.learn(Task("a", 3), [(x, y)], Recipe(1, lr=0.0, optimizer=torch.optim.SGD), progress=False)
        alone.learn(Task(name, 3, seed=i), [(x, y)], sgd, progress=False)
        assert torch.allclose(alone(x, name), together(x, name), atol=1e-5)
    assert not torch.allclose(together(x, "a"), together(x, "b"), atol=0.1)


def test_psp_of_grouped_convolutions_has_a_sign_for_every_input() -> None:
    """A depthwise layer's W * c is the same weights on inputs whose signs c flips, channel by channel."""
    net = nn.Conv2d(4, 8, 1, groups=4, bias=False)
    method: Any = PSP(st.Base(net, example=torch.zeros(1, 4, 5, 5)), seed=1)
    (signs,) = method.contexts(1).values()
    assert signs.shape == net.weight.shape and len(signs[::2].unique()) == 2
    x = torch.rand(2, 4, 5, 5)
    flipped = F.conv2d(x * signs[::2].view(1, 4, 1, 1), net.weight, groups=4)
    assert torch.allclose(F.conv2d(x, superpose(net.weight, signs), groups=4), flipped)


def test_psp_covers_every_layer_and_starts_from_the_base() -> None:
    base = conv_base()
    method: Any = PSP(base)
    contexts = method.contexts(0)
    assert set(contexts) == {"net.0.weight", "net.3.weight"}
    for name, signs in contexts.items():
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert signs.shape == (1, *method.trunk.get_parameter(name).shape[1:])
        assert torch.equal(signs, PSP(base).contexts(0)[name])
        assert not torch.equal(signs, method.contexts(1)[name])
        kept = method.trunk.get_parameter(name).detach()
        pretrained = network(base).get_parameter(name.removeprefix("net."))
        # Folded.
        assert not torch.equal(kept, pretrained)
        assert torch.equal(superpose(kept, signs), pretrained)


def test_psp_norms_by_the_batch_or_by_running_statistics_of_the_task() -> None:
    x, y = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
    # A base of any numbers, which no normalisation bounds.
    with st.seeded(1):
        base = st.Base(conv_net(), example=torch.zeros(1, 3, 32, 32))
    of_batch, of_task = (PSP(base, statistics=s) for s in ("batch", "task"))
    for method in (of_batch, of_task):
        method.learn(Task("a", 2), [(x, y)], Recipe(2), progress=False)
    # The others in the batch count.
    assert not torch.allclose(of_batch(x, "a")[:4], of_batch(x[:4], "a"), atol=1e-3)
    assert torch.allclose(of_task(x, "a")[:4], of_task(x[:4], "a"), atol=1e-5)
    assert of_task.added("a") - of_batch.added("a") == 2 * 8
    # Of other statistics, which "batch" takes out and "task" does not.
    other = 5 * x + 3
    shift = [(m(other, "a") - m(x, "a")).abs().max() for m in (of_batch, of_task)]
    assert shift[0] < 1e-2 < shift[1]


# ---- the others


def test_pnn_lateral_by_hand() -> None:
    lateral: Any = Lateral((2,), sources=2)
    with torch.no_grad():
        lateral.scales.copy_(torch.tensor([1.0, 0.5]))
        lateral.reduce.weight.copy_(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, -2.0]]))
        lateral.reduce.bias.copy_(torch.tensor([0.0, 1.0]))
        lateral.expand.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    # scaled: 1 2 | 2 3; reduced: 1 + 4 = 5, 2 - 6 + 1 = -3 -> relu 5, 0; expanded: 5, 0
    assert lateral([first, second]).tolist() == [[5.0, 0.0]]


def test_pnn_columns_are_joined_after_each_tap() -> None:
    """h_1 = layer_1(x) + lateral_1(taps of base and column a), h_2 = layer_2(h_1) + lateral_2(…), layer by layer."""
    method = METHODS.build("pnn", mlp_base(TAPS["mlp"]), options={})
    learn(method, "mlp", "a", "b")
    x = inputs("mlp")
    assert isinstance(x, Tensor)

    def by_hand(
        net: nn.Module, laterals: nn.ModuleDict | None, known: list[dict[str, Tensor]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        taps: dict[str, Tensor] = {}
        h = x
        for name, layer in net.named_children():
            h = layer(h)
            if name in TAPS["mlp"]:
                h = taps[name] = h if laterals is None else h + laterals[name]([other[name] for other in known])
        return h, taps

    _, base = by_hand(network(method.base), None, [])
    _, first = by_hand(method.columns["a"].trunk.net, method.columns["a"].laterals, [base])
    code, _ = by_hand(method.columns["b"].trunk.net, method.columns["b"].laterals, [base, first])
    assert torch.allclose(method(x, "b"), run_head(method.heads["b"], code, x), atol=1e-6)


def test_pnn_hears_base_and_earlier_columns() -> None:
    method = build("conv", "pnn")
    learn(method, "conv", "a", "b")
    x = inputs("conv")
    before = {t: method(x, t).detach() for t in ("a", "b")}
    with torch.no_grad():
        method.columns["a"].trunk.net[0].weight.add_(1.0)
    assert not torch.equal(method(x, "b"), before["b"])
    with torch.no_grad():
        method.columns["a"].trunk.net[0].weight.sub_(1.0)
        method.base.net[3].weight.add_(1.0)
    assert not torch.equal(method(x, "a"), before["a"])


@pytest.mark.parametrize("name", ["lora", "residual-adapter"])
@pytest.mark.parametrize("kind", ["conv", "map"])
def test_zero_start_is_the_base(kind: str, name: str) -> None:
    """Before training, every task's code is the base's."""
    method = build(kind, name)
    method._add(Task("a", "identity"), method.add)
    x = inputs(kind)
    assert torch.allclose(method(x, "a"), method.base(x).out, atol=1e-6)


def test_lora_learns_only_its_own_adapter_and_small_numbers() -> None:
    method: Any = LoRA(conv_base(), rank=2)
    learn(method, "conv", "a", "b")
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    learn(method, "conv", "c")
    moved = {n for n, p in method.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved == set()
    trained = {id(p) for p in method.trained("b")}
    names = {n for n, p in method.named_parameters() if id(p) in trained}
    assert len(names) == 6 and all(".b." in n for n in names)
    # conv1 3->8 3x3 and conv2 8->16 3x3 at rank 2: A (2, in, 3, 3), B (out, 2, 1, 1); head 16 -> 3
    assert method.added("b") == 2 * 3 * 9 + 8 * 2 + 2 * 8 * 9 + 16 * 2 + 16 * 3 + 3
    assert not any("base_layer" in name for name in method.tensors())


@pytest.mark.parametrize("name", [n for n in METHODS.names() if not METHODS[n].sequential and n != "pnn"])
def test_gradients_of_earlier_tasks_do_not_count_when_clipping(name: str) -> None:
    """A task is learned alike first and second, where tasks do not touch each other."""
    clipped = Recipe(5, lr=1e-2, clip=1e-3, optimizer=torch.optim.SGD)
    after, alone = build("conv", name), build("conv", name)
    learn(after, "conv", "a")
    for method in (after, alone):
        method.learn(Task("b", 3, seed=5), batches("conv", 1), clipped, progress=False)
    x = inputs("conv")
    assert torch.equal(after(x, "b"), alone(x, "b"))


def test_piggyback_masks_are_bits_of_the_frozen_weights() -> None:
    base = conv_base()
    method: Any = Piggyback(base)
    method._add(Task("a", 3), method.add)
    masks: Any = method.masks["a"]
    with torch.no_grad():
        # The first filter is cut.
        getattr(masks, "net/0/weight")[0] = THRESHOLD / 2
    before = method(inputs("conv"), "a")
    method.learned(method.tasks["a"], ())
    kept = method.state_dict()["masks.a.net/0/weight"]
    assert kept.dtype == torch.bool
    assert not kept[0].any()
    assert kept[1:].all()
    assert torch.equal(method(inputs("conv"), "a"), before)
    assert masks.bits == 3 * 8 * 9 + 8 * 16 * 9


def test_piggyback_gradient_passes_the_cut() -> None:
    """d loss / d m = (d loss / d (W m)) W: Mallya et al., equation 4."""
    method: Any = Piggyback(mlp_base())
    method._add(Task("a", "identity"), method.add)
    x = inputs("mlp")
    assert isinstance(x, Tensor)
    masked = method.masks["a"].binary()
    method(x, "a").sum().backward()
    gradient = getattr(method.masks["a"], "net/0/weight").grad
    weight = method.trunk.net[0].weight
    effective = (weight * masked["net.0.weight"]).detach().requires_grad_(True)
    hidden = F.linear(x, effective, method.trunk.net[0].bias).relu()
    F.linear(hidden, method.trunk.net[2].weight, method.trunk.net[2].bias).sum().backward()
    assert torch.allclose(gradient, effective.grad * weight, atol=1e-5)


@pytest.mark.parametrize("name", METHODS.names())
def test_evaluation_changes_nothing(name: str) -> None:
    method = build("conv", name)
    learn(method, "conv", "a")
    x = inputs("conv", 8)
    before, state = method(x, "a").detach(), {k: v.clone() for k, v in method.state_dict().items()}
    st.evaluate(method, "a", batches("conv"))
    assert torch.equal(method(x, "a"), before)
    assert all(torch.equal(v, state[k]) for k, v in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS.names())
def test_learning_that_did_not_end_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """Learn a, stop while learning b, and all is as if b had not begun: answers, saves, and what is learned next."""
    method, other = build("conv", name), build("conv", name)
    learn(method, "conv", "a")
    learn(other, "conv", "a")
    x = inputs("conv", 8)

    def two_steps() -> Any:
        yield from batches("conv", 1) * 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.learn(Task("b", 3, seed=1), two_steps(), QUIET, progress=False)
    assert list(method.tasks) == ["a"]
    assert torch.equal(method(x, "a"), other(x, "a"))
    method.save(tmp_path)
    again = load_method(tmp_path, method.base)
    for one in (method, other, again):
        one.learn(Task("b", 3, seed=1), batches("conv", 1), QUIET, progress=False)
        one.learn(Task("c", 3, seed=2), batches("conv", 2), QUIET, progress=False)
    for task in "abc":
        assert torch.equal(method(x, task), other(x, task))
        assert torch.equal(again(x, task), other(x, task))
    method.save(tmp_path)
    assert torch.equal(load_method(tmp_path, method.base)(x, "b"), other(x, "b"))


def test_a_resume_file_of_another_task_is_refused(tmp_path: Path) -> None:
    method = build("conv", "features")
    method.learn(Task("a", 3), batches("conv"), QUIET, resume=tmp_path / "r", progress=False)
    with pytest.raises(st.TrainingError, match="holds the state of features, task a, not of features, task b"):
        method.learn(Task("b", 3), batches("conv"), QUIET, resume=tmp_path / "r", progress=False)
    with pytest.raises(st.TrainingError, match="not of AdamW"):
        build("conv", "features").learn(
            Task("a", 3), batches("conv"), Recipe(5, optimizer=torch.optim.AdamW), resume=tmp_path / "r", progress=False
        )


@pytest.mark.parametrize("name", TRAINED)
def test_bfloat16_learns(name: str) -> None:
    method = build("conv", name)
    result = method.learn(Task("a", 3), batches("conv"), Recipe(10, lr=1e-2, precision="bf16"), progress=False)
    assert result.losses[-1] < result.losses[0]
    assert method(inputs("conv"), "a").dtype == torch.float32


@pytest.mark.parametrize("name", [n for n in METHODS.names() if n not in ("pnn", "residual-adapter")])
def test_bare_layers_and_tied_weights(name: str, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    for net in (nn.Linear(12, 12), Tied()):
        method = build("mlp", name, st.Base(net, example=torch.zeros(1, 12)))
        learn(method, "mlp", "a", "b")
        method.save(tmp_path / type(net).__name__)
        again = load_method(tmp_path / type(net).__name__, method.base)
        assert torch.equal(again(inputs("mlp"), "a"), method(inputs("mlp"), "a"))


def test_lora_reaches_every_layer_that_it_counts() -> None:
    """torch's fused transformer layer would pass adapters by."""
    for kind in ("conv", "mlp", "sequence"):
        method: Any = LoRA(BASES[kind](), rank=2)
        learn(method, kind, "a")
        moved = {n: bool(p.any()) for n, p in method._of("a").items() if "lora_B" in n}
        assert moved and all(moved.values()), moved


def test_lora_names_are_matched_in_full() -> None:
    block = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
    base = st.Base(nn.Sequential(block, nn.ReLU(), nn.Linear(12, 6)), example=torch.zeros(1, 12))
    method: Any = LoRA(base, rank=2)
    learn(method, "mlp", "a")
    assert method.added("a") == 2 * 12 * 2 + 2 * 12 + 2 * 6 + 6 * 3 + 3


def test_a_saved_method_does_not_need_its_initial_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with st.seeded(0):
        side = st.SideTuner(conv_base()).add_task("t", side="fcn4", merge="sum", head=2).side
    assert side is not None
    for name in ("sidetune", "boosting"):
        file = tmp_path / f"{name}.safetensors"
        save_file(side.state_dict(), file)
        method = METHODS.build(name, conv_base(), options={"side": "fcn4", "merge": "sum", "init": str(file)})
        learn(method, "conv", "a")
        method.save(tmp_path / name)
        file.unlink()
        assert torch.equal(load_method(tmp_path / name, conv_base())(inputs("conv"), "a"), method(inputs("conv"), "a"))


def test_each_task_is_saved_with_its_own_metrics(tmp_path: Path) -> None:
    method = build("conv", "sidetune")
    for name, accuracy in (("a", 0.25), ("b", 0.5)):
        learn(method, "conv", name)
        method.save(tmp_path, metrics={"accuracy": accuracy})
    found = {n: json.loads((tmp_path / n / "side.json").read_text())["metrics"] for n in ("a", "b")}
    assert found == {"a": {"accuracy": 0.25}, "b": {"accuracy": 0.5}}
    (tmp_path / "a/side.safetensors").unlink()
    # What is gone is written again.
    method.save(tmp_path)
    assert list(load_method(tmp_path, method.base).tasks) == ["a", "b"]


def test_ewc_says_when_it_saw_nothing() -> None:
    with pytest.raises(st.TrainingError, match="saw no sample"):
        EWC(mlp_base(), samples=0).learn(Task("a", 3), batches("mlp"), QUIET, progress=False)


def test_boosting_ends_every_stage_with_the_schedule(tmp_path: Path) -> None:
    rates = []

    class Watched(torch.optim.lr_scheduler.LinearLR):
        def step(self, *args: Any) -> None:
            super().step(*args)
            rates.append(self.get_last_lr()[0])

    def falling(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return Watched(optimizer, 1.0, 0.01, total_iters=steps)

    method: Any = Boosting(conv_base(), stages=2, side="fcn4", merge="alpha")
    method.learn(Task("a", 3), batches("conv"), Recipe(10, lr=1.0e-2, scheduler=falling), progress=False)
    ends = [rate for rate in rates if rate == pytest.approx(1e-4)]
    assert len(ends) == 2


def test_residual_adapter_is_a_parallel_1x1_convolution() -> None:
    base = conv_base()
    method: Any = ResidualAdapter(base)
    method._add(Task("a", "identity"), method.add)
    adapters = method.adapters["a"]
    with torch.no_grad():
        for conv in adapters.beside_conv.values():
            conv.weight.normal_(0, 0.1)
    x = base.prepare(inputs("conv"))
    net: Any = base.net
    first, second = adapters.beside_conv["0"], adapters.beside_conv["3"]
    assert isinstance(x, Tensor)
    h = net[2](net[1](net[0](x) + F.conv2d(x, first.weight, stride=2)))
    expected = net[6](net[5](net[4](net[3](h) + F.conv2d(h, second.weight, stride=2))))
    assert torch.allclose(method(inputs("conv"), "a"), expected, atol=1e-5)


def test_boosting_trains_each_stage_and_every_alpha() -> None:
    """The original's alphas had no gradient; here the softmax over base, earlier sides and side moves."""
    method: Any = Boosting(conv_base(), stages=3, side="fcn4", merge="alpha")
    method.learn(Task("a", 3), batches("conv"), Recipe(30, lr=1e-2), progress=False)
    for i in (1, 2, 3):
        branch = method.model[f"a-{i}"]
        alpha = branch.merge.alpha
        start = torch.zeros_like(alpha)
        assert not torch.allclose(alpha, start, atol=1e-4), i
        assert len(branch.merge.weights) == i + 1
    one: Any = Boosting(conv_base(), stages=1, side="fcn4", merge="alpha")
    learn(one, "conv", "a")
    sides, rest = [sum(p.numel() for p in m.parameters()) for m in (one.model["a-1"].side, method.model["a-3"].head)]
    # And the weights of base and three sides.
    assert method.added("a") == 3 * sides + rest + 4


def test_an_earlier_stage_is_not_changed_by_a_later_one() -> None:
    short, long = [Boosting(conv_base(), stages=n, side="fcn4", merge="alpha") for n in (1, 2)]
    short.learn(Task("a", 3), batches("conv"), Recipe(5), progress=False)
    long.learn(Task("a", 3), batches("conv"), Recipe(10), progress=False)
    for a, b in zip(short.model["a-1"].parameters(), long.model["a-1"].parameters(), strict=True):
        assert torch.equal(a, b)


# ---- errors


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    method = build("conv", "features")
    learn(method, "conv", "a")
    with pytest.raises(st.TaskError, match="'a' is learned already"):
        learn(method, "conv", "a")
    with pytest.raises(st.UnknownNameError, match="did you mean 'a'"):
        method(inputs("conv"), "aa")
    for name in ("a/b", "training", "_modules", "keys"):
        with pytest.raises(st.TaskError, match="cannot be a task's name"):
            learn(method, "conv", name)
    with pytest.raises(st.UnknownNameError, match="did you mean 'finetune'"):
        METHODS["fine-tune"]
    with pytest.raises(st.TaskError, match="no torch module"):
        METHODS["finetune"](st.Base(lambda x: x.mean((2, 3)), example=torch.zeros(1, 3, 8, 8)))
    with pytest.raises(st.TaskError, match="use lora"):
        METHODS["residual-adapter"](mlp_base())
    with pytest.raises(st.TaskError, match="name submodules"):
        METHODS["pnn"](mlp_base())
    with pytest.raises(st.TaskError, match="at least one stage"):
        METHODS.build("boosting", mlp_base(), options={"stages": 0})
    with pytest.raises(st.DataError, match="label 3 is out of range"):
        build("conv", "finetune").learn(Task("a", 3), [(inputs("conv"), torch.full((4,), 3))], QUIET, progress=False)


def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("finetune", "sidetune"):
        method, folder = build("conv", name), tmp_path / name
        learn(method, "conv", "a")
        method.save(folder)
        before = method(inputs("conv"), "a").detach()
        method.learn(Task("b", 3, seed=1), batches("conv", 1), QUIET, progress=False)
        with monkeypatch.context() as patch:
            patch.setattr("sidetuning_bench.methods.method.write_json", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                method.save(folder)
        again = load_method(folder, method.base)
        assert list(again.tasks) == saved_tasks(folder) == ["a"]
        assert torch.equal(again(inputs("conv"), "a"), before)
        method.save(folder)
        assert saved_tasks(folder) == ["a", "b"]
        assert len(list(folder.glob("*.safetensors"))) <= 1
    assert saved_tasks(tmp_path / "nowhere") == []


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    method = build("conv", "finetune")
    learn(method, "conv", "a")
    folder = tmp_path / "saved"
    method.save(folder)
    with pytest.raises(st.ArtifactError, match="another base"):
        load_method(folder, mlp_base())
    with pytest.raises(st.ArtifactError, match="holds the method 'finetune'"):
        build("conv", "independent").load(folder)
    with pytest.raises(st.TaskError, match="load into a new one"):
        method.load(folder)
    config = folder / "method.json"
    (tensors,) = folder.glob("*.safetensors")
    good, content = config.read_text(), tensors.read_bytes()
    for text, match in (
        ("{", "is not JSON"),
        (json.dumps({**json.loads(good), "format_version": 99}), "format_version"),
        (json.dumps({k: v for k, v in json.loads(good).items() if k != "tasks"}), "no valid field 'tasks'"),
    ):
        config.write_text(text)
        with pytest.raises(st.ArtifactError, match=match):
            load_method(folder, method.base)
    config.write_text(good)
    for broken in (content[: len(content) // 2], content[:-4] + b"\1\2\3\4", b""):
        tensors.write_bytes(broken)
        with pytest.raises(st.ArtifactError, match=r"cannot be read|was changed"):
            load_method(folder, method.base)
    with pytest.raises(st.ArtifactError, match="does not exist"):
        load_method(tmp_path / "nowhere", method.base)


def edited(file: Path, change: Callable[[dict[str, Any]], object], sign: bool) -> None:
    """Another text, with its right checksum where its maker changed it."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(signed(content) if sign else content))


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda c: c["tasks"][0]["labels"].reverse(), False),
        (lambda c: c["options"].update(coefficient=7.0), False),
        (lambda c: c.update(format_version=1, tasks=[]), False),
        (lambda c: c.update(probe=["a"]), True),
        (lambda c: c.update(output_shape=[]), True),
        (lambda c: c["tasks"][0].pop("head"), True),
        (lambda c: c.update(tensors=f"../{c['tensors']}"), True),
    ],
)
def test_a_changed_method_is_refused(tmp_path: Path, change: Any, sign: bool) -> None:
    method = EWC(mlp_base())
    method.learn(
        Task("pets", 2, labels=["cat", "dog"]), [(inputs("mlp"), torch.tensor([0, 1, 0, 1]))], QUIET, progress=False
    )
    method.save(tmp_path)
    edited(tmp_path / "method.json", change, sign)
    with pytest.raises(st.ArtifactError, match=r"method\.json|was learned from another base"):
        load_method(tmp_path, mlp_base())


def update_options(changed: dict[str, Any], content: dict[str, Any]) -> None:
    content["options"].update(changed)


def test_options_of_another_type_are_refused(tmp_path: Path) -> None:
    method = METHODS.build("sidetune", mlp_base(), options={"side": "mlp"})
    method.learn(Task("pets", 2), [(inputs("mlp"), torch.tensor([0, 1, 0, 1]))], QUIET, progress=False)
    method.save(tmp_path)
    for value in (0.5, [1], "x"):
        changed = {"side_options": value}
        edited(tmp_path / "method.json", partial(update_options, changed), True)
        with pytest.raises(st.SideTuningError, match="cannot be built"):
            load_method(tmp_path, mlp_base())


def test_a_trunk_with_a_3d_convolution_is_copied() -> None:
    class Lambda(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.deep = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(self.conv(x).unsqueeze(1)).mean((3, 4)).flatten(1)

    base, x = st.Base(Lambda(), example=torch.zeros(1, 3, 8, 8)), torch.rand(2, 3, 8, 8)
    assert torch.allclose(Trunk(base)(x), base(x).out, atol=1e-5)
