"""Hashes of what a network, a function or any other value is: the same in every process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from logging import Logger
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sidetuning.inputs import PLAIN, original
from sidetuning.reach import (
    CALL,
    RANDOM,
    Spoken,
    added,
    code_bytes,
    held,
    is_container,
    is_installed,
    methods_of,
    name_of,
    state_of,
    stored_by,
)

# Attributes that every module has.
TORCHS = frozenset(vars(nn.Module()))
# Types of torch whose values have names.
NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.qscheme)
# Functions of Python and of numpy that are told by their names.
BUILT_IN = (BuiltinFunctionType, np.ufunc, type(np.argmax))
# Sets within the items of sets that are looked at: those have no order by which what was met could be numbered.
SETS = 3
# Words of 8 bytes in a row, of sums that tell where a number is.
ROW = 1024


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
        # A part may be compiled, or not.
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict().items()}
        for name, tensor in sorted(state.items()):
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
    content = within or _Content()
    content.know(modules)
    for module in map(original, modules):
        config = getattr(module, "config", None)
        # Each part of a network of transformers has the configuration, or a part of it.
        whole = hasattr(config, "model_type")
        digest.update((str(config) if whole else "").encode())
        digest.update(str(_scripts(module, 0)).encode())
        for name, part in module.named_modules():
            if original(part) is part:
                name = f"{name}.".replace("_orig_mod.", "")[:-1]
                digest.update(f"{name} {content.digest(_told(part, whole, content))}".encode())
    if not isinstance(net, nn.Module):
        digest.update(content.digest(net).encode())
    if within is None:
        digest.update(content.rest().encode())
    return digest.hexdigest()


def _told(part: nn.Module, whole: bool, content: _Content) -> list[Any]:
    """What tells what a module computes, its weights and its parts apart; `whole`: its configuration was told."""
    own = {} if isinstance(part, torch.jit.ScriptModule) else content.called(part, "forward")
    moves = stored_by(own) | TORCHS
    state = {
        key: value
        for key, value in vars(part).items()
        if key not in moves
        and not (whole and key == "config" and hasattr(value, "model_type"))
        # What packages keep for themselves is theirs to keep right.
        and (key[:1] != "_" or isinstance(value, (int, float, str, Tensor)) or not is_installed(type(part)))
    }
    # Buffers that are not saved are in no `state_dict`.
    unsaved = {key: part._buffers[key] for key in sorted(part._non_persistent_buffers_set)}
    hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
    hooks = [hook for hook in hooks if not is_installed(hook if isinstance(hook, FunctionType) else type(hook))]
    return [type(part).__qualname__, state, unsaved, own, *([hooks] if hooks else [])]


def weights_version(net: Any, modules: Sequence[nn.Module] | None = None) -> object:
    """Equal as long as the weights of `modules`, by default of the network alone, and what else a callable holds, are.

    It tells cheaply whether `weights_sha256` must be computed again. Writes in place raise a tensor's version; those
    that go round it (`.data`) change sums of its bytes.
    """
    found: list[Any] = []
    for module in [net] if modules is None else modules:
        state = {**dict(module.named_buffers()), **module.state_dict(keep_vars=True)}
        found += [(name, _version(value)) for name, value in state.items()]
    if not isinstance(net, nn.Module) and not callable(getattr(net, "fingerprint", None)):
        content = _Content()
        content.know(modules or ())
        found.append(content.digest(net))
    return found


def _version(value: Any) -> object:
    if not isinstance(value, Tensor):
        return content_sha256(value)
    parts = _dense(value)
    return value.data_ptr(), 0 if value.is_inference() else value._version, *map(_sum, parts)


def _sum(tensor: Tensor) -> int:
    """A sum of a tensor's bytes, in 64-bit integers where they divide it, and of where they are: faster than a hash."""
    content = _flat(tensor)
    words = content.view(torch.int64) if len(content) % 8 == 0 else content
    whole = len(words) // ROW * ROW if len(words) > ROW else 0
    # Numbers that change places change the sum of a row or of a column.
    grid, parts = words[:whole].view(-1, ROW), [words[whole:]]
    parts += [grid.sum(0), grid.sum(1) * 3] if whole else []
    return sum(int((part * _places(len(part), part.device)).sum()) for part in parts)


@lru_cache(maxsize=256)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device)


def tensor_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes, on the CPU, for hashes."""
    parts = [_flat(part.cpu()) for part in _dense(tensor)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flat(tensor: Tensor) -> Tensor:
    # Not `flatten`: one number may have a stride.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _dense(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: those that are quantised or sparse, for example."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
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
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", type(function).__qualname__)
    alone = isinstance(getattr(function, "__self__", None), (ModuleType, type, type(None)))
    return str(name) if isinstance(function, BUILT_IN) and alone else f"{name}#{content_sha256(function)}"


def content_sha256(value: Any) -> str:
    """sha256 over what a value is: the same in every process, and another for another value.

    Of functions that is their code, defaults, and what they close over and read of their module; of objects their class
    and state; of modules their weights and structure.
    """
    content = _Content()
    found = content.digest(value)
    rest = content.rest()
    return hashlib.sha256(f"{found}{rest}".encode()).hexdigest() if rest else found


class _Content:
    """One hash, of one value or of several. What was met once counts by its number when it is met again."""

    def __init__(self) -> None:
        self.met: dict[int, int] = {}
        self.methods: dict[tuple[type, str], dict[str, Any]] = {}
        # Attributes that the methods of a class, by which its objects were met, set themselves.
        self.moves: dict[type, frozenset[str]] = {}
        self.spoken, self.sets = Spoken(), 0
        # A number of a value that is gone could be that of another.
        self.held: list[Any] = []

    def digest(self, value: Any) -> str:
        """The hash of a value, of those within it, and so on; without recursion, of any depth."""
        above = {id(value): 0}
        waiting = [(value, hashlib.sha256(type(value).__qualname__.encode()), iter(self._parts(value)))]
        while True:
            value, digest, parts = waiting[-1]
            for part in parts:
                if isinstance(part, bytes):
                    digest.update(part)
                elif id(part) in above and id(part) not in self.met:
                    # A list within itself.
                    digest.update(f"{len(waiting) - above[id(part)]} above".encode())
                else:
                    above[id(part)] = len(waiting)
                    own = hashlib.sha256(type(part).__qualname__.encode())
                    waiting.append((part, own, iter(self._parts(part))))
                    break
            else:
                waiting.pop()
                above.pop(id(value), None)
                if not waiting:
                    return digest.hexdigest()
                waiting[-1][1].update(digest.hexdigest().encode())

    def rest(self) -> str:
        """Hashes of the methods that code names which was met, on whatever object; empty where there are none."""
        found = ""
        while methods := self.spoken.more():
            found += self.digest(methods)
        return found

    def called(self, value: Any, name: str) -> dict[str, Any]:
        """As `methods_of` the class of a value, which is asked once of each class."""
        kind = type(value)
        if (kind, name) not in self.methods:
            self.methods[kind, name] = methods_of(kind, name)
            self.spoken.given.update((kind, key) for key in self.methods[kind, name])
        self.spoken.note(value)
        return self.methods[kind, name]

    def meet(self, value: Any) -> None:
        """Give a value that was not met its number."""
        if id(value) not in self.met:
            self.met[id(value)] = len(self.met)
            self.held.append(value)

    def know(self, modules: Sequence[nn.Module]) -> None:
        """Meet modules whose weights are hashed elsewhere, also where they are met again."""
        for part in [part for module in modules for part in module.modules()]:
            self.meet(part)

    def _parts(self, value: Any) -> list[Any]:
        """Bytes, and values within, that say what a value is."""
        if isinstance(value, Tensor):
            if is_lazy(value) or value.is_meta:
                return [f"{value.dtype} without values".encode()]
            return [f"{tuple(value.shape)} {value.dtype}".encode(), tensor_bytes(value).numpy().tobytes()]
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            content = array.tolist() if array.dtype.hasobject else array.tobytes()
            masked = [np.ma.getmaskarray(value)] if isinstance(value, np.ma.MaskedArray) else []
            return [f"{array.shape} {array.dtype}".encode(), content, *masked]
        if isinstance(value, (*PLAIN, *NAMED, bytes, complex)) and not isinstance(value, tuple):
            return [repr(value).encode(), *added(value)]
        if is_container(value):
            return self._items(value)
        if isinstance(value, ModuleType):
            return [value.__name__.encode()]
        if isinstance(value, (FunctionType, nn.Module)):
            return self._met(value)
        if isinstance(value, torch.Generator):
            # Its seed does not move.
            return [name_of(value), value.initial_seed()]
        if isinstance(value, (type, Logger, *RANDOM)):
            return [name_of(value)]
        if isinstance(value, MethodType):
            stored = stored_by({"": value.__func__})
            self.moves[type(value.__self__)] = self.moves.get(type(value.__self__), frozenset()) | stored
        if isinstance(value, (partial, MethodType)):
            return held(value)
        if id(value) in self.met:
            return [str(self.met[id(value)]).encode()]
        self.meet(value)
        kind, called = type(value), self.called(value, CALL)
        entered = {key: getattr(kind, key, None) for key in ("__enter__", "__exit__")}
        moves = stored_by(called) | stored_by(entered) | self.moves.get(kind, frozenset())
        return [kind.__qualname__, called, *state_of(value, moves)]

    def _items(self, value: Any) -> list[Any]:
        """The parts of a list, a set or a mapping."""
        self.spoken.note(value)
        if isinstance(value, (set, frozenset)):
            if self.sets == SETS:
                return [str(len(value)).encode()]
            # In any order: what one item meets does not count for the others.
            return [*sorted(self._apart().digest(item).encode() for item in value), *added(value)]
        if isinstance(value, Mapping):
            pairs = {key if isinstance(key, str) else self.digest(key): inner for key, inner in value.items()}
            return [*(part for key in sorted(pairs) for part in (key, pairs[key])), *added(value)]
        return [*value, *added(value)]

    def _apart(self) -> _Content:
        other = copy.copy(self)
        other.met, other.sets = dict(self.met), self.sets + 1
        return other

    def _met(self, value: Any) -> list[Any]:
        """The parts of a function or a module, the first time."""
        name = f"{getattr(value, '__qualname__', type(value).__qualname__)}".encode()
        if id(value) in self.met:
            return [name, str(self.met[id(value)]).encode()]
        self.meet(value)
        self.spoken.note(value)
        if isinstance(value, nn.Module):
            return [name, weights_sha256(value, [value], ()), structure_sha256(value, [value], self)]
        return [code_bytes(value.__code__), *held(value)]
