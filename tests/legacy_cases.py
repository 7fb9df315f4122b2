"""Reads the cases of tests/legacy: what an earlier version wrote, and what it made of it (tests/legacy/README.md)."""

from __future__ import annotations

import json
import pkgutil
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sidetuning as st
from conftest import BASES

ROOT = Path(__file__).parent / "legacy/0.1.0"
About = dict[str, Any]


def names(part: str) -> list[str]:
    """The cases of one part, such as "tasks"."""
    return sorted(folder.name for folder in (ROOT / part).iterdir() if folder.is_dir())


def read(folder: Path) -> tuple[About, dict[str, Tensor]]:
    """What a case is, and the tensors that it should give."""
    file = folder / "expected.safetensors"
    return json.loads((folder / "about.json").read_text()), load_file(file) if file.exists() else {}


def copied(tmp_path: Path, *parts: str) -> Path:
    """A copy of some of its folders, to work in."""
    for part in parts:
        shutil.copytree(ROOT / part, tmp_path / part)
    return tmp_path


def same_machine(root: Path = ROOT) -> bool:
    """Whether sums are made of the same bits here as they were where `root` was made."""
    made = json.loads((root / "about.json").read_text())
    capability = torch.backends.cpu.get_cpu_capability()
    return (made["packages"]["torch"], made["cpu_capability"]) == (torch.__version__.partition("+")[0], capability)


def base_of(about: About) -> st.Base:
    """The base that a `base` entry describes; skipped where its packages are not here, or draw other weights."""
    name = about.get("load_base", {}).get("name", "")
    for scheme, package in (("timm:", "timm"), ("hf:", "transformers"), ("onnx:", "onnxruntime")):
        if name.startswith(scheme):
            pytest.importorskip(package)
    example = about.get("example")
    zeros = None if example is None else torch.zeros(example["shape"], dtype=getattr(torch, example["dtype"]))
    with st.seeded(about.get("seed", 0)):
        if "tiny" in about:
            base = BASES[about["tiny"]](tuple(about.get("taps", ())))
        elif "load_base" in about:
            base = st.load_base(**about["load_base"])
            base = base if zeros is None else base.with_example(zeros)
        else:
            net = pkgutil.resolve_name(about["wrap"])
            net = net(**about["arguments"]) if "arguments" in about else net
            assert zeros is not None
            base = st.Base(net, example=zeros, **about.get("options", {}))
    if base.identity().difference({"sha256": about["fingerprint"]}) and not same_machine():
        pytest.skip("this version of torch or of another package draws other weights")
    return base


def input_of(tensors: Mapping[str, Tensor]) -> st.Input:
    """The input of a case: a tensor, a mapping of "x.NAME", or one with the further numbers "extra"."""
    parts = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("x.")}
    if "extra" in tensors:
        return {"x": tensors["x"], "extra": tensors["extra"]}
    return parts or tensors["x"]


def equal(found: Tensor, expected: Tensor, root: Path = ROOT) -> bool:
    """Bitwise on a machine like that which wrote `root`, else within rounding."""
    if same_machine(root):
        return torch.equal(found, expected)
    return torch.allclose(found.double(), expected.double(), atol=1e-4, rtol=1e-3)


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The names below `prefix` of which the tensors differ."""
    wanted = {name.removeprefix(prefix): tensor for name, tensor in expected.items() if name.startswith(prefix)}
    assert wanted and wanted.keys() <= found.keys()
    return [name for name, tensor in wanted.items() if not equal(found[name], tensor)]


def hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256(file.read_bytes()).hexdigest() for file in files}
