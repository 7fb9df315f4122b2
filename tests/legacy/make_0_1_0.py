"""Write `0.1.0/`: a small example of everything that version 0.1.0 of sidetuning writes, with what it makes of it.

It runs with version 0.1.0 (commit 9cbeda0) only and is kept for the record; newer versions read what it wrote. In a
checkout of that commit, with its development packages (`pip install '.[dev]'`):

    export OMP_NUM_THREADS=1 PYTHONPATH=src:tests:tests/fake_habitat
    python …/tests/legacy/make_0_1_0.py

The tiny bases are those of that checkout's `tests/conftest.py`, the world of the agents is its stand-in for Habitat.
All is made in a temporary folder and put beside this file at the end, in place of what was there. Whatever is saved is
read back at once by 0.1.0 itself, and `expected.safetensors` holds what the copy that was read back gives. README.md
describes the layout.
"""

# ruff: noqa: I001  (the order is right where these modules are, in that commit)
from __future__ import annotations

import importlib.metadata
import json
import os
import pkgutil
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sidetuning as st
from conftest import BASES, TAPS, inputs, write_parquet
from sidetuning import cache, training
from sidetuning.artifacts import write_json
from sidetuning.cli import main as cli
from sidetuning.methods import METHODS, Method, Recipe, Task, load_method

HERE = Path(__file__).resolve().parent / "0.1.0"
PACKAGES = (
    "sidetuning",
    "torch",
    "numpy",
    "safetensors",
    "accelerate",
    "transformers",
    "timm",
    "peft",
    "torch-pruning",
    "onnx",
    "onnxruntime",
    "minari",
    "gymnasium",
    "stable-baselines3",
    "pyarrow",
    "pillow",
)
About = dict[str, Any]


def main() -> None:
    """Make all in a temporary folder, then put it in its place."""
    assert st.__version__ == "0.1.0", f"this is sidetuning {st.__version__}"
    torch.set_num_threads(1)
    work = Path(tempfile.gettempdir()).resolve() / "sidetuning-0.1.0"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    os.chdir(work)  # every path below, and every path in a command, is relative to this folder
    for part in (data, tasks, methods, caches, resume, trajectories, runs, policies, versions):
        print(part.__name__, flush=True)
        part()
    shutil.rmtree(
        "cache", ignore_errors=True
    )  # base features of the runs, which are computed again where they are needed
    for file in work.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    os.chdir(work.parent)
    shutil.rmtree(HERE, ignore_errors=True)
    shutil.copytree(work, HERE)
    shutil.rmtree(work)


# ---- what all parts share


def base_of(about: About) -> st.Base:
    """The base that a `base` entry of an `about.json` describes.

    {"tiny": KIND, "taps": […]}: `conftest.BASES[KIND](taps)`.
    {"load_base": {…}}: `load_base(**…)`; with "example", then `.with_example(zeros of that shape and type)`.
    {"wrap": "module:name", …}: a class of torch called with "arguments", or without these the function itself, as
    `Base(…, example=zeros, **options)`.
    "seed", 0 where it is not there: weights are drawn within `seeded(seed)`.
    """
    example = about.get("example")
    zeros = None if example is None else torch.zeros(example["shape"], dtype=getattr(torch, example["dtype"]))
    with st.seeded(about.get("seed", 0)):
        if "tiny" in about:
            return BASES[about["tiny"]](tuple(about.get("taps", ())))
        if "load_base" in about:
            base = st.load_base(**about["load_base"])
            return base if zeros is None else base.with_example(zeros)
        net = pkgutil.resolve_name(about["wrap"])
        if "arguments" in about:
            net = net(**about["arguments"])
        return st.Base(net, example=zeros, **about.get("options", {}))


def with_fingerprint(about: About) -> About:
    """A `base` entry with the fingerprint of the base that it leads to."""
    return {**about, "fingerprint": base_of(about).fingerprint()}


def flat(x: st.Input, name: str = "x") -> dict[str, Tensor]:
    """An input as named tensors: "x"; "x.input_ids" and the like of a mapping; "x" and "extra" of an observation."""
    if isinstance(x, st.Observation):
        return {**flat(x.x, name), "extra": x.extra}
    if isinstance(x, Mapping):
        return {f"{name}.{key}": value for key, value in x.items()}
    return {name: x}


def write(folder: Path, about: About, tensors: Mapping[str, Tensor]) -> None:
    """`about.json` and `expected.safetensors` of a case."""
    write_json(folder / "about.json", about)
    if tensors:
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder that holds tensors."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f.relative_to(folder).as_posix(): sha256(f.read_bytes()).hexdigest() for f in files}


def command(text: str) -> str:
    """Run a command as the command line does; returns it."""
    sys.argv = ["sidetuning", *text.split()]  # which a run keeps
    cli(sys.argv[1:])
    return text


class Stop(Exception):
    """Stands for a kill."""


@contextmanager
def killed() -> Iterator[None]:
    """What the block does must end with a `Stop`."""
    try:
        yield
    except Stop:
        return
    raise AssertionError("it was not interrupted")


def stopping(loss: Callable[..., Tensor], after: int) -> Callable[..., Tensor]:
    """A loss that works so many times."""
    calls = 0

    def stops(output: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop
        return loss(output, target)

    return stops


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """A command that gets Ctrl-C at the beginning of an optimiser step, after so many whole ones."""
    step, calls = training._step, 0

    def stops(*given: Any) -> float:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return step(*given)

    training._step = stops
    try:
        yield
        raise AssertionError("it was not interrupted")
    except SystemExit as end:
        assert end.code == 130
    finally:
        training._step = step


def versions() -> None:
    """What all was made with: bits of sums depend on the processor and on torch."""
    made = {
        "made_by": "make_0_1_0.py",
        "commit": "9cbeda0",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json("about.json", made)


# ---- data/: what runs read


def data() -> None:
    """Data sets of few simple pictures, texts, a tiny encoder with its tokenizer, a tiny ONNX file."""
    cifar_data(Path("data/cifar"))
    taskonomy_data(Path("data/taskonomy"))
    squad_data(Path("data/squad"))
    encoder(Path("data/tiny-bert"))
    onnx_file(Path("data/tiny.onnx"))
    Path("data/nav.yaml").write_text("")  # settings of the stand-in for Habitat, which reads none
    Path("data/text.txt").write_text("old river made in 1844 by tower")
    square = np.full((48, 40, 3), (200, 30, 30), np.uint8)
    square[10:30, 8:28] = (20, 180, 90)
    Image.fromarray(square).save("data/image.png")


def cifar_data(folder: Path) -> None:
    """20 classes, 3 training images and one to test of each: a coarse pattern around a colour per class."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 215, (20, 1, 1, 3))
    for split, n in (("train", 3), ("test", 1)):
        labels = [c for c in range(20) for _ in range(n)]
        pattern = rng.integers(-30, 31, (len(labels), 4, 4, 3)).repeat(8, 1).repeat(8, 2)
        write_parquet(folder, split, (colours[labels] + pattern).clip(0, 255).astype(np.uint8), labels)


def taskonomy_data(root: Path, size: int = 32) -> None:
    """Frames of two buildings in Taskonomy's layout: a bright square somewhere, and labels that follow it."""
    rng = np.random.default_rng(0)
    for building, count in (("almena", 6), ("ihlen", 2)):
        for point in range(count):
            top, left = rng.integers(0, size // 2, 2)
            inside = np.zeros((size, size, 1), bool)
            inside[top : top + size // 2, left : left + size // 2] = True
            pictures = {
                "rgb": np.where(inside, (230, 200, 40), (40 + 5 * point, 30, 60)),
                "normal": np.where(inside, (127, 127, 254), (254, 127, 127)),
            }
            for domain, picture in pictures.items():
                file = root / domain / building / f"point_{point}_view_0_domain_{domain}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture.astype(np.uint8)).save(file)
            scores = np.where(np.arange(12) == (3 if left > size // 4 else 7), 9.0, 0.0).astype(np.float32)
            file = root / "class_object" / building / f"point_{point}_view_0_domain_class_object.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, scores)
    (root / "splits.csv").write_text("id,train,val,test\nalmena,1,0,0\nihlen,0,0,1\n")


WORDS = [
    "red",
    "green",
    "blue",
    "it",
    "was",
    "made",
    "in",
    "by",
    "a",
    "an",
    "of",
    "tower",
    "river",
    "old",
    "new",
    "big",
    "small",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "the", "number", "?", ".", ",", *WORDS]
NUMBERS = [str(n) for n in range(1840, 1850)]


def squad_data(folder: Path) -> None:
    """Sentences in which the answer is a number, or there is none."""
    folder.mkdir(parents=True)
    for split, count, seed in (("train", 12, 0), ("dev", 6, 1)):
        rng = np.random.default_rng(seed)
        paragraphs = []
        for k in range(count):
            words = rng.choice(WORDS, int(rng.integers(6, 14))).tolist()
            answers = []
            if k % 3:
                words[int(rng.integers(1, 5))] = str(rng.choice(NUMBERS))
                year = next(w for w in words if w in NUMBERS)
                answers = [{"text": year, "answer_start": " ".join(words).index(year)}]
            asked = {"id": f"{split}-{k}", "question": "what is the number ?", "answers": answers}
            paragraphs.append({"context": " ".join(words), "qas": [asked]})
        write_json(
            folder / f"{split}.json", {"version": "v2.0", "data": [{"title": "numbers", "paragraphs": paragraphs}]}
        )


def encoder(folder: Path) -> None:
    """A BERT with random weights and a tokenizer of its own, as a folder of transformers."""
    import transformers

    folder.mkdir(parents=True)
    words = [*VOCABULARY, *NUMBERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    with st.seeded(0):
        transformers.BertModel(config).save_pretrained(folder, safe_serialization=True)


def onnx_file(file: Path) -> None:
    """relu(x W + b), (1, 12) -> (1, 16)."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    kind = onnx.TensorProto.FLOAT
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)
        for name, shape in (("w", (12, 16)), ("b", (16,)))
    ]
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    ends = [helper.make_tensor_value_info(n, kind, ["batch", d]) for n, d in (("x", 12), ("y", 16))]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    file.write_bytes(model.SerializeToString())


# ---- tasks/: what `save_task` writes

CONV, MAP, MLP = ({"tiny": kind, "taps": []} for kind in ("conv", "map", "mlp"))
TAPPED = {kind: {"tiny": kind, "taps": list(taps)} for kind, taps in TAPS.items()}
CIFAR = {"load_base": {"name": "resnet44-cifar10"}}
DOOM = {"load_base": {"name": "resnet-doom-curvature"}}
BERT = "hf:data/tiny-bert"
THIN = {"side": "fcn4", "side_options": {"width": 0.25}}
SMALL = {"side": "mlp", "side_options": {"hidden": 8}}


def tasks() -> None:
    """All kinds of sides, merges, heads, starts and bases."""
    images, small, vectors, texts = pictures("map"), pictures("conv"), inputs("mlp"), inputs("sequence")
    case(
        "cifar-mlp2", "the merge of icifar, with labels and metrics", CIFAR, images,
        animals={
            **THIN, "merge": "mlp2", "head": 5, "labels": ["cat", "dog", "Käfer", "fish, flat", "猫"],
            "metrics": {"accuracy": 0.875, "loss": 0.3125},
        },
    )  # fmt: skip
    case(
        "cifar-distilled", "merge alpha, a side that started distilled", CIFAR, images,
        pets={"side": "fcn4", "merge": "alpha", "head": 3, "init": "distilled"},
    )  # fmt: skip
    case(
        "doom-distilled",
        "the side of itaskonomy: fcn5, a quarter as wide, signed, started distilled",
        {**DOOM, "example": {"shape": [1, 3, 64, 64], "dtype": "uint8"}},
        picture_bytes(1, 64),
        rooms={
            "side": "fcn5",
            "side_options": {"width": 0.25, "signed": True},
            "merge": "alpha",
            "head": 4,
            "init": "distilled",
            "metrics": {"score": 0.5},
        },
    )
    case(
        "laterals", "later tasks hear the sides of earlier ones", CONV, inputs("conv", 2),
        first={**THIN, "merge": "alpha", "head": 3},
        second={**THIN, "merge": "mlp2", "head": 2, "laterals": ["first"]},
        third={**THIN, "merge": "alpha", "head": 2, "laterals": ["first", "second"]},
    )  # fmt: skip
    for kind in ("conv", "map", "mlp", "sequence"):
        case(
            f"ladder-{kind}", "a side on taps", TAPPED[kind], pictures(kind),
            ladder={"side": "ladder", "side_options": {"width": 8}, "merge": "alpha", "head": 3},
        )  # fmt: skip
    for kind in ("conv", "map"):
        case(
            f"fusion-{kind}", "a side on taps, with batch norms", TAPPED[kind], pictures(kind),
            fusion={"side": "fusion", "side_options": {"width": 8, "shift": 1}, "merge": "sum", "head": 3},
        )  # fmt: skip
    case(
        "init-zero", "a gate in the merge", MLP, vectors,
        gated={**SMALL, "merge": "mlp2", "head": 3, "init": "zero"},
        alpha={**SMALL, "merge": "alpha", "head": 3, "init": "zero"},
    )  # fmt: skip
    case(
        "init-low-energy", "a scale on the side, of the input and of taps", TAPPED["conv"], small,
        scaled={**THIN, "merge": "mlp2", "head": 3, "init": "low-energy"},
        ladder={"side": "ladder", "side_options": {"width": 8}, "merge": "alpha", "head": 3, "init": "low-energy"},
    )  # fmt: skip
    case(
        "prenorm", "group norm before the head, of vectors", CONV, small,
        normed={**THIN, "merge": "mlp2", "head": 3, "prenorm": True},
    )  # fmt: skip
    case(
        "pixels", "a decoder, after a group norm of maps", MAP, images[:1],
        dense={
            **THIN, "merge": "mlp2", "head": "pixels", "head_options": {"channels": 2, "hidden": 8}, "prenorm": True,
        },
        rooms={"side": "fcn5", "side_options": {"width": 0.0625, "signed": True}, "merge": "alpha", "head": 3},
    )  # fmt: skip
    case(
        "custom",
        "a side and a head of the user's own",
        MLP,
        vectors,
        own={
            "side": OwnPart("Sequential(Linear(12, 8), Tanh(), Linear(8, 16))"),
            "merge": "alpha",
            "merge_options": {"init": 0.25},
            "head": OwnPart("Linear(16, 3)"),
        },
    )
    case(
        "base-only", "no side", CONV, small,
        fixed={"side": None, "merge": "base-only", "head": 4},
        normed={"side": None, "merge": "base-only", "head": 4, "prenorm": True},
    )  # fmt: skip
    case(
        "text",
        "spans and classes of token sequences",
        TAPPED["sequence"],
        texts,
        words={**SMALL, "merge": "mlp2", "head": 3},
        transformer={
            "side": "transformer",
            "side_options": {"width": 8, "layers": 1, "heads": 2},
            "merge": "alpha",
            "head": "span",
        },
        slim={"side": "slim", "side_options": {"width": 8, "layers": 1}, "merge": "alpha", "head": "span"},
        convolutional={
            "side": "convolutional",
            "side_options": {"width": 8, "layers": 2},
            "merge": "film",
            "head": "span",
        },
        match={"side": "match", "side_options": {"width": 8, "layers": 1}, "merge": "alpha", "head": "span"},
    )
    pair = {
        "input_ids": torch.tensor([[2, 5, 6, 7, 8, 9, 3, 14, 20, 31, 12, 3], [2, 5, 6, 8, 9, 3, 18, 13, 3, 0, 0, 0]]),
        "token_type_ids": torch.tensor([[0] * 7 + [1] * 5, [0] * 6 + [1] * 3 + [0] * 3]),
    }
    pair["attention_mask"] = (pair["input_ids"] > 0).long()
    taps = ["embeddings", "encoder.layer.1"]
    case(
        "bert",
        "sides for questions and texts, on an encoder of transformers in a folder",
        {"load_base": {"name": BERT, "taps": taps}},
        pair,
        match={"side": "match", "side_options": {"width": 8}, "merge": "alpha", "head": "span"},
        top={"side": "top", "merge": "alpha", "head": "span"},
        slim={"side": "slim", "side_options": {"width": 8, "layers": 1}, "merge": "alpha", "head": "span"},
    )
    case(
        "policy",
        "a head that also reads the extra numbers of an observation",
        CONV,
        st.Observation(small, torch.randn(3, 3, generator=torch.Generator().manual_seed(1))),
        go={
            **THIN,
            "merge": "alpha",
            "head": "policy",
            "head_options": {"actions": 4, "extra": 3, "hidden": 8, "dropout": 0.5},
        },
    )
    case("copy", "a copy of the base as the side", MLP, vectors, whole={"side": "copy", "merge": "alpha", "head": 3})
    case(
        "copy-slim", "half of the base's channels, by torch-pruning", CONV, small,
        slimmed={"side": "copy", "side_options": {"width": 0.5}, "merge": "alpha", "head": 3},
    )  # fmt: skip
    for kind, which in (("mlp", MERGES), ("map", [m for m in MERGES if m not in ("side-only", "fixed")])):
        side = (
            SMALL if kind == "mlp" else {"side": "transformer", "side_options": {"width": 8, "layers": 1, "heads": 2}}
        )
        case(
            f"merges-{kind}", "every merge", MLP if kind == "mlp" else MAP, pictures(kind),
            **{m: {**side, "merge": m, "merge_options": MERGES[m], "head": 2} for m in which},
        )  # fmt: skip
    case(
        "timm", "a base of random weights, with output, mean, std and channels last", TIMM, picture_bytes(1, 64),
        kinds={**THIN, "merge": "alpha", "head": 3},
    )  # fmt: skip
    gru = {
        "wrap": "torch.nn:GRU", "arguments": {"input_size": 6, "hidden_size": 16, "batch_first": True}, "seed": 3,
        "example": {"shape": [1, 5, 6], "dtype": "float32"}, "options": {"output": 0},
    }  # fmt: skip
    sequences = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(2))
    case("output-index", "output=0 of a network's own", gru, sequences, steps={**SMALL, "merge": "mlp2", "head": 2})
    function = {"wrap": "torch.nn.functional:normalize", "example": {"shape": [1, 12], "dtype": "float32"}}
    case("function", "a plain function as the base", function, vectors, a={**SMALL, "merge": "alpha", "head": 2})
    onnx = {"load_base": {"name": "onnx:data/tiny.onnx"}}
    case("onnx", "a base run by ONNX Runtime", onnx, vectors, a={**SMALL, "merge": "alpha", "head": 2})
    case(
        "identity", "the merged code itself, of a side that started with xavier", CONV, small,
        code={**THIN, "merge": "alpha", "head": "identity", "init": "xavier"},
    )  # fmt: skip


TIMM = {
    "load_base": {"name": "timm:test_mambaout", "output": "map", "pretrained": False}, "seed": 5,
    "example": {"shape": [1, 3, 64, 64], "dtype": "uint8"},
}  # fmt: skip
MERGES: dict[str, dict[str, Any]] = {
    "side-only": {}, "sum": {}, "product": {}, "fixed": {}, "alpha": {"init": 0.25}, "film": {"hidden": 6}, "mlp": {},
    "mlp-hidden": {}, "mlp2": {}, "res-mlp": {}, "concat": {},
}  # fmt: skip


class OwnPart(str):
    """A part of the user's own, as an expression of the names in `torch.nn`."""

    def build(self) -> nn.Module:
        """The module."""
        module = eval(self, dict(vars(nn)))
        assert isinstance(module, nn.Module)
        return module


def picture_bytes(batch: int, size: int) -> Tensor:
    """Random pictures, uint8 (b, 3, size, size)."""
    return torch.randint(
        0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(size), dtype=torch.uint8
    )


def pictures(kind: str) -> st.Input:
    """A small input of a tiny base; one that gives vectors takes pictures of any size."""
    return picture_bytes(3, {"conv": 16, "map": 32}[kind]) if kind in ("conv", "map") else inputs(kind)


def case(name: str, what: str, about: About, x: st.Input, **given: dict[str, Any]) -> None:
    """Save the tasks of one model to `tasks/NAME/TASK`, each as soon as it has weights that no start gives."""
    folder = Path("tasks") / name
    model, entries = st.SideTuner(base_of(about)), []
    for k, (task, options) in enumerate(given.items()):
        parts = {n: v.build() if isinstance(v, OwnPart) else v for n, v in options.items() if n != "metrics"}
        with st.seeded(k):
            model.add_task(task, **parts)
        stir(model, task, x, options["head"])
        model.save_task(task, folder / task, metrics=options.get("metrics"))
        own = {n: str(v) for n, v in options.items() if isinstance(v, OwnPart)}
        entries.append({"task": task, "folder": task, **({"own": own} if own else {})})
    again = st.SideTuner(base_of(about))
    for entry in entries:
        own = {n: OwnPart(v).build() for n, v in entry.get("own", {}).items()}
        again.load_task(folder / entry["folder"], **own)
    with torch.no_grad():
        outputs = {f"output/{task}": again(x, task) for task in again.tasks}
        assert all(torch.equal(out, model(x, n.removeprefix("output/"))) for n, out in outputs.items())
    write(folder, {"what": what, "base": with_fingerprint(about), "tasks": entries}, {**flat(x), **outputs})


def stir(model: st.SideTuner, task: str, x: st.Input, head: object) -> None:
    """Noise on every parameter; where the head is a classifier, two steps of training too, which move batch norms."""
    with st.seeded(7), torch.no_grad():
        for parameter in model[task].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if isinstance(head, int):
        count = len(x.x if isinstance(x, st.Observation) else next(iter(flat(x).values())))
        labels = torch.arange(count) % head
        batch = {**x, "labels": labels} if isinstance(x, Mapping) else (x, labels)
        st.fit(model, task, [batch], steps=2, lr=1e-2, progress=False)


# ---- methods/: what `Method.save` writes


def methods() -> None:
    """Every method with two tasks, on vectors of images; some others on other bases, or with other options."""
    plain: dict[str, dict[str, Any]] = {name: {} for name in METHODS.names()}
    plain["sidetune"] = {**THIN, "merge": "mlp2"}
    plain["boosting"] = {**THIN, "merge": "mlp2", "stages": 2}
    plain["lora"] = {"rank": 2}
    plain["psp"] = {"seed": 3, "statistics": "task"}
    for name, options in plain.items():
        learn(name, name, TAPPED["conv"], options)
    learn("sidetune-dense", "sidetune", CONV, {**THIN, "merge": "alpha", "init": "low-energy", "dense": True})
    learn("boosting-zero", "boosting", MLP, {**SMALL, "merge": "sum", "init": "zero", "prenorm": True, "stages": 3})
    learn("ewc-running", "ewc", MLP, {"running": 0.5, "labels": "data", "samples": 4})
    learn("psp-batch", "psp", CONV, {})
    learn("features-prenorm", "features", MAP, {"prenorm": True})
    for name in ("lora", "psp"):
        learn(f"{name}-sequence", name, TAPPED["sequence"], {"rank": 2} if name == "lora" else {})
    learn("sidetune-pixels", "sidetune", MAP, {**THIN, "merge": "sum"}, heads=("pixels", 2))


def learn(name: str, method: str, about: About, options: dict[str, Any], heads: Sequence[int | str] = (3, 2)) -> None:
    """Save a method that has learned two tasks to `methods/NAME/saved`."""
    folder, kind = Path("methods") / name, about["tiny"]
    x, rows = pictures(kind), torch.arange(4 if kind in ("mlp", "sequence") else 3)
    learner = METHODS.build(method, base_of(about), options=options)
    for k, (task, head) in enumerate(zip(("pets", "cars"), heads, strict=True)):
        if isinstance(head, int):
            todo, y = Task(task, head, labels=[f"{task} {i}" for i in range(head)], seed=k), rows % head
        else:
            todo, y = Task(task, head, F.mse_loss, seed=k, head_options={"channels": 1, "hidden": 8}), x[:, :1] / 255
        batch = {**x, "labels": y} if isinstance(x, Mapping) else (x, y)
        learner.learn(todo, [batch], Recipe(4, lr=1e-2), progress=False)
    learner.save(folder / "saved", metrics={"accuracy": 0.5})
    again = load_method(folder / "saved", base_of(about))
    with torch.no_grad():
        outputs = {f"output/{task}": again(x, task) for task in again.tasks}
        assert all(torch.equal(out, learner(x, n.removeprefix("output/"))) for n, out in outputs.items())
    entry = {"method": method, "base": with_fingerprint(about), "folder": "saved", "tasks": list(again.tasks)}
    write(folder, entry, {**flat(x), **outputs})


# ---- caches/


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """A second view of vectors."""
    return x + torch.rand(x.shape, generator=generator)


noise.__module__ = "legacy"  # a cache's key holds the module and the name of what made its views


def caches() -> None:
    """Base features of vectors and images, one cache that was begun alone, and features of tokens."""
    from sidetuning.scenarios.icifar import mirror

    x = torch.rand(10, 12, generator=torch.Generator().manual_seed(4))
    vectors = TensorDataset(x, torch.arange(10) % 3)
    legacy = {"module": "legacy", "name": "noise", "what": "x + torch.rand(x.shape, generator=generator)"}
    for dtype in ("float32", "float16"):
        given = {"views": 2, "seed": 5, "dtype": dtype, "batch_size": 4}
        feature_cache(f"vectors-{dtype}", TAPPED["mlp"], vectors, given, noise, legacy, [0, 7, 3])
    plain = {"views": 1, "dtype": "float32", "identity": "ten vectors"}
    feature_cache("vectors-named", MLP, vectors, plain, None, None, [9, 1])
    images = TensorDataset(picture_bytes(3, 32), torch.arange(3))
    flip = {
        "module": mirror.__module__,
        "name": mirror.__qualname__,
        "what": "the function of icifar --mirror: x.flip(-1)",
    }
    taps = {"tiny": "conv", "taps": ["4"]}
    feature_cache("images-mirrored", taps, images, {"views": 2, "dtype": "float16"}, mirror, flip, [2, 0])
    begun_cache(vectors, legacy)
    token_caches()


def feature_cache(
    name: str, about: About, content: TensorDataset, given: About, augment: Any, how: About | None, rows: list[int]
) -> None:
    """A finished cache in `caches/NAME/KEY`."""
    folder = Path("caches") / name
    cached = st.cache_features(base_of(about), content, folder, augment=augment, progress=False, **given)
    found = {"data.x": content.tensors[0], "data.y": content.tensors[1]}
    for view in range(cached.views):
        cached.view = view
        found |= {f"view{view}/{k}": v for k, v in batch_tensors(cached.__getitems__(rows)).items()}
    entry = {
        "call": "cache_features",
        "base": with_fingerprint(about),
        "data": "TensorDataset(data.x, data.y)",
        "arguments": given,
        "augment": how,
        "key": cached.folder.name,
        "rows": rows,
    }
    write(folder, entry, found)


def batch_tensors(batch: tuple[Any, st.Features, Tensor]) -> dict[str, Tensor]:
    """What a cache gives for some rows, as named tensors."""
    x, features, y = batch
    return {**flat(x), "out": features.out, **{f"tap.{k}": v for k, v in features.taps.items()}, "y": y}


def begun_cache(vectors: TensorDataset, how: About) -> None:
    """Chunks of four samples; the writer dies at the second chunk of the first view."""
    folder, calls = Path("caches/vectors-begun"), 0
    given = {"views": 2, "seed": 5, "batch_size": 4}
    fetch, chunk = cache._fetch, cache.CHUNK

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Stop
        return fetch(*args)

    cache.CHUNK, cache._fetch = 4, dies
    with killed():
        st.cache_features(base_of(MLP), vectors, folder, augment=noise, progress=False, **given)
    cache._fetch = fetch
    (key,) = [f.name for f in folder.iterdir()]
    with tempfile.TemporaryDirectory() as whole:
        cached = st.cache_features(base_of(MLP), vectors, whole, augment=noise, progress=False, **given)
        found = {"data.x": vectors.tensors[0], "data.y": vectors.tensors[1]}
        for view in range(2):
            cached.view = view
            found |= {f"view{view}/{k}": v for k, v in batch_tensors(cached.__getitems__(range(10))).items()}
    cache.CHUNK = chunk
    entry = {
        "call": "cache_features",
        "base": with_fingerprint(MLP),
        "data": "TensorDataset(data.x, data.y)",
        "arguments": given,
        "augment": how,
        "key": key,
        "rows": list(range(10)),
        "CHUNK": 4,
        "what": "no meta.json: one of six chunks is done; the same call, with cache.CHUNK = 4, goes on to these rows",
    }
    write(folder, entry, found)


def token_caches() -> None:
    """Tokens of the training windows of the squad run, in half precision (that run's own cache) and in single."""
    from sidetuning.data.squad import make_windows, read_questions
    from sidetuning.integrations.transformers import load_tokenizer
    from sidetuning.token_cache import cache_tokens

    about = {"load_base": {"name": BERT, "taps": ["embeddings", "encoder.layer.1"]}}
    base = base_of(about)
    windows = make_windows(read_questions("data/squad", "train").items, load_tokenizer(base, 40), 40, 8)
    labels, rows = torch.from_numpy(windows.labels), [5, 0, 11]
    for dtype in ("float16", "float32"):
        folder = Path("caches") / f"tokens-{dtype}"
        cached = cache_tokens(base, windows, labels, folder, dtype=dtype, progress=False)
        entry = {
            "call": "cache_tokens",
            "base": with_fingerprint(about),
            "texts": "make_windows(read_questions('data/squad', 'train').items, load_tokenizer(base, 40), 40, 8)",
            "labels": "torch.from_numpy(windows.labels)",
            "arguments": {"dtype": dtype},
            "key": cached.folder.name,
            "rows": rows,
            "texts_fingerprint": windows.fingerprint(),
        }
        write(folder, entry, batch_tensors(cached.__getitems__(rows)))


# ---- resume/


def resume() -> None:
    """Training that was stopped in the middle, and the weights that it ends with where it was not."""
    fit_resume()
    distill_resume()
    method_resume("boosting", {**SMALL, "merge": "sum", "stages": 2}, before=(), after=6)
    method_resume("ewc", {"samples": 8}, before=("pets",), after=5)


X = torch.rand(16, 12, generator=torch.Generator().manual_seed(8))
Y = torch.arange(16) % 3


def batches() -> DataLoader[Any]:
    """Four batches of five, the last one of a single sample, in an order that the seed draws."""
    return DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)


def final(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module under names that start with "final/"."""
    return {f"final/{name}": tensor for name, tensor in module.state_dict().items()}


def fit_resume() -> None:
    """Of `fit`, with a schedule and a validation, stopped after step 6 of 9: at the second batch of the second pass."""
    folder = Path("resume/fit")
    folder.mkdir(parents=True)
    adding = {**SMALL, "merge": "mlp2", "head": 3}
    options: dict[str, Any] = {"steps": 9, "lr": 0.01, "weight_decay": 0.1, "seed": 3, "save_every": 0.0}

    def run(loss: Callable[..., Tensor] = F.cross_entropy, file: Path | None = None) -> tuple[Any, Any]:
        model = st.SideTuner(base_of(MLP))
        with st.seeded(0):
            model.add_task("pets", **adding)
        result = st.fit(
            model, "pets", batches(), loss=loss, resume=file, progress=False, **options,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7),
            validate=DataLoader(TensorDataset(X[:6] + 1, Y[:6]), batch_size=6),
        )  # fmt: skip
        return model, result

    whole, result = run()
    with killed():
        run(stopping(F.cross_entropy, 7), folder / "resume.pt")  # a loss of validation among them
    check_goes_on(folder / "resume.pt", lambda file: run(file=file)[0]["pets"], whole["pets"])
    entry = {
        "what": "fit(model, 'pets', loader, **arguments, scheduler=…, validate=…, resume='resume.pt')",
        "base": with_fingerprint(MLP),
        "add_task": adding,
        "arguments": options,
        "loader": "DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)",
        "scheduler": "torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)",
        "validate": "DataLoader(TensorDataset(x[:6] + 1, y[:6]), batch_size=6)",
        "stopped_after": position(folder / "resume.pt"),
        "losses": result.losses,
        "validation": result.validation,
    }
    write(folder, entry, {"x": X, "y": Y, **final(whole["pets"])})


def distill_resume() -> None:
    """Of `distill`, stopped after step 5 of 8."""
    folder = Path("resume/distill")
    folder.mkdir(parents=True)
    adding = {**SMALL, "merge": "alpha", "head": 3}
    options: dict[str, Any] = {"steps": 8, "lr": 0.01, "seed": 1, "save_every": 0.0}

    def run(loss: Callable[..., Tensor] = F.mse_loss, file: Path | None = None) -> tuple[Any, Any]:
        model = st.SideTuner(base_of(MLP))
        with st.seeded(0):
            model.add_task("pets", **adding)
        return model, st.distill(model, "pets", batches(), loss=loss, resume=file, progress=False, **options)

    whole, result = run()
    with killed():
        run(stopping(F.mse_loss, 5), folder / "resume.pt")
    check_goes_on(folder / "resume.pt", lambda file: run(file=file)[0]["pets"].side, whole["pets"].side)
    entry = {
        "what": "distill(model, 'pets', loader, **arguments, resume='resume.pt'); final/… is model['pets'].side",
        "base": with_fingerprint(MLP),
        "add_task": adding,
        "arguments": options,
        "loader": "DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)",
        "stopped_after": position(folder / "resume.pt"),
        "losses": result.losses,
    }
    write(folder, entry, {"x": X, "y": Y, **final(whole["pets"].side)})


def method_resume(name: str, options: dict[str, Any], before: Sequence[str], after: int) -> None:
    """Of `Method.learn`, stopped after so many of its 8 steps; tasks learned before are saved in `saved`."""
    folder = Path("resume") / f"method-{name}"
    folder.mkdir(parents=True)
    recipe = {"steps": 8, "lr": 0.01, "seed": 2}

    def fresh() -> Method:
        if not before:
            return METHODS.build(name, base_of(MLP), options=options)
        return load_method(folder / "saved", base_of(MLP))

    def task(loss: Callable[..., Tensor] = F.cross_entropy, which: str = "cars", seed: int = 1) -> Task:
        return Task(which, 3, loss, seed=seed)

    if before:
        method = METHODS.build(name, base_of(MLP), options=options)
        for k, earlier in enumerate(before):
            method.learn(task(which=earlier, seed=10 + k), batches(), Recipe(**recipe), progress=False)
        method.save(folder / "saved")
    whole = fresh()
    result = whole.learn(task(), batches(), Recipe(**recipe), progress=False)
    with killed():
        fresh().learn(
            task(stopping(F.cross_entropy, after)), batches(), Recipe(**recipe), resume=folder / "resume.pt",
            save_every=0.0, progress=False,
        )  # fmt: skip

    def go_on(file: Path) -> Method:
        method = fresh()
        method.learn(task(), batches(), Recipe(**recipe), resume=file, save_every=0.0, progress=False)
        return method

    check_goes_on(folder / "resume.pt", go_on, whole)
    entry = {
        "what": "method.learn(Task('cars', 3, seed=1), loader, Recipe(**recipe), resume='resume.pt', save_every=0.0)",
        "method": name,
        "options": options,
        "base": with_fingerprint(MLP),
        "saved": "saved" if before else None,
        "recipe": recipe,
        "loader": "DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)",
        "stopped_after": {f.name: position(f) for f in sorted(folder.glob("resume.pt*"))},
        "losses": result.losses,
    }
    write(folder, entry, {"x": X, "y": Y, **final(whole)})


def position(file: Path) -> dict[str, int]:
    """Where a resume file stopped."""
    found = torch.load(file, weights_only=True)["position"]
    return {name: found[name] for name in ("step", "epoch", "batch")}


def check_goes_on(file: Path, run: Callable[[Path], nn.Module], whole: nn.Module) -> None:
    """Go on from a copy of a resume file, and its companions, and compare the weights bitwise."""
    with tempfile.TemporaryDirectory() as folder:
        for part in file.parent.glob(f"{file.name}*"):
            shutil.copy(part, folder)
        ended = run(Path(folder) / file.name).state_dict()
    expected = whole.state_dict()
    assert ended.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in ended.items())


# ---- trajectories/

WORLD = "habitat:data/nav.yaml"
WALKS = "trajectories/habitat-pointnav-v0"


def trajectories() -> None:
    """Ten walks through the stand-in for Habitat, and what eleven would be."""
    from sidetuning.data.trajectories import read_steps

    collect = f"collect-trajectories --env {WORLD} --size 16 --workers 1 --no-progress"
    given = command(f"{collect} --episodes 10 --out {WALKS}")
    steps = read_steps(WALKS)
    copy = shutil.copytree(WALKS, Path("more") / Path(WALKS).name)
    command(f"{collect} --episodes 11 --out {copy}")
    more = read_steps(copy)
    shutil.rmtree(copy.parent)
    rows = [0, 1, len(steps) - 1]
    entry = {
        "command": given,
        "folder": Path(WALKS).name,
        "episodes": 10,
        "fingerprint": steps.fingerprint(),
        "steps": len(steps),
        "rows": rows,
        "with_11_episodes": {"fingerprint": more.fingerprint(), "steps": len(more)},
        "what": "the command with --episodes 11 adds one; rgb, extra and actions are those of some rows",
    }
    found = {"rgb": steps.rgb[rows], "extra": steps.extra[rows], "actions": steps.actions[rows], "starts": steps.starts}
    write(Path(WALKS).parent, entry, found)


# ---- runs/: run folders of the command line


def runs() -> None:
    """One of each scenario, with few steps; commands are run in the folder that holds data/ and runs/."""
    icifar_runs()
    interrupted_run()
    compare_run()
    itaskonomy_run()
    transfer_run()
    squad_run()
    imitation_run()
    rl_run()


ICIFAR = "icifar --data data/cifar --cache cache --no-progress --batch 8"
NARROW = "--side-width 0.25 --init xavier --tasks 2 --samples 64"
MIRRORED = (
    "--side ladder --taps layer3 --merge alpha --init None --mirror --optimizer adamw --schedule one-cycle "
    "--smoothing 0.1 --tasks 1 --samples 32"
)


def icifar_runs() -> None:
    """Two tasks, and one much as the best recipe has it."""
    from sidetuning.scenarios import predict

    x = cifar_pictures()
    for name, arguments, taps, what in (
        ("icifar", f"{NARROW} --merge alpha", [], "two tasks, finished"),
        ("icifar-mirrored", MIRRORED, ["layer3"], "one task with a side on taps, mirrored images, one cycle"),
    ):
        folder = Path("runs") / name
        given = command(f"{ICIFAR} {arguments} --out {folder}/run")
        model = st.load(folder / "run")
        answers = predict.predict(predict.Settings(str(folder / "run"), ("data/image.png",)))
        entry = {
            "what": what,
            "command": given,
            "base": with_fingerprint({"load_base": {"name": "resnet44-cifar10", "taps": taps}}),
            "tasks": model.tasks,
            "predict data/image.png": [asdict(a) for a in answers],
        }
        write(folder, entry, {"x": x, **answers_of(model, model.tasks, x)})


def interrupted_run() -> None:
    """Two tasks of icifar, of which the second was interrupted."""
    folder, whole = Path("runs/icifar-interrupted"), Path("whole")
    again = f"{ICIFAR} {NARROW} --merge alpha --seed 1 --save-every 0.0 --out"
    command(f"{again} {whole}")
    with interrupted(8 + 5):  # a task has 8 steps, a pass 4 batches
        command(f"{again} {folder}/run")
    with tempfile.TemporaryDirectory() as copy:
        going = shutil.copytree(folder / "run", Path(copy) / "run")
        command(f"{again} {going}")
        assert hashes(going) == hashes(whole)
    assert not (folder / "run/result.json").exists()
    (file,) = (folder / "run/resume").iterdir()
    result = json.loads((whole / "result.json").read_text())
    last = f"tasks/{file.stem}/side.safetensors"
    tensors = {f"final/{name}": tensor for name, tensor in load_file(whole / last).items()}
    entry = {
        "what": "one of two tasks is learned, the second was stopped; the same command goes on, to these weights of it",
        "command": f"{again} {folder}/run",
        "base": with_fingerprint(CIFAR),
        "resume": {file.name: position(file)},
        "finished": {"sha256": hashes(whole), "accuracy": result["accuracy"], "alphas": result["alphas"]},
    }
    model, x = st.load(whole), cifar_pictures()
    write(folder, entry, {"x": x, **tensors, **answers_of(model, model.tasks, x)})
    shutil.rmtree(whole)


def cifar_pictures() -> Tensor:
    """Three test images, uint8."""
    from sidetuning.data.cifar import load_images

    images = load_images("data/cifar", "test")
    return torch.stack([images[i][0] for i in (0, 7, 15)])


@torch.no_grad()
def answers_of(model: Any, names: Sequence[str], x: st.Input, prefix: str = "output") -> dict[str, Tensor]:
    """The outputs of some tasks of a model or method."""
    return {f"{prefix}/{task}": model(x, task) for task in names}


def compare_run() -> None:
    """Two cells."""
    folder = Path("runs/compare")
    given = command(
        "compare icifar --methods features sidetune --merge alpha --seeds 1 --data data/cifar --samples 32 --batch 8 "
        f"--tasks 1 --cache cache --out {folder}/run"
    )
    x, found = cifar_pictures(), {}
    cells = ["features-0", "sidetune-0"]
    for cell in cells:
        method = load_method(folder / "run" / cell / "tasks", base_of(CIFAR))
        found |= answers_of(method, list(method.tasks), x, f"output/{cell}")
    entry = {"command": given, "base": with_fingerprint(CIFAR), "cells": cells, "methods": "run/CELL/tasks"}
    write(folder, entry, {"x": x, **found})


SEEN = {**DOOM, "example": {"shape": [1, 3, 32, 32], "dtype": "uint8"}}


def taskonomy_pictures() -> Tensor:
    """Both test frames, uint8."""
    files = sorted(Path("data/taskonomy/rgb/ihlen").iterdir())
    return torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) for f in files])


def itaskonomy_run() -> None:
    """A dense task and one of categories."""
    folder = Path("runs/itaskonomy")
    given = command(
        "itaskonomy --data data/taskonomy --tasks normal class_object --side-width 0.0625 --init xavier --epochs 2 "
        f"--batch 3 --pictures 2 --cache cache --no-progress --out {folder}/run"
    )
    method, x = load_method(folder / "run/tasks", base_of(SEEN)), taskonomy_pictures()
    entry = {"command": given, "base": with_fingerprint(SEEN), "tasks": list(method.tasks), "methods": "run/tasks"}
    write(folder, entry, {"x": x, **answers_of(method, list(method.tasks), x)})


def transfer_run() -> None:
    """Two numbers of frames, two seeds."""
    folder = Path("runs/transfer")
    given = command(
        "transfer --data data/taskonomy --targets class_object --frames 2 4 --methods features --steps 2 --batch 2 "
        f"--seeds 2 --cache cache --out {folder}/run"
    )
    x, found = taskonomy_pictures(), {}
    cells = sorted(f.parent.name for f in (folder / "run").glob("*/result.json"))
    for cell in cells:
        method = load_method(folder / "run" / cell / "tasks", base_of(SEEN))
        found |= answers_of(method, list(method.tasks), x, f"output/{cell}")
    entry = {"command": given, "base": with_fingerprint(SEEN), "cells": cells, "methods": "run/CELL/tasks"}
    write(folder, entry, {"x": x, **found})


def squad_run() -> None:
    """A side that compares the text with the question, on a tiny BERT."""
    from sidetuning.data.squad import make_windows, read_questions
    from sidetuning.integrations.transformers import load_tokenizer
    from sidetuning.scenarios import answer
    from sidetuning.scenarios import squad as scenario

    folder = Path("runs/squad")
    given = command(
        f"squad --data data/squad --base {BERT} --length 40 --stride 8 --width 8 --epochs 2 --batch 8 --lr 0.01 "
        f"--n-best 3 --cache caches/tokens-float16 --no-progress --out {folder}/run"
    )
    kept = [f for f in Path("caches/tokens-float16").iterdir() if f.is_dir()]
    assert len(kept) == 1, "the run has another cache than `token_caches`"
    content = json.loads((folder / "run/run.json").read_text())
    settings = scenario.Settings(**content["settings"])
    about = {"load_base": {"name": BERT, "taps": scenario.taps_of(settings)}}
    base = base_of(about)
    method = load_method(folder / "run/tasks", base)
    windows = make_windows(read_questions("data/squad", "dev").items, load_tokenizer(base, 40), 40, 8)
    x = windows.batch(range(len(windows)))
    question = "what is the number ?"
    found = answer.answer(answer.Settings(str(folder / "run"), question, "data/text.txt", best=2))
    entry = {
        "command": given, "base": with_fingerprint(about), "tasks": ["squad"], "methods": "run/tasks",
        "answer": {
            "arguments": ["answer", "runs/squad/run", question, "--context", "data/text.txt", "--best", "2"],
            "best": [p._asdict() for p in found.best], "threshold": found.threshold,
        },
    }  # fmt: skip
    write(folder, entry, {**flat(x), **answers_of(method, ["squad"], x)})


AGENTS = f"--env {WORLD} --seeds 1 --test-episodes 2 --side-width 0.0625 --init xavier --no-progress"
COMPASS = "pointgoal_with_gps_compass"


def observations() -> list[dict[str, Any]]:
    """What an agent sees at its first three steps ahead."""
    from sidetuning.scenarios.worlds import make_world

    world = make_world(WORLD, "test", 16)
    seen = [world.reset(seed=5)[0]]
    seen += [world.step(1)[0] for _ in range(2)]
    world.close()
    return seen


def imitation_run() -> None:
    """Side-tuning from four trajectories."""
    from sidetuning.scenarios.play import load_player

    folder = Path("runs/imitation")
    given = command(
        f"imitation --data {WALKS} --methods sidetune --trajectories 4 --steps 6 --batch 8 --shift 2 {AGENTS} "
        f"--cache cache --out {folder}/run"
    )
    agents(folder, {"command": given}, ["sidetune-4-0"], lambda cell: load_player(cell).policy)


def rl_run() -> None:
    """PPO with a side."""
    from sidetuning.scenarios import ppo

    folder = Path("runs/rl")
    given = command(
        f"rl --methods sidetune --steps 64 --envs 2 --rollout 16 --batch 16 --size 16 {AGENTS} --out {folder}/run"
    )
    agents(folder, {"command": given}, ["sidetune-0"], lambda cell: ppo.policy_of(ppo.load_policy(cell)[1]))


def agents(folder: Path, entry: About, cells: list[str], load: Callable[[Path], Any]) -> None:
    """What the agents of some cells would do, at three observations."""
    seen = observations()
    found = {"rgb": np.stack([o["rgb"] for o in seen]), "compass": np.stack([o[COMPASS] for o in seen])}
    tensors = {name: torch.from_numpy(array) for name, array in found.items()}
    for cell in cells:
        policy = load(folder / "run" / cell)
        tensors[f"policy/{cell}"] = torch.stack([policy(o) for o in seen])
    size = seen[0]["rgb"].shape[0]
    base = {**DOOM, "example": {"shape": [1, 3, size, size], "dtype": "uint8"}}
    write(folder, {**entry, "base": with_fingerprint(base), "cells": cells}, tensors)


# ---- policies/: agents as stable-baselines3 saves them


def policies() -> None:
    """PPO with a side-tuned extractor and cached base features, by `PPO.save`, whose pickles name classes of ours."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    from sidetuning.integrations.sb3 import SideTunedExtractor, VecBaseFeatures
    from sidetuning.scenarios.ppo import probabilities
    from sidetuning.scenarios.worlds import make_world

    folder = Path("policies/ppo")
    folder.mkdir(parents=True)
    env = VecBaseFeatures(DummyVecEnv([lambda: make_world(WORLD, "train", 16)]), base_of(DOOM).with_example(zeros(16)))
    options = {**THIN, "init": None, "hidden": 8}
    learner = PPO(
        "MultiInputPolicy",
        env,
        n_steps=16,
        batch_size=16,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": SideTunedExtractor,
            "features_extractor_kwargs": options,
            "net_arch": [],
        },
    )
    learner.learn(16)
    learner.save(folder / "agent.zip")
    again = PPO.load(folder / "agent.zip", device="cpu")
    seen = observations()
    tensors = {
        "rgb": torch.from_numpy(np.stack([o["rgb"] for o in seen])),
        "compass": torch.from_numpy(np.stack([o[COMPASS] for o in seen])),
        "policy": torch.stack([probabilities(again.policy, o)[0] for o in seen]),
    }
    entry = {
        "what": "PPO.load('agent.zip'); scenarios.ppo.probabilities(policy, observation)[0] of each observation",
        "extractor": options,
        "base": with_fingerprint({**DOOM, "example": {"shape": [1, 3, 16, 16], "dtype": "uint8"}}),
    }
    write(folder, entry, tensors)


def zeros(size: int) -> Tensor:
    """A picture."""
    return torch.zeros(1, 3, size, size, dtype=torch.uint8)


if __name__ == "__main__":
    main()
