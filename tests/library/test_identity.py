"""One identity of a base: equal for equal bases, different for different ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sidetuning as st
from conftest import conv_net, inputs


def timm_base(**options: Any) -> st.Base:
    pytest.importorskip("timm")
    with st.seeded(0):
        return st.load_base("timm:resnet18", pretrained=False, **options)


def test_a_task_of_the_vector_is_refused_on_the_map_of_the_same_weights(tmp_path: Path) -> None:
    vector, channels = timm_base(), timm_base(output="map")
    assert vector.identity().sha256 == channels.identity().sha256 and vector.identity() != channels.identity()
    model = st.SideTuner(vector)
    model.add_task("pets", side=None, merge="base-only", head=3)
    model.save_task("pets", tmp_path)
    with pytest.raises(st.ArtifactError, match=r"it returned \(512,\), this base returns \(512, 7, 7\)"):
        st.SideTuner(channels).load_task(tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet44-cifar10", {"pretrained": False}),
        ("resnet44-cifar10", {"output": "map"}),
        ("resnet44-cifar10", {"revision": "v9"}),
        ("timm:resnet18", {"revision": "v9", "pretrained": False}),
        ("onnx:net.onnx", {"revision": "v9"}),
        ("onnx:net.onnx", {"pretrained": False}),
        ("onnx:net.onnx", {"weights": "other.safetensors"}),
    ],
)
def test_options_that_a_base_does_not_read_are_refused(name: str, options: dict[str, Any]) -> None:
    option = next(iter(options))
    with pytest.raises(st.UnknownNameError, match=f"{name} does not read {option}=; leave it out"):
        st.load_base(name, **options)


def test_what_changes_the_features_changes_the_identity() -> None:
    net, x = conv_net().eval(), inputs("conv")
    assert isinstance(x, torch.Tensor)
    norm: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.2] * 3}
    bases = [
        st.Base(net, example=x),
        st.Base(net, example=x, **norm),
        st.Base(net, example=x, mean=[0.5004] * 3, std=[0.2] * 3),
        st.Base(net, example=x, output=lambda out: 2 * out),
        st.Base(net, example=x, output=lambda out: 3 * out),
        st.Base(conv_net()[:5].eval(), example=x),
        st.Base(conv_net()[:5].eval(), example=x, channels_last=True),
    ]
    digests = [base.identity().digest(base.tap_shapes) for base in bases]
    assert len(set(digests)) == len(bases)
    again = st.Base(net, example=x, **norm)
    assert again.identity() == bases[1].identity() and again.identity().digest({}) == digests[1]
    assert again.with_taps(["2"]).identity() == again.identity()
    assert again.identity().digest({"2": (8, 16, 16)}) != digests[1]


def test_files_of_the_first_version_are_compared_by_what_they_hold() -> None:
    net, x = conv_net().eval(), inputs("conv")
    assert isinstance(x, torch.Tensor)
    base = st.Base(net, example=x, mean=[0.4914] * 3, std=[0.2] * 3)
    known = base.identity()
    rounded = {**known.preparation, "mean": [0.491] * 3}
    assert known.difference({"sha256": known.sha256}) is None
    assert known.difference({"sha256": known.sha256, "output_shape": [16], "preparation": rounded}) is None
    assert known.difference(known.record()) is None
    assert "otherwise" in str(known.difference({**known.record(), "preparation": rounded}))
    assert "sha256" in str(known.difference({**known.record(), "sha256": "0" * 64}))


def test_weights_moved_in_place_are_seen() -> None:
    base = st.Base(nn.Linear(4, 3), example=torch.zeros(1, 4))
    first = base.identity()
    assert base.identity() == first
    with torch.no_grad():
        base.net.weight[0, 0] += 1  # type: ignore[attr-defined]
    second = base.identity()
    base.net.weight.data[0, 0] += 1  # type: ignore[attr-defined]
    assert len({first.sha256, second.sha256, base.identity().sha256}) == 3
