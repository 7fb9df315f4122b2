"""What sides see: no later token than the base does, no padding, and images under every name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sidetuning as st
from conftest import TinyBert, conv_base, sequence_base
from sidetuning.artifacts import read_task, write_files
from sidetuning.folding import may_be_channels_last

TAPS = ("embedding", "layer")
TOKEN_SIDES = ("transformer", "ladder", "mlp")


class Decoder(nn.Module):
    """Ids and a mask -> (b, t, 16); a token sees itself and earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.embedding(input_ids))[0]  # type: ignore[no-any-return]


def decoder() -> st.Base:
    example = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    with st.seeded(1):
        return st.Base(Decoder(), example=example, taps=TAPS)


def text(ids: Tensor, before: int = 0, after: int = 0) -> dict[str, Tensor]:
    """Ids (b, t) with padding before and after them."""
    mask = nn.functional.pad(torch.ones_like(ids), (before, after))
    return {"input_ids": nn.functional.pad(ids, (before, after)), "attention_mask": mask}


IDS = torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def sided(base: st.Base, side: str, **options: Any) -> st.SideTuner:
    """The side's own output, as a task."""
    model = st.SideTuner(base)
    model.add_task("t", side=side, merge="side-only", head="identity", side_options=options, seed=0)
    return model


def test_a_base_is_known_as_a_decoder_by_what_it_computes() -> None:
    assert decoder().causal and not sequence_base().causal
    table = nn.Embedding(50, 16)
    # Each token alone: nothing is lost by looking at the others.
    assert not st.Base(lambda input_ids: table(input_ids), example={"input_ids": IDS[:1]}).causal
    for example in (text(IDS[:1, :1]), text(IDS[:1, :2]), text(IDS[:1, :4], after=3)):
        with st.seeded(1):
            assert st.Base(Decoder(), example=example).causal
            assert not st.Base(TinyBert(), example=example).causal
    weak = TinyBert()
    with torch.no_grad():
        # Of random weights a token hardly moves another.
        weak.layer.self_attn.out_proj.weight.mul_(1e-4)
    assert not st.Base(weak, example=text(IDS[:1])).causal
    mean = st.Base(lambda x: x.cumsum(1), example=torch.zeros(1, 5, 4))
    assert mean.causal
    assert not st.Base(lambda x: x.flip(1).cumsum(1), example=torch.zeros(1, 5, 4)).causal


@pytest.mark.parametrize("side", [*TOKEN_SIDES, "copy"])
def test_a_side_of_a_decoder_sees_no_later_token(side: str) -> None:
    model = sided(decoder(), side)
    changed = IDS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50
    before, after = model(text(IDS), "t"), model(text(changed), "t")
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize("side", ["transformer", "ladder"])
def test_a_side_of_an_encoder_sees_all_tokens_and_causal_may_be_said(side: str) -> None:
    changed = IDS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    for options, sees in (({}, True), ({"causal": True}, False)):
        model = sided(sequence_base(TAPS), side, **options)
        if side == "transformer":
            same = torch.equal(model(text(IDS), "t")[:, :5], model(text(changed), "t")[:, :5])
            assert same is not sees
    both = sided(decoder(), side, causal=False)
    assert not torch.equal(both(text(IDS), "t")[:, :4], both(text(changed), "t")[:, :4])


@pytest.mark.parametrize("side", TOKEN_SIDES)
@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (2, 1)])
def test_padding_on_either_side_changes_nothing(side: str, before: int, after: int) -> None:
    for base in (sequence_base(TAPS), decoder()):
        if before and base.causal and side == "ladder":
            # This decoder itself begins its state with the padding.
            continue
        model = sided(base, side)
        out = model(text(IDS, before, after), "t")
        assert out.isfinite().all()
        assert torch.allclose(out[:, before : before + 6], model(text(IDS), "t"), atol=1e-5)


def test_a_task_of_version_1_on_a_decoder_gives_what_it_gave(tmp_path: Path) -> None:
    model = sided(decoder(), "transformer", causal=False)
    model.save_task("t", tmp_path)
    config = read_task(tmp_path)[0]
    del config["parts"]["layouts"]
    config["parts"]["side"][1].clear()
    write_files(tmp_path, {k: v for k, v in config.items() if k != "sha256"}, load_file(tmp_path / "side.safetensors"))
    assert json.loads((tmp_path / "side.json").read_text())["parts"]["side"] == ["transformer", {}]
    again = st.SideTuner(decoder())
    again.load_task(tmp_path)
    assert torch.equal(again(text(IDS), "t"), model(text(IDS), "t"))


def test_a_ladder_refuses_taps_of_another_length_than_the_text() -> None:
    class Padded(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            t = input_ids.shape[1]
            ids = nn.functional.pad(input_ids, (0, -t % 4))
            return super().forward(ids, attention_mask)[:, :t]

    base = st.Base(Padded(), example=text(IDS[:, :4]), taps=["embedding"])
    model = sided(base, "ladder")
    assert model(text(IDS[:, :4]), "t").shape == (3, 4, 16)
    with pytest.raises(st.ShapeError, match="the tap 'embedding' has 8 tokens and the text 6"):
        model(text(IDS), "t")


class Vision(nn.Module):
    """Images under their name, as models of transformers take them -> (b, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.conv(pixel_values).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("side", ["fcn3", "fcn4", "fcn5", "fcn8", "mlp", "transformer", "copy"])
@pytest.mark.parametrize("named", [False, True])
def test_an_image_is_the_same_under_every_name(side: str, named: bool) -> None:
    example: Any = torch.zeros(1, 3, 32, 32)
    net: nn.Module = Vision() if named else nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for given in (example, {"pixel_values": example}):
        base = st.Base(net, example=given, mean=[0.4] * 3, std=[0.2] * 3)
        model = sided(base, side)
        whole = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        expected = model(whole, "t")
        for key in ("x", "pixel_values"):
            for x in (whole, whole.float() / 255):
                assert torch.allclose(model({key: x}, "t"), expected, atol=1e-5)


def test_a_copy_of_strided_pointwise_convolutions_keeps_torchs_layout() -> None:
    strided = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert may_be_channels_last(plain) and not may_be_channels_last(strided)
    for net, options, last in ((strided, {}, False), (plain, {}, True), (plain, {"channels_last": False}, False)):
        model = sided(st.Base(net, example=torch.zeros(1, 3, 16, 16)), "copy", **options)
        side = model["t"].side
        weight = dict(side.named_parameters())["net.0.weight"]  # type: ignore[union-attr]
        assert weight.is_contiguous(memory_format=torch.channels_last) is last
        model(torch.rand(2, 3, 16, 16), "t").sum().backward()


class Fixed(nn.Module):
    """A layer without a gradient, of which zeros are zeros, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.last = nn.Linear(12, 12, bias=False), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.fixed(x)
        return self.last(x)  # type: ignore[no-any-return]


def test_a_copy_keeps_what_zeros_do_not_show() -> None:
    base, x = st.Base(Fixed(), example=torch.zeros(1, 12)), torch.randn(4, 12)
    assert torch.allclose(sided(base, "copy")(x, "t"), base(x).out, atol=1e-6)


def test_a_fusion_side_takes_a_batch_of_one_on_taps_of_one_cell() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Flatten())
    model = st.SideTuner(st.Base(net, example=torch.zeros(1, 3, 16, 16), taps=("0", "2")))
    model.add_task("t", side="fusion", head=3)
    assert st.fit(model, "t", [(torch.rand(1, 3, 16, 16), torch.tensor([1]))], progress=False).steps == 1


@pytest.mark.parametrize("size", [(64, 64), (64, 16)])
def test_a_transformer_side_refuses_another_grid(size: tuple[int, int]) -> None:
    model = sided(conv_base(), "transformer")
    with pytest.raises(st.ShapeError, match=r"images of \(8, 8\) patches.*with_example"):
        model(torch.rand(2, 3, *size), "t")


def test_a_base_that_does_not_tell_its_vocabulary_is_refused_by_sides_with_a_table() -> None:
    weight = torch.randn(50, 4)
    base = st.Base(lambda input_ids: weight[input_ids], example={"input_ids": IDS[:1]})
    for side in ("mlp", "transformer"):
        with pytest.raises(st.ShapeError, match="does not tell how many token ids it knows"):
            sided(base, side)
