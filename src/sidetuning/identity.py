"""What a base *is*: the one thing by which tasks, methods, caches and agents tell one base from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Identity:
    """A base's weights, how it prepares inputs, and what it returns. Equal bases have equal identities.

    Attributes:
        sha256: hash of the network's weights; see `weights_sha256`.
        kind: "vector", "sequence" or "map".
        output_shape: shape of the code for the base's example, without the batch.
        preparation: normalisation and choice of the output, as JSON values.
    """

    sha256: str
    kind: str
    output_shape: tuple[int, ...]
    preparation: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """As JSON values, for files."""
        return {**asdict(self), "output_shape": list(self.output_shape)}

    def digest(self, taps: Mapping[str, tuple[int, ...]] | None = None) -> str:
        """sha256 over all of it, and over the names and shapes of `taps`: what cached features depend on."""
        return hashlib.sha256(json.dumps([self.record(), taps]).encode()).hexdigest()

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


def weights_sha256(net: Callable[..., Any], output_shape: tuple[int, ...]) -> str:
    """sha256 over the names, shapes, types and bytes of a network's weights and buffers.

    A network that is no module gives its own, `net.fingerprint()`; else its name and output shape are hashed.
    """
    own = getattr(net, "fingerprint", None)
    digest = hashlib.sha256()
    if callable(own):
        digest.update(str(own()).encode())
    elif isinstance(net, nn.Module):
        for name, tensor in sorted(net.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor).numpy().data)
    else:
        name = getattr(net, "__qualname__", type(net).__qualname__)
        digest.update(f"{getattr(net, '__module__', '')}.{name} {output_shape}".encode())
    return digest.hexdigest()


def weights_version(net: Callable[..., Any]) -> object:
    """Equal as long as a module's weights are: tells cheaply whether `weights_sha256` must be computed again.

    Writes in place raise a tensor's version; those that go round it (`.data`) change the sum of its bytes.
    """
    if not isinstance(net, nn.Module):
        return object()
    return [
        (name, t.data_ptr(), 0 if t.is_inference() else t._version, _sum(t))
        for name, t in net.state_dict(keep_vars=True).items()
    ]


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
        return f"{type(function).__qualname__} {function!r}"
    if "<lambda>" in name:
        code: Any = function.__code__
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        constants = [c for c in code.co_consts if not hasattr(c, "co_code")]
        name += "#" + hashlib.sha256(repr((code.co_code, code.co_names, constants, cells)).encode()).hexdigest()
    return str(name)
