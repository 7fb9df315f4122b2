"""What a network is given, one tensor or a mapping; and what is asked of every network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sidetuning.errors import ShapeError, UnknownNameError
from sidetuning.registry import unknown

# One tensor, or the keyword arguments of the network. A mapping may hold two keys that are no arguments: "x", the one
# tensor of a network that takes no names, and "extra", (b, n) numbers that only heads see, such as an agent's compass.
Input = Tensor | Mapping[str, Any]
# Entries of a mapping that are images.
IMAGES = ("x", "pixel_values")
# What a network keeps of an earlier part of the same text.
STATE = ("cache", "past_key_values", "past_key_value", "cache_params", "mems", "state", "past_buckets_states")
# Types of values that are numbers, texts or nothing, and of tuples of such.
PLAIN = (int, float, str, bool, tuple, type(None))
# Numbers of an example that are written down with it, at most.
WRITTEN = 4096


def call(net: Callable[..., Any], x: Input) -> Any:
    """Run `net` on a tensor, or on a mapping splatted into keyword arguments; see `Input` for its two other keys.

    An image under "pixel_values" is the one tensor of a network that does not name it.
    """
    if isinstance(x, Tensor):
        return net(x)
    own = arguments_of(net)
    images = [key for key in IMAGES if key in x]
    given = next((key for key in images if key not in own), None)
    if given is not None and len(images) > 1:
        raise ShapeError(f"the input has images under '{images[0]}' and '{images[1]}'; give one of them")
    named = {key: value for key, value in x.items() if key != given and (key in own or key != "extra")}
    return net(**named) if given is None else net(x[given], **named)


def arguments_of(net: Callable[..., Any]) -> dict[str, bool]:
    """The names of a network's arguments, and whether it needs them; none where it does not tell."""
    net = original(net)
    function = net.forward if isinstance(net, nn.Module) else net
    method = getattr(function, "__func__", None)
    return _signature(function) if method is None else _method(method)


def _signature(function: Callable[..., Any]) -> dict[str, bool]:
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {a.name: a.default is a.empty for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}


@lru_cache(maxsize=256)
def _method(function: Callable[..., Any]) -> dict[str, bool]:
    """Those of a method, without its object."""
    found = _signature(function)
    return {name: found[name] for name in list(found)[1:]}


def dtype_of(name: str | None) -> torch.dtype:
    """The type of floats called `name`, "float32" by default; raises UnknownNameError."""
    known = ("float32", "bfloat16", "float16", "float64")
    if (name or known[0]) not in known:
        raise UnknownNameError(unknown("dtype", str(name), known, verb="known"))
    return getattr(torch, name or known[0])  # type: ignore[no-any-return]


def entries_of(net: Callable[..., Any], example: Input) -> dict[str, bool]:
    """The entries that a mapping may have, and whether it must: the network's arguments, and those of the example."""
    images = IMAGES[:1] if image_of(example) is None else IMAGES
    optional = dict.fromkeys([*images, "extra", *(() if isinstance(example, Tensor) else example)], False)
    return {**optional, **arguments_of(net)}


def check_entries(entries: Mapping[str, bool], x: Mapping[str, Any]) -> None:
    """Check a mapping against what `entries_of` gave.

    Raises:
        ShapeError: the state of an earlier part of a text, which a side does not see.
        UnknownNameError: an entry that the network does not read, or one that it lacks.
    """
    if state := [key for key in STATE if x.get(key) is not None]:
        raise ShapeError(
            f"side-tuning runs whole texts, since a side does not see what '{state[0]}' stands for; leave it out and "
            "give all tokens"
        )
    if strange := [key for key in x if key not in entries]:
        raise UnknownNameError(unknown("input", strange[0], sorted(entries), verb="read by the network"))
    image = any(key in x for key in IMAGES)
    if missing := [key for key, needed in entries.items() if needed and key not in x and not image]:
        raise UnknownNameError(f"the network reads '{missing[0]}', which the input lacks; it has {', '.join(x)}")


def counted(x: Input, reads_places: bool) -> dict[str, Any]:
    """An input with the places of its tokens, where padding comes before some: counted as generation counts them."""
    found: dict[str, Any] = dict(x) if isinstance(x, Mapping) else {}
    mask = found.get("attention_mask") if reads_places and "position_ids" not in found else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return found
    # A graph cannot look whether there is any; without, these are the places that the network counts itself.
    if torch.compiler.is_compiling() or bool((mask[:, :1] == 0).any()):
        first = (mask != 0).int().argmax(1, keepdim=True)
        found["position_ids"] = (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)
    return found


def image_of(inputs: Input) -> Tensor | None:
    """The image of an input: the one tensor, or the entry "x" or "pixel_values" of a mapping."""
    if isinstance(inputs, Tensor):
        return inputs
    found = next((inputs[key] for key in IMAGES if key in inputs), None)
    return found if isinstance(found, Tensor) else None


def example_record(example: Input) -> Any:
    """An example as JSON values: shapes and types, and the numbers where they may matter, as of ids and masks."""
    if isinstance(example, Tensor):
        noted = example.numel() <= WRITTEN and not example.is_complex()
        noted = noted and (example.ndim < 3 or not example.is_floating_point())
        about = {"shape": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
        if not noted and example.numel() and not example.is_complex() and bool((example == example.flatten()[0]).all()):
            # Such as a long mask.
            return {**about, "value": example.flatten()[0].item()}
        return {**about, "values": example.tolist() if noted else None}
    return {"inputs": {key: example_record(v) if isinstance(v, Tensor) else v for key, v in example.items()}}


def example_from(record: Any) -> Input:
    """The example of a record; zeros where the values do not matter.

    Raises:
        ShapeError: a record that is damaged, or of an input that takes too much memory.
    """
    try:
        if "inputs" in record:
            entries = {str(key): value for key, value in record["inputs"].items()}
            return {k: example_from(v) if isinstance(v, dict) else v for k, v in entries.items()}  # type: ignore[misc]
        dtype = getattr(torch, str(record["dtype"]))
        shape = [int(n) for n in record["shape"]]
        if not isinstance(dtype, torch.dtype) or min(shape, default=0) < 0 or math.prod(shape) > 2**26:
            raise ValueError(f"{record['dtype']} {shape}")
        values = record.get("values")
        if values is None:
            return torch.full(shape, record.get("value", 0), dtype=dtype)
        return torch.tensor(values, dtype=dtype).view(shape)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ShapeError(f"the recorded example of a base is damaged ({error}); give example=, an input") from error


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
    if not isinstance(x, Mapping):
        raise ShapeError(
            f"an input is a tensor or a mapping to tensors, not a {type(x).__name__}; stack or name its parts"
        )
    return {key: fn(value) if isinstance(value, Tensor) else value for key, value in x.items()}


def original(module: Any) -> Any:
    """The module that `torch.compile` wraps, or itself."""
    if isinstance(module, nn.Module):
        # Asked for in each pass: torch takes microseconds to tell that an attribute is not there.
        # Not `get`: the modules of scripted networks have none.
        held = "_orig_mod" in module._modules
        return module._modules["_orig_mod"] if held else module
    return getattr(module, "_orig_mod", module)


class FirstWeight:
    """Type and place of the first weight of floating point; None without one.

    Each pass asks for them, so the place where the weight was is looked at first.
    """

    def __init__(self, nets: tuple[nn.Module, ...]) -> None:
        self.nets, self.owner, self.name = nets, nn.Module(), ""

    def _find(self) -> Tensor | None:
        kept = getattr(self.owner, self.name, None)
        if isinstance(kept, Tensor) and kept.is_floating_point():
            return kept
        for part in chain.from_iterable(net.modules() for net in self.nets):
            for name, weight in part.named_parameters(recurse=False):
                if weight.is_floating_point():
                    self.owner, self.name = part, name
                    return weight
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """Its type."""
        weight = self._find()
        return None if weight is None else weight.dtype

    @property
    def device(self) -> torch.device | None:
        """Where it lies."""
        weight = self._find()
        return None if weight is None else weight.device


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


def trained_with(net: object) -> str:
    """The normalisation that a network of timm was trained with; empty where it does not tell."""
    config = getattr(net, "pretrained_cfg", None)
    norm = [config.get(name) for name in ("mean", "std")] if isinstance(config, Mapping) else [None]
    return "" if None in norm else f"mean={norm[0]} and std={norm[1]}"
