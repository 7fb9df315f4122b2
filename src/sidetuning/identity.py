"""What a base *is*: the one thing by which tasks, methods, caches and agents tell one base from another."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidetuning.probe import same_summary

# Types of attributes that may change what a module computes, such as the number of its heads.
PLAIN = (int, float, str, bool, tuple, type(None))


@dataclass(frozen=True)
class Identity:
    """A base's weights, how it prepares inputs, and what it returns. Equal bases have equal identities.

    Attributes:
        sha256: hash of the network's weights; see `weights_sha256`.
        kind: "vector", "sequence" or "map".
        output_shape: shape of the code for the base's example, without the batch.
        preparation: normalisation and choice of the output, as JSON values.
        probe: numbers that tell what the base makes of fixed inputs; equal weights may compute different things.
    """

    sha256: str
    kind: str
    output_shape: tuple[int, ...]
    preparation: dict[str, Any]
    probe: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """As JSON values, for files."""
        shape, probe = list(self.output_shape), list(self.probe)
        return {
            "sha256": self.sha256,
            "kind": self.kind,
            "output_shape": shape,
            "preparation": self.preparation,
            "probe": probe,
        }

    def digest(self) -> str:
        """sha256 over what is hashed or exact: all but the probe, which other hardware rounds in another way."""
        return hashlib.sha256(json.dumps({**self.record(), "probe": None}).encode()).hexdigest()

    def difference(self, recorded: Mapping[str, Any]) -> str | None:
        """How the base of `recorded` (by `record`, or an older file) differs from this one; None where it does not.

        A map or a sequence of another size is the same base on other inputs. Older files may hold the hash alone.
        """
        found = recorded.get("sha256")
        if found != self.sha256:
            return f"its weights have the sha256 {str(found)[:12]}…, this base's {self.sha256[:12]}…"
        shape = recorded.get("output_shape")
        if shape is not None and _form(tuple(shape)) != _form(self.output_shape):
            return f"it returned {tuple(shape)}, this base returns {self.output_shape}"
        preparation = recorded.get("preparation")
        own = self.preparation if "kind" in recorded else _older(self.preparation)
        if preparation is not None and preparation != own:
            return f"it prepared its inputs or picked its output otherwise: {preparation}, this base {own}"
        probe = recorded.get("probe")
        # On inputs of another size the same network gives other numbers.
        if probe is not None and tuple(shape or ()) == self.output_shape and not same_summary(probe, list(self.probe)):
            return "it had the same weights and computed other outputs from the same input"
        return None


def _form(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many dimensions a code has, and its width."""
    return len(shape), shape[-1] if len(shape) == 2 else shape[0]


def _older(preparation: dict[str, Any]) -> dict[str, Any]:
    """As version 0.1.0 wrote it: normalisation to three decimals, functions by their names alone."""
    norms = {key: None if (v := preparation[key]) is None else [round(x, 3) for x in v] for key in ("mean", "std")}
    output = preparation["output"]
    return {**preparation, **norms, "output": output.split("#")[0] if isinstance(output, str) else output}


def preparation(
    mean: Tensor | None, std: Tensor | None, output: str | int | Callable[..., Any] | None, channels_last: bool
) -> dict[str, Any]:
    """Normalisation and choice of the output as JSON values. float32 holds seven digits."""
    norm = [None if t is None else [float(f"{v:.7g}") for v in t.flatten().tolist()] for t in (mean, std)]
    name = function_name(output) if callable(output) else output
    return {"mean": norm[0], "std": norm[1], "output": name, "channels_last": channels_last}


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
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor).numpy().data)
    return digest.hexdigest()


def structure_sha256(net: Callable[..., Any], modules: Sequence[nn.Module]) -> str:
    """sha256 over what outputs depend on beside weights: classes, plain attributes, code, and what it closes over.

    A new version of a network's package may change it; then cached features are computed again.
    """
    digest = hashlib.sha256()
    for module in modules:
        module = getattr(module, "_orig_mod", module)
        digest.update(str(getattr(module, "config", "")).encode())
        for name, part in module.named_modules():
            plain = {k: v for k, v in vars(part).items() if isinstance(v, PLAIN) and k != "training"}
            digest.update(f"{name} {type(part).__qualname__} {sorted(plain.items())}\n".encode())
            own = vars(part).get("forward")
            digest.update(b"" if own is None else function_name(own).encode())
    if not isinstance(net, nn.Module):
        digest.update(function_name(net).encode())
        try:
            digest.update(pickle.dumps(net))
        except Exception:
            # What cannot be pickled is told by its code and what it closes over.
            digest.update(code_sha256(net).encode())
    return digest.hexdigest()


def weights_version(module: nn.Module) -> object:
    """Equal as long as a module's weights are: tells cheaply whether `weights_sha256` must be computed again.

    Writes in place raise a tensor's version; those that go round it (`.data`) change the sum of its bytes.
    """
    tensors = module.state_dict(keep_vars=True).items()
    return [(name, t.data_ptr(), 0 if t.is_inference() else t._version, _sum(t)) for name, t in tensors]


def _sum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, read as 64-bit integers where they divide it: much faster than a hash."""
    content = _bytes(tensor)
    return int((content.view(torch.int64) if len(content) % 8 == 0 else content).sum(dtype=torch.int64))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def function_name(function: Callable[..., Any]) -> str:
    """A function's name; that of a lambda has a hash of what it does, since all in one place are called the same."""
    if isinstance(function, partial):
        return f"{function_name(function.func)} {function.args} {function.keywords}"
    name = getattr(function, "__qualname__", None)
    if name is None:
        return f"{type(function).__qualname__}"
    return f"{name}#{code_sha256(function)}" if "<lambda>" in name else str(name)


def code_sha256(function: Any) -> str:
    """sha256 over a function's code and what it closes over; that of an object over its class's `__call__`."""
    code: Any = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if code is None:
        return ""
    cells = [_content(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    constants = [c for c in code.co_consts if not hasattr(c, "co_code")]
    inner = [c.co_code for c in code.co_consts if hasattr(c, "co_code")]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants, inner, cells)).encode()).hexdigest()


def _content(value: Any) -> str:
    """What is closed over, without the places in memory that `repr` may tell."""
    if isinstance(value, Tensor):
        return hashlib.sha256(_bytes(value).numpy().data).hexdigest()
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception:
        return function_name(value) if callable(value) else type(value).__qualname__
