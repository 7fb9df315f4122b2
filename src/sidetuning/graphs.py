"""A base and its tasks as graphs: what is written, in which format, and how it is run again from its file."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.branch import Branch
from sidetuning.errors import ArtifactError
from sidetuning.files import atomic_write, user_cache
from sidetuning.inputs import IMAGES
from sidetuning.predicting import run
from sidetuning.probe import probe_input

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
# A graph as a function of named tensors.
Run = Callable[[Mapping[str, Tensor]], list[Tensor]]


@dataclass
class Graph:
    """One graph to be written: what is called, on which named inputs, with which named outputs."""

    file: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    read: list[str] = field(default_factory=list)


class Pass(nn.Module):
    """The base on raw inputs, or on prepared ones: its code, then its taps."""

    def __init__(self, base: Base, names: Sequence[str], raw: bool = True) -> None:
        super().__init__()
        self.raw = raw
        # The network is registered under its own name: `Base` hides it, and weights would become constants.
        self.base, self.names, self.net = base, list(names), base.net

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = named(self.base, self.names, tensors)
        return tuple(self.base.encode(self.base.prepare(inputs) if self.raw else inputs).tensors())


class Tasks(nn.Module):
    """Some tasks on raw inputs and the base's outputs, or on raw inputs alone where `whole` is set."""

    def __init__(
        self, base: Base, branches: Mapping[str, Branch], tasks: Sequence[str], names: Sequence[str], whole: bool
    ) -> None:
        super().__init__()
        self.base, self.tasks, self.names, self.taps = base, list(tasks), list(names), list(base.tap_shapes)
        self.net = base.net if whole else None
        needed = dict.fromkeys([*tasks, *(lateral for task in tasks for lateral in branches[task].config.laterals)])
        self.branches = nn.ModuleDict({name: branches[name] for name in needed})

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        inputs = self.base.prepare(named(self.base, self.names, tensors[:count]))
        if self.net is not None:
            features = self.base.encode(inputs)
        else:
            features = Features(tensors[count], dict(zip(self.taps, tensors[count + 1 :], strict=True)))
        branches: dict[str, Branch] = dict(self.branches.items())  # type: ignore[arg-type]
        outputs = run(self.tasks, branches, inputs, features)
        return tuple(outputs[task] for task in self.tasks)


def named(base: Base, names: Sequence[str], tensors: Sequence[Tensor]) -> Input:
    """The input of a base from its tensors, with what else its example holds."""
    if isinstance(base.example, Tensor):
        return tensors[0]
    return {**base.example, **dict(zip(names, tensors, strict=True))}


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
    base: Base, branches: Mapping[str, Branch], tasks: Sequence[str], format: str, single: bool
) -> Iterator[Graph]:
    """The graphs of a model: one, or the base's and one per task."""
    examples, ending = samples(base, 2), ENDINGS[format]
    names = list(examples)
    if single:
        module = Tasks(base, branches, tasks, names, True)
        yield Graph(f"model{ending}", module, examples, [f"task.{task}" for task in tasks])
        return
    with torch.no_grad():
        features = base(named(base, names, list(examples.values())))
    given = {"out": features.out, **{f"tap.{tap}": tensor for tap, tensor in features.taps.items()}}
    yield Graph(f"base{ending}", Pass(base, names), examples, list(given))
    for task in tasks:
        module = Tasks(base, branches, [task], names, False)
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
        import onnxruntime  # noqa: F401
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
    program.save(str(file))
    return open_onnx(graph, file)


def open_onnx(graph: Graph, file: Path) -> Run:
    """What runs a graph from its file, by ONNX Runtime, on as many cores as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
    # Its threads would wait in a loop, and take the cores from the sides.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    graph.read = [str(value.name) for value in session.get_inputs()]

    def answer(given: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: np.ascontiguousarray(given[name].numpy()) for name in graph.read}
        return [torch.from_numpy(array) for array in session.run(graph.outputs, arrays)]

    return answer


def write_torch(graph: Graph, file: Path, shapes: Any) -> Run:
    """As `write`, by torch.export."""
    program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=shapes)
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    graph.read = list(graph.inputs)
    return lambda given: list(loaded(*(given[name] for name in graph.inputs)))


def described(base: Base, tensor: Tensor) -> dict[str, Any]:
    """Type and shape of an input, open dimensions by name."""
    shape: list[int | str] = ["batch", *tensor.shape[1:]] if tensor.ndim else []
    if texts(base, tensor):
        shape[1] = "tokens"
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


def kept(content: Sequence[Any], ending: str, make: Callable[[Path], Any]) -> Path:
    """A file of the user's cache that is named by all that it depends on, made where it is not there."""
    file = user_cache("engines") / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}{ending}"
    if not file.exists():
        # Compilers ask for the ending.
        with tempfile.TemporaryDirectory() as own, atomic_write(file) as temporary:
            make(made := Path(own) / file.name)
            shutil.move(made, temporary)
    return file


@contextmanager
def removed(file: Path) -> Iterator[None]:
    """Remove a file that cannot be opened: the next call makes it anew."""
    try:
        yield
    except Exception:
        file.unlink(missing_ok=True)
        raise
