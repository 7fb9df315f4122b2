"""Write `0.2.0/`: examples of what version 0.2.0 writes and 0.1.0 did not, with what it makes of them.

It runs with version 0.2.0 only and is kept for the record; newer versions read what it wrote. In a checkout of that
version, with its development packages:

    OMP_NUM_THREADS=1 PYTHONPATH=src:tests:tests/library python tests/legacy/make_0_2_0.py

README.md describes the layout.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

import sidetuning as st
from data_parts import write_digits
from sidetuning.cli import main as cli
from test_generating import IDS, learned, network, text

HERE = Path(__file__).resolve().parent / "0.2.0"
TAPS = ("layer2", "layer3")


def main() -> None:
    """Make all in a temporary folder, then put it in its place."""
    assert st.__version__ == "0.2.0", f"this is sidetuning {st.__version__}"
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    os.chdir(work)
    expected: dict[str, Tensor] = {}
    for part in (model, own, caches, writer):
        expected |= part()
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in expected.items()}, "expected.safetensors")
    packages = {name: version(name) for name in ("torch", "numpy", "transformers", "timm")}
    about = {"packages": packages, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    Path("about.json").write_text(json.dumps({**about, "python": platform.python_version()}, indent=1))
    for file in work.rglob(".lock"):
        file.unlink()
    os.chdir(work.parent)
    shutil.rmtree(HERE, ignore_errors=True)
    shutil.copytree(work, HERE)
    shutil.rmtree(work)


def images(count: int, seed: int) -> Tensor:
    """Images of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def model() -> dict[str, Tensor]:
    """A model folder: heads in closed form with sums and routes, labels, numbers in units of their own."""
    made = st.SideTuner(st.load_base("resnet44-cifar10", taps=TAPS))
    x, classes = images(48, 0), torch.arange(48) % 3
    options = {"outputs": 3, "width": 64, "grid": 2, "seed": 7}
    made.add_task("solved", side=None, merge="base-only", head="random", head_options=options, labels=["a", "b", "c"])
    st.solve(made, "solved", [(x, classes)], keep_statistics=True, progress=False)
    st.learn_routes(made, "solved", [(x, classes)], width=64, grid=2, progress=False)
    made.add_task("tags", side="fusion", head=2, problem="labels", labels=["left", "right"], seed=1)
    tags = torch.stack([classes > 0, classes > 1], 1).float()
    st.fit(made, "tags", [(x, tags)], steps=2, progress=False)
    made.add_task("age", side="fcn4", merge="alpha", head=1, problem="numbers", init="distilled", seed=2)
    st.fit(made, "age", [(x, 20.0 + 30 * classes[:, None])], steps=2, progress=False)
    st.learn_routes(made, "tags", [(255 - x, tags)], width=64, grid=2, progress=False)
    made.save("model")
    again, some = st.load("model"), images(4, 1)
    found = {"x": some, "update.x": images(16, 2), "update.y": torch.arange(16) % 3}
    found |= {f"output/{name}": output for name, output in again.forward_all(some).items()}
    found["route"] = again.route(some).probabilities
    st.update(again, "solved", [(found["update.x"], found["update.y"])], progress=False)
    return {**found, "updated": again(some, "solved")}


def own() -> dict[str, Tensor]:
    """The folder of `sidetuning train`, with its reports; the photographs are not kept."""
    write_digits(Path("digits"), (0, 1), 20)
    cli(["train", "digits", "--base", "resnet44-cifar10", "--task", "digits", "--out", "own", "--budget", "1s", "--quiet"])
    shutil.rmtree("digits")
    Path("own/report.html").unlink()
    return {"own": st.load("own")(images(4, 1), "digits")}


def caches() -> dict[str, Tensor]:
    """Features of two views, and a sweep on them that has ended."""
    base = st.load_base("resnet44-cifar10", taps=TAPS[1:])
    data = TensorDataset(images(8, 3), torch.arange(8) % 2)
    cached = st.cache_features(base, data, "cache", progress=False)
    some = [
        st.Candidate("solved", {"side": None, "merge": "base-only", "head": 2}, solve=True),
        st.Candidate("side", {"side": "fusion", "head": 2, "seed": 0}, fit={"steps": 2}),
    ]
    swept = st.sweep(base, cached, some, validation=cached, out="sweep", progress=False)
    rows = {trial.name: torch.tensor(trial.scores["loss"]) for trial in swept.trials}
    return {"data.x": data.tensors[0], "data.y": data.tensors[1], **{f"loss/{name}": loss for name, loss in rows.items()}}


def writer() -> dict[str, Tensor]:
    """A decoder with tasks that write."""
    network("gpt2").save_pretrained("decoder")
    base = st.load_base("hf:decoder", taps=["h.0", "h.1", "h.2"])
    # It would name a folder of this machine.
    base.spec = None
    made = learned(base)
    made.save("writer")
    found = {"ids": IDS}
    for task in made.tasks:
        found[f"written/{task}"] = made.generate(text(IDS), task, max_new_tokens=6, do_sample=False)
        found[f"logits/{task}"] = made(text(IDS), task)
    return found


if __name__ == "__main__":
    main()
