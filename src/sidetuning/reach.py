"""What a function or an object reaches: code that somebody wrote, what it reads, calls and holds, and networks."""

from __future__ import annotations

import copyreg
import dis
import random
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache, partial
from logging import Logger
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sidetuning.inputs import PLAIN

# The method of objects that are called.
CALL = "__call__"
# The folders of installed packages.
INSTALLED = {"site-packages", "dist-packages"}
STANDARD = sysconfig.get_paths()["stdlib"]
# Where decorators, methods and properties keep the function that they are made of.
WRAPPED = ("__wrapped__", "__func__", "fget", "func")
# What makes methods and properties of functions, and where it keeps them.
BINDS: dict[type, str] = {staticmethod: "__func__", classmethod: "__func__", property: "fget", cached_property: "func"}
# By these an object says what a copy of it is made from.
COPIED = ("__reduce__", "__reduce_ex__", "__getstate__")
# Methods that make, show, compare or copy an object; what else begins with underscores is called by operators.
PASSIVE = {
    *COPIED,
    *["__new__", "__init__", "__post_init__", "__repr__", "__str__", "__eq__", "__hash__", "__del__", "__setstate__"],
}
# What draws random numbers: its state moves, and says nothing of what its owner is.
RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# A cell of a closure that holds nothing yet.
EMPTY = CellType()
# Values that hold no network.
LEAVES = (*PLAIN[:4], Tensor, bytes, complex, np.generic, type, ModuleType, type(None), Logger, *RANDOM)


def modules_of(net: Any) -> list[nn.Module]:
    """The modules that a callable runs: itself, or all that it reaches, in the order in which they are met."""
    found: dict[int, nn.Module] = {}
    # Values are kept: a number of one that is gone could be that of another.
    met: dict[int, Any] = {}
    spoken, waiting = Spoken(), [net]
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif not (id(value) in met or isinstance(value, LEAVES) or callable(getattr(value, "fingerprint", None))):
            met[id(value)] = value
            spoken.note(value)
            parts = held(value)
            if not (isinstance(value, FunctionType) or is_container(value)):
                parts = [methods_of(type(value), CALL), *parts]
            # The owner of a method comes before what the method reads.
            waiting += parts if isinstance(value, MethodType) else reversed(parts)
        if not waiting:
            waiting += spoken.more()
    return list(found.values())


def is_container(value: Any) -> bool:
    """Whether a value is told by the values in it, and by what a class of one's own adds to them."""
    return isinstance(value, (list, tuple, set, frozenset, Mapping))


def held(value: Any) -> list[Any]:
    """The values that a function, an object, a list or a set holds, and what a function reads of its module."""
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != EMPTY]
        stored = names_in(value.__code__, "STORE_ATTR")
        own = {} if is_installed(value) else {key: each for key, each in vars(value).items() if key not in stored}
        return [value.__defaults__, value.__kwdefaults__, cells, globals_of(value), *([own] if own else [])]
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.hasobject else []  # type: ignore[return-value]
    if is_container(value):
        return [*(value.values() if isinstance(value, Mapping) else value), *added(value)]
    return state_of(value)


def state_of(value: Any, moves: frozenset[str] = frozenset()) -> list[Any]:
    """What an object holds: its attributes but for those that move, and what else a copy of it is made from."""
    # Some hold more than their attributes, such as pixels, and say what a copy is made from.
    plain = all(getattr(type(value), name, None) is getattr(object, name, None) for name in COPIED)
    own = [{key: each for key, each in vars(value).items() if key not in moves}] if hasattr(value, "__dict__") else []
    made = _made(value)
    if own and plain:
        # Attributes of a class with slots are a second part of its state.
        state = made[2] if len(made) > 2 else None
        return [*own, *(state[1:] if isinstance(state, tuple) else ())]
    return [*own, *([list(part) if isinstance(part, Iterator) else part for part in made[1:]] or [name_of(value)])]


def name_of(value: Any) -> bytes:
    """The module and the name of a class, of a function without code, or of what there are no copies of."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}".encode()


def added(value: Any) -> list[Any]:
    """What an object of a class of one's own adds to the number, text or list that it is: none where it adds none."""
    if type(value) in (*PLAIN, list, dict, set, frozenset, bytes, complex):
        return []
    made = _made(value)
    found = [getattr(value, "default_factory", None), made[2] if len(made) > 2 else None]
    return found if any(part is not None for part in found) else []


def _made(value: Any) -> tuple[Any, ...]:
    """What a copy of an object would be made from; nothing where it has a name, or there are no copies of it."""
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        made = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:
        return ()
    return made if isinstance(made, tuple) else ()


class Spoken:
    """Methods of classes of one's own that the code which was met names, or calls by operators."""

    def __init__(self) -> None:
        self.kinds: dict[type, None] = {}
        self.names: set[str] = set()
        self.code = False
        self.given: set[tuple[type, str]] = set()

    def note(self, value: Any) -> None:
        """Meet a function, or an object."""
        if not isinstance(value, FunctionType):
            self.kinds[type(value)] = None
        elif not is_installed(value):
            self.code = True
            self.names |= names_in(value.__code__) | names_in(innermost(value).__code__)

    def more(self) -> list[dict[str, Any]]:
        """Those of each class that were not given before; what they name in turn is in a later answer."""
        found = []
        for kind in sorted(self.kinds, key=lambda kind: kind.__qualname__) if self.code else ():
            keys = {key for owner in kind.__mro__ if not is_installed(owner) for key in vars(owner)}
            names = sorted(key for key in keys if key in self.names or (key[:2] == "__" and key not in PASSIVE))
            methods = methods_of(kind, "", names)
            new = {key: value for key, value in methods.items() if (kind, key) not in self.given}
            self.given.update((kind, key) for key in new)
            found += [new] if new else []
        return found


def methods_of(kind: type, name: str, more: list[str] | None = None) -> dict[str, Any]:
    """The method `name` of a class, and what it calls and reads of that class that no installed package wrote.

    Args:
        kind: the class.
        name: a method, which counts whoever wrote it.
        more: further methods and attributes, of which those count that no installed package wrote.
    """
    found: dict[str, Any] = {}
    names = [name, *(more or ())]
    for key in names:
        owners = [owner for owner in kind.__mro__ if key in vars(owner)]
        for i, owner in enumerate(owners):
            # A method of a parent may be called by `super()`.
            value, label = vars(owner)[key], f"{key} of parent {i}" if i else key
            while type(value) in BINDS:
                value = getattr(value, BINDS[type(value)])
            method = innermost(value)
            if not isinstance(method, FunctionType):
                found |= {key: value} if i == 0 and _is_value(key, value, owner) else {}
                continue
            own = not is_installed(method)
            if own or (key == name and i == 0):
                # With the arguments of its decorators.
                found[label] = value if own else method
            names += sorted(names_in(method.__code__).difference(names)) if own or i == 0 else []
    return found


def _is_value(key: str, value: Any, owner: type) -> bool:
    """Whether an attribute of a class is a value, and not what makes attributes of its objects."""
    if key[:2] == "__" or value is None:
        return False
    simple = isinstance(value, (*PLAIN, Tensor, np.ndarray, list, dict))
    return simple or not (isinstance(value, type) or hasattr(type(value), "__get__") or is_installed(owner))


def stored_by(methods: Mapping[str, Any]) -> frozenset[str]:
    """The attributes that methods set themselves, such as a counter: they say nothing of what an object is."""
    functions = [innermost(value) for value in methods.values()]
    return frozenset().union(*(names_in(f.__code__, "STORE_ATTR") for f in functions if isinstance(f, FunctionType)))


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


@lru_cache(maxsize=10_000)
def names_in(code: CodeType, step: str | None = None) -> frozenset[str]:
    """The names that a function and those within it speak of, by default in any of their steps."""
    steps = dis.get_instructions(code) if step else ()
    own = [each.argval for each in steps if each.opname == step] if step else code.co_names
    inner = [names_in(constant, step) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(own).union(*inner)


def innermost(value: Any) -> Any:
    """The function that somebody wrote, behind decorators and what makes methods and properties of it."""
    for _ in range(10):
        inner = next((vars(value)[key] for key in WRAPPED if key in getattr(value, "__dict__", ())), None)
        inner = inner or next((getattr(value, key) for key in WRAPPED if callable(getattr(value, key, None))), None)
        if inner is None or isinstance(value, nn.Module):
            return value
        value = inner
    return value


def is_installed(value: Any) -> bool:
    """Whether a function, a class or a module is that of an installed package, ours in a checkout too, or of Python."""
    if isinstance(value, FunctionType):
        name, file = value.__module__, getattr(innermost(value), "__code__", value.__code__).co_filename
    else:
        name, file = value.__name__ if isinstance(value, ModuleType) else value.__module__, "<"
    if file[:1] == "<" and file[:7] != "<frozen":
        # Written by a program, a data class for example. Modules without a file are what somebody types.
        file = getattr(sys.modules.get(name), "__file__", None) or ""
    ours = (name or "").partition(".")[0] == __name__.partition(".")[0] or value is object
    packaged = not INSTALLED.isdisjoint(file.replace("\\", "/").split("/"))
    return ours or packaged or file.startswith((STANDARD, "<frozen"))


def globals_of(function: FunctionType) -> dict[str, Any]:
    """What a function reads by name, such as a network, numbers, or other functions of its module and of one's own.

    Packages and classes are known by their names, which the code holds; a number that the function sets itself, such as
    a counter, says nothing of what it does. Installed packages read what they always read.
    """
    if is_installed(function):
        return {}
    code, space = function.__code__, function.__globals__
    found = {name: space[name] for name in sorted(names_in(code, "LOAD_GLOBAL")) if name in space}
    for name in names_in(code, "STORE_GLOBAL"):
        if isinstance(found.get(name), PLAIN):
            found.pop(name, None)
    for name, module in list(found.items()):
        if isinstance(module, ModuleType) and getattr(module, "__file__", None) and not is_installed(module):
            read = sorted(names_in(code) & vars(module).keys())
            found |= {f"{name}.{key}": vars(module)[key] for key in read}
    return {name: value for name, value in found.items() if not _is_known(value)}


def _is_known(value: Any) -> bool:
    return isinstance(value, (ModuleType, type, Logger)) or (isinstance(value, FunctionType) and is_installed(value))
