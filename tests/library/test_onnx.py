"""Bases from ONNX files: of any layout, type and batch size, right or refused in a sentence."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sidetuning as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

IMAGES = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def save(path: Path, nodes: list[Any], given: dict[str, Any], shape: list[Any], weights: tuple[Any, ...] = ()) -> str:
    """Write a graph from `nodes`, with inputs of (type, shape), and the output "y" of a shape."""
    inputs = [helper.make_tensor_value_info(name, *info) for name, info in given.items()]
    kind = given.get("y_type", TensorProto.FLOAT)
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", kind, shape)], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return f"onnx:{path}"


def pictures(folder: Path, kind: int = TensorProto.FLOAT, sizes: tuple[Any, ...] = ("b", 3, 8, 8)) -> str:
    """A network that gives the mean of each channel, (b, 3); with the channels last where `sizes` has them there."""
    order = [0, 3, 1, 2] if sizes[3] == 3 else [0, 1, 2, 3]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=order),
        helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        helper.make_node("Flatten", ["g"], ["y"]),
    ]
    return save(folder / "net.onnx", nodes, {"x": (kind, sizes)}, [sizes[0], 3])


def texts(folder: Path, batch: Any = "b", length: Any = "t") -> str:
    """An embedding of 50 token ids, times the mask: (b, t, 4)."""
    table = numpy_helper.from_array(np.random.RandomState(0).randn(50, 4).astype("f"), "table")
    axes = numpy_helper.from_array(np.array([2], dtype="int64"), "axes")
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "axes"], ["u"]),
        helper.make_node("Mul", ["e", "u"], ["y"]),
    ]
    given = {name: (TensorProto.INT64, [batch, length]) for name in ("input_ids", "attention_mask")}
    return save(folder / "text.onnx", nodes, given, [batch, length, 4], (table, axes))


@pytest.mark.parametrize(
    ("kind", "sizes", "options"),
    [
        (TensorProto.UINT8, ("b", 3, 8, 8), {}),
        (TensorProto.FLOAT16, ("b", 3, 8, 8), {}),
        (TensorProto.DOUBLE, ("b", 3, 8, 8), {}),
        (TensorProto.FLOAT, (1, 3, 8, 8), {}),
        (TensorProto.UINT8, (4, 3, 8, 8), {}),
        (TensorProto.FLOAT, ("b", 3, "h", "w"), {"example": torch.zeros(1, 3, 8, 8)}),
        (TensorProto.FLOAT, ("b", 8, 8, 3), {"nhwc": ["x"]}),
        (TensorProto.FLOAT16, (2, None, None, 3), {"nhwc": ["x"], "example": torch.zeros(1, 3, 8, 8)}),
    ],
)
def test_pictures_of_every_type_and_layout_work_completely(
    kind: int, sizes: tuple[Any, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    base = st.load_base(pictures(tmp_path, kind, sizes), **options)
    expected = (IMAGES.float() / 255).mean((2, 3)) * (255 if kind == TensorProto.UINT8 else 1)
    for given in (IMAGES, IMAGES / 255, {"x": IMAGES}):
        assert torch.allclose(base(given).out, expected, rtol=2e-3)
    assert base(IMAGES[:0]).out.shape == (0, 3) and base.example.shape == (1, 3, 8, 8)  # type: ignore[union-attr]
    model = st.SideTuner(base)
    model.add_task("t", side="mlp", head=2, seed=0)
    st.fit(model, "t", [(IMAGES, torch.arange(5) % 2)], steps=2, progress=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    for same in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model).module, pickled):
        assert torch.equal(same(IMAGES, "t"), model(IMAGES, "t"))  # type: ignore[operator]
    model.save_task("t", tmp_path / "t")
    again = st.load(tmp_path / "t")
    assert torch.equal(again(IMAGES, "t"), model(IMAGES, "t")) and again.base.spec == base.spec


@pytest.mark.parametrize(
    ("sizes", "options", "sentence"),
    [
        (("b", 3, "h", "w"), {}, r"leaves sizes open: .* example=torch.zeros\(1, 3, …, …\)"),
        (("b", 3, 8, None), {}, "leaves sizes open"),
        (("b", "h", "w", 3), {"nhwc": ["x"]}, r"leaves sizes open: .* example=torch.zeros\(1, 3, …, …\)"),
        (("b", 8, 8, 3), {}, r"channels last: say nhwc=\['x'\]"),
        (("b", 3, 8, 8), {"nhwc": ["X"]}, "there is x, y"),
        (("b", 3, 8, 8), {"nhwc": ["y"]}, "leave nhwc= out"),
        (("b", 3, 8, 8), {"output": "z"}, "no output 'z'; it has y"),
        (("b", 3, 8, 8), {"example": torch.zeros(1, 4, 8, 8)}, "cannot run on x"),
    ],
)
def test_what_a_file_does_not_tell_is_asked_for(
    sizes: tuple[Any, ...], options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(st.SideTuningError, match=sentence):
        st.load_base(pictures(tmp_path, sizes=sizes), **options)


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        (TensorProto.UINT8, IMAGES.float(), "was given floats from 0 to 255"),
        (TensorProto.UINT8, IMAGES.long() + 1, "give torch.uint8"),
        (TensorProto.FLOAT16, IMAGES * 1e5, "was given 'x' with numbers beyond 65504; scale them"),
        (TensorProto.FLOAT, IMAGES.long(), "was given 'x' as torch.int64; give torch.float32"),
        (TensorProto.FLOAT, IMAGES[:, :2], r"cannot run on x \(5, 2, 8, 8\)"),
        (TensorProto.FLOAT, IMAGES[0], r"cannot run on x \(3, 8, 8\)"),
        (TensorProto.FLOAT, {"images": IMAGES}, "input 'images' is not (taken|read) by"),
        (TensorProto.FLOAT, {"x": IMAGES, "mask": IMAGES}, "input 'mask' is not (taken|read) by"),
        (TensorProto.FLOAT, (IMAGES / 255).requires_grad_(True), "no gradient of the input"),
    ],
)
def test_inputs_that_a_file_does_not_take_are_refused_in_a_sentence(
    kind: int, given: Any, sentence: str, tmp_path: Path
) -> None:
    base = st.load_base(pictures(tmp_path, kind))
    with pytest.raises(st.SideTuningError, match=sentence):
        base(given)


@pytest.mark.parametrize(("batch", "length"), [("b", "t"), ("b", 6), (1, 6), (3, 6)])
def test_texts_get_the_vocabulary_that_is_said(batch: Any, length: Any, tmp_path: Path) -> None:
    base = st.load_base(texts(tmp_path, batch, length))
    assert base.kind == "sequence" and base.example["attention_mask"].all()  # type: ignore[call-overload, index]
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]] * 2)
    x = {"input_ids": torch.randint(0, 50, (4, 6)), "attention_mask": mask}
    shorter = {name: value[1:2, :3] for name, value in x.items()} if length == "t" else x
    assert torch.equal(base(shorter).out, base(x).out[1:2, :3] if length == "t" else base(x).out)
    assert torch.equal(base({name: value.int() for name, value in x.items()}).out, base(x).out)
    model = st.SideTuner(base)
    for side in ("mlp", "transformer"):
        with pytest.raises(st.ShapeError, match=r"side_options=\{'vocabulary'"):
            model.add_task(side, side=side, head=2)
        model.add_task(side, side=side, head=2, side_options={"vocabulary": 50})
        assert model(x, side).shape == (4, 2)
    wrong: list[tuple[Any, str]] = [
        ({"input_ids": x["input_ids"]}, "'attention_mask' is missing"),
        (x["input_ids"], "'attention_mask' is missing"),
        ({**x, "token_type_ids": mask}, "input 'token_type_ids' is not (taken|read) by"),
        ({**x, "attention_mask": None}, "is a NoneType"),
        ({**x, "attention_mask": mask[:2]}, "cannot run on|as many of each"),
        ({**x, "input_ids": x["input_ids"] + 50}, "cannot run on"),
        ({**x, "input_ids": x["input_ids"] / 3}, "give torch.int64"),
    ]
    for given, sentence in wrong:
        with pytest.raises(st.SideTuningError, match=sentence):
            base(given)


def test_a_fixed_batch_whose_rows_are_mixed_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    name = save(tmp_path / "mixed.onnx", nodes, {"x": (TensorProto.FLOAT, [4, 3])}, [4, 3])
    with pytest.raises(st.ShapeError, match="when another one is in its batch"):
        st.load_base(name)


def test_outputs_and_inputs_that_a_base_cannot_have_are_refused(tmp_path: Path) -> None:
    choice = [helper.make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=1)]
    name = save(tmp_path / "a.onnx", choice, {"x": (TensorProto.FLOAT, ["b", 3])}, ["b", 1])
    text = onnx.load(tmp_path / "a.onnx")
    text.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(text, tmp_path / "a.onnx")
    with pytest.raises(st.ShapeError, match=r"is torch\.int64; pick one of floats"):
        st.load_base(name)
    both = {"x": (TensorProto.FLOAT, [2, 3]), "z": (TensorProto.FLOAT, [4, 3])}
    mixed = [helper.make_node("ReduceSum", ["z"], ["s"], keepdims=0), helper.make_node("Add", ["x", "s"], ["y"])]
    with pytest.raises(st.ShapeError, match="several batch sizes"):
        st.load_base(save(tmp_path / "b.onnx", mixed, both, [2, 3]))


def test_maps_with_the_channels_last_are_turned(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    given = {"x": (TensorProto.FLOAT, ["b", 8, 8, 3])}
    base = st.load_base(save(tmp_path / "map.onnx", nodes, given, ["b", 8, 8, 3]), nhwc=["x", "y"])
    assert base.output_shape == (3, 8, 8) and torch.equal(base(IMAGES).out, IMAGES / 255)
    plain = st.load_base(f"onnx:{tmp_path / 'map.onnx'}", example=torch.zeros(1, 8, 8, 3))
    assert plain.output_shape == (8, 8, 3) and plain.identity().sha256 != base.identity().sha256


def test_a_pickled_model_is_refused_where_its_file_was_changed(tmp_path: Path) -> None:
    model = st.SideTuner(st.load_base(pictures(tmp_path)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pictures(tmp_path, sizes=(1, 3, 8, 8))
    with pytest.raises(st.UnknownNameError, match="not the file that this model was saved with"):
        torch.load(file, weights_only=False)


@pytest.mark.slow
def test_an_onnx_base_is_the_same_in_every_process(tmp_path: Path) -> None:
    name = pictures(tmp_path, sizes=(2, None, None, 3))
    script = (
        f"import torch, sidetuning as st; b = st.load_base({name!r}, nhwc=['x'], example=torch.zeros(1, 3, 8, 8))\n"
    )
    script += "print(b.identity().digest(), b.structure())"
    found = {subprocess.check_output([sys.executable, "-c", script], text=True) for _ in range(2)}
    assert len(found) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [1, -3], "dtype": "float32"},
        {"shape": [10**9, 10**9], "dtype": "float32"},
        {"shape": [1], "dtype": "nn"},
        {"shape": [2], "dtype": "int64", "values": [10**30]},
        {"shape": [2], "dtype": "int64", "values": [1, 2, 3]},
        "x",
    ],
)
def test_a_saved_example_is_checked(wrong: Any, tmp_path: Path) -> None:
    from sidetuning.artifacts import read_task, write_files

    base = st.load_base(pictures(tmp_path, sizes=("b", 3, "h", "w")), example=torch.zeros(1, 3, 8, 8))
    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head=2)
    model.save_task("t", tmp_path / "t")
    config, tensors = read_task(tmp_path / "t")
    assert config["base"]["spec"]["options"] == {"example": {"shape": [1, 3, 8, 8], "dtype": "float32", "value": 0.0}}
    config["base"]["spec"]["options"]["example"] = wrong
    write_files(tmp_path / "t", json.loads(json.dumps(config)), tensors)
    with pytest.raises(st.ShapeError, match="recorded example of a base is damaged"):
        st.load(tmp_path / "t")


def test_every_base_takes_an_example_and_remembers_it(tmp_path: Path) -> None:
    base = st.load_base("resnet44-cifar10", example=torch.zeros(1, 3, 48, 48))
    model = st.SideTuner(base)
    model.add_task("t", side="mlp", head=2)
    model.save_task("t", tmp_path)
    x: Tensor = torch.rand(2, 3, 48, 48)
    assert torch.equal(st.load(tmp_path)(x, "t"), model(x, "t"))
