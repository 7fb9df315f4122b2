"""What a base *is*: the one thing by which tasks, methods, caches and agents tell one base from another."""

from __future__ import annotations

import copyreg
import hashlib
import inspect
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from logging import Logger
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sidetuning.inputs import CALL, PLAIN, globals_of, innermost, is_filled, is_installed, names_in
from sidetuning.probe import same_summary

# Attributes that every module has.
TORCHS = frozenset(vars(nn.Module()))
# Types of torch whose values have names.
NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.qscheme)
# Values within values within values that are looked at.
DEPTH = 10
# By these an object says what a copy of it is made from.
COPIED = ("__reduce__", "__reduce_ex__", "__getstate__")
# What draws random numbers: its state moves, and says nothing of what its owner is.
RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@dataclass(frozen=True)
class BaseSpec:
    """How to build a base again: the arguments of `load_base`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class Identity:
    """A base's weights, how it prepares inputs, and what it returns. Equal bases have equal identities.

    Attributes:
        sha256: hash of the network's weights; see `weights_sha256`.
        kind: "vector", "sequence" or "map".
        output_shape: shape of the code for the base's example, without the batch.
        preparation: normalisation and choice of the output, as JSON values.
        probe: numbers that tell what the base makes of fixed inputs; equal weights may compute different things.
        input_shape: shape of the inputs of the probe, without the batch.
    """

    sha256: str
    kind: str
    output_shape: tuple[int, ...]
    preparation: dict[str, Any]
    probe: tuple[float, ...]
    input_shape: Any

    def record(self) -> dict[str, Any]:
        """As JSON values, for files."""
        shape, probe = list(self.output_shape), list(self.probe)
        return {
            "sha256": self.sha256,
            "kind": self.kind,
            "output_shape": shape,
            "preparation": self.preparation,
            "probe": probe,
            "input_shape": self.input_shape,
        }

    def digest(self) -> str:
        """sha256 over what is hashed or exact: all but the probe, which other hardware rounds in another way."""
        return hashlib.sha256(json.dumps({**self.record(), "probe": None, "input_shape": None}).encode()).hexdigest()

    def difference(self, recorded: Mapping[str, Any]) -> str | None:
        """How the base of `recorded` (by `record`, or an older file) differs from this one; None where it does not.

        A map or a sequence of another size is the same base on other inputs. Older files may hold the hash alone.
        """
        ran, runs = (told.get("precision", "torch") for told in (recorded.get("preparation") or {}, self.preparation))
        if ran != runs:
            return f"it ran in {ran}, this base in {runs}: give load_base that engine= and precision="
        found = recorded.get("sha256")
        if found != self.sha256:
            return f"its weights have the sha256 {str(found)[:12]}…, this base's {self.sha256[:12]}…"
        shape = recorded.get("output_shape")
        if shape is not None and _form(tuple(shape)) != _form(self.output_shape):
            return f"it returned {tuple(shape)}, this base returns {self.output_shape}"
        preparation, own = recorded.get("preparation"), self.preparation
        if "kind" not in recorded:
            own = _older(own)
        probe = recorded.get("probe")
        # On inputs of another size the same network gives other numbers.
        same = recorded.get("input_shape") == self.input_shape
        told = bool(probe and self.probe and same)
        if preparation is not None and (_named(preparation) != _named(own) if told else preparation != own):
            return f"it prepared its inputs or picked its output otherwise: {preparation}, this base {own}"
        if told and not same_summary(list(probe or ()), list(self.probe)):
            return "it had the same weights and computed other outputs from the same input"
        return None


def _form(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many dimensions a code has, and its width."""
    return len(shape), shape[-1] if len(shape) == 2 else next(iter(shape), 0)


def _named(preparation: dict[str, Any]) -> dict[str, Any]:
    """Functions by their names alone: code changes with Python's version, and the probe tells what it does."""
    output = preparation.get("output")
    return {**preparation, "output": output.split("#")[0] if isinstance(output, str) else output}


def _older(preparation: dict[str, Any]) -> dict[str, Any]:
    """As version 0.1.0 wrote it: normalisation to three decimals, functions by their names alone."""
    norms = {key: None if (v := preparation[key]) is None else [round(x, 3) for x in v] for key in ("mean", "std")}
    return _named({**preparation, **norms})


def preparation(
    mean: Tensor | None,
    std: Tensor | None,
    output: str | int | Callable[..., Any] | None,
    channels_last: bool,
    bgr: bool,
) -> dict[str, Any]:
    """Normalisation and choice of the output as JSON values. float32 holds seven digits."""
    norm = [None if t is None else [float(f"{v:.7g}") for v in t.flatten().tolist()] for t in (mean, std)]
    name = function_name(output) if callable(output) else output
    # Files of bases that take RGB never had the last entry.
    reverse = {"bgr": True} if bgr else {}
    return {"mean": norm[0], "std": norm[1], "output": name, "channels_last": channels_last, **reverse}


def weights_sha256(net: Callable[..., Any], modules: Sequence[nn.Module], output_shape: tuple[int, ...]) -> str:
    """sha256 over the names, shapes, types and bytes of a network's weights and buffers.

    A network that is no module gives its own, `net.fingerprint()`. Of other callables, name and output shape are
    hashed, and the modules that they run.
    """
    own = getattr(net, "fingerprint", None)
    digest = hashlib.sha256()
    if callable(own):
        digest.update(str(own()).encode())
    elif not isinstance(net, nn.Module):
        name = getattr(net, "__qualname__", type(net).__qualname__)
        digest.update(f"{getattr(net, '__module__', '')}.{name} {output_shape}".encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            name = name.removeprefix("_orig_mod.")
            if not isinstance(tensor, Tensor):
                # What quantised modules and those with a state of their own hold.
                digest.update(f"{name} {content_sha256(tensor)}\n".encode())
                continue
            if is_lazy(tensor) or tensor.is_meta:
                digest.update(f"{name} {tensor.dtype} without values\n".encode())
                continue
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor_bytes(tensor).numpy().data)
        # TorchScript that is frozen has its weights among the constants of its code.
        for name, constants in _scripts(module, 1):
            digest.update(f"{name} {content_sha256(constants)}".encode() if constants else b"")
    return digest.hexdigest()


def _scripts(module: nn.Module, item: int) -> list[tuple[str, Any]]:
    """The code, 0, or the constants, 1, of the parts of a network that are TorchScript."""
    scripts = [(name, part) for name, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    codes = [(name, part.code_with_constants) for name, part in scripts if hasattr(part, "forward")]
    return [(name, (code[0], code[1].const_mapping)[item]) for name, code in codes]


def structure_sha256(net: Callable[..., Any], modules: Sequence[nn.Module], within: _Content | None = None) -> str:
    """sha256 over what outputs depend on beside weights: classes, plain attributes, code, and what it closes over.

    A new version of a network's package may change it; then cached features are computed again.
    """
    digest = hashlib.sha256()
    content = within or _Content({})
    # Their weights are hashed elsewhere, also where they are met again, as in a method that was replaced.
    for part in [part for module in modules for part in module.modules()]:
        content.meet(part)
    for module in modules:
        module = getattr(module, "_orig_mod", module)
        digest.update(str(getattr(module, "config", "")).encode())
        digest.update(str(_scripts(module, 0)).encode())
        for name, part in module.named_modules():
            state = {key: value for key, value in vars(part).items() if _tells(key, value)}
            # Buffers that are not saved are in no `state_dict`.
            unsaved = {key: part._buffers[key] for key in sorted(part._non_persistent_buffers_set)}
            own = {} if isinstance(part, torch.jit.ScriptModule) else content.called(type(part), "forward")
            found = [type(part).__qualname__, state, unsaved, own]
            digest.update(f"{name} {content.digest(found)}".encode())
    if not isinstance(net, nn.Module):
        digest.update(content.digest(net).encode())
    return digest.hexdigest()


def _tells(name: str, value: Any) -> bool:
    """Whether an attribute of a module may change what it computes; of those that torch keeps, none does."""
    private = name[0] == "_" and not (isinstance(value, (int, float, str, Tensor)) and name not in TORCHS)
    return not private and name not in ("training", "config")


def weights_version(module: nn.Module) -> object:
    """Equal as long as a module's weights are: tells cheaply whether `weights_sha256` must be computed again.

    Writes in place raise a tensor's version; those that go round it (`.data`) change the sum of its bytes.
    """
    return [(name, _version(value)) for name, value in module.state_dict(keep_vars=True).items()]


def _version(value: Any) -> object:
    if not isinstance(value, Tensor):
        return content_sha256(value)
    parts = _dense(value)
    return value.data_ptr(), 0 if value.is_inference() else value._version, *map(_sum, parts)


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, read as 64-bit integers where they divide it: much faster than a hash."""
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    return int((content.view(torch.int64) if len(content) % 8 == 0 else content).sum(dtype=torch.int64))


def tensor_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, on the CPU, for hashes."""
    parts = [part.cpu().contiguous().flatten().view(torch.uint8) for part in _dense(tensor)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _dense(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: those that are quantised or sparse, for example."""
    tensor = tensor.detach()
    if flatten := getattr(tensor, "__tensor_flatten__", None):
        return [part for name in flatten()[0] for part in _dense(getattr(tensor, name))]
    if not tensor.is_quantized:
        return [tensor if tensor.layout is torch.strided else tensor.to_dense()]
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scales = [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    else:
        scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    return [tensor.int_repr(), *scales]


def function_name(function: Callable[..., Any]) -> str:
    """A callable's name, with a hash of its code and of all that it holds and reads: many have one name, or none."""
    if isinstance(function, partial):
        return f"{function_name(function.func)}#{content_sha256((function.args, function.keywords))}"
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    plain = getattr(function, "__module__", None) and getattr(function, "__closure__", None) is None
    builtin = getattr(function, "__code__", None) is None and hasattr(function, "__name__")
    return str(name) if builtin and plain else f"{name}#{content_sha256(function)}"


def content_sha256(value: Any) -> str:
    """sha256 over what a value is: the same in every process, and another for another value.

    Of functions that is their code, defaults, and what they close over and read of their module; of objects their class
    and state; of modules their weights and structure.
    """
    return _Content({}).digest(value)


def code_bytes(code: CodeType) -> bytes:
    """What a function does: its instructions, and the names, constants and inner functions that they speak of."""
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    kinds = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 12)
    parts = [code.co_code, repr((code.co_names, given, kinds)).encode()]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            parts.append(code_bytes(constant))
        else:
            # The order of a set changes from process to process.
            parts.append(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode())
    return b"\0".join(parts)


def methods_of(kind: type, name: str) -> dict[str, Any]:
    """The method `name` of a class, and what it calls and reads of that class that no installed package wrote."""
    found: dict[str, Any] = {}
    names = [name]
    for key in names:
        value = inspect.getattr_static(kind, key, None)
        method = innermost(value)
        if isinstance(method, FunctionType):
            if key == name or not is_installed(method):
                found[key] = method
            names += sorted(names_in(method.__code__).difference(names))
        elif isinstance(value, (*PLAIN, Tensor, np.ndarray, list, dict)) and value is not None and key[:2] != "__":
            found[key] = value
    return found


class _Content:
    """One hash, of one value or of several. What was met once counts by its number when it is met again."""

    def __init__(self, known: Mapping[int, int]) -> None:
        self.met = dict(known)
        self.methods: dict[tuple[type, str], dict[str, Any]] = {}
        # A number of a value that is gone could be that of another.
        self.held: list[Any] = []

    def digest(self, value: Any, depth: int = DEPTH) -> str:
        digest = hashlib.sha256(type(value).__qualname__.encode())
        for part in self._parts(value, depth - 1) if depth else ():
            # Each function is looked at once.
            left = DEPTH if isinstance(value, FunctionType) else depth - 1
            digest.update(part if isinstance(part, bytes) else self.digest(part, left).encode())
        return digest.hexdigest()

    def called(self, kind: type, name: str) -> dict[str, Any]:
        """As `methods_of`, which is asked once of each class."""
        if (kind, name) not in self.methods:
            self.methods[kind, name] = methods_of(kind, name)
        return self.methods[kind, name]

    def meet(self, value: Any) -> None:
        """Give a value that was not met its number."""
        if id(value) not in self.met:
            self.met[id(value)] = len(self.met)
            self.held.append(value)

    def _parts(self, value: Any, depth: int) -> list[Any]:
        """Bytes, and values within, that say what a value is."""
        if isinstance(value, Tensor):
            if is_lazy(value) or value.is_meta:
                return [f"{value.dtype} without values".encode()]
            return [f"{tuple(value.shape)} {value.dtype}".encode(), tensor_bytes(value).numpy().tobytes()]
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            content = array.tolist() if array.dtype.hasobject else array.tobytes()
            return [f"{array.shape} {array.dtype}".encode(), content]
        if isinstance(value, (*PLAIN, *NAMED, bytes, complex)) and not isinstance(value, tuple):
            return [repr(value).encode()]
        if isinstance(value, (list, tuple)):
            return list(value)
        if isinstance(value, (set, frozenset)):
            # In any order: what one item meets does not count for the others.
            return sorted(_Content(self.met).digest(item, depth).encode() for item in value)
        if isinstance(value, Mapping):
            pairs = {key if isinstance(key, str) else self.digest(key, depth): inner for key, inner in value.items()}
            return [part for key in sorted(pairs) for part in (key, pairs[key])]
        if isinstance(value, partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, ModuleType):
            return [value.__name__.encode()]
        if isinstance(value, (FunctionType, nn.Module)):
            return self._met(value)
        if isinstance(value, (type, Logger, *RANDOM)):
            return _built_in(value)
        if id(value) in self.met:
            return [str(self.met[id(value)]).encode()]
        self.meet(value)
        own = [type(value).__qualname__, self.called(type(value), CALL)]
        # Some hold more than their attributes, such as pixels, and say what a copy is made from.
        plain = all(getattr(type(value), name, None) is getattr(object, name, None) for name in COPIED)
        state = [vars(value)] if hasattr(value, "__dict__") else []
        return [*own, *state, *([] if state and plain else _built_in(value))]

    def _met(self, value: Any) -> list[Any]:
        """The parts of a function or a module, the first time."""
        name = f"{getattr(value, '__qualname__', type(value).__qualname__)}".encode()
        if id(value) in self.met:
            return [name, str(self.met[id(value)]).encode()]
        self.meet(value)
        if isinstance(value, nn.Module):
            return [name, weights_sha256(value, [value], ()), structure_sha256(value, [value], self)]
        cells = [cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)]
        return [code_bytes(value.__code__), value.__defaults__, value.__kwdefaults__, cells, globals_of(value)]


def _built_in(value: Any) -> list[Any]:
    """What says what an object without attributes is: its name, or what a copy of it would be made from."""
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}".encode()
    if isinstance(value, (type, Logger, *RANDOM)) or isinstance(getattr(value, "__self__", None), ModuleType):
        return [name]
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:
        # A lock, for example, of which there are no copies.
        return [name]
    if isinstance(made, str):
        return [name]
    return [list(part) if isinstance(part, Iterator) else part for part in made[1:]]
