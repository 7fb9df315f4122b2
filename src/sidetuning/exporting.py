"""A model as graphs that run without this library: ONNX, or programs of torch.export. The base once, tasks small."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sidetuning.base import Base
from sidetuning.branch import Branch
from sidetuning.errors import ArtifactError, UnknownNameError
from sidetuning.files import read_json, write_json
from sidetuning.graphs import ENDINGS, Graph, Pass, Run, described, exporting, graphs_of, longer, named, samples, write
from sidetuning.predicting import run
from sidetuning.registry import unknown
from sidetuning.transforms import ImageTransform, TextTransform
from sidetuning.tuner import SideTuner

Format = Literal["onnx", "torch"]
# What tells an exported folder, and the version of its fields.
ABOUT, FORMAT_VERSION = "model.json", 1
# The largest relative difference to torch that an export may have.
TOLERANCE = 1e-4
# What turns a task's output into what people read.
ACTIVATIONS = {"classes": "softmax", "tokens": "softmax", "labels": "sigmoid"}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        files: the graphs, relative to the folder.
        difference: the largest difference to torch that was found, relative to the largest number of an output.
    """

    path: Path
    files: list[str]
    difference: float


def export(
    model: SideTuner,
    path: str | Path,
    *,
    format: Format = "onnx",
    tasks: Sequence[str] | None = None,
    single: bool = False,
) -> Exported:
    """Write a model as graphs that run without this library, and compare each with torch.

    The folder holds `base.onnx`, `tasks/<task>/task.onnx` for each task, which reads the base's outputs, and
    `model.json`: names of inputs and outputs, preprocessing, labels. Batch sizes and lengths of texts are open.

    Args:
        model: the model, on the CPU.
        path: the folder to write; an earlier export there is replaced.
        format: "onnx", or "torch" for programs of torch.export (`.pt2`).
        tasks: their names, all by default.
        single: write one graph of the base and all tasks, `model.onnx`, instead.

    Raises:
        UnknownNameError: no such task or format.
        ArtifactError: a folder of other things, a network that cannot be exported, or outputs that differ from torch's
            by more than 1e-4 of their size; nothing is written then.
        ImportError: the packages of the extra `onnx` are not installed.
    """
    if format not in ENDINGS:
        raise UnknownNameError(unknown("format", format, ENDINGS, verb="known"))
    path, chosen = Path(path), list(model.tasks if tasks is None else tasks)
    for task in chosen:
        # Raises, with near names.
        model[task]
    if path.exists() and not (path.is_dir() and _is_export(path)):
        raise ArtifactError(f"{path} exists and holds no earlier export; give another folder, or an empty one")
    if not chosen:
        raise ArtifactError("the model has no task to export; add one first")
    if model.base.engine.run is not None:
        raise ArtifactError(f"a base in {model.base.engine} is not exported; give a model on the plain base")
    if not isinstance(model.base.net, nn.Module) or model.base.device.type != "cpu":
        raise ArtifactError(
            f"only a base that is a torch module on the CPU can be exported, not {type(model.base.net).__name__} on "
            f"{model.base.device}; an ONNX base runs as its own file already, and model.cpu() moves a model"
        )
    base, branches = sized(model, chosen), {task: model[task] for task in model.tasks}
    graphs = list(graphs_of(base, branches, chosen, format, single))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        with torch.no_grad(), exporting():
            runs = {graph.file: write(graph, folder / graph.file, format) for graph in graphs}
            worst = max(difference(base, branches, chosen, graphs, runs, rows) for rows in (1, 3))
        if not worst <= TOLERANCE:
            raise ArtifactError(
                f"the exported graphs differ from torch by {worst:.1e} of an output's size, and {TOLERANCE:g} is "
                "allowed; nothing was written: export in float32, or with another version of torch"
            )
        if isinstance(base.transform, TextTransform):
            base.transform.tokenizer().save_pretrained(folder / "tokenizer")
        entries = {task: task_entry(base, branches[task], f"task.{task}", graphs) for task in chosen}
        write_json(folder / ABOUT, about(base, entries, graphs, format, worst))
        replace_folder(folder, path)
    return Exported(path, [graph.file for graph in graphs], worst)


def _is_export(path: Path) -> bool:
    """Whether a folder is empty, or holds what `export` wrote and nothing else."""
    graphs = {f"{name}{ending}" for name in ("base", "model") for ending in ENDINGS.values()}
    found = {file.name.removesuffix(".data") for file in path.iterdir() if file.name != ".DS_Store"}
    try:
        ours = not found or bool(read_json(path / ABOUT, {"format": str, "tasks": dict}, ""))
    except (OSError, ArtifactError):
        return False
    return ours and found <= {ABOUT, "tasks", "tokenizer", *graphs}


def sized(model: SideTuner, tasks: Sequence[str]) -> Base:
    """The base for images of the size that the tasks were trained with.

    Raises:
        ArtifactError: they were trained with several sizes.
    """
    sizes: dict[tuple[int, int], str] = {}
    for task in tasks:
        transform = model[task].transform or model.base.transform
        if isinstance(transform, ImageTransform):
            sizes.setdefault(transform.size, task)
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ArtifactError(
            f"task '{first}' takes images of {one[0]} x {one[1]} pixels and '{second}' of {other[0]} x {other[1]}, and "
            "a graph is of one size; export them into two folders, one task at a time"
        )
    example = model.base.example
    if not sizes or not isinstance(example, Tensor) or tuple(example.shape[-2:]) in sizes:
        return model.base
    return model.base.with_example(example.new_zeros(*example.shape[:-2], *next(iter(sizes))))


def difference(
    base: Base,
    branches: Mapping[str, Branch],
    tasks: Sequence[str],
    graphs: Sequence[Graph],
    runs: Mapping[str, Run],
    rows: int,
) -> float:
    """The largest relative difference of the tasks' outputs to torch's, of a batch of so many rows."""
    given = longer(base, samples(base, rows))
    inputs = base.prepare(named(base, list(given), list(given.values())))
    expected = run(list(tasks), branches, inputs, base.encode(inputs))
    known: dict[str, Tensor] = dict(given)
    for graph in graphs:
        known |= zip(graph.outputs, runs[graph.file](known), strict=True)
    worst = 0.0
    for task, wanted in expected.items():
        found = known[f"task.{task}"]
        size = float(wanted.abs().max().clamp(min=1e-6))
        apart = float((found - wanted).abs().max()) / size if found.shape == wanted.shape else np.inf
        # No comparison with NaN is true.
        worst = max(worst, apart) if np.isfinite(apart) else np.inf
    return worst


def about(base: Base, entries: Mapping[str, Any], graphs: Sequence[Graph], format: str, worst: float) -> dict[str, Any]:
    """What stands in `model.json`; `entries` are those of the tasks."""
    # Of one graph of everything, the base is a part.
    first, alone = graphs[0], isinstance(graphs[0].module, Pass)
    recorded = {
        "name": base.spec.name if base.spec else None,
        "sha256": base.identity().sha256,
        "file": first.file if alone else None,
        "inputs": [{"name": name, **described(base, first.inputs[name])} for name in first.read],
        "outputs": first.outputs if alone else [],
    }
    return {
        "format_version": FORMAT_VERSION,
        "library_version": version("sidetuning"),
        "format": format,
        "base": recorded,
        # Graphs take uint8, and normalise it themselves, where the base does.
        "preprocessing": None if base.transform is None else base.transform.to_json(),
        "tasks": dict(entries),
        "largest_difference_to_torch": worst,
    }


def task_entry(base: Base, branch: Branch, output: str, graphs: Sequence[Graph]) -> dict[str, Any]:
    """What `model.json` says of a task."""
    graph = next(graph for graph in graphs if output in graph.outputs)
    problem = branch.config.problem or type(branch.problem).__name__.lower()
    transform = branch.transform or base.transform
    return {
        "file": graph.file,
        "inputs": graph.read,
        "output": output,
        "problem": problem,
        "activation": ACTIVATIONS.get(problem),
        "labels": branch.labels,
        "preprocessing": None if transform is None else transform.to_json(),
    }


def replace_folder(new: Path, path: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
    if path.exists():
        path.replace(new.with_name("earlier"))
    new.replace(path)
    shutil.rmtree(new.with_name("earlier"), ignore_errors=True)
