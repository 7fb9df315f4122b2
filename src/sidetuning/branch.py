"""One task's branch: side, merge and head, built from registered names or from the user's own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input, Observation, call
from sidetuning.errors import ShapeError, TaskError
from sidetuning.heads import HEADS, named_head
from sidetuning.merges import MERGES, Alpha, Gated, GroupNorm
from sidetuning.sides import SIDES
from sidetuning.sides.initialise import LowEnergy, distilled_weights, load_weights, xavier

CUSTOM = "custom"  # the recorded name of a part that the user built


@dataclass(frozen=True)
class BranchConfig:
    """How a branch was built; what `side.json` records. Parts are (name, options); a user's own module is "custom"."""

    side: tuple[str, dict[str, Any]] | None
    merge: tuple[str, dict[str, Any]]
    head: tuple[str, dict[str, Any]]
    laterals: list[str] = field(default_factory=list)
    prenorm: bool = False
    init: str | None = None


class Branch(nn.Module):
    """Side, merge and head of one task. Its parameters are exactly what training the task trains.

    Attributes:
        config: how it was built.
        labels: names of the classes, where the task has them.
    """

    def __init__(
        self,
        side: nn.Module | None,
        merge: nn.Module,
        head: nn.Module,
        norm: nn.Module,
        config: BranchConfig,
    ) -> None:
        super().__init__()
        self.side, self.merge, self.norm, self.head = side, merge, norm, head
        self.config = config
        self.labels: list[str] | None = None

    def side_output(self, inputs: Input, features: Features) -> Tensor | None:
        """S(x), of the base's output shape; None for a branch without a side."""
        if self.side is None:
            return None
        if getattr(self.side, "uses_taps", False):
            ids = (ids_of(inputs),) if getattr(self.side, "uses_ids", False) else ()
            out = self.side(features.taps, mask_of(inputs), *ids)
        else:
            out = call(self.side, inputs)
        return out

    def forward(self, inputs: Input, features: Features, laterals: Sequence[Tensor] = ()) -> Tensor:
        """The task's output from a prepared input, the base's features and earlier tasks' side outputs."""
        return self.output(inputs, features, self.side_output(inputs, features), laterals)

    def output(self, inputs: Input, features: Features, side: Tensor | None, laterals: Sequence[Tensor]) -> Tensor:
        """Merge, normalise and decode, where the side output is known."""
        base = features.out
        if side is not None and side.shape != base.shape:
            raise ShapeError(
                f"the side returns {tuple(side.shape)} and the base {tuple(base.shape)}; they must agree (for inputs of another size "
                "than the example's build the model on base.with_example(x))"
            )
        return decode(self.head, self.norm(self.merge(base, side, laterals)), inputs)

    @property
    def alpha(self) -> float | None:
        """The weight of the base, where the merge is alpha."""
        merge = self.merge.merge if isinstance(self.merge, Gated) else self.merge
        return float(merge.weights[0].detach()) if isinstance(merge, Alpha) else None

    @property
    def frozen(self) -> bool:
        """Whether the task was frozen."""
        return not any(p.requires_grad for p in self.parameters())


def build_branch(
    base: Base,
    *,
    side: str | nn.Module | None,
    head: int | str | nn.Module,
    merge: str | nn.Module,
    laterals: Sequence[str] = (),
    prenorm: bool = False,
    init: str | Path | None = None,
    side_options: Mapping[str, Any] | None = None,
    merge_options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
) -> Branch:
    """Build the branch that `SideTuner.add_task` describes, in evaluation mode."""
    merge_module: Any = merge
    merge_name: tuple[str, dict[str, Any]] = (CUSTOM, {})
    if isinstance(merge, str):
        options = dict(merge_options or {})
        merge_module = MERGES.build(merge, base.kind, base.width, len(laterals), options=options)
        merge_name = (merge, options)
    if getattr(merge_module, "uses_side", True):
        if side is None:
            raise TaskError(f"merge '{merge_name[0]}' needs a side; name one, or use merge='base-only'")
        side_module, side_name = _build(SIDES, side, side_options, base=base)
    else:  # a side that is never heard would only be trained in vain
        side_module, side_name = None, None
    head_module, head_name = _build(HEADS, *named_head(head, head_options), base=base)
    assert isinstance(merge_module, nn.Module)

    kept: str | None = None  # what a rebuild from `side.json` must know; weights come from the file then
    if init == "zero":
        merge_module, kept = Gated(merge_module), "zero"
    elif side_module is not None and init is not None:
        if init == "xavier":
            xavier(side_module)
        elif init == "low-energy":
            side_module, kept = LowEnergy(side_module), "low-energy"
        elif init == "distilled":
            name, options = side_name or (CUSTOM, {})
            load_weights(side_module, distilled_weights(base, name, options), f"side '{name}'")
        elif isinstance(init, Path) or "." in init or "/" in init:
            load_weights(side_module, init, f"side '{side_name[0] if side_name else CUSTOM}'")
        else:
            names = "xavier, low-energy, zero, distilled or the path of a safetensors file"
            raise TaskError(f"init '{init}' is not known; give {names}")
    norm = GroupNorm(base.kind, base.width) if prenorm else nn.Identity()
    config = BranchConfig(side_name, merge_name, head_name, list(laterals), prenorm, kept)
    return Branch(side_module, merge_module, head_module, norm, config).eval()


def _build(
    registry: Any, part: str | nn.Module, options: Mapping[str, Any] | None, *, base: Base
) -> tuple[nn.Module, tuple[str, dict[str, Any]]]:
    if isinstance(part, str):
        module = registry.build(part, base, options=dict(options or {}))
        return module, (part, dict(options or {}))
    if options:
        raise TaskError(
            f"options {dict(options)} are for a registered {registry.kind}; build your own module with them"
        )
    if not isinstance(part, nn.Module):
        raise TaskError(f"a {registry.kind} is a registered name or a torch module, not a {type(part).__name__}")
    return part, (CUSTOM, {})


def decode(head: nn.Module, code: Tensor, inputs: Input) -> Tensor:
    """Run a head on a code, with the mask or the extra numbers of the inputs where it takes them."""
    if getattr(head, "uses_extra", False):
        return head(code, inputs.extra if isinstance(inputs, Observation) else None)
    if getattr(head, "uses_mask", False):
        return head(code, mask_of(inputs))
    return head(code)


def mask_of(inputs: Input) -> Tensor | None:
    """The attention mask (b, t) of a mapping; None for tensors and unmasked inputs."""
    return part_of(inputs, "attention_mask")


def ids_of(inputs: Input) -> Tensor:
    """The token ids (b, t) of a text."""
    ids = part_of(inputs, "input_ids")
    if ids is None:
        raise ShapeError("this side reads token ids: its base must be a text encoder, called with input_ids")
    return ids


def part_of(inputs: Input, name: str) -> Tensor | None:
    """A named tensor of a mapping; None where it is not there."""
    if isinstance(inputs, Observation):
        inputs = inputs.x
    return inputs.get(name) if isinstance(inputs, Mapping) else None
