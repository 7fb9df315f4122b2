"""A base is a frozen, pure function of each sample; what is not is refused, and every input is right or refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sidetuning as st
from conftest import BASES, TAPS, conv_net, inputs

NORM: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


def image_base(**options: Any) -> st.Base:
    with st.seeded(0):
        return st.Base(conv_net(), example=torch.zeros(1, 3, 32, 32), **{**NORM, **options})


@pytest.mark.parametrize("kind", BASES)
def test_every_thread_gets_its_own_answers(kind: str) -> None:
    model = st.SideTuner(BASES[kind]())
    model.add_task("t", side="ladder", head=3, taps=TAPS[kind])
    batches = [inputs(kind, 4, seed=seed) for seed in range(4)]
    expected = [model(x, "t").detach() for x in batches]
    wrong, stop = [0] * 4, threading.Event()

    def serve(i: int) -> None:
        for _ in range(25):
            wrong[i] += not torch.allclose(model(batches[i], "t").detach(), expected[i], atol=1e-5)
            wrong[i] += not torch.allclose(model.forward_all(batches[i])["t"].detach(), expected[i], atol=1e-5)

    def change() -> None:
        while not stop.is_set():
            model.add_task("passing", side="ladder", head=2, taps=TAPS[kind][:1])
            model.remove_task("passing")

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    changing = threading.Thread(target=change)
    for thread in (changing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    changing.join()
    assert wrong == [0] * 4


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.linear(x))
        return out


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda x: F.dropout(x, 0.5, training=True), "other outputs for the same input"),
        (lambda x: x + torch.randn(len(x), 1), "other outputs for the same input"),
        (lambda x: x - x.mean(0), "when another one is in its batch"),
        (lambda x: F.batch_norm(x, None, None, training=True) if len(x) > 1 else x, "when another one is in its batch"),
        (lambda x: x.T, "first dimension must be the batch"),
        (lambda x: x.mean(0, keepdim=True), "first dimension must be the batch"),
        (lambda x: x.view(1, 4), "does not take two samples at once"),
    ],
)
def test_what_is_no_function_of_each_sample_is_refused(function: Any, sentence: str) -> None:
    with pytest.raises(st.ShapeError, match=sentence):
        st.Base(Function(function), example=torch.zeros(1, 4))


@pytest.mark.parametrize(
    "write", [nn.ReLU(inplace=True), lambda x: x.sub_(x.mean(1, keepdim=True)), lambda x: x.mul_(2)]
)
def test_a_base_that_writes_into_its_input_changes_nobody_elses(write: Any) -> None:
    def net(x: Tensor) -> Tensor:
        out: Tensor = write(x)
        return out + 1

    base = st.Base(net, example=torch.randn(1, 4))
    model = st.SideTuner(base)
    with st.seeded(0):
        model.add_task("t", side="mlp", merge="side-only", head="identity")
    x = torch.randn(3, 4)
    before = x.clone()
    expected = model["t"].side_output(before, base(before))
    assert expected is not None and torch.equal(model(x, "t"), expected) and torch.equal(x, before)


class Renamed(nn.Module):
    """One module under two names: tracing folds it once for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.again = self.conv
        self.norm.load_state_dict({**self.norm.state_dict(), "running_mean": torch.full((4,), 0.3)})

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + F.conv2d(x, self.again.weight)).mean((2, 3))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net[1].running_mean.fill_(0.3)  # type: ignore[union-attr, operator]
    net[0].register_forward_hook(lambda *call: 3 * call[2])
    return net


class Replaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.forward = self.other  # type: ignore[method-assign]

    def other(self, x: Tensor) -> Tensor:
        return (-self.norm(self.conv(x))).relu().mean((2, 3))


class Keeps(nn.Module):
    """Keeps what it computes once, until it is trained, as the attention of LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.kept: dict[str, Any] = {}

    def train(self, mode: bool = True) -> Keeps:
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        key = str(len(x.shape)) if isinstance(x, Tensor) else "traced"
        if key not in self.kept:
            self.kept[key] = x.new_ones(()) * self.scale if isinstance(x, Tensor) else x * 2
        return (x * self.kept[key]).mean((2, 3))


def test_folding_leaves_the_network_as_it_is_and_types_may_change_after_a_pass() -> None:
    net = Keeps()
    base, x = st.Base(net, example=torch.zeros(1, 3, 8, 8)), torch.rand(3, 3, 8, 8)
    expected = base(x).out
    for _ in range(2):
        assert torch.allclose(base.folded()(x).out, expected, atol=1e-5)
        assert all(isinstance(value, Tensor) for value in net.kept.values())
    assert torch.equal(base(x).out, expected)
    assert base.to(torch.bfloat16)(x).out.dtype == torch.bfloat16 and not net.training


@pytest.mark.parametrize("build", [Renamed, hooked, Replaced, Keeps])
def test_folded_features_are_those_of_the_base(build: Any) -> None:
    base = st.Base(build(), example=torch.zeros(1, 3, 8, 8))
    x = torch.rand(3, 3, 8, 8)
    assert torch.allclose(base.folded()(x).out, base(x).out, rtol=1e-3, atol=1e-5)


def test_images_are_right_or_refused_in_tensors_and_mappings_alike() -> None:
    base = image_base()
    whole = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    share = whole.float() / 255
    expected = base(whole).out
    for x in (whole, share, share.double(), share.half().float()):
        for given in (x, {"x": x}):
            assert torch.allclose(base(given).out, expected, atol=1e-2 if x is not whole else 1e-5)
    mean, std = (torch.tensor(NORM[name]).view(-1, 1, 1) for name in ("mean", "std"))
    for wrong in ((share - mean) / std, whole.float(), whole.long(), whole.int()):
        for given in (wrong, {"x": wrong}):
            with pytest.raises(st.ShapeError, match=r"as uint8, or as floats in \[0, 1\]"):
                base(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type_takes_every_image(dtype: torch.dtype) -> None:
    model = st.SideTuner(image_base())
    model.add_task("t", side="fcn4", merge="mlp2", head=3)
    whole = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected = model(whole, "t")
    model.to(dtype)
    for x in (whole, whole.float() / 255, whole.double() / 255):
        out = model(x, "t")
        assert out.dtype == dtype and torch.allclose(out.float(), expected, atol=0.1)


@pytest.mark.parametrize("merge", ["fixed", "mlp2", "base-only"])
def test_the_gradient_of_the_input_is_the_true_one(merge: str) -> None:
    base = image_base()
    model = st.SideTuner(base)
    model.add_task("t", side="fcn4", merge=merge, head=3)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x, "t").sum(), x)
    prepared = base.prepare(x)
    whole = model["t"](prepared, st.Features(base.net(prepared)))
    (expected,) = torch.autograd.grad(whole.sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert not base(torch.rand(2, 3, 32, 32)).out.requires_grad


def test_frozen_tasks_laterals_and_parts_do_not_move() -> None:
    x = inputs("conv", 8)
    model = st.SideTuner(BASES["conv"](TAPS["conv"]))
    for name in ("frozen", "lateral", "part"):
        model.add_task(name, side="fusion", head=3)
    model.add_task("new", side="fusion", head=3, laterals=["lateral"])
    model.freeze_task("frozen")
    side = model["part"].side
    assert side is not None
    side.requires_grad_(False)
    before = {name: model(x, name).detach() for name in model.tasks}
    statistics = {k: v.clone() for k, v in side.state_dict().items()}
    for mode in (model.train, model["frozen"].train, model["lateral"].train, nn.Sequential(model).train):
        mode()
        model(x, "new").sum().backward()
        model.forward_all(x)["part"].sum().backward()
    model.eval()
    assert torch.equal(model(x, "frozen"), before["frozen"]) and torch.equal(model(x, "lateral"), before["lateral"])
    assert all(torch.equal(v, side.state_dict()[k]) for k, v in statistics.items())
    assert not torch.equal(model(x, "new"), before["new"])
    model.remove_task("new")
    model.train()
    assert model["lateral"].training and not model["frozen"].training


def test_a_task_costs_the_same_however_many_there_are() -> None:
    model = st.SideTuner(image_base())
    passes: list[int] = []
    model.base.net.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[attr-defined]
    counted: list[int] = []
    for i in range(60):
        visited = 0

        def count(module: nn.Module, *_: Any) -> None:
            nonlocal visited
            visited += 1

        handle = torch.nn.modules.module.register_module_forward_hook(count)
        model.add_task(f"t{i}", side="mlp", head=2, side_options={"hidden": 2})
        handle.remove()
        counted.append(visited)
    assert not passes and len(set(counted)) == 1
    shared = nn.Linear(16, 2)
    model.add_task("a", side="mlp", head=shared)
    with pytest.raises(st.TaskError, match="also that of task 'a'"):
        model.add_task("b", side="mlp", head=shared)
    model.remove_task("a")
    model.add_task("b", side="mlp", head=shared)
    with pytest.raises(st.TaskError, match="also that of the base"):
        model.add_task("c", side=model.base.net, head=2)  # type: ignore[arg-type]


def test_taps_of_a_later_task_do_not_change_a_bit_of_the_others() -> None:
    for kind in BASES:
        model = st.SideTuner(BASES[kind]())
        model.add_task("first", side="mlp", head=3)
        x = inputs(kind)
        before = model(x, "first")
        model.add_task("later", side="ladder", head=2, taps=TAPS[kind])
        assert torch.equal(model(x, "first"), before), kind


def test_nothing_of_a_lateral_or_a_frozen_task_moves_once_it_is_one() -> None:
    x, y = inputs("conv", 8), torch.arange(8) % 3
    model = st.SideTuner(BASES["conv"](TAPS["conv"]))
    for name in ("a", "c"):
        model.add_task(name, side="fusion", head=3)
    model.train()
    model.freeze_task("c")
    model.add_task("b", side="fusion", head=3, laterals=["a"])
    before = {name: {k: v.clone() for k, v in model[name].state_dict().items()} for name in ("a", "c")}
    model(x, "c")
    st.fit(model, "b", [(x, y)], steps=2, progress=False)
    for name, state in before.items():
        assert all(torch.equal(value, model[name].state_dict()[key]) for key, value in state.items())


def test_keys_that_a_network_names_reach_it() -> None:
    def net(mask: Tensor, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return x * mask if extra is None else x * mask + extra

    base = st.Base(net, example={"mask": torch.ones(1, 4), "x": torch.ones(1, 4)})
    given = {"mask": torch.full((2, 4), 2.0), "x": torch.ones(2, 4), "extra": torch.ones(2, 4)}
    assert torch.equal(base(given).out, torch.full((2, 4), 3.0))


def test_tensors_that_a_base_has_lost_are_nobodys() -> None:
    model = st.SideTuner(st.Base(nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(40))), example=torch.zeros(1, 4)))
    model.add_task("first", side="mlp", head=2)
    model.double().float()
    for i in range(60):
        model.add_task(f"t{i}", side="mlp", head=2, side_options={"hidden": 2})


@pytest.mark.parametrize("side", ["slim", "copy", "transformer", "mlp"])
def test_an_entry_that_the_network_does_not_read_is_refused(side: str) -> None:
    """As "idx" in data sets, or a slip of the pen; networks of transformers would swallow any of them."""
    model = st.SideTuner(BASES["sequence"](("embedding",)))
    model.add_task("t", side=side, head=2)
    right = inputs("sequence", 4)
    assert isinstance(right, dict)
    mask = right.pop("attention_mask")
    for name, sentence in (
        ("atention_mask", "did you mean 'attention_mask'"),
        ("idx", "'idx' is not read by the network; there is attention_mask"),
        ("input_id", "did you mean 'input_ids'"),
        ("extra", "reads 'attention_mask', which the input lacks"),
    ):
        with pytest.raises(st.UnknownNameError, match=sentence):
            st.fit(model, "t", [{**right, name: mask, "labels": torch.zeros(4).long()}], steps=1, progress=False)


def test_a_network_of_any_names_takes_those_of_its_example() -> None:
    class Swallows(nn.Module):
        def forward(self, **tensors: Tensor) -> Tensor:
            return tensors["left"] + tensors.get("right", torch.zeros(()))

    x = {"left": torch.rand(3, 4), "right": torch.rand(3, 4)}
    assert torch.equal(st.Base(Swallows(), example=x)(x).out, x["left"] + x["right"])
    one = st.Base(torch.compile(Swallows(), backend="eager"), example={"left": torch.zeros(1, 4)})
    with pytest.raises(st.UnknownNameError, match="'right' is not read"):
        one(x)


def test_a_network_of_timm_refuses_whole_images_that_nobody_normalises() -> None:
    net = conv_net()
    net.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}  # type: ignore[assignment]
    base, whole = st.Base(net, example=torch.zeros(1, 3, 32, 32)), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for x in (whole, {"x": whole}, {"pixel_values": whole}):
        with pytest.raises(st.ShapeError, match=r"normalised by mean=\(0.4, 0.5, 0.6\) and std=.*; give Base mean="):
            base(x)
    assert torch.equal(base(torch.zeros(2, 3, 32, 32)).out, net(torch.zeros(2, 3, 32, 32)))
    assert st.Base(net, example=torch.zeros(1, 3, 32, 32), **NORM)(whole).out.shape == (2, 16)
    with pytest.raises(st.ShapeError, match="needs both mean= and std="):
        st.Base(net, example=torch.zeros(1, 3, 32, 32), mean=[0.5] * 3)


def test_bgr_networks_get_their_channels_in_reverse_order() -> None:
    plain, reverse = image_base(), image_base(bgr=True)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for given in (x, {"x": x}):
        prepared = plain.prepare(x)
        assert isinstance(prepared, Tensor)
        expected = plain.net(prepared.flip(1))
        assert torch.equal(reverse(given).out, expected)
    assert reverse.identity().digest() != plain.identity().digest()


def test_the_state_of_an_earlier_text_and_unknown_entries_are_refused() -> None:
    base = BASES["sequence"]()
    x = inputs("sequence")
    assert isinstance(x, dict)
    for key in ("past_key_values", "cache_params", "mems"):
        with pytest.raises(st.ShapeError, match=f"does not see what '{key}' stands for"):
            base({**x, key: [torch.zeros(1)]})
    for key, near in (
        ("atention_mask", "did you mean 'attention_mask'"),
        ("boxes", "there is attention_mask, extra, input_ids, x"),
    ):
        with pytest.raises(st.UnknownNameError, match=near):
            base({**x, key: x["input_ids"]})
    assert base({**x, "extra": torch.zeros(4, 2)}).out.shape == (4, 6, 16)


@pytest.mark.parametrize("example", [[1, 2], (torch.zeros(1, 3, 32, 32),), "image", None])
def test_an_example_is_a_tensor_or_a_mapping(example: Any) -> None:
    with pytest.raises(st.ShapeError, match="an input is a tensor or a mapping to tensors, not a "):
        st.Base(lambda x: x, example=example)
    with pytest.raises(st.ShapeError, match="an input is a tensor or a mapping to tensors, not a "):
        image_base().with_example(example)


def test_an_image_under_two_names_is_refused() -> None:
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises(st.ShapeError, match="images under 'x' and 'pixel_values'; give one of them"):
        image_base()({"x": x, "pixel_values": x})


def test_an_example_that_the_network_does_not_take_is_refused_in_a_sentence() -> None:
    with pytest.raises(st.ShapeError, match=r"does not run on its example \(.*; give another example="):
        st.Base(conv_net(), example=torch.zeros(1, 4, 32, 32))
    with pytest.raises(st.UnknownNameError, match="reads 'input', which the input lacks"):
        st.Base(conv_net(), example={"images": torch.zeros(1, 3, 32, 32)})
    with pytest.raises(st.ShapeError, match="does not run on its example"):
        st.Base(lambda images: images @ images, example={"images": torch.zeros(1, 3, 32, 8)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sides_of_a_half_precision_network_are_trained_in_full(dtype: torch.dtype) -> None:
    for kind in BASES:
        net = BASES[kind]().net.to(dtype)  # type: ignore[attr-defined]
        base = st.Base(net, example=BASES[kind]().example, taps=TAPS[kind])
        model, x = st.SideTuner(base), inputs(kind)
        model.add_task("t", side="ladder", head=3)
        out = model(x, "t")
        assert out.dtype == torch.float32 and base(x).out.dtype == torch.float32 and base.dtype == dtype
        st.fit(model, "t", [(x, torch.arange(4) % 3)], steps=1, progress=False)
        assert model.to(dtype)(x, "t").dtype == dtype
        assert next(model.to(torch.float64)["t"].parameters()).dtype == model(x, "t").dtype == torch.float64


@pytest.mark.parametrize("side", ["fcn4", "mlp", "transformer"])
def test_functions_of_doubles_keep_their_inputs_and_sides_take_floats(side: str) -> None:
    seen: list[torch.dtype] = []

    def net(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x.double().mean((2, 3))

    model = st.SideTuner(st.Base(net, example=torch.zeros(1, 3, 16, 16, dtype=torch.float64)))
    model.add_task("t", side=side, head=2)
    out = model(torch.rand(2, 3, 16, 16, dtype=torch.float64), "t")
    assert out.dtype == torch.float32 and set(seen) == {torch.float64}


class Volume(nn.Module):
    """Has weights of 3-d convolutions beside those of images."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.video = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.video(self.image(x).unsqueeze(1)).squeeze(1)
        return out


def test_a_network_with_3d_convolutions_is_folded_and_copied() -> None:
    with st.seeded(0):
        base = st.Base(Volume(), example=torch.zeros(1, 3, 12, 12))
    x = torch.rand(2, 3, 12, 12)
    folded = base.folded()
    assert folded is not base
    torch.testing.assert_close(folded(x).out, base(x).out, rtol=1e-4, atol=1e-5)
    model = st.SideTuner(base)
    model.add_task("t", side="copy", head=2)
    st.fit(model, "t", [(x, torch.tensor([0, 1]))], steps=2, progress=False)


def test_a_base_that_is_moved_nowhere_is_never_in_training_mode() -> None:
    """`fit` moves the model to where it is, and other threads may be served meanwhile."""
    base = image_base()
    modes: list[bool] = []

    class Watched(nn.Module):
        def train(self, mode: bool = True) -> Watched:
            modes.append(mode)
            return super().train(mode)

    base.net.add_module("watched", Watched())  # type: ignore[attr-defined]
    base.to("cpu")
    base.float()
    assert True not in modes
    base.double()
    assert modes == [True, False] and not base.net.training  # type: ignore[attr-defined]
