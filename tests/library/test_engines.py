"""Engines of the frozen base: right or refused in a sentence, and told apart where they differ beyond rounding."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sidetuning as st
from conftest import conv_net, in_threads, inputs, mlp_base, network
from sidetuning import engines
from sidetuning.content import tensor_bytes
from sidetuning.running import Engine
from text_parts import write_encoder

PACKAGES = {"onnxruntime": "onnxscript", "openvino": "openvino"}
FAST = ["folded", "onnxruntime", "openvino"]
ENGINES = [*FAST, pytest.param("compile", marks=pytest.mark.slow)]
IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of engines that the tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDETUNING_CACHE", str(tmp_path_factory.mktemp("engines")))
        yield


def installed(engine: str) -> None:
    """Skip a test of an engine that is not installed."""
    for package in ("onnxscript", PACKAGES.get(engine, "torch")):
        pytest.importorskip(package)


def seeded_base(taps: tuple[str, ...] = ()) -> st.Base:
    """Convolutions with batch norms that do something, on images in [0, 1] that are normalised."""
    with st.seeded(0):
        net = conv_net()
        norm: Any = net[1]
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)
    return st.Base(net, example=IMAGES[:1], taps=taps, mean=[0.5] * 3, std=[0.25] * 3)


def apart(found: st.Features, expected: st.Features) -> float:
    return engines.error_of(expected, found)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gives_what_torch_gives(engine: str) -> None:
    installed(engine)
    plain = seeded_base(("2", "0"))
    base = st.with_engine(plain, engine)
    assert base.engine.name == engine and base.engine.error < 1e-5
    for rows in (1, 2, 5):
        found, expected = base(IMAGES[:rows]), plain(IMAGES[:rows])
        assert list(found.taps) == list(expected.taps)
        assert 0 <= apart(found, expected) < 1e-5
    assert base.engine.run is not None and base.engine.features(base.prepare(IMAGES), False) is not None
    # It is the plain base: tasks and caches of one are the other's.
    assert base.identity() == plain.identity() and base.structure() == plain.structure()
    fewer = base.with_taps(["0"])
    assert list(fewer(IMAGES).taps) == ["0"] and torch.equal(fewer(IMAGES).taps["0"], base(IMAGES).taps["0"])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_fit_goes_to_plain_torch(engine: str) -> None:
    installed(engine)
    plain = seeded_base()
    base = st.with_engine(plain, engine)
    larger = torch.rand(2, 3, 40, 36)
    assert apart(base(larger), plain(larger)) < 1e-5
    strange = base.prepare(IMAGES).clone()  # type: ignore[union-attr]
    strange[1, 0, 5, 5] = torch.nan
    assert torch.equal(base.encode(strange).out.isnan(), plain.encode(strange).out.isnan())
    assert base.encode(strange).out.isnan().sum() == 16
    empty = IMAGES[:0]
    assert base(empty).out.shape == plain(empty).out.shape
    gradients = []
    for one in (base, plain):
        x = IMAGES.clone().requires_grad_()
        one(x).out.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].abs().sum() > 0
    assert base.double().engine.run is None
    assert base(IMAGES).out.dtype == torch.float64


@pytest.mark.parametrize("engine", FAST)
def test_threads_get_their_own_answers(engine: str) -> None:
    installed(engine)
    base = st.with_engine(seeded_base(("2",)), engine)
    xs = [torch.rand(1 + i % 3, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    alone = [base(x) for x in xs]

    def work(i: int) -> None:
        for turn in range(5):
            k = (i + turn) % len(xs)
            assert all(torch.equal(a, b) for a, b in zip(base(xs[k]).tensors(), alone[k].tensors(), strict=True))

    in_threads(work, 8)


@pytest.mark.parametrize("engine", [pytest.param(name, marks=pytest.mark.slow) for name in (*FAST[1:], "compile")])
def test_texts_of_any_length_with_padding(engine: str, text_base: st.Base) -> None:
    installed(engine)
    taps = ["encoder.layer.0"]
    plain = st.Base(text_base.net, example=text_base.example, output="last_hidden_state", taps=taps)
    base = st.with_engine(plain, engine)
    for rows, tokens in ((1, 8), (3, 20), (5, 2)):
        given = {"input_ids": torch.randint(0, 9, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}
        given["attention_mask"][0, (tokens + 1) // 2 :] = 0
        assert apart(base(given), plain(given)) < 1e-5
        assert base.engine.features(base.prepare(given), False) is not None
    # Runtimes take what torch refuses: ids beyond the table or before it, and longer texts than there are positions.
    for ids in (torch.full((2, 8), 10**6), torch.full((2, 8), -1), torch.ones(2, 600).long()):
        for one in (plain, base):
            with pytest.raises((IndexError, RuntimeError)):
                one({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    # A row of padding alone, and an entry that the example lacks, are torch's.
    given["attention_mask"][0] = 0
    assert torch.equal(base(given).out, plain(given).out)
    more = {**given, "token_type_ids": torch.zeros(5, 2).long()}
    assert torch.equal(base(more).out, plain(more).out)


def test_texts_of_a_tokenizer_run_by_the_engine(text_base: st.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model = st.SideTuner(st.with_engine(text_base, "folded"))
    plain = st.SideTuner(text_base)
    for each in (model, plain):
        each.add_task("t", side=None, merge="base-only", head=2, labels=["a", "b"], seed=0)
    assert text_base.transform is not None and "token_type_ids" in text_base.transform("old tower")
    ran, run = [], model.base.engine.run
    assert run is not None

    def counted(inputs: Any) -> Any:
        ran.append(inputs)
        return run(inputs)

    counting = dataclasses.replace(model.base.engine, run=counted)
    monkeypatch.setattr(model.base, "engine", counting)
    assert model.predict(["the old tower", "who ?"]) == plain.predict(["the old tower", "who ?"])
    assert len(ran) == 1
    # Pairs, and inputs without what the tokenizer gives, run by it too.
    pair, ids = (
        ("the old tower", "who ?"),
        {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6).long()},
    )
    assert model.predict(pair) == plain.predict(pair) and torch.equal(model(ids, "t"), plain(ids, "t"))
    assert len(ran) == 3 and model.base.identity() == text_base.identity()


@pytest.mark.slow
def test_a_tokenizers_texts_run_in_int8_and_older_ranges_are_read(text_base: st.Base) -> None:
    installed("onnxruntime")
    assert text_base.transform is not None
    pairs = text_base.transform.batch([("the old tower", "who ?"), ("red", "it was made in 1822")])
    base = st.with_engine(text_base, "onnxruntime", precision="int8", calibration=pairs)
    assert base.engine.ranges is not None and base.engine.ranges["token_type_ids"] == [0, 1]
    again = st.with_engine(text_base, "onnxruntime", precision="int8", calibration=base.engine.ranges)
    assert torch.equal(base(pairs).out, again(pairs).out) and apart(base(pairs), text_base(pairs)) < 0.25
    assert base.identity() == again.identity()
    bare = st.Base(text_base.net, example=text_base.example, output="last_hidden_state")
    ids = {name: pairs[name] for name in ("input_ids", "attention_mask")}
    before = st.with_engine(bare, "onnxruntime", precision="int8", calibration=ids)
    older = st.with_engine(text_base, "onnxruntime", precision="int8", calibration=before.engine.ranges)
    assert torch.equal(older(ids).out, before(ids).out)


def test_a_task_learned_on_an_engine_is_the_plain_bases(tmp_path: Path) -> None:
    plain = seeded_base()
    model = st.SideTuner(st.with_engine(plain, "folded"))
    model.add_task("pets", side="fcn4", head=3)
    model.save_task("pets", tmp_path / "pets")
    other = st.SideTuner(plain)
    other.load_task(tmp_path / "pets")
    assert torch.allclose(other(IMAGES, "pets"), model(IMAGES, "pets"), atol=1e-5)
    rows = torch.utils.data.TensorDataset(IMAGES, torch.zeros(5))
    first, second = (st.cache_features(one, rows, tmp_path / "cache") for one in (plain, model.base))
    assert first.folder == second.folder


@pytest.mark.parametrize(("engine", "precision"), [("torch", "bf16"), ("folded", "bf16"), ("onnxruntime", "int8")])
def test_fewer_bits_are_another_base(engine: str, precision: str, tmp_path: Path) -> None:
    installed(engine)
    plain = seeded_base()
    base = st.with_engine(plain, engine, precision=precision, calibration=IMAGES)
    assert 1e-4 < base.engine.error < 0.1
    assert apart(base(IMAGES), plain(IMAGES)) == pytest.approx(base.engine.error, rel=0.3)
    for one, two in ((base, plain), (plain, base)):
        model = st.SideTuner(one)
        model.add_task("pets", side="fcn4", head=3)
        model.save_task("pets", tmp_path / one.engine.precision)
        with pytest.raises(st.ArtifactError, match=f"{precision} by {engine}.*engine= and precision="):
            st.SideTuner(two).load_task(tmp_path / one.engine.precision)
    again = st.with_engine(seeded_base(), engine, precision=precision, calibration=base.engine.ranges or IMAGES)
    assert again.identity() == base.identity()
    assert torch.equal(again(IMAGES).out, base(IMAGES).out)
    folders = []
    for one in (base, plain):
        cached = st.cache_features(one, torch.utils.data.TensorDataset(IMAGES, torch.zeros(5)), tmp_path / "cache")
        folders.append(cached.folder)
    assert folders[0] != folders[1]


def test_other_inputs_are_refused_where_torch_would_give_other_numbers() -> None:
    installed("onnxruntime")
    base = st.with_engine(seeded_base(), "onnxruntime", precision="int8", calibration=[(IMAGES, None)])
    with pytest.raises(st.ShapeError, match="int8 by onnxruntime, and cannot take this input"):
        base(torch.rand(2, 3, 40, 36))
    with pytest.raises(st.ShapeError, match="not finite"):
        base.encode(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(st.ShapeError, match="no gradient of its input"):
        base(IMAGES.clone().requires_grad_())
    with pytest.raises(st.ShapeError, match="stays where it was built"):
        base.double()
    assert base.engine.run is not None and base.float() is base
    larger = base.with_example(torch.rand(1, 3, 40, 36))
    assert larger(torch.rand(2, 3, 40, 36)).out.shape == (2, 16)


def test_other_taps_and_other_weights_are_refused() -> None:
    base = st.with_engine(seeded_base(("2",)), "folded")
    with pytest.raises(st.ShapeError, match="name all taps when it is built"):
        base.with_taps(["0"])
    copied = copy.deepcopy(base)
    assert copied.identity() == base.identity()
    with torch.no_grad():
        next(network(base).parameters()).add_(1)
    with pytest.raises(st.ShapeError, match="changed after fp32 by folded was built"):
        base.identity()
    with pytest.raises(st.ShapeError, match="cannot be sent to another process"):
        pickle.dumps(base.engine)


@pytest.mark.parametrize(
    ("base", "how", "sentence"),
    [
        (mlp_base, {"engine": "onnxruntme"}, "onnxruntime"),
        (mlp_base, {"engine": "folded", "precision": "int7"}, "int8"),
        (mlp_base, {"engine": "compile", "precision": "int4"}, "choose engine= of torch"),
        (mlp_base, {"engine": "onnxruntime", "precision": "int8", "calibration": []}, "gives no input"),
        (lambda: st.with_engine(mlp_base(), "folded"), {"engine": "folded"}, "give the plain base"),
        (lambda: mlp_base().double(), {"engine": "folded"}, "float32, not a .* in torch.float64"),
        (lambda: st.Base(lambda x: x, example=torch.rand(1, 3)), {"engine": "folded"}, "not a function"),
    ],
)
def test_refusals(base: Callable[[], st.Base], how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(st.SideTuningError, match=sentence):
        st.with_engine(base(), **how)


def test_int8_activations_need_inputs() -> None:
    installed("onnxruntime")
    with pytest.raises(st.ShapeError, match="needs inputs like those to come"):
        st.with_engine(seeded_base(), "onnxruntime", precision="int8")


def test_a_wrong_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = seeded_base()
    with torch.no_grad():
        next(network(other).parameters()).mul_(1.01)
    monkeypatch.setattr(st.Base, "folded", lambda base: other)
    with pytest.raises(st.ShapeError, match=r"differs from torch by .* and 0\.001 is allowed"):
        st.with_engine(seeded_base(), "folded")


def test_auto_picks_what_is_fastest_and_says_so(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def built(base: st.Base, name: str, *others: Any) -> st.Base:
        if name != "folded":
            raise ImportError(f"{name} is not installed")
        return found

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_power(torch.eye(300), 2000)[:8].mean() + x

    base, found = (st.Base(net, example=torch.rand(1, 6)) for net in (Slow(), nn.Identity()))
    base = st.Base(nn.Sequential(Slow(), nn.Linear(6, 6)), example=torch.rand(1, 6))
    found.engine = Engine("folded")
    monkeypatch.setattr(engines, "_built", built)
    chosen = st.with_engine(base, "auto")
    assert chosen is found and (chosen.engine.speed or 0) > 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "runs by folded in fp32 (torch " in said


def test_a_model_folder_builds_its_engine_again(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = st.load_base("resnet44-cifar10", engine="folded", precision="bf16")
    assert base.spec is not None and base.spec.options == {"engine": "folded", "precision": "bf16"}
    model = st.SideTuner(base)
    model.add_task("pets", side=None, merge="base-only", head=3)
    model.save(tmp_path / "model")
    again = st.load(tmp_path / "model")
    assert str(again.base.engine) == "bf16 by folded"
    assert torch.equal(again(IMAGES, "pets"), model(IMAGES, "pets"))


def test_an_engine_that_is_missing_is_torch_in_fp32_alone(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = st.load_base("resnet44-cifar10")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"sidetuning\[onnx\]"):
        engines.rebuilt(plain, "onnxruntime", "int8", {"x": [0.0, 1.0]})
    assert engines.rebuilt(plain, "onnxruntime", "fp32", None) is plain
    assert "the base runs by torch: " in capfd.readouterr().err
    with pytest.raises(st.UnknownNameError, match="nonsense"):
        engines.rebuilt(plain, "nonsense", "fp32", None)
    with pytest.raises(st.ArtifactError, match="calibration of a base is damaged"):
        engines.rebuilt(plain, "onnxruntime", "int8", {"x": [0.0, "1"]})  # type: ignore[list-item]


def test_a_server_runs_its_tasks_by_an_engine(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from sidetuning.serving.served import Served

    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("pets", side=None, merge="base-only", head=3)
    model.save(tmp_path)
    with pytest.raises(st.ShapeError, match="give the plain base"):
        # What is asked for is not what the folder says.
        folded = st.SideTuner(st.load_base("resnet44-cifar10", engine="folded"))
        folded.add_task("pets", side=None, merge="base-only", head=3)
        folded.save(tmp_path / "folded")
        Served(tmp_path / "folded", engine="torch")
    assert Served(tmp_path / "folded").moment.base.engine.name == "folded"
    served = Served(tmp_path, engine="folded")
    assert served.moment.base.engine.name == "folded"
    model.add_task("cars", side=None, merge="base-only", head=2)
    model.save(tmp_path)
    assert served.refresh() and sorted(served.moment.branches) == ["cars", "pets"]


def test_a_model_on_an_engine_is_not_exported(tmp_path: Path) -> None:
    model = st.SideTuner(st.with_engine(seeded_base(), "folded"))
    model.add_task("pets", side=None, merge="base-only", head=3)
    with pytest.raises(st.ArtifactError, match="fp32 by folded is not exported"):
        st.export(model, tmp_path / "out")


def stored_bytes(net: nn.Module) -> int:
    """Bytes of the weights of a network, those within quantised tensors too."""
    return sum(tensor_bytes(parameter).numel() for parameter in net.parameters())


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_quantised_base_under_any_side(kind: str, precision: str, encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    how: dict[str, Any] = {}
    name, taps = f"hf:{encoder}", ["encoder.layer.0"]
    x: Any = {"input_ids": torch.randint(0, 9, (6, 7)), "attention_mask": torch.ones(6, 7).long()}
    if kind == "image":
        timm = pytest.importorskip("timm")
        with st.seeded(0):
            net = timm.create_model("test_vit", num_classes=0)
        save_file(net.state_dict(), tmp_path / "weights.safetensors")
        name, taps, how = "timm:test_vit", ["blocks.0"], {"weights": tmp_path / "weights.safetensors"}
        x = torch.randint(0, 256, (6, 3, 160, 160), dtype=torch.uint8)
    plain = st.load_base(name, taps=taps, **how)
    base = st.load_base(name, taps=taps, precision=precision, **how)
    assert 1e-5 < base.engine.error < 0.3 and 0 < apart(base(x), plain(x)) < 0.3
    assert stored_bytes(network(base)) < stored_bytes(network(plain))
    assert base.identity() == st.load_base(name, taps=taps, precision=precision, **how).identity()
    assert base.identity().difference(plain.identity().record())
    # The network takes any input, and gives its gradient.
    raw = torch.rand(2, 3, 160, 160, requires_grad=True)
    if kind == "image":
        base(raw).out[:, 0].sum().backward()
        assert raw.grad is not None and raw.grad.abs().sum() > 0
    model = st.SideTuner(base)
    with pytest.raises(st.TaskError, match="not quantised"):
        model.add_task("copied", side="copy", head=2)
    model.add_task("ladder", side="ladder", head=2)
    before = base(x).out
    st.fit(model, "ladder", [(x, torch.arange(6) % 2)], epochs=2, progress=False)
    assert torch.equal(base(x).out, before)
    model.save(tmp_path / "model")
    again = st.load(tmp_path / "model")
    assert str(again.base.engine) == f"{precision} by torch"
    assert torch.equal(again(x, "ladder"), model(x, "ladder"))
    with pytest.raises(st.ArtifactError, match=f"ran in {precision} by torch, this base in torch"):
        st.SideTuner(plain).load_task(tmp_path / "model" / "tasks" / "ladder")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_decoder_in_fewer_bits_writes_in_them(precision: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchao")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with st.seeded(0):
        config = transformers.LlamaConfig(vocab_size=50, **shape, eos_token_id=None, pad_token_id=0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    plain = st.load_base(f"hf:{tmp_path}")
    base = st.load_base(f"hf:{tmp_path}", precision=precision)
    assert plain.lm is not None and base.lm is not None and base.lm.backbone is base.net
    ids = torch.randint(1, 50, (2, 6))
    model = st.SideTuner(base)
    written = model.generate({"input_ids": ids}, None, max_new_tokens=3)
    # What it writes is of its own codes: in int8, of quantised layers.
    logits = base.lm.logits(base({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).out)
    assert torch.equal(written[:, 6], logits[:, -1].argmax(-1))
    with torch.no_grad():
        whole = base.lm.net(input_ids=ids).logits
    assert torch.allclose(whole.float(), logits, atol=1e-2) and not torch.equal(whole, plain.lm.net(ids).logits)
    with pytest.raises(st.ShapeError, match="by engine='torch' alone"):
        st.with_engine(plain, "onnxruntime", precision="int8", calibration=[])


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_damaged_file_of_an_engine_is_made_anew(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(engine)
    monkeypatch.setenv("SIDETUNING_CACHE", str(tmp_path))
    plain = mlp_base()
    st.with_engine(plain, engine)
    # One file, whole: nothing that was written on the way is left.
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write_bytes(b"no graph")
    with pytest.raises(st.ShapeError, match=f"cannot be built for {engine}"):
        st.with_engine(plain, engine)
    x = inputs("mlp")
    assert apart(st.with_engine(plain, engine)(x), plain(x)) < 1e-5


def test_the_command_line_trains_on_a_base_in_fewer_bits(tmp_path: Path) -> None:
    pytest.importorskip("tyro")
    from sidetuning.commands.train import Settings, opened

    settings = Settings("photos", "pets", str(tmp_path), base="resnet44-cifar10", precision="bf16")
    model = opened(settings, tmp_path)
    assert str(model.base.engine) == "bf16 by torch"
    model.add_task("pets", side=None, merge="base-only", head=3)
    model.save(tmp_path)
    assert opened(settings, tmp_path).base.identity() == model.base.identity()
    with pytest.raises(st.TaskError, match="a base in bf16; leave --precision out"):
        opened(dataclasses.replace(settings, precision="int8"), tmp_path)
    with pytest.raises(st.TaskError, match="a base in bf16; leave --precision out"):
        opened(dataclasses.replace(settings, precision="fp32"), tmp_path)
    assert str(opened(dataclasses.replace(settings, precision=None), tmp_path).base.engine) == "bf16 by torch"


@pytest.mark.slow
def test_the_code_of_the_page_that_the_page_does_not_run(tmp_path: Path) -> None:
    """It names a model of the Hub, and needs what quantises."""
    installed("onnxruntime")
    pytest.importorskip("torchao")
    pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs/how-to/engines.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    write_encoder(tmp_path)
    name, images = "hf:sentence-transformers/all-MiniLM-L6-v2", (255 * IMAGES).to(torch.uint8)
    scope: dict[str, Any] = {"st": st, "loader": [(images, None)]}
    texts, photographs = block.replace(name, f"hf:{tmp_path}").strip().splitlines()
    for line in (texts, photographs):
        exec(line, scope)
        assert scope["base"].engine.precision == "int8"
    assert block.count(name) == 1 and scope["base"](images).out.shape == (5, 64)
