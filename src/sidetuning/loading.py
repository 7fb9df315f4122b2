"""From a name to a base, and from a folder to a model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sidetuning.artifacts import CONFIG, read_task
from sidetuning.base import Base, BaseSpec
from sidetuning.engines import Calibration, rebuilt, with_engine
from sidetuning.errors import ArtifactError, UnknownNameError
from sidetuning.folder import task_folders
from sidetuning.inputs import Input, example_from, example_record
from sidetuning.outputs import Taps
from sidetuning.registry import Registry
from sidetuning.shelf import Shelf
from sidetuning.tuner import SideTuner

BASES: Registry[Callable[..., Base]] = Registry(
    "base", {"resnet44-cifar10": "sidetuning.bases:resnet44_cifar10"}, group="sidetuning.bases"
)
SCHEMES: Registry[Callable[..., Base]] = Registry(
    "base scheme",
    {
        "timm": "sidetuning.integrations.timm:load",
        "hf": "sidetuning.integrations.transformers:load",
        "onnx": "sidetuning.integrations.onnx:load",
        "http": "sidetuning.integrations.http:load_http",
        "https": "sidetuning.integrations.http:load_https",
    },
)


def load_base(
    name: str,
    *,
    taps: Taps = (),
    output: str | None = None,
    revision: str | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    dtype: str | None = None,
    example: Input | None = None,
    nhwc: Sequence[str] = (),
    engine: str = "torch",
    precision: str = "fp32",
    calibration: Calibration | None = None,
) -> Base:
    """Build a pretrained base by name.

    Args:
        name: a packaged base ("resnet44-cifar10"), "timm:NAME", "hf:NAME_OR_FOLDER", "onnx:PATH", or the address of a
            server's embeddings of texts, "http://host/v1?model=NAME".
        taps: names of submodules whose outputs are returned too, or a mapping to their layouts, as of `Base`.
        output: which output to use; "map" gives a timm model's spatial features instead of the pooled ones, and a
            transformers model takes the name of a field ("last_hidden_state" by default).
        revision: revision of a transformers model on the Hub.
        pretrained: False builds timm and transformers models with random weights.
        weights: a safetensors file to use instead of the weights that the name stands for.
        dtype: type of the weights of timm and transformers models: "float32", "bfloat16", "float16" or "float64". Sides
            are trained in full precision all the same.
        example: an input of the size that parts are built for, as of `Base.with_example`; an ONNX file that leaves
            sizes open needs it.
        nhwc: names of the inputs and outputs of an ONNX file that are (b, h, w, c).
        engine, precision, calibration: what runs the network, and in how many bits, as of `with_engine`.

    Raises:
        UnknownNameError: no such base, scheme or tap, or an option that this kind of base does not read.
        ImportError: the optional package behind the scheme is not installed.
        OSError: the weights can neither be found nor downloaded.
    """
    path = None if weights is None else os.path.realpath(weights)
    named = dict(taps) if isinstance(taps, Mapping) else list(taps)
    options = {"taps": named, "output": output, "revision": revision, "weights": path, "nhwc": list(nhwc)}
    options["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    given: dict[str, Any] = {key: value for key, value in options.items() if value not in (None, [], {})}
    given |= {} if pretrained else {"pretrained": False}
    given |= {} if example is None else {"example": example}
    build, arguments = _builder(name)
    for option in given:
        if option not in (*_read_by(build), "example"):
            raise UnknownNameError(
                f"{name} does not read {option}=; leave it out (it reads {', '.join(_read_by(build))})"
            )
    # What is built for one size is built again for another.
    later = given.pop("example", None) if "example" not in _read_by(build) else None
    base = build(*arguments, **given)
    if later is not None:
        base = base.with_example(later)
    if example is not None:
        given["example"] = example_record(example)
    if name.startswith(("hf:", "onnx:")) and Path(arguments[0]).exists():
        # Found from every folder.
        name = f"{name.partition(':')[0]}:{Path(arguments[0]).resolve()}"
    base.spec = BaseSpec(name, {key: value for key, value in given.items() if key != "revision"}, revision)
    return with_engine(base, engine, precision=precision, calibration=calibration)


def _builder(name: str) -> tuple[Callable[..., Base], list[str]]:
    """The function that builds the base called `name`, and its first argument where it has one."""
    scheme, colon, rest = name.partition(":")
    if colon:
        return SCHEMES[scheme], [rest]
    if name not in BASES and name.endswith((".onnx", ".safetensors")):
        raise UnknownNameError(f"'{name}' is a file; write onnx:{name}, or give a base's name and weights={name}")
    return BASES[name], []


def _read_by(build: Callable[..., Base]) -> list[str]:
    """The options of `load_base` that a builder reads."""
    parameters = inspect.signature(build).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return list(OPTIONS)
    return [p.name for p in parameters if p.kind == p.KEYWORD_ONLY or p.default is not p.empty]


def load(path: str | Path, *, base: Base | None = None, max_tasks_in_memory: int | None = None) -> SideTuner:
    """Rebuild a model from a saved task, or from a folder of tasks such as a run's.

    Args:
        path: a task's folder, a folder of such folders, or a run's folder.
        base: the base, where it cannot be built from its recorded spec.
        max_tasks_in_memory: read a task when it is asked for, and keep so many: the last used, and those that were
            changed since. A task is called as its folder then, and `parameters()` are those of the tasks in memory.
            By default all tasks are read at once.

    Raises:
        ArtifactError: no task there, a damaged one, or a base that has no recorded spec.
        TaskError: fewer than one task in memory.
    """
    path = Path(path)
    folders = [path] if (path / CONFIG).exists() else task_folders(path)
    if not folders:
        other = next((f for f in (path, path / "tasks") if (f / "method.json").exists()), None)
        if other is not None:
            raise ArtifactError(f"{other} holds tasks of another method than side-tuning; load them with load_method")
        what = f"holds no saved task ({CONFIG})" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}; give the folder of a task or of a run")
    first = 1 if base is None else 0
    waiting = {folder: read_task(folder) for folder in (folders if max_tasks_in_memory is None else folders[:first])}
    if base is None:
        base = _recorded_base(path, next(iter(waiting.values()))[0]["base"].get("spec"))
    model, identity = SideTuner(base), base.identity()
    if max_tasks_in_memory is not None:
        model._shelf = Shelf({folder.name: folder for folder in folders}, identity, max_tasks_in_memory)
        return model
    for folder in in_order(path, {folder: config for folder, (config, _) in waiting.items()}):
        # Its tensors are not needed twice.
        model._add_saved(folder, waiting.pop(folder), identity)
    return model


def in_order(path: Path, configs: Mapping[Path, Mapping[str, Any]]) -> Iterator[Path]:
    """The folders of saved tasks, by what each one's text says: a task comes after its laterals.

    Raises:
        ArtifactError: laterals that are not among them.
    """
    waiting, known = dict(configs), set[str]()
    while waiting:
        ready = [f for f, config in waiting.items() if known.issuperset(config["parts"].get("laterals", []))]
        if not ready:
            names = ", ".join(config["task"] for config in waiting.values())
            raise ArtifactError(f"{path}: the laterals of {names} are not there")
        for folder in ready:
            yield folder
            known.add(waiting.pop(folder)["task"])


def _recorded_base(path: Path, spec: Mapping[str, Any] | None) -> Base:
    """Build the base that a task's file names."""
    if spec is None:
        raise ArtifactError(
            f"{path} was trained on a base without a recorded spec; build it and pass load(…, base=base)"
        )
    if spec["name"].startswith(("http:", "https:")):
        # A file that somebody else wrote must not send texts, and a key, anywhere.
        raise ArtifactError(
            f"{path} was trained on the base of a server, {spec['name']}; if you trust it, pass "
            f"load(…, base=load_base('{spec['name']}'))"
        )
    options = {"revision": spec.get("revision"), **spec["options"]}
    build, _ = _builder(spec["name"])
    # Version 0.1.0 recorded options that the base did not read; they changed nothing.
    read = {key: value for key, value in options.items() if key in _read_by(build) or key not in UNREAD}
    if options.get("example") is not None:
        read["example"] = example_from(options["example"])
    engine, precision = str(read.pop("engine", "torch")), str(read.pop("precision", "fp32"))
    ranges = read.pop("calibration", None)
    try:
        return rebuilt(load_base(spec["name"], **read), engine, precision, ranges)
    except TypeError as error:
        raise ArtifactError(
            f"{path} names a base that cannot be built ({error}); build it and pass load(…, base=base)"
        ) from error


UNREAD = ("taps", "output", "revision", "pretrained", "weights")
OPTIONS = (*UNREAD, "dtype", "example", "nhwc")
