"""The methods that can learn to answer questions, with the settings that each one reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sidetuning.base import Base
from sidetuning.errors import SideTuningError
from sidetuning.sides.top import EMBEDDINGS
from sidetuning_bench import methods
from sidetuning_bench.options import Count, LoRAOptions, MethodOptions, Positive, ScratchOptions


@dataclass(frozen=True)
class TextOptions(MethodOptions):
    """What all methods share.

    Attributes:
        rate: learning rate at its peak, where none is set.
        cached: whether the base is never trained, so that its features are computed once.
    """

    rate: ClassVar[float] = 1e-3
    cached: ClassVar[bool] = True

    def taps(self, layers: Sequence[str]) -> list[str]:
        """The inner activations that the method reads, of a base with these layers."""
        return []


@dataclass(frozen=True)
class BranchOptions(TextOptions):
    """What sides and ladders share."""

    width: Count = 96
    """Width of the side network."""
    merge: str = "alpha"
    """How base and side are fused."""
    init: Literal["as-built", "xavier", "low-energy", "zero", "distilled"] = "as-built"
    """How the side starts; distilled: it imitates the base on the training windows first."""
    distill_epochs: Positive = 1.0
    """Passes over the training windows in that imitation."""

    def network(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the side."""
        raise NotImplementedError

    def build(self, base: Base, seed: int) -> methods.Method:
        side, options = self.network()
        init = None if self.init in ("as-built", "distilled") else self.init
        given = {"side": side, "merge": self.merge, "side_options": options, "init": init}
        return methods.METHODS.build("sidetune", base, options=given)


@dataclass(frozen=True)
class SideTuneOptions(BranchOptions):
    """Side-tuning: a frozen base, a side network, an alpha merge and a head."""

    name = "sidetune"
    side: str = "match"
    """Side network: match (compares the text with the question), slim (a transformer on the base's embeddings),
    convolutional, or top (a copy of the base's last layers)."""
    layers: Count | None = None
    """Layers of the side network; by default 2 of match, 1 of top, 4 of slim and convolutional."""

    @property
    def depth(self) -> int:
        """Layers of the side network."""
        return self.layers or {"match": 2, "top": 1}.get(self.side, 4)

    def network(self) -> tuple[str, dict[str, Any]]:
        return self.side, {} if self.side == "top" else {"width": self.width, "layers": self.depth}

    def taps(self, layers: Sequence[str]) -> list[str]:
        if self.side == "match":
            return [EMBEDDINGS, *dict.fromkeys((layers[(len(layers) - 1) // 2], layers[-2:][0]))]
        if self.side != "top":
            return [EMBEDDINGS]
        # The top reads what comes just below it.
        return [[EMBEDDINGS, *layers][-1 - enough("layers", self.depth, layers)]]


@dataclass(frozen=True)
class LadderOptions(BranchOptions):
    """Ladder: a small block per tapped layer of the frozen base."""

    name = "ladder"
    rungs: Count = 3
    """Number of layers of the base that the ladder reads, spread evenly; the embeddings do not count."""

    def network(self) -> tuple[str, dict[str, Any]]:
        return "ladder", {"width": self.width}

    def taps(self, layers: Sequence[str]) -> list[str]:
        rungs = enough("rungs", self.rungs, layers)
        return [EMBEDDINGS, *(layers[(k + 1) * len(layers) // rungs - 1] for k in range(rungs))]


@dataclass(frozen=True)
class FeaturesOptions(TextOptions):
    """Fixed features: a head on the frozen base."""

    name = "features"


@dataclass(frozen=True)
class FineTuneOptions(TextOptions):
    """Fine-tuning: a copy of the base, trained as a whole."""

    name, rate, cached = "finetune", 3e-5, False

    def build(self, base: Base, seed: int) -> methods.Method:
        return methods.METHODS.build("independent", base, options={})


@dataclass(frozen=True)
class TextScratchOptions(ScratchOptions, TextOptions):
    """From scratch: a network of the base's shape, from random weights."""

    rate, cached = 1e-4, False


@dataclass(frozen=True)
class TextLoRAOptions(LoRAOptions, TextOptions):
    """LoRA: low-rank updates of the frozen base's weights."""

    rate, cached = 2e-4, False


FROZEN = (SideTuneOptions(), LadderOptions(), FeaturesOptions())
TUNED = (FineTuneOptions(), TextScratchOptions(), TextLoRAOptions())
METHODS: dict[str, TextOptions] = {options.name: options for options in (*FROZEN, *TUNED)}


def enough(name: str, wanted: int, layers: Sequence[str]) -> int:
    """A number of layers that the base has.

    Raises:
        SideTuningError: it has fewer.
    """
    if wanted > len(layers):
        raise SideTuningError(f"--{name} {wanted}: the base has {len(layers)} layers")
    return wanted
