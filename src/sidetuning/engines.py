"""Engines for the frozen base: it never learns, so it may run as anything that gives the same numbers.

Every engine is compared with plain torch when it is built, and refused where it differs beyond rounding. In fewer bits
a base is another base: its tasks and caches are its own.
"""

from __future__ import annotations

import copy
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ArtifactError, ShapeError, SideTuningError, UnknownNameError, told
from sidetuning.graphs import Graph, Pass, exporting, kept, longer, named, open_onnx, removed, samples, texts, write
from sidetuning.inputs import map_input, to_device
from sidetuning.language import LanguageModel
from sidetuning.probe import MASKS
from sidetuning.quantising import quantise_onnx, quantise_weights
from sidetuning.registry import unknown
from sidetuning.running import Engine, Run, form_of, tensors_of
from sidetuning.terminal import say
from sidetuning.transforms import MOST_TOKENS

# The precisions of each engine.
ENGINES: dict[str, tuple[str, ...]] = {
    "torch": ("fp32", "bf16", "int8", "int4"),
    "folded": ("fp32", "bf16"),
    "compile": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
}
# What is imported; the first two write the graph.
NEEDED: dict[str, tuple[str, ...]] = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime")}
NEEDED["openvino"] = (*NEEDED["onnxruntime"], "openvino")
# The largest id that is looked for.
MOST_IDS = 2**24
PRECISIONS = ("fp32", "bf16", "int8", "int4")
# The largest relative error of fp32, which is rounding's, and of fewer bits, beyond which a network is another one.
ROUNDING, COARSE = 1e-3, 0.25
# Batches for calibration at most, and rows of a batch that `engine="auto"` measures.
BATCHES, ROWS = 32, 8
Calibration = Input | Iterable[Any]


def with_engine(
    base: Base, engine: str = "auto", *, precision: str = "fp32", calibration: Calibration | None = None
) -> Base:
    """The same base, run by another engine, or in fewer bits.

    Args:
        base: a plain base, of a torch module in float32, with all taps that tasks will read.
        engine: "torch"; "folded", torch with batch norms folded into convolutions, channels last; "compile", by
            torch's compiler, ahead of time; "onnxruntime" or "openvino"; or "auto", which measures what is installed.
        precision: "fp32"; "bf16"; "int8"; or "int4", weights of four bits, in groups of 32. In torch, int8 and int4
            are the weights of linear layers, through torchao; elsewhere int8 is of activations too.
        calibration: inputs like those to come, a batch or a loader of batches, for int8 by onnxruntime and openvino.

    Returns:
        A base whose attribute `engine` tells name, precision and error. Inputs of other sizes, other devices and
        gradients of the input go to plain torch in fp32, and are refused where that would give other numbers.

    Raises:
        UnknownNameError: no such engine or precision, or not this precision of this engine.
        ShapeError: a base that the engine cannot run, or an error beyond rounding: 1e-3 in fp32.
        ImportError: the engine is not installed.
    """
    if engine != "auto" and engine not in ENGINES:
        raise UnknownNameError(unknown("engine", engine, [*ENGINES, "auto"], verb="known"))
    if precision not in PRECISIONS:
        raise UnknownNameError(unknown("precision", precision, PRECISIONS, verb="known"))
    if engine != "auto" and precision not in ENGINES[engine]:
        able = ", ".join(name for name, known in ENGINES.items() if precision in known)
        raise UnknownNameError(f"{engine} does not run a base in {precision}; choose engine= of {able}")
    if base.engine.again is not None:
        raise ShapeError(f"this base runs in {base.engine} already; give the plain base")
    if engine == "torch" and precision == "fp32":
        return base
    if not isinstance(base.net, nn.Module) or base.dtype != torch.float32:
        kind = f"{type(base.net).__name__} in {base.dtype}"
        raise ShapeError(f"engines run torch modules whose weights are float32, not a {kind}; leave engine= out")
    if base.lm is not None and precision != "fp32" and engine != "torch":
        raise ShapeError(f"a base that writes texts runs in {precision} by engine='torch' alone")
    batches = [] if calibration is None else batches_of(base, calibration)
    ranges: Any = calibration if is_ranges(calibration) else None
    if engine == "auto":
        return _fastest(base, precision, batches)
    return _built(base, engine, precision, batches, ranges)


def is_ranges(calibration: Any) -> bool:
    """Whether a calibration is what an earlier one has measured, as a base's spec keeps it."""
    pairs = list(calibration.values()) if isinstance(calibration, Mapping) else [None]
    return all(isinstance(p, list) and len(p) == 2 and all(isinstance(v, (int, float)) for v in p) for p in pairs)


def batches_of(base: Base, calibration: Calibration) -> list[Input]:
    """The first batches of inputs, prepared.

    Raises:
        ShapeError: there are none.
    """
    if is_ranges(calibration):
        return []
    given = [calibration] if isinstance(calibration, (Tensor, Mapping)) else calibration
    batches = [base.prepare(b[0] if isinstance(b, (tuple, list)) else b) for b, _ in zip(given, range(BATCHES))]
    if not batches:
        raise ShapeError("calibration= gives no input; give a batch, or a loader of batches")
    return batches


def _built(
    base: Base, name: str, precision: str, batches: Sequence[Input], ranges: Mapping[str, list[float]] | None
) -> Base:
    """The base with an engine, compared with plain torch."""
    # What it is, before it runs as something else.
    base.identity()
    # Ranges of older versions are of a graph without what the example lacks.
    plain, (base, idle) = base, _wide(base) if name != "torch" else (base, ())
    if ranges is not None and not ranges.keys() >= set(idle):
        base, idle = plain, ()
    batches = [Engine(idle=idle).whole(x) for x in batches]
    # In fewer bits, what it was calibrated for tells its error.
    inputs = list(batches[:1])
    if precision == "fp32" or not batches:
        inputs += [_probe(base, 1), _probe(base, 3, more=True)]
    expected = [base.encode(x) for x in inputs]
    other, otherwise, run = copy.copy(plain), None, None
    with told(f"this base cannot be built for {name} ({{}}); choose another engine="):
        if name in ("onnxruntime", "openvino"):
            run, ranges = _graph(base, name, precision, batches, ranges)
        else:
            inner = base if name == "torch" else base.folded()
            inner = inner if precision == "fp32" else _converted(inner, precision)
            if name == "torch":
                other = inner
            else:
                run = inner.encode if name == "folded" else _graph(inner, name, precision)[0]
                otherwise = None if precision == "fp32" else inner.encode
    form = form_of(_probe(base, 2))
    bounds = {} if run is None or name == "folded" else _bounds(base)
    ranges = None if ranges is None else {**ranges, **{key: [0, bounds[key]] for key in idle}}
    again = partial(_built, name=name, precision=precision, batches=(), ranges=ranges)
    other.engine = Engine(name, precision, 0.0, None, ranges, run, otherwise, form, bounds, idle, None, again)
    with told(f"this base does not run by {name} ({{}}); choose another engine="):
        found = [other.encode(x) if run is None else run(x) for x in inputs]
    error = max(error_of(a, b) for a, b in zip(expected, found, strict=True))
    bound = ROUNDING if precision == "fp32" else COARSE
    if not error <= bound:
        raise ShapeError(
            f"in {other.engine} this base differs from torch by {error:.1e} of its features, and {bound:g} is allowed; "
            "choose another engine= or precision=" + ("" if ranges is None else ", or more inputs for calibration=")
        )
    if precision != "fp32":
        # In fp32 it is the plain base's.
        other._probe = None
        other.example_features = other.encode(base.prepare(base.example))
    other.engine = replace(other.engine, error=error, sha256=other.identity().sha256)
    if base.spec is not None:
        options = {"engine": name, "precision": precision, "calibration": ranges}
        given = {key: value for key, value in options.items() if value is not None}
        other.spec = replace(base.spec, options={**base.spec.options, **given})
    return other


def _probe(base: Base, rows: int, more: bool = False) -> Input:
    """A prepared input of so many rows, of the example's size; `more` makes texts longer, with padding."""
    given = samples(base, rows)
    given = longer(base, given) if more else given
    return base.prepare(named(base, list(given), list(given.values())))


def _wide(base: Base) -> tuple[Base, tuple[str, ...]]:
    """The base whose example has all that its tokenizer gives, and what it lacked, where zeros there change nothing."""
    x = tensors_of(base.prepare(base.example))
    zeros = {name: torch.zeros_like(x["input_ids"]) for name in getattr(base.transform, "names", ()) if name not in x}
    if not zeros or error_of(base.encode(x), base.encode({**x, **zeros})) > 1e-6:
        return base, ()
    other = copy.copy(base)
    other.example = {**tensors_of(base.example), **zeros}
    return other, tuple(zeros)


def _bounds(base: Base) -> dict[str, int]:
    """What plain torch takes of whole numbers, such as ids, and of tokens: graphs do not look."""
    x, found = to_device(_probe(base, 1), torch.device("cpu")), {}
    if isinstance(base.net, nn.Module) and base.device.type != "cpu":
        # Beyond a table, a GPU fails for the rest of the process.
        base = base.with_net(copy.deepcopy(base.net).cpu())
    entries = {name: value for name, value in tensors_of(x).items() if isinstance(value, Tensor)}
    for name, value in entries.items():
        if value.dtype in (torch.int64, torch.int32) and name not in MASKS[:2]:
            filled = partial(_filled, x, name)
            found[name] = _largest(lambda n, filled=filled: base.encode(filled(n)), 1, MOST_IDS)  # type: ignore[misc]
    if tokens := [value.shape[1] for value in entries.values() if texts(base, value)]:

        def repeated(value: Tensor, n: int) -> Tensor:
            return value.repeat(1, n, *[1] * (value.ndim - 2))[:, :n] if texts(base, value) else value

        found[""] = _largest(lambda n: base.encode(map_input(x, lambda v: repeated(v, n))), tokens[0], MOST_TOKENS)
    return found


def _filled(x: Input, name: str, number: int) -> Input:
    """An input with one number in all places of an entry."""
    return map_input(x, lambda value: torch.full_like(value, number) if value is tensors_of(x)[name] else value)


def _largest(run: Callable[[int], Any], known: int, most: int) -> int:
    """The largest number, up to `most`, with which something runs; those below it do, too."""
    below, above, number = known, most + 1, most
    while above - below > 1:
        try:
            run(number)
            below = number
        except Exception:
            # Networks refuse what is beyond their tables in many ways.
            above = number
        number = (below + above) // 2
    return below


def error_of(expected: Features, found: Features) -> float:
    """The largest relative difference of code and taps, |a - b| / |a|; infinite where one is not finite."""
    pairs = zip(expected.tensors(), found.tensors(), strict=True)
    errors = [float((a - b).double().norm() / a.double().norm().clamp(min=1e-12)) for a, b in pairs]
    return max(error if error < float("inf") else float("inf") for error in errors)


def _converted(base: Base, precision: str) -> Base:
    """The base with its own weights in fewer bits; nothing of the given one changes."""
    assert isinstance(base.net, nn.Module)
    if precision == "bf16":
        whole = copy.deepcopy(base.net if base.lm is None else base.lm.net).to(torch.bfloat16)
        lm = None if base.lm is None else LanguageModel(whole)
        return base.with_net(whole if lm is None else lm.backbone, lm)
    tensors = {id(tensor): tensor for tensor in [*base.net.parameters(), *base.net.buffers()]}
    # Only what is converted takes memory anew.
    net = copy.deepcopy(base.net, tensors)
    quantise_weights(net, precision)
    return base.with_net(net, None if base.lm is None else base.lm.around(net))


def _graph(
    base: Base,
    name: str,
    precision: str,
    batches: Sequence[Input] = (),
    ranges: Mapping[str, list[float]] | None = None,
) -> tuple[Run, Mapping[str, list[float]] | None]:
    """The network as a graph with open numbers of rows and tokens, and the ranges of its activations in int8."""
    if name != "compile" and base.device.type != "cpu":
        raise ShapeError(f"{name} runs on the CPU alone, and this base lies on {base.device}; use engine='compile'")
    if missing := [package for package in NEEDED.get(name, ()) if find_spec(package) is None]:
        extra = "openvino" if name == "openvino" else "onnx"
        raise ImportError(f"engine='{name}' needs {missing[0]}: pip install 'sidetuning[{extra}]'")
    inputs = {k: v for k, v in tensors_of(_probe(base, 2)).items() if isinstance(v, Tensor)}
    graph = Graph("base", Pass(base, list(inputs), raw=False), inputs, ["out", *base.tap_shapes])
    known = [version(package) for package in ("torch", *NEEDED.get(name, ())[:2])]
    named_by = [base.identity().digest(), base.structure(), base.layouts, graph.outputs, form_of(inputs), known]
    if name == "compile":
        file = kept([*named_by, *_machine(base.device)], ".pt2", lambda path: _compile(graph, path))
        with removed(file):
            package = torch._inductor.aoti_load_package(str(file))
        return _outputs(base, lambda given: package(*(given[k] for k in inputs))), None
    file = whole = kept(named_by, ".onnx", lambda path: _export(graph, path))
    if precision == "int8":
        if not batches and ranges is None:
            raise ShapeError(f"{name} in int8 needs inputs like those to come: calibration=, a batch or a loader")
        feeds = [{k: v.numpy() for k, v in tensors_of(batch).items() if k in inputs} for batch in batches]
        measured = {k: v for k, v in (ranges or {}).items() if k not in inputs or inputs[k].is_floating_point()}
        ranges = measured or quantise_onnx(whole, None, feeds, None)
        file = kept([*named_by, ranges], ".onnx", lambda path: quantise_onnx(whole, path, [], ranges))
    with removed(file):
        run = open_onnx(graph, file) if name == "onnxruntime" else _open_openvino(graph, file, precision)
    return _outputs(base, run), ranges


def _outputs(base: Base, run: Callable[[dict[str, Tensor]], Sequence[Tensor]]) -> Run:
    """A graph of named tensors as a function of an input."""
    taps = list(base.tap_shapes)

    def features(inputs: Input) -> Features:
        tensors = {name: x.detach().contiguous() for name, x in tensors_of(inputs).items() if isinstance(x, Tensor)}
        out, *others = run(tensors)
        return Features(out, dict(zip(taps, others, strict=True)))

    return features


def _export(graph: Graph, path: Path) -> None:
    with torch.no_grad(), exporting():
        write(graph, path, "onnx")


def _compile(graph: Graph, path: Path) -> None:
    """Write the code that torch's compiler makes of a graph, ahead of time: no number of rows compiles it anew."""
    base: Any = graph.module.base
    open_sizes = [[0] * bool(x.ndim) + [1] * texts(base, x) for x in graph.inputs.values()]
    shapes = tuple(dict.fromkeys(dimensions, torch.export.Dim.AUTO) for dimensions in open_sizes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph.module.eval(), tuple(graph.inputs.values()), dynamic_shapes=(shapes,))
        options = {"freezing": True}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def _machine(device: torch.device) -> list[Any]:
    """What compiled code depends on: a processor without some instruction would end the program."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [f"flags {platform.processor()}"]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [flags, torch.get_num_threads(), torch.cuda.get_device_capability(device) if device.type == "cuda" else None]


def _open_openvino(graph: Graph, file: Path, precision: str) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """What runs an ONNX file by OpenVINO, from any number of threads."""
    import openvino

    core = openvino.Core()
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(str(file)), "CPU", hints)
    names = [port.get_any_name() for port in compiled.inputs]

    def answer(given: Mapping[str, Tensor]) -> list[Tensor]:
        # A request is one thread's.
        results = compiled.create_infer_request().infer({name: given[name].numpy() for name in names})
        return [torch.from_numpy(results[place].copy()) for place in range(len(graph.outputs))]

    return answer


def _fastest(base: Base, precision: str, batches: Sequence[Input]) -> Base:
    """The base with the engine that takes the least time for a batch, of those that are installed; says which.

    "compile" takes part on GPUs alone: on a CPU it compiles for longer than all others together.
    """
    cpu = base.device.type == "cpu"
    names = [name for name, known in ENGINES.items() if precision in known and (name == "compile") != cpu]
    found: dict[str, Base] = {} if precision != "fp32" else {"torch": base}
    refused: list[str] = []
    for name in [name for name in names if name not in found and (cpu or name in ("compile", "folded", "torch"))]:
        try:
            found[name] = _built(base, name, precision, batches, None)
        except (ImportError, SideTuningError) as error:
            refused.append(f"{name}: {error}")
    if not found:
        raise ShapeError(f"no engine runs this base in {precision}: {'; '.join(refused)}")
    x = batches[0] if batches else _probe(base, ROWS)
    seconds: dict[str, list[float]] = {name: [] for name in ["", *found]}
    # The first round warms up.
    for turn in range(4):
        for name, other in [("", base), *found.items()]:
            start = time.perf_counter()
            other.encode(x)
            if base.device.type == "cuda":
                torch.cuda.synchronize(base.device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    times = {name: median(values) for name, values in seconds.items()}
    best = min(found, key=lambda name: times[name])
    shown = ", ".join(f"{name} {1000 * times[name]:.3g} ms" for name in found)
    say(f"the base runs by {best} in {precision} ({shown} for {len(next(iter(tensors_of(x).values())))} rows)", True)
    chosen = found[best]
    if best != "torch" or precision != "fp32":
        chosen.engine = replace(chosen.engine, speed=times[""] / times[best])
    return chosen


def rebuilt(base: Base, engine: str, precision: str, ranges: Mapping[str, list[float]] | None) -> Base:
    """The base with the engine that a model folder names; plain torch, which is said, where it cannot be had here.

    Raises:
        SideTuningError: the engine cannot be had, and plain torch would give other numbers.
    """
    if ranges is not None and not is_ranges(ranges):
        raise ArtifactError("the recorded calibration of a base is damaged; build the base, and give base=")
    try:
        return with_engine(base, engine, precision=precision, calibration=ranges)
    except (ImportError, SideTuningError) as error:
        if precision != "fp32" or engine not in ENGINES:
            raise
        say(f"the base runs by torch: {error}", True)
        return base
