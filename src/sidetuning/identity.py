"""What a base *is*: the one thing by which tasks, methods, caches and agents tell one base from another."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sidetuning.content import function_name
from sidetuning.probe import same_summary


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
        # Older files may hold numbers that are infinite.
        told = bool(probe and self.probe and same) and all(map(math.isfinite, probe or ()))
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
