"""The methods that can learn to answer questions, with the settings that each one reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sidetuning.base import Base
from sidetuning.errors import SideTuningError
from sidetuning_bench import methods
from sidetuning_bench.language.top import EMBEDDINGS
from sidetuning_bench.options import Count, LoRAOptions, MethodOptions, Positive, ScratchOptions


@dataclass(frozen=True)
class BranchOptions(MethodOptions):
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
        return "ladder", {"width": self.width}

    def taps(self, layers: Sequence[str]) -> list[str]:
        """The inner activations that the side reads, of a base with these layers."""
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
    convolutional, top (a copy of the base's last layers), or copy (of the whole base, as in the paper)."""
    layers: Count | None = None
    """Layers of the side network; by default 2 of match, 1 of top, 4 of slim and convolutional."""

    @property
    def depth(self) -> int:
        """Layers of the side network."""
        return self.layers or {"match": 2, "top": 1}.get(self.side, 4)

    def network(self) -> tuple[str, dict[str, Any]]:
        return self.side, {} if self.side in ("top", "copy") else {"width": self.width, "layers": self.depth}

    def taps(self, layers: Sequence[str]) -> list[str]:
        if self.side == "match":
            return [EMBEDDINGS, *dict.fromkeys((layers[(len(layers) - 1) // 2], layers[-2:][0]))]
        if self.side == "copy":
            return []
        if self.side != "top":
            return [EMBEDDINGS]
        if self.depth > len(layers):
            raise SideTuningError(f"--layers {self.depth}: the base has {len(layers)} layers")
        # The top reads what comes just below it.
        return [[EMBEDDINGS, *layers][-1 - self.depth]]


@dataclass(frozen=True)
class LadderOptions(BranchOptions):
    """Ladder: a small block per tapped layer of the frozen base."""

    name = "ladder"
    rungs: Count = 3
    """Number of layers of the base that the ladder reads, spread evenly; the embeddings do not count."""

    def taps(self, layers: Sequence[str]) -> list[str]:
        if self.rungs > len(layers):
            raise SideTuningError(f"--rungs {self.rungs}: the base has {len(layers)} layers")
        return [EMBEDDINGS, *(layers[(k + 1) * len(layers) // self.rungs - 1] for k in range(self.rungs))]


@dataclass(frozen=True)
class FeaturesOptions(MethodOptions):
    """Fixed features: a head on the frozen base."""

    name = "features"


@dataclass(frozen=True)
class FineTuneOptions(MethodOptions):
    """Fine-tuning: a copy of the base, trained as a whole."""

    name = "finetune"

    def build(self, base: Base, seed: int) -> methods.Method:
        return methods.METHODS.build("independent", base, options={})


KINDS = (SideTuneOptions, LadderOptions, FeaturesOptions, FineTuneOptions, ScratchOptions, LoRAOptions)
METHODS: dict[str, MethodOptions] = {kind.name: kind() for kind in KINDS}
# Methods that never train the base: its features are computed once.
CACHED = ("sidetune", "ladder", "features")
# Learning rates of methods, and of sides, where none is set; others have 1e-3.
RATES = {"copy": 3e-5, "finetune": 3e-5, "scratch": 1e-4, "lora": 2e-4}
