"""What a network is given: one tensor or a mapping; and the networks that a callable runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sidetuning.errors import ShapeError

# One tensor, or the keyword arguments of the network. A mapping may hold two keys that are no arguments: "x", the one
# tensor of a network that takes no names, and "extra", (b, n) numbers that only heads see, such as an agent's compass.
Input = Tensor | Mapping[str, Any]
# Entries of a mapping that are images.
IMAGES = ("x", "pixel_values")
# Types of inputs in a description, up to how many of their values it holds, and the largest input that is believed.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool)
DTYPES = (*DTYPES, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FEW, MANY = 4096, 2**27


def call(net: Callable[..., Any], x: Input) -> Any:
    """Run `net` on a tensor, or on a mapping splatted into keyword arguments; see `Input` for its two other keys."""
    if isinstance(x, Tensor):
        return net(x)
    own = _arguments(net)
    named = {key: value for key, value in x.items() if key in own or key not in ("x", "extra")}
    return net(**named) if "x" in named or "x" not in x else net(x["x"], **named)


def _arguments(net: Callable[..., Any]) -> frozenset[str]:
    """Which of the two keys that have a meaning of their own a network names as arguments."""
    code = getattr(getattr(type(net), "forward", net), "__code__", None)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code is not None else ()
    return frozenset(("x", "extra")) & frozenset(names)


def arguments_of(net: Callable[..., Any]) -> dict[str, bool]:
    """The names of a network's arguments, and whether it needs them; none where it does not tell."""
    net = getattr(net, "_orig_mod", net)
    try:
        arguments = inspect.signature(net.forward if isinstance(net, nn.Module) else net).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {a.name: a.default is a.empty for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}


def entry(inputs: Input, name: str) -> Tensor | None:
    """The tensor called `name` in a mapping, such as "attention_mask" (b, t); None where there is none."""
    return None if isinstance(inputs, Tensor) else inputs.get(name)


def take_rows(x: Input, rows: Tensor | slice) -> Input:
    """Some samples of a batch."""
    return map_input(x, lambda tensor: tensor[rows] if tensor.ndim else tensor)


def to_device(x: Input, device: torch.device) -> Input:
    """An input on a device."""
    return map_input(x, lambda tensor: tensor.to(device))


def map_input(x: Input, fn: Callable[[Tensor], Tensor]) -> Input:
    if isinstance(x, Tensor):
        return fn(x)
    return {key: fn(value) if isinstance(value, Tensor) else value for key, value in x.items()}


def modules_of(net: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a callable runs: itself, a method's owner, what a partial, an object or a closure holds."""
    if isinstance(net, nn.Module):
        return [net]
    if depth == 0 or net is None or isinstance(net, (Tensor, str, bytes, int, float, type)):
        return []
    held: list[Any] = [getattr(net, "__self__", None)]
    if isinstance(net, partial):
        held += [net.func, *net.args, *net.keywords.values()]
    held += [cell.cell_contents for cell in getattr(net, "__closure__", None) or () if _filled(cell)]
    held += net if isinstance(net, (list, tuple)) else []
    held += net.values() if isinstance(net, dict) else []
    held += vars(net).values() if hasattr(net, "__dict__") and not callable(getattr(net, "fingerprint", None)) else []
    found = {id(module): module for thing in held for module in modules_of(thing, depth - 1)}
    return list(found.values())


def original(module: Any) -> Any:
    """The module that `torch.compile` wraps, or itself."""
    return getattr(module, "_orig_mod", module)


def freeze(module: nn.Module) -> None:
    """Put a network into evaluation mode, without gradients.

    Raises:
        ShapeError: its weights are not in memory.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(is_lazy(tensor) or tensor.is_meta for tensor in tensors):
        raise ShapeError(
            "some weights of the base are not in memory (offloaded, on the device 'meta', or not initialised yet): "
            "load all of it onto one device, without a device map, and run it once"
        )
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    try:
        module.eval()
    except NotImplementedError:
        # An exported program has one mode, that of its export.
        for part in module.modules():
            part.training = False


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def describe(x: Input) -> Any:
    """Shapes and types of an input as JSON values, with the values where they are few whole numbers."""
    if isinstance(x, Tensor):
        whole = not (x.is_floating_point() or x.is_complex()) and x.numel() <= FEW
        return [list(x.shape), str(x.dtype).removeprefix("torch."), *([x.tolist()] if whole else [])]
    return {key: describe(value) if isinstance(value, Tensor) else {"value": value} for key, value in x.items()}


def described(record: Any) -> Input:
    """An input of this description, with zeros where no values are told.

    Raises:
        TypeError: it is no description, or one of an input that is far too large.
    """
    if isinstance(record, dict):
        return {k: v.get("value") if isinstance(v, dict) else described(v) for k, v in record.items()}
    shape, name, *values = record if isinstance(record, list) and len(record) in (2, 3) else ((), "", ())
    kind = next((t for t in DTYPES if str(t) == f"torch.{name}"), None)
    if kind is None or not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) > MANY:
        raise TypeError(f"no example has the form {str(record)[:80]}")
    try:
        return torch.tensor(values[0], dtype=kind).reshape(shape) if values else torch.zeros(shape, dtype=kind)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"the example's values do not fit it ({error})") from error
