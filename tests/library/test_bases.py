"""Bases of every origin: timm, transformers, ONNX, functions, modules; and what the library imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sidetuning as st
from conftest import conv_base, conv_net, inputs, network
from sidetuning.inputs import example_from, example_record
from sidetuning.integrations.onnx import external_files

SOURCE = Path(st.__file__).parent
IMAGES = torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("resnet18", "vector"), ("mobilenetv3_small_050", "vector"), ("vit_tiny_patch16_224", "vector")],
)
def test_timm_models(name: str, kind: str) -> None:
    base = st.load_base(f"timm:{name}", pretrained=False)
    assert base.kind == kind
    model = st.SideTuner(base)
    model.add_task("pets", side="fcn5", head=7)
    assert model(torch.rand(2, 3, 224, 224), "pets").shape == (2, 7)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_timm_maps_are_channels_first_whatever_the_layout(name: str) -> None:
    tap = "layers.0" if name.startswith("swin") else "stages.0"
    base = st.load_base(f"timm:{name}", pretrained=False, output="map", taps=[tap])
    assert base.kind == "map"
    assert base.output_shape[1] == base.output_shape[2] == 7
    assert base.tap_shapes[tap][1:] == (56, 56)
    model = st.SideTuner(base)
    model.add_task("ladder", side="ladder", head=3, merge="film")
    model.add_task("fcn", side="fcn3", head=3)
    assert {k: v.shape for k, v in model.forward_all(torch.rand(1, 3, 224, 224)).items()} == {
        "ladder": (1, 3),
        "fcn": (1, 3),
    }


def test_transformers_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    base = st.load_base(f"hf:{tmp_path}", taps=["encoder.layer.0", "encoder.layer.2"])
    assert base.kind == "sequence"
    assert base.width == 32
    model = st.SideTuner(base)
    model.add_task("squad", side="ladder", head="span", merge="sum")
    model.add_task("topic", side="transformer", head=4)
    ids = torch.randint(0, 99, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    assert model(batch, "squad").shape == (2, 12, 2)
    assert model(batch, "topic").shape == (2, 4)
    model.save_task("topic", tmp_path / "topic")
    assert torch.equal(st.load(tmp_path / "topic")(batch, "topic"), model(batch, "topic"))
    monkeypatch.chdir(tmp_path.parent)  # a relative path is found from every folder
    relative = st.SideTuner(st.load_base(f"hf:{tmp_path.name}"))
    relative.add_task("t", side="transformer", head=2)
    relative.save_task("t", tmp_path / "t")
    monkeypatch.chdir("/")
    assert torch.equal(st.load(tmp_path / "t")(batch, "t"), relative(batch, "t"))
    with pytest.raises(st.UnknownNameError, match="did you mean 'last_hidden_state'"):
        st.load_base(f"hf:{tmp_path}", output="last_hiden_state")
    with pytest.raises(st.ShapeError, match="tap a module in it"):
        st.load_base(f"hf:{tmp_path}", taps=["encoder"])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(st.UnknownNameError, match=r"transformers cannot load .*; check the name"):
        st.load_base(f"hf:{tmp_path}")


def test_image_models_of_transformers_are_given_what_they_were_trained_with(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel, T5Config, T5Model, Wav2Vec2Config, Wav2Vec2Model

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    plain = st.load_base(f"hf:{tmp_path / 'resnet'}")
    assert plain.kind == "map" and plain.mean is None
    told = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.3], "do_normalize": True}
    (tmp_path / "resnet/preprocessor_config.json").write_text(json.dumps(told))
    base, x = st.load_base(f"hf:{tmp_path / 'resnet'}"), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    by_hand = (x / 255 - torch.tensor(told["image_mean"]).view(3, 1, 1)) / torch.tensor(told["image_std"]).view(3, 1, 1)
    assert torch.allclose(base(x).out, plain(by_hand).out, atol=1e-5)
    T5Model(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    assert st.load_base(f"hf:{tmp_path / 't5'}").output_shape == (8, 16)  # its encoder
    sound = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    Wav2Vec2Model(sound).save_pretrained(tmp_path / "sound")
    with pytest.raises(st.ShapeError, match="neither texts nor images"):
        st.load_base(f"hf:{tmp_path / 'sound'}")


@pytest.mark.slow
def test_onnx_session(tmp_path: Path) -> None:
    net = conv_net().eval()
    path = tmp_path / "net.onnx"
    script = "import sys, torch; sys.path.insert(0, sys.argv[2]); from conftest import conv_net; torch.manual_seed(0)\n"
    script += "n = conv_net().eval(); torch.save(n.state_dict(), sys.argv[1] + '.pt')\n"
    script += "torch.onnx.export(n, (torch.zeros(2, 3, 32, 32),), sys.argv[1], dynamo=True, dynamic_shapes=({0: 'b'},))"
    subprocess.run(
        [sys.executable, "-c", script, str(path), str(Path(__file__).parents[1])], check=True, capture_output=True
    )
    net.load_state_dict(torch.load(f"{path}.pt", weights_only=True))
    base = st.load_base(f"onnx:{path}")
    x = inputs("conv", 3)
    with torch.no_grad():
        assert torch.allclose(base(x).out, net(x), atol=1e-5)
    model = st.SideTuner(base)
    model.add_task("a", side="fcn4", head=2)
    st.fit(model, "a", [(x, torch.tensor([0, 1, 0]))], steps=2, progress=False)
    model.save_task("a", tmp_path / "a")
    assert torch.equal(st.load(tmp_path / "a")(x, "a"), model(x, "a"))
    with pytest.raises(st.UnknownNameError, match="no taps"):
        st.load_base(f"onnx:{path}", taps=["conv"])
    weights, before = tmp_path / "net.onnx.data", base.identity().sha256  # torch writes them into a file of their own
    content = bytearray(weights.read_bytes())
    content[10] ^= 1
    weights.write_bytes(bytes(content))
    assert st.load_base(f"onnx:{path}").identity().sha256 != before


def write_onnx(path: Path, location: str | None = None, entry: str | None = None, within: bool = False) -> None:
    """x (b, 4) @ w -> (b, 4): w in a file beside it, or `within` a branch of an If; `entry` is a metadata entry."""
    from onnx import TensorProto, helper, save

    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], torch.eye(4).numpy().tobytes(), raw=True)
    if location is not None:
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "xy")
    nodes, kept = [helper.make_node("MatMul", ["x", "w"], ["y"])], [weights]
    if within:
        branch = helper.make_graph(nodes, "branch", [], [y], kept)
        true = helper.make_node("Constant", [], ["true"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
        nodes = [true, helper.make_node("If", ["true"], ["y"], then_branch=branch, else_branch=branch)]
        kept = []
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], kept), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    if entry is not None:
        model.metadata_props.add(key="location", value=entry)
    save(model, path)


@pytest.mark.parametrize("entry", ["Berlin", "/dev/zero", "../secret"])
def test_a_metadata_entry_of_an_onnx_file_is_no_file(entry: str, tmp_path: Path) -> None:
    write_onnx(tmp_path / "n.onnx", entry=entry)
    assert len(st.load_base(f"onnx:{tmp_path / 'n.onnx'}").identity().sha256) == 64


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("location", ["/dev/zero", "../secret", "missing", "link", "fifo", ""])
def test_weights_of_an_onnx_file_lie_in_its_folder(location: str, within: bool, tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(torch.eye(4).numpy().tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "fifo")
    write_onnx(folder / "n.onnx", location, within=within)
    with pytest.raises(st.ArtifactError, match="which is no file in its folder"):
        st.load_base(f"onnx:{folder / 'n.onnx'}")


def test_weights_beside_an_onnx_file_are_read_also_through_the_links_of_a_cache(tmp_path: Path) -> None:
    (blobs := tmp_path / "blobs").mkdir()
    (snapshot := tmp_path / "snapshots" / "1").mkdir(parents=True)
    (blobs / "b").write_bytes(torch.eye(4).numpy().tobytes())
    write_onnx(blobs / "a", "weights.bin", within=True)
    (snapshot / "n.onnx").symlink_to(blobs / "a")
    (snapshot / "weights.bin").symlink_to(blobs / "b")
    assert external_files(snapshot / "n.onnx") == [snapshot / "weights.bin"]
    write_onnx(tmp_path / "n.onnx", "b", within=True)
    (tmp_path / "b").write_bytes(torch.eye(4).numpy().tobytes())
    base = st.load_base(f"onnx:{tmp_path / 'n.onnx'}")
    assert torch.equal(base(x := torch.rand(2, 4)).out, x)


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"\x3a\xff\xff\xff\x0f", b"onnx"])
def test_a_file_that_is_no_onnx_file_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "n.onnx").write_bytes(content)
    with pytest.raises(st.SideTuningError, match=r"n\.onnx.*export the network again"):
        st.load_base(f"onnx:{tmp_path / 'n.onnx'}")


@pytest.mark.slow
def test_onnx_runtime_tells_nobody(tmp_path: Path) -> None:
    write_onnx(tmp_path / "n.onnx")
    script = "import os, sys, sidetuning as st; st.load_base(sys.argv[1]); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    command = [sys.executable, "-c", script, f"onnx:{tmp_path / 'n.onnx'}"]
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == "1\n"


def test_a_function_is_a_base() -> None:
    base = st.Base(lambda x: x.mean((2, 3)), example=torch.zeros(1, 3, 16, 16))
    model = st.SideTuner(base)
    model.add_task("a", side="fcn4", head=2)
    assert model(torch.rand(2, 3, 16, 16), "a").shape == (2, 2)
    with pytest.raises(st.ShapeError, match="only callable"):
        model.add_task("b", side="copy", head=2)


def test_the_fingerprint_follows_weights_and_buffers() -> None:
    base, again = conv_base(), conv_base()
    first = base.identity().sha256
    assert first == again.identity().sha256
    assert len(first) == 64
    assert isinstance(again.net, nn.Module)
    again.net.get_buffer("1.running_mean").add_(1e-3)
    assert again.identity().sha256 != first


def test_uint8_and_float_images_are_the_same_to_the_base() -> None:
    base = conv_base()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(base(x).out, base(x.float() / 255).out)


def test_folding_batch_norms_only_rounds() -> None:
    base = conv_base()
    folded = base.folded()
    x = inputs("conv")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network(folded).modules())
    assert torch.allclose(folded(x).out, base(x).out, atol=1e-5)


def test_folding_keeps_taps() -> None:
    base = conv_base(("2", "4"))
    folded, x = base.folded(), inputs("conv")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network(folded).modules())
    for tap in ("2", "4"):
        assert torch.allclose(folded(x).taps[tap], base(x).taps[tap], atol=1e-5)
    between = conv_base(("0", "1"))  # what lies between a convolution and its norm can only be seen unfolded
    assert torch.allclose(between.folded()(x).taps["0"], between(x).taps["0"], atol=1e-5)
    assert torch.allclose(between.folded()(x).taps["1"], between(x).taps["1"], atol=1e-5)


def test_a_convolution_with_weight_norm_is_not_folded() -> None:
    with st.seeded(1):
        net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8))
    base = st.Base(net, example=torch.zeros(1, 3, 32, 32))
    assert torch.equal(base.folded()(inputs("conv")).out, base(inputs("conv")).out)


def test_taps_that_cannot_be_are_said() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
    with pytest.raises(st.ShapeError, match="'0' returns is written over"):
        st.Base(net, example=torch.zeros(1, 3, 32, 32), taps=["0"])
    assert st.Base(net, example=torch.zeros(1, 3, 32, 32), taps=["1"]).tap_shapes == {"1": (8, 30, 30)}

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    with pytest.raises(st.ShapeError, match="'idle' is not run"):
        st.Base(Idle(), example=torch.zeros(1, 3, 32, 32), taps=["idle"])


def test_a_network_put_into_training_mode_does_not_move() -> None:
    base = conv_base()
    before, net = base.identity().sha256, base.net
    assert isinstance(net, nn.Module)
    net.train()
    base(inputs("conv"))
    assert base.identity().sha256 == before


def test_a_module_of_another_task_or_of_the_base_is_refused() -> None:
    net = conv_net()[:5]
    base = st.Base(net, example=torch.zeros(1, 3, 32, 32))
    model, side = st.SideTuner(base), nn.Conv2d(3, 16, 4, 4)
    model.add_task("a", side=side, head=2)
    with pytest.raises(st.TaskError, match="also that of task 'a'"):
        model.add_task("b", side=side, head=2)
    with pytest.raises(st.TaskError, match="also that of the base"):
        model.add_task("b", side=net, head=2)
    assert model.tasks == ["a"]


def test_names_that_do_not_exist() -> None:
    with pytest.raises(st.UnknownNameError, match="did you mean 'resnet44-cifar10'"):
        st.load_base("resnet44-cifar")
    with pytest.raises(st.UnknownNameError, match="did you mean 'timm'"):
        st.load_base("tim:resnet18")
    with pytest.raises(st.UnknownNameError, match="timm model"):
        st.load_base("timm:resnet1800", pretrained=False)
    with pytest.raises(st.UnknownNameError, match="tap"):
        conv_base(taps=("layer9",))
    with pytest.raises(st.UnknownNameError, match="does not exist"):
        st.load_base("onnx:nowhere.onnx")
    with pytest.raises(st.ShapeError, match="pick one with output="):
        st.Base(lambda x: {"a": x}, example=torch.zeros(1, 3))


def test_outputs_that_are_not_tensors_are_picked() -> None:
    net = lambda x: {"code": (x, x.mean(1))}  # noqa: E731
    assert st.Base(net, example=torch.zeros(1, 3), output=lambda y: y["code"][0]).output_shape == (3,)


def test_importing_needs_no_optional_package() -> None:
    optional = ["timm", "transformers", "gymnasium", "onnxruntime", "sklearn", "stable_baselines3", "vizdoom", "minari"]
    code = f"import sys, sidetuning, sidetuning.api; bad = {{*{optional}, 'av'}} & set(sys.modules)"
    code += "; sys.exit(str(bad) if bad else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("told", "by_hand"),
    [
        ({"image_mean": 0.5, "image_std": [0.5, 0.25, 0.5]}, lambda x: (x - 0.5) / stack(0.5, 0.25, 0.5)),
        ({"do_normalize": False}, lambda x: x),
        (
            {"rescale_factor": 1 / 127.5, "offset": True, "image_mean": [0.5] * 3, "image_std": [0.2] * 3},
            lambda x: (2 * x - 1 - 0.5) / 0.2,
        ),
        (
            {"image_processor_type": "VivitImageProcessor", "rescale_factor": 1 / 127.5, "do_normalize": False},
            lambda x: 2 * x - 1,
        ),
        (
            {"image_processor_type": "EfficientNetImageProcessor", "image_mean": [0.4] * 3, "image_std": [0.2] * 3},
            lambda x: (x - 0.4) / 0.2 / 0.2,
        ),
        ({"include_top": False, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}, lambda x: (x - 0.4) / 0.2),
        ({"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3}, lambda x: (255 * x - 100) / 50),
        ({"feature_extractor_type": "MobileViTFeatureExtractor", "do_normalize": False}, lambda x: x.flip(1)),
        (
            {"do_flip_channel_order": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3},
            lambda x: ((x - stack(0.4, 0.5, 0.6)) / 0.2).flip(1),
        ),
    ],
)
def test_images_are_prepared_as_the_models_own_processor_does(
    told: dict[str, Any], by_hand: Any, tmp_path: Path
) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_channels=3)
    ResNetModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    base, x = st.load_base(f"hf:{tmp_path}"), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for given in (x, {"pixel_values": x}, x / 255):
        prepared = base.prepare(given)
        prepared = prepared if isinstance(prepared, torch.Tensor) else prepared["pixel_values"]
        assert torch.allclose(prepared, by_hand(x / 255), atol=1e-5)


def stack(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


def tiny_bert(folder: Path) -> str:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_a_base_in_half_precision_is_loaded_and_its_tasks_load_again(dtype: Any, tmp_path: Path) -> None:
    base = st.load_base(tiny_bert(tmp_path / "bert"), dtype=dtype, taps=["encoder.layer.0"])
    assert str(base.dtype).endswith(str(dtype).removeprefix("torch."))
    model = st.SideTuner(base)
    model.add_task("t", side="ladder", head=2)
    model.save_task("t", tmp_path / "t")
    x = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    again = st.load(tmp_path / "t")
    assert again.base.dtype == base.dtype and torch.equal(again(x, "t"), model(x, "t"))
    full = st.load_base(f"hf:{tmp_path / 'bert'}")
    assert full.dtype == torch.float32 and full.identity().difference(base.identity().record())
    for wrong in ("bf16", "int8"):
        with pytest.raises(st.UnknownNameError, match=f"dtype '{wrong}' is not known"):
            st.load_base(f"hf:{tmp_path / 'bert'}", dtype=wrong)
    with pytest.raises(st.UnknownNameError, match="does not read dtype="):
        st.load_base("resnet44-cifar10", dtype="bfloat16")


def test_the_example_of_a_base_is_built_again_with_its_tasks(tmp_path: Path) -> None:
    text = st.load_base(tiny_bert(tmp_path / "bert"))
    ids = {"input_ids": torch.arange(12)[None] % 50, "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    image = st.load_base("resnet44-cifar10")
    for base, example in ((image, torch.rand(1, 3, 48, 48)), (text, ids)):
        model = st.SideTuner(base.with_example(example))
        model.add_task("t", side="mlp", head=2)
        folder = tmp_path / str(base.kind)
        model.save_task("t", folder)
        again = st.load(folder)
        assert torch.equal(again(example, "t"), model(example, "t"))
        assert again.base.identity() == model.base.identity()
        assert json.loads((folder / "side.json").read_text())["base"]["spec"]["options"]["example"]
    larger = st.load_base("resnet44-cifar10", example=torch.zeros(1, 3, 48, 48)).example
    assert isinstance(larger, torch.Tensor) and larger.shape == (1, 3, 48, 48)


@pytest.mark.parametrize("record", [{}, {"shape": [2**30, 9], "dtype": "float32"}, {"shape": [1], "dtype": "load"}, 3])
def test_a_damaged_example_of_a_file_is_refused(record: Any) -> None:
    with pytest.raises(st.ShapeError, match="the recorded example of a base is damaged"):
        example_from(record)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0", "repvit_m1", "mobilenetv3_small_050"])
def test_weights_with_a_classifier_fit_whatever_the_classifier_is_called(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    with st.seeded(0):
        net = timm.create_model(name).eval()
    state = {key: value.contiguous().clone() for key, value in net.state_dict().items()}
    save_file(state, tmp_path / "net.safetensors")
    base = st.load_base(f"timm:{name}", weights=tmp_path / "net.safetensors")
    net.reset_classifier(0)
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(base(x).out, net(base.prepare(x)))
    save_file({**state, "other.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(st.ArtifactError, match=r"too many, the first is other\.weight"):
        st.load_base(f"timm:{name}", weights=tmp_path / "net.safetensors")


@pytest.mark.parametrize("tensor", [torch.ones(1, 5000, dtype=torch.long), torch.full((1, 70, 70), 0.5)])
def test_a_long_example_of_one_value_is_written_as_that(tensor: torch.Tensor) -> None:
    record = json.loads(json.dumps(example_record({"mask": tensor})))
    found = example_from(record)
    assert torch.equal(found["mask"], tensor) and len(str(record)) < 200  # type: ignore[call-overload,index]
