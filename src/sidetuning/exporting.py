"""A model as graphs that run without this library: ONNX, or programs of torch.export. The base once, tasks small."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sidetuning import __version__
from sidetuning.base import Base, Features, Input
from sidetuning.branch import Branch
from sidetuning.errors import ArtifactError, UnknownNameError
from sidetuning.files import write_json
from sidetuning.inputs import IMAGES
from sidetuning.probe import probe_input
from sidetuning.registry import unknown
from sidetuning.tuner import SideTuner

Format = Literal["onnx", "torch"]
ENDINGS: dict[str, str] = {"onnx": ".onnx", "torch": ".pt2"}
# What tells an exported folder, and the version of its fields.
ABOUT, FORMAT_VERSION = "model.json", 1
# The largest relative difference to torch that an export may have.
TOLERANCE = 1e-4
# What turns a task's output into what people read.
ACTIVATIONS = {"classes": "softmax", "tokens": "softmax", "labels": "sigmoid"}
# A graph as a function of named arrays.
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


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


@dataclass
class Graph:
    """One graph to be written: what is called, on which named inputs, with which named outputs."""

    file: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    read: list[str] = field(default_factory=list)


class Pass(nn.Module):
    """The base on raw inputs: its code, then its taps."""

    def __init__(self, base: Base, names: Sequence[str]) -> None:
        super().__init__()
        # The network is registered under its own name: `Base` hides it, and weights would become constants.
        self.base, self.names, self.net = base, list(names), base.net

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.base.encode(self.base.prepare(named(self.base, self.names, tensors))).tensors())


class Tasks(nn.Module):
    """Some tasks on raw inputs and the base's outputs, or on raw inputs alone where `whole` is set."""

    def __init__(self, model: SideTuner, tasks: Sequence[str], names: Sequence[str], whole: bool) -> None:
        super().__init__()
        self.base, self.tasks, self.names, self.taps = model.base, list(tasks), list(names), list(model.base.tap_shapes)
        self.net = model.base.net if whole else None
        needed = dict.fromkeys([*tasks, *(lateral for task in tasks for lateral in model[task].config.laterals)])
        self.branches = nn.ModuleDict({name: model[name] for name in needed})

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        inputs = self.base.prepare(named(self.base, self.names, tensors[:count]))
        if self.net is not None:
            features = self.base.encode(inputs)
        else:
            features = Features(tensors[count], dict(zip(self.taps, tensors[count + 1 :], strict=True)))
        branches: dict[str, Branch] = dict(self.branches.items())  # type: ignore[arg-type]
        sides = {name: branch.side_output(inputs, features) for name, branch in branches.items()}
        outputs = []
        for task in self.tasks:
            laterals = [side for name in branches[task].config.laterals if (side := sides[name]) is not None]
            outputs.append(branches[task].output(inputs, features, sides[task], laterals))
        return tuple(outputs)


def named(base: Base, names: Sequence[str], tensors: Sequence[Tensor]) -> Input:
    """The input of a base from its tensors, with what else its example holds."""
    if isinstance(base.example, Tensor):
        return tensors[0]
    return {**base.example, **dict(zip(names, tensors, strict=True))}


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
    branches = {task: model[task] for task in chosen}
    if path.exists() and not (path / ABOUT).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} exists and holds no earlier export; give another folder, or an empty one")
    if not chosen:
        raise ArtifactError("the model has no task to export; add one first")
    if not isinstance(model.base.net, nn.Module) or model.base.device.type != "cpu":
        raise ArtifactError(
            f"only a base that is a torch module on the CPU can be exported, not {type(model.base.net).__name__} on "
            f"{model.base.device}; an ONNX base runs as its own file already, and model.cpu() moves a model"
        )
    examples = samples(model.base, 2)
    graphs = list(graphs_of(model, chosen, examples, format, single))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        with torch.no_grad(), exporting():
            runs = {graph.file: write(graph, folder / graph.file, format) for graph in graphs}
            worst = max(difference(model, chosen, graphs, runs, rows) for rows in (1, 3))
        if not worst <= TOLERANCE:
            raise ArtifactError(
                f"the exported graphs differ from torch by {worst:.1e} of an output's size, and {TOLERANCE:g} is "
                "allowed; nothing was written: export in float32, or with another version of torch"
            )
        write_json(folder / ABOUT, about(model, branches, graphs, format, worst))
        replace_folder(folder, path)
    return Exported(path, [graph.file for graph in graphs], worst)


def samples(base: Base, rows: int) -> dict[str, Tensor]:
    """Random inputs of a base by name, of so many rows; images are uint8 where the base normalises them."""
    both = probe_input(base.example)
    tensors = {"x": both} if isinstance(both, Tensor) else {k: v for k, v in both.items() if isinstance(v, Tensor)}
    generator = torch.Generator().manual_seed(rows)
    found = {}
    for name, tensor in tensors.items():
        index = torch.randint(0, 2, (rows,), generator=generator)
        value = tensor[index] if tensor.ndim else tensor
        if name in IMAGES and base.mean is not None:
            value = torch.randint(0, 256, value.shape, generator=generator, dtype=torch.uint8)
        elif name in IMAGES and value.is_floating_point():
            value = torch.rand(value.shape, generator=generator, dtype=value.dtype)
        found[name] = value
    return found


def longer(base: Base, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Texts of another length than the example's, the first with padding at its end."""
    changed = {name: torch.cat([x, x[:, :3]], 1) if texts(base, x) else x for name, x in given.items()}
    mask = changed.get("attention_mask")
    if mask is not None and len(mask) > 1:
        mask[0, -2:] = 0
    return changed


def texts(base: Base, tensor: Tensor) -> bool:
    """Whether a tensor's second dimension is one of tokens, whose number is open."""
    ids = None if isinstance(base.example, Tensor) else base.example.get("input_ids")
    return isinstance(ids, Tensor) and tensor.ndim >= 2 and tensor.shape[1] == ids.shape[1]


def graphs_of(
    model: SideTuner, tasks: Sequence[str], examples: dict[str, Tensor], format: str, single: bool
) -> Iterator[Graph]:
    """The graphs of a model: one, or the base's and one per task."""
    base, names, ending = model.base, list(examples), ENDINGS[format]
    if single:
        yield Graph(f"model{ending}", Tasks(model, tasks, names, True), examples, [f"task.{task}" for task in tasks])
        return
    with torch.no_grad():
        features = base(named(base, names, list(examples.values())))
    given = {"out": features.out, **{f"tap.{tap}": tensor for tap, tensor in features.taps.items()}}
    yield Graph(f"base{ending}", Pass(base, names), examples, list(given))
    for task in tasks:
        module = Tasks(model, [task], names, False)
        yield Graph(f"tasks/{task}/task{ending}", module, {**examples, **given}, [f"task.{task}"])


@contextmanager
def exporting() -> Iterator[None]:
    """Without torch's fused attention, which no other program has, and the exporters' notes to their authors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def write(graph: Graph, file: Path, format: str) -> Run:
    """Write one graph; returns what runs it from its file.

    Raises:
        ArtifactError: torch cannot export it.
    """
    base: Any = graph.module.base
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = tuple(
        {0: batch, 1: tokens} if texts(base, tensor) else {0: batch} if tensor.ndim else None
        for tensor in graph.inputs.values()
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    save = write_onnx if format == "onnx" else write_torch
    try:
        return save(graph, file, (shapes,))
    except (ImportError, OSError):
        raise
    except Exception as error:
        # Exporters raise as many kinds of errors as there are networks.
        told = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"torch cannot export {graph.file} ({type(error).__name__}: {told}); try --format "
            f"{'torch' if format == 'onnx' else 'onnx'}, or another base"
        ) from error


def write_onnx(graph: Graph, file: Path, shapes: Any) -> Run:
    """As `write`, through torch.onnx; run by ONNX Runtime. Inputs that nothing reads are no part of the graph."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export to ONNX needs more packages: pip install 'sidetuning[onnx]'") from error
    program = torch.onnx.export(
        graph.module.eval(),
        tuple(graph.inputs.values()),
        input_names=list(graph.inputs),
        output_names=graph.outputs,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    inputs: Any = program.model.graph.inputs
    for value in [value for value in inputs if not value.uses() and not value.is_graph_output()]:
        inputs.remove(value)
    graph.read = [str(value.name) for value in inputs]
    program.save(str(file))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(given: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: np.ascontiguousarray(given[name].numpy()) for name in graph.read}
        return [torch.from_numpy(array) for array in session.run(graph.outputs, arrays)]

    return run


def write_torch(graph: Graph, file: Path, shapes: Any) -> Run:
    """As `write`, by torch.export."""
    program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=shapes)
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    graph.read = list(graph.inputs)
    return lambda given: list(loaded(*(given[name] for name in graph.inputs)))


def difference(
    model: SideTuner, tasks: Sequence[str], graphs: Sequence[Graph], runs: Mapping[str, Run], rows: int
) -> float:
    """The largest relative difference of the tasks' outputs to torch's, of a batch of so many rows."""
    given = longer(model.base, samples(model.base, rows))
    expected = model.forward_all(named(model.base, list(given), list(given.values())), tasks=tasks)
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


def about(
    model: SideTuner, branches: Mapping[str, Branch], graphs: Sequence[Graph], format: str, worst: float
) -> dict[str, Any]:
    """What stands in `model.json`."""
    base, entries = model.base, {}
    for task, branch in branches.items():
        graph = next(graph for graph in graphs if f"task.{task}" in graph.outputs)
        problem = branch.config.problem or type(branch.problem).__name__.lower()
        entries[task] = {
            "file": graph.file,
            "inputs": graph.read,
            "output": f"task.{task}",
            "problem": problem,
            "activation": ACTIVATIONS.get(problem),
            "labels": branch.labels,
        }
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
        "library_version": __version__,
        "format": format,
        "base": recorded,
        "preprocessing": preprocessing(base),
        "tasks": entries,
        "largest_difference_to_torch": worst,
    }


def preprocessing(base: Base) -> dict[str, Any] | None:
    """How a file becomes an input; graphs take uint8 and normalise it themselves where the base does."""
    example = base.example
    if not isinstance(example, Tensor) or example.ndim != 4:
        return None
    return {"kind": "image", "size": list(example.shape[-2:]), "crop_pct": 1.0, "interpolation": "bilinear"}


def described(base: Base, tensor: Tensor) -> dict[str, Any]:
    """Type and shape of an input, open dimensions by name."""
    shape: list[int | str] = ["batch", *tensor.shape[1:]] if tensor.ndim else []
    if texts(base, tensor):
        shape[1] = "tokens"
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def replace_folder(new: Path, path: Path) -> None:
    """Put a finished folder in the place of an earlier one."""
    if path.exists():
        path.replace(new.with_name("earlier"))
    new.replace(path)
    shutil.rmtree(new.with_name("earlier"), ignore_errors=True)
