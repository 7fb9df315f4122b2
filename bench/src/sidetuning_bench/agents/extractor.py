"""The encoder of agents that learn by PPO: the library's extractor with three more methods, and a compass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from gymnasium import spaces
from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning.branch import build_branch
from sidetuning.errors import ShapeError, UnknownNameError
from sidetuning.integrations.sb3 import SideTunedExtractor
from sidetuning.registry import unknown
from sidetuning_bench.agents.trajectories import COMPASS, compass_numbers
from sidetuning_bench.methods.trunk import Trunk

PRECISIONS = ("no", "bf16")


class AgentExtractor(SideTunedExtractor):
    """Features for a navigating agent by one of five methods.

    Args:
        observation_space: as in `SideTunedExtractor`; a compass is (2,), distance and angle, as Habitat's.
        base, side, side_options, merge, hidden: as in `SideTunedExtractor`.
        method: "sidetune"; "features", the base alone; "finetune", a tuned copy of the base, with its batch norms
            folded into the convolutions; "scratch", a network of the base's shape from random weights; "side-only", the
            side alone from random weights.
        init: how the side of "sidetune" starts.
        precision: "bf16" runs the network of the last three methods under bfloat16 autocast, when acting and when
            learning alike; the features are float32.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("sidetune", "features", "finetune", "scratch", "side-only")

    def __init__(
        self,
        observation_space: spaces.Dict,
        base: str | Callable[[], Base] = "resnet-doom-curvature",
        method: str = "sidetune",
        side: str | nn.Module = "fcn5",
        side_options: Mapping[str, Any] | None = None,
        merge: str = "alpha",
        init: str | None = "distilled",
        hidden: int = 128,
        precision: Literal["no", "bf16"] = "no",
    ) -> None:
        if precision not in PRECISIONS:
            raise UnknownNameError(unknown("precision", precision, PRECISIONS, verb="one of the extractor's"))
        super().__init__(observation_space, base, method, side, side_options, merge, init, hidden)
        self.precision = precision

    def add_networks(self, method: str, parts: Mapping[str, Any]) -> None:
        """Build the networks of any of the five methods; `trunk` makes a code alone, without a pass of the base."""
        self.trunk: nn.Module | None = None
        if method in SideTunedExtractor.METHODS:
            super().add_networks(method, parts)
            return
        self.encoder, self.branch = None, None
        if method == "side-only":
            alone = {**parts, "merge": "side-only", "init": None}
            self.trunk = build_branch(self.base, head="identity", **alone).side
        else:
            # Folded where it is tuned, since its batch norms do not move in evaluation mode.
            tuned = method == "finetune"
            self.trunk = Trunk(self.base.folded() if tuned else self.base, pretrained=tuned)

    def encode(self, inputs: Input, code: Tensor | None) -> Tensor:
        if self.trunk is None:
            return super().encode(inputs, code)
        with torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            merged: Tensor = self.trunk(inputs)
        return merged.float()

    def encode_numbers(self, name: str, values: Tensor) -> Tensor:
        """log(1 + distance), cos and sin of a compass; other numbers as they are."""
        if name != COMPASS:
            return super().encode_numbers(name, values)
        if values.shape[1:] != (2,):
            raise ShapeError(f"'{COMPASS}' must be (2,), distance and angle, not {tuple(values.shape[1:])}")
        return compass_numbers(values)
