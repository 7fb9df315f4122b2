"""A frozen network that is run by something else than torch: what fits its graph goes there, the rest is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sidetuning.content import content_sha256
from sidetuning.errors import ShapeError
from sidetuning.inputs import Input, entry
from sidetuning.outputs import Features

Run = Callable[[Input], Features]


@dataclass(frozen=True, eq=False)
class Engine:
    """How the network of a base is run, and how far that is from plain torch.

    Attributes:
        name: "torch", "folded", "compile", "onnxruntime" or "openvino".
        precision: "fp32", "bf16", "int8" or "int4".
        error: largest relative difference of the code and the taps to those of torch in fp32, by their norms.
        speed: how many times as fast as plain torch it is, where `engine="auto"` has measured it.
        ranges: of activations, as measured on calibration inputs: the name in the graph, the least and the largest.
        run: the engine; None where torch runs the network's own weights, in fewer bits.
        otherwise: runs, in the same precision, what does not fit the engine; None where only plain torch could.
        form: of the inputs that fit, by `form_of`.
        bounds: the largest whole number in each entry, such as an id, that the network takes; "" is for tokens.
        idle: entries that inputs may lack, which are 0 then, such as "token_type_ids".
        sha256: of the weights that it was built from.
        again: builds the engine for another base, such as that of images of another size.
    """

    name: str = "torch"
    precision: str = "fp32"
    error: float = 0.0
    speed: float | None = None
    ranges: Mapping[str, list[float]] | None = None
    run: Run | None = None
    otherwise: Run | None = None
    form: Any = None
    bounds: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    sha256: str | None = None
    again: Callable[[Any], Any] | None = None

    def __str__(self) -> str:
        return f"{self.precision} by {self.name}"

    def __deepcopy__(self, memo: Any) -> Engine:
        # What it runs does not change.
        return self

    def __reduce__(self) -> Any:
        if self.run is None:
            return Engine, (self.name, self.precision, self.error, self.speed, self.ranges)
        raise ShapeError(f"a base in {self} cannot be sent to another process; build it there, st.with_engine(base, …)")

    def features(self, inputs: Input, gradient: bool) -> Features | None:
        """What the engine makes of a prepared input; None where the base's own network must make it.

        Raises:
            ShapeError: the input does not fit, and plain torch would give other numbers.
        """
        if self.run is None:
            return None
        inputs = self.whole(inputs)
        reason = "it gives no gradient of its input" if gradient else self._misfit(inputs)
        if not reason:
            try:
                return self.run(inputs)
            except Exception as error:
                # Runtimes share no errors; whatever it was, plain torch tells it better, or can.
                reason = str(error).strip().partition("\n")[0]
        if self.otherwise is not None:
            return self.otherwise(inputs)
        if self.precision == "fp32":
            return None
        raise ShapeError(
            f"this base runs in {self}, and cannot take this input ({reason}); build it for inputs like this one "
            "with example=, or use engine='torch'"
        )

    def whole(self, inputs: Input) -> Input:
        """An input with all entries of the graph."""
        if isinstance(inputs, Tensor) or not self.idle:
            return inputs
        return {**{name: torch.zeros_like(inputs["input_ids"]) for name in self.idle}, **inputs}

    def moved(self, before: Tensor, after: Tensor) -> Engine:
        """What is left of it where its base goes to another device or type: in fp32, plain torch.

        Raises:
            ShapeError: plain torch would give other numbers.
        """
        if self.run is None or (before.dtype, before.device) == (after.dtype, after.device):
            return self
        if self.precision != "fp32":
            raise ShapeError(f"a base in {self} stays where it was built; move the plain base, then st.with_engine")
        return Engine()

    def rebuilt(self, base: Any) -> Any:
        """The engine for a base that has another example."""
        return base if self.run is None or self.again is None else self.again(base)

    def check_taps(self, wanted: list[str], known: list[str]) -> None:
        """Raise ShapeError: with other taps, a graph rounds otherwise, and tasks that are learned would change."""
        if self.run is not None and wanted:
            raise ShapeError(
                f"this base runs in {self} with the taps {known}, and not with {wanted}; name all taps when it is "
                "built, load_base(…, taps=…)"
            )

    def check_weights(self, sha256: str) -> None:
        """Raise ShapeError where the base's weights are not those that the engine was built from."""
        if self.sha256 not in (None, sha256):
            raise ShapeError(f"the weights of this base changed after {self} was built; build it again")

    def _misfit(self, inputs: Input) -> str:
        """Why an input does not fit; empty where it does."""
        form, mask = form_of(inputs), entry(inputs, "attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.any(1).all()):
            # Attention over nothing is what each runtime makes of it.
            return "a text of padding alone"
        if form != self.form:
            return f"it was built for {self.form}, this is {form}"
        entries = {name: value for name, value in tensors_of(inputs).items() if isinstance(value, Tensor)}
        if not all(bool(value.sum().isfinite()) for value in entries.values() if value.is_floating_point()):
            # Some runtimes, and all in int8, make a number of what is none.
            return "numbers that are not finite"
        # Runtimes read beyond a table in silence, or count from its end.
        for name, most in self.bounds.items():
            value = entries[name or "input_ids"]
            low, high = map(int, value.aminmax()) if name and value.numel() else (0, value.shape[-1])
            if low < 0 or high > most:
                return f"{name or 'tokens'} from {low} to {high}, where the network takes 0 to {most}"
        return ""

    def told(self) -> dict[str, Any]:
        """What tells its base from the plain one, for its identity: nothing where they differ by rounding alone."""
        calibrated = {} if self.ranges is None else {"calibration": content_sha256(self.ranges)[:16]}
        return {} if self.precision == "fp32" else {"precision": str(self), **calibrated}


def tensors_of(inputs: Input) -> dict[str, Any]:
    """The entries of an input that the network sees."""
    if isinstance(inputs, Tensor):
        return {"x": inputs}
    return {name: value for name, value in inputs.items() if name != "extra"}


def form_of(inputs: Input) -> dict[str, Any]:
    """Names, types and shapes of an input's entries; the number of rows, and that of tokens, are open."""
    entries = tensors_of(inputs)
    ids = entries.get("input_ids")
    length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else -1

    def form(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = ["tokens" if d == 0 and size == length else size for d, size in enumerate(value.shape[1:])]
        rows = "rows" if len(value.shape[:1]) and len(value) else 0
        return f"{str(value.dtype).removeprefix('torch.')} on {value.device.type} {(rows, *sizes)}".replace("'", "")

    return {name: form(value) for name, value in sorted(entries.items())}
