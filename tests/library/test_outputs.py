"""Where the channels of an inner map are: told by the network's modules, or by the user, and never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sidetuning as st
from sidetuning.artifacts import read_task, write_files

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Last(nn.Module):
    """(b, h, w, c) to the same, as blocks of windows attend."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Turn(nn.Module):
    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *self.places)


class Norm2d(nn.LayerNorm):
    """A layer norm of (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


def mixed(width: int = 12) -> nn.Sequential:
    """Channels first, then last, then first again."""
    first = [nn.Conv2d(3, width, 2, 2), Norm2d(width), nn.ReLU(), Turn(2, 3, 1), Last(width), nn.Identity()]
    return nn.Sequential(*first, Turn(3, 1, 2), nn.Conv2d(width, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("tap", ["0", "1", "2", "4", "4.norm", "5", "6", "7"])
def test_every_tap_is_channels_first_whatever_the_network_does_there(tap: str) -> None:
    base = st.Base(mixed(), example=EXAMPLE, taps=[tap])
    assert base.tap_shapes[tap] == (12, 8, 8)
    x = torch.rand(2, 3, 16, 16)
    raw = base.net[: int(tap[0]) + 1](x) if "." not in tap else None  # type: ignore[index]
    if raw is not None:
        expected = raw.permute(0, 3, 1, 2) if base.layouts[tap] == "nhwc" else raw
        assert torch.equal(base(x).taps[tap], expected)


def test_a_tap_that_cannot_be_told_is_refused_unless_the_user_tells() -> None:
    with pytest.raises(st.ShapeError, match=r"cannot be told from the network; say it, taps=\{'4': 'nhwc'\}"):
        st.Base(mixed(8), example=EXAMPLE, taps=["4"])
    base = st.Base(mixed(8), example=EXAMPLE, taps={"4": "nhwc", "7": "nchw"})
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(base(x).taps["4"], base.net[:5](x).permute(0, 3, 1, 2))  # type: ignore[index]
    assert base.layouts == {"4": "nhwc", "7": "nchw"}

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unfold(2, 2, 2).sum(-1)

    with pytest.raises(st.ShapeError, match="cannot be told"):
        st.Base(nn.Sequential(Plain(), nn.Flatten()), example=torch.zeros(1, 5, 4, 6), taps=["0"])


@pytest.mark.parametrize(
    ("taps", "error", "sentence"),
    [
        ({"4": "nwhc"}, st.UnknownNameError, "did you mean 'nhwc'"),
        ({"9": "nhwc"}, st.ShapeError, "is no map; leave its layout out"),
        ({"44": "nhwc"}, st.UnknownNameError, "tap '44' is not in the base"),
    ],
)
def test_layouts_that_cannot_be_are_refused(taps: dict[str, str], error: Any, sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        st.Base(mixed(), example=EXAMPLE, taps=taps)


def test_the_output_is_turned_too_unless_the_user_says_otherwise() -> None:
    net = mixed()[:5]
    assert st.Base(net, example=EXAMPLE).output_shape == (12, 8, 8)
    assert st.Base(net, example=EXAMPLE, channels_last=False).output_shape == (8, 8, 12)
    assert st.Base(mixed()[:3], example=EXAMPLE).select.channels_last is False
    assert st.Base(lambda x: x, example=EXAMPLE).output_shape == (3, 16, 16)


def test_a_tap_whose_first_dimension_is_not_the_batch_is_refused() -> None:
    class Windows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 3, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.windows = Windows()

        def forward(self, x: Tensor) -> Tensor:
            return self.windows(x).reshape(len(x), -1, 4)

    with pytest.raises(st.ShapeError, match="first dimension is the batch"):
        st.Base(Net(), example=torch.zeros(1, 6, 4), taps=["windows"])


def test_a_told_layout_is_saved_with_its_task_and_its_cache(tmp_path: Path) -> None:
    with st.seeded(0):
        net = mixed(8)
    base, x = st.Base(net, example=EXAMPLE), torch.rand(2, 3, 16, 16)
    model = st.SideTuner(base)
    model.add_task("last", side="ladder", head=2, taps={"4": "nhwc"})
    model.save_task("last", tmp_path / "last")
    again = st.SideTuner(base)
    again.load_task(tmp_path / "last")
    assert torch.equal(again(x, "last"), model(x, "last"))
    model.add_task("both", side="ladder", head=2, taps={"4": None, "7": "nchw"})
    assert model.base.layouts == {"4": "nhwc", "7": "nchw"}
    with pytest.raises(st.TaskError, match="reads the tap '4' as nchw, and this model's base as nhwc"):
        model.add_task("first", side="ladder", head=2, taps={"4": "nchw"})
    data = TensorDataset(x, torch.zeros(2))
    folders = {
        st.cache_features(base.with_taps({"4": layout}), data, tmp_path, progress=False).folder
        for layout in ("nhwc", "nchw")
    }
    assert len(folders) == 2


def test_older_tasks_read_their_taps_as_they_were_trained(tmp_path: Path) -> None:
    with st.seeded(0):
        base = st.Base(mixed(), example=EXAMPLE)
    model, x = st.SideTuner(base), torch.rand(2, 3, 16, 16)
    # Wrong, as one layout for the whole network had it.
    model.add_task("old", side="ladder", head=2, taps={"4": "nchw"})
    model.save_task("old", tmp_path)
    config = read_task(tmp_path)[0]
    del config["parts"]["layouts"]
    write_files(tmp_path, {k: v for k, v in config.items() if k != "sha256"}, load_file(tmp_path / "side.safetensors"))
    again = st.SideTuner(base)
    again.load_task(tmp_path)
    assert again.base.layouts == {"4": "nchw"} and torch.equal(again(x, "old"), model(x, "old"))
