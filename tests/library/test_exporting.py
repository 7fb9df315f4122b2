"""Exported graphs give torch's outputs, for every kind of base, batch size and length, and run without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sidetuning as st
from conftest import BASES, TAPS, conv_base, inputs, mlp_base
from sidetuning import graphs
from sidetuning.cli import main
from sidetuning.transforms import ImageTransform, TextTransform, WordTransform

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).parents[2] / "examples/onnx_without_torch.py"
# Torch cannot be imported in the process that runs the example.
BLOCKED = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
SIDES = {"conv": "fcn4", "map": "fusion", "sequence": "transformer", "mlp": "mlp"}


def model_of(kind: str) -> st.SideTuner:
    """Three tasks: a side with a lateral's user beside it, and fixed features."""
    model = st.SideTuner(BASES[kind](TAPS[kind]))
    model.add_task("pets", side=SIDES[kind], head=3, labels=["cat", "dog", "bird"], seed=0)
    model.add_task("age", side="mlp", merge="sum", head=2, laterals=["pets"], problem="numbers", seed=1)
    model.add_task("plain", side=None, merge="base-only", head="span" if kind == "sequence" else 2, seed=2)
    return model


def answer(folder: Path, x: st.Input) -> dict[str, Tensor]:
    """What the graphs of a folder give, run by their names in `model.json` alone."""
    about = json.loads((folder / "model.json").read_text())
    named = {"x": x} if isinstance(x, Tensor) else dict(x)
    known = {name: tensor.numpy() for name, tensor in named.items()}

    def run(file: str, read: list[str], outputs: list[str]) -> None:
        session = onnxruntime.InferenceSession(folder / file)
        known.update(zip(outputs, session.run(outputs, {name: known[name] for name in read}), strict=True))

    if about["base"]["file"]:
        run(about["base"]["file"], [i["name"] for i in about["base"]["inputs"]], about["base"]["outputs"])
    for task in about["tasks"].values():
        run(task["file"], task["inputs"], [task["output"]])
    return {name: torch.from_numpy(known[task["output"]]) for name, task in about["tasks"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_onnx_graphs_give_what_torch_gives(kind: str, single: bool, tmp_path: Path) -> None:
    model = model_of(kind)
    done = st.export(model, tmp_path / "out", single=single)
    assert done.difference <= 1e-4
    assert done.files == (["model.onnx"] if single else ["base.onnx", *(f"tasks/{t}/task.onnx" for t in model.tasks)])
    for batch in (1, 5):
        x = inputs(kind, batch)
        if kind == "conv":
            x = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
        if not isinstance(x, Tensor):
            x = {name: torch.cat([tensor, tensor], 1) for name, tensor in x.items()}
        with torch.no_grad():
            expected = model.forward_all(x)
        found = answer(tmp_path / "out", x)
        assert all(torch.allclose(found[task], expected[task], rtol=1e-4, atol=1e-5) for task in model.tasks)


def test_programs_of_torch_export_are_exact(tmp_path: Path) -> None:
    model = model_of("mlp")
    assert st.export(model, tmp_path / "out", format="torch", tasks=["plain"]).difference == 0
    base, task = (torch.export.load(tmp_path / "out" / f).module() for f in ("base.pt2", "tasks/plain/task.pt2"))
    x = torch.rand(7, 12)
    with torch.no_grad():
        assert torch.equal(task(x, *base(x))[0], model(x, "plain"))


@pytest.mark.slow
def test_a_task_reads_only_what_it_needs_and_an_earlier_export_goes(tmp_path: Path) -> None:
    model = model_of("mlp")
    st.export(model, tmp_path / "out", format="torch", single=True)
    assert st.export(model, tmp_path / "out", tasks=["plain"]).files == ["base.onnx", "tasks/plain/task.onnx"]
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["tasks"]["plain"]["inputs"] == ["out"] and not list(tmp_path.rglob("*.pt2"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    # Others have files of that name, and people put files of theirs beside ours.
    for name, text in (("model.json", '{"format": "layers-model"}'), ("own.txt", "mine"), (".env", "mine")):
        shutil.copytree(tmp_path / "out", tmp_path / name)
        (tmp_path / name / name).write_text(text)
        with pytest.raises(st.ArtifactError, match="holds no earlier export"):
            st.export(model, tmp_path / name, tasks=["plain"])
        assert (tmp_path / name / name).read_text() == text


@pytest.mark.slow
def test_the_command_and_the_example_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    names = {"kind": ["cat", "dog"], "place": ["in", "out", "sea"]}
    for task, labels in names.items():
        model.add_task(task, side=None, merge="base-only", head=len(labels), labels=labels, seed=0)
        model.save_task(task, tmp_path / "model/tasks" / task)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "graphs")])
    shown = capsys.readouterr().out
    assert "base.onnx" in shown and "differ from torch by at most" in shown
    with torch.no_grad():
        outputs = model.forward_all(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = [f"{task} {[names[task][i] for i in out.argmax(1)]}" for task, out in outputs.items()]
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLE), str(tmp_path / "graphs"), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 20


@pytest.mark.slow
def test_parts_of_every_kind_are_exported(tmp_path: Path) -> None:
    model = st.SideTuner(BASES["map"](TAPS["map"]))
    model.add_task("pixels", side="fusion", merge="mlp2", head="pixels", head_options={"centre": 3.0, "scale": 2.0})
    model.add_task("film", side="mlp", merge="film", head=3, prenorm=True)
    model.add_task("gated", side="copy", merge="concat", head=3, init="zero")
    model.add_task("lateral", side="transformer", laterals=["pixels", "film"], head=3, init="low-energy")
    model.add_task("code", side="fcn3", merge="res-mlp", head="identity")
    assert st.export(model, tmp_path / "out", format="torch", single=True).difference == 0
    assert st.export(model, tmp_path / "out", single=True).difference < 1e-5


class Unexportable(nn.Module):
    """Depends on its numbers, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x + 1


def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = st.SideTuner(st.Base(Unexportable(), example=torch.zeros(1, 4)))
    with pytest.raises(st.ArtifactError, match="no task to export"):
        st.export(model, tmp_path / "out")
    model.add_task("t", side=None, merge="base-only", head=2)
    with pytest.raises(st.ArtifactError, match=r"torch cannot export base\.pt2"):
        st.export(model, tmp_path / "out", format="torch")
    with pytest.raises(st.UnknownNameError, match="did you mean 't'"):
        st.export(model, tmp_path / "out", tasks=["tt"])
    (tmp_path / "own").mkdir()
    (tmp_path / "own/file").write_text("")
    with pytest.raises(st.ArtifactError, match="holds no earlier export"):
        st.export(model, tmp_path / "own")
    called = st.SideTuner(st.Base(lambda x: x, example=torch.zeros(1, 4)))
    called.add_task("t", side=None, merge="base-only", head=2)
    with pytest.raises(st.ArtifactError, match="only a base that is a torch module"):
        st.export(called, tmp_path / "out")
    wrong = st.SideTuner(mlp_base())
    wrong.add_task("t", side=None, merge="base-only", head=2)
    write = graphs.write_torch
    monkeypatch.setattr(graphs, "write_torch", lambda *given: lambda x: [y * torch.nan for y in write(*given)(x)])
    with pytest.raises(st.ArtifactError, match="differ from torch by inf"):
        st.export(wrong, tmp_path / "out", format="torch")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_images_are_bytes_where_the_base_normalises_them(tmp_path: Path) -> None:
    model = st.SideTuner(conv_base())
    model.add_task("t", side="fcn4", head=2, seed=0)
    st.export(model, tmp_path / "out", format="torch", single=True)
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["base"]["inputs"] == [{"name": "x", "dtype": "uint8", "shape": ["batch", 3, 32, 32]}]


def test_a_task_is_exported_at_the_size_that_it_was_trained_with(tmp_path: Path) -> None:
    model = st.SideTuner(conv_base())
    for task in ("small", "large"):
        model.add_task(task, side="fcn4", head=2, seed=0)
    model["small"].transform = ImageTransform((16, 24), crop_pct=0.9)
    with pytest.raises(st.ArtifactError, match=r"'small' takes images of 16 x 24 pixels and 'large' of 32 x 32"):
        st.export(model, tmp_path / "out", format="torch")
    st.export(model, tmp_path / "out", format="torch", tasks=["small"])
    about = json.loads((tmp_path / "out/model.json").read_text())
    assert about["base"]["inputs"][0]["shape"] == ["batch", 3, 16, 24]
    assert about["tasks"]["small"]["preprocessing"]["crop_pct"] == 0.9


@pytest.mark.slow
def test_words_are_found_again_by_the_places_of_their_tokens(encoder: Path, tmp_path: Path) -> None:
    """As docs/export.md says it: the words joined by spaces, and each word's first token."""
    tokenizers = pytest.importorskip("tokenizers")
    model = st.SideTuner(st.load_base(f"hf:{encoder}"))
    options: dict[str, Any] = {"head": "tokens", "head_options": {"outputs": 3}, "labels": ["O", "B-LOC", "I-LOC"]}
    model.add_task("ner", side="mlp", seed=0, **options)
    own = model.base.transform
    assert isinstance(own, TextTransform)
    model["ner"].transform = WordTransform(own.max_length, own.names, own.tokenizer)
    st.export(model, tmp_path / "out")
    about = json.loads((tmp_path / "out/model.json").read_text())
    task = about["tasks"]["ner"]
    assert task["preprocessing"] == {"kind": "text", "max_length": 64, "words": True} and task["problem"] == "tokens"
    words = ["the", "old-tower", "is", "red"]
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer/tokenizer.json")).encode(" ".join(words))
    known = {"input_ids": ids.ids, "attention_mask": ids.attention_mask, "token_type_ids": ids.type_ids}
    given = {entry["name"]: torch.tensor([known[entry["name"]]]) for entry in about["base"]["inputs"]}
    scores = answer(tmp_path / "out", given)["ner"][0]
    begins = [sum(len(word) + 1 for word in words[:k]) for k in range(len(words))]
    firsts = [[begin for begin, end in ids.offsets if end > begin].index(begin) + 1 for begin in begins]
    expected = model.predict([words])["ner"][0]
    assert [task["labels"][k] for k in scores[firsts].argmax(1)] == [word.answers[0].label for word in expected]


@pytest.mark.slow
def test_texts_come_with_their_tokenizer(encoder: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = st.SideTuner(st.load_base(f"hf:{encoder}"))
    model.add_task("mood", side="mlp", head=2, labels=["good", "bad"], seed=0)
    st.export(model, tmp_path / "out")
    text = "seven eight nine seven"
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer/tokenizer.json")).encode(text)
    known = {"input_ids": ids.ids, "attention_mask": ids.attention_mask, "token_type_ids": ids.type_ids}
    about = json.loads((tmp_path / "out/model.json").read_text())
    wanted = [entry["name"] for entry in about["base"]["inputs"]]
    found = answer(tmp_path / "out", {name: torch.tensor([known[name]]) for name in wanted})
    label, value = model.predict(text)["mood"][0]
    assert ["good", "bad"][int(found["mood"].argmax())] == label
    assert float(found["mood"].softmax(1).max()) == pytest.approx(value, abs=1e-4)
