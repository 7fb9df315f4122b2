"""One task's branch: side, merge and head, built from registered names or from the user's own modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sidetuning.base import Base, Features, Input, Layout
from sidetuning.beside import Kept
from sidetuning.errors import ShapeError, TaskError, UnknownNameError
from sidetuning.heads import HEADS, InUnits, Shared, Wide, named_head, run_head
from sidetuning.inputs import original
from sidetuning.merges import MERGES, Alpha, Gated, GroupNorm, Merge
from sidetuning.problems import PROBLEMS, Problem
from sidetuning.registry import unknown
from sidetuning.sides import SIDES, Side, run_side
from sidetuning.sides.initialise import LowEnergy, initialise, layout
from sidetuning.transforms import Transform

# The problem that goes with a head; with others it is "classes".
BY_HEAD = {"span": "span", "tokens": "tokens", "lm": "next"}
# The recorded name of a part that the user built.
CUSTOM = "custom"
Options = dict[str, Any]


@dataclass(frozen=True)
class BranchConfig:
    """How a branch was built; what `side.json` records. Parts are (name, options); a user's own module is "custom"."""

    side: tuple[str, Options] | None
    merge: tuple[str, Options]
    head: tuple[str, Options]
    laterals: list[str] = field(default_factory=list)
    prenorm: bool = False
    init: str | None = None
    problem: str | None = None
    layouts: dict[str, Layout] = field(default_factory=dict)


class Branch(nn.Module):
    """Side, merge and head of one task. Its parameters are exactly what training the task trains.

    Attributes:
        side, merge, norm, head: the parts; `norm` stands before the head.
        config: how it was built.
        labels: names of the classes, where the task has them.
        transform: makes its input of a file, an image or a text, where that is another than the base's.
    """

    def __init__(
        self, side: nn.Module | None, merge: nn.Module, head: nn.Module, norm: nn.Module, config: BranchConfig
    ) -> None:
        super().__init__()
        self.side, self.merge, self.norm, self.head = side, merge, norm, head
        self.config = config
        # As a rebuild from `side.json` makes it.
        self.built = layout(self)
        self.labels: list[str] | None = None
        self.transform: Transform | None = None
        # A lateral of another task, which must not move.
        self.pinned = False
        # How many calls learn it now: a model that keeps some tasks in memory keeps these.
        self.learning = 0
        # Passes over data that it was trained for: the next ones draw other orders.
        self.passes = 0
        # The problem of the loss that it was trained with, where that was given.
        self.trained_as: str | None = None
        # Hashes of its weights as they were read and written: by these its files are known.
        self.written: set[str] = set()
        # What was kept of its data, in files beside its own.
        self.beside: dict[str, Kept] = {}

    @property
    def units(self) -> Tensor | None:
        """Centres and scales (2, channels) of the targets, where its head answers in their units."""
        return self.head.units if isinstance(self.head, InUnits) else None

    @property
    def problem(self) -> Problem:
        """What its targets mean: as given, or what goes with the loss or the head."""
        name = self.config.problem or self.trained_as or BY_HEAD.get(self.config.head[0], "classes")
        problem = PROBLEMS[name]()
        problem.units, problem.labels = self.units, self.labels
        return problem

    @property
    def own_problem(self) -> Problem | None:
        """What its targets mean where that was given."""
        return self.problem if self.config.problem else None

    @property
    def taps(self) -> tuple[str, ...]:
        """The base's inner activations that the side and the head read."""
        side, head = original(self.side), original(self.head)
        sides = side.taps if isinstance(side, Side) else ()
        return tuple(dict.fromkeys([*sides, *(head.expansion.taps if isinstance(head, Wide) else ())]))

    def side_output(self, inputs: Input, features: Features) -> Tensor | None:
        """S(x) of the prepared inputs and the base's features, of the base's output shape; None without a side."""
        if missing := [tap for tap in self.taps if tap not in features.taps]:
            raise ShapeError(
                f"the task reads the tap '{missing[0]}', which the features do not hold; compute or cache them with "
                f"base.with_taps({list(self.taps)})"
            )
        return None if self.side is None else run_side(self.side, inputs, features)

    def forward(self, inputs: Input, features: Features, laterals: Sequence[Tensor] = ()) -> Tensor:
        """The task's output for prepared `inputs`, the base's `features` and other tasks' side outputs `laterals`."""
        return self.output(inputs, features, self.side_output(inputs, features), laterals)

    def output(
        self,
        inputs: Input,
        features: Features,
        side: Tensor | None,
        laterals: Sequence[Tensor],
        shared: Shared | None = None,
    ) -> Tensor:
        """Merge, normalise and decode a `side`'s output.

        Args:
            inputs, features, laterals: those of `forward`.
            side: the side's output.
            shared: that of `run_head`, for tasks that run together.
        """
        return run_head(self.head, self.code(features, side, laterals), inputs, features, shared)

    def code(self, features: Features, side: Tensor | None, laterals: Sequence[Tensor]) -> Tensor:
        """What the head reads: the base's code in `features` merged with those of `side` and `laterals`, normalised."""
        base = features.out
        if side is not None and side.shape != base.shape:
            raise ShapeError(
                f"the side returns {tuple(side.shape)} and the base {tuple(base.shape)}; they must agree (for inputs "
                "of another size than the example's build the model on base.with_example(x))"
            )
        merged: Tensor = self.norm(self.merge(base, side, laterals))
        return merged

    def train(self, mode: bool = True) -> Branch:
        """What is frozen stays in evaluation mode: a task, a lateral, or a part whose parameters were all frozen."""
        super().train(mode and not self.pinned and not self.frozen)
        for module in self.modules() if self.training else ():
            if (parameters := list(module.parameters())) and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    @property
    def alpha(self) -> float | None:
        """The weight of the base, where the merge is alpha."""
        merge = original(self.merge.merge if isinstance(self.merge, Gated) else self.merge)
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
    merge: str | nn.Module | None = None,
    laterals: Sequence[str] = (),
    prenorm: bool = False,
    init: str | Path | None = None,
    problem: str | None = None,
    side_options: Mapping[str, Any] | None = None,
    merge_options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
) -> Branch:
    """Build the branch that `SideTuner.add_task` describes, in evaluation mode."""
    if merge is None:
        # A task that writes starts as the base does, bit for bit.
        quiet = "silent" if side in ("ladder", "transformer", "mlp") else "zero"
        merge, init = ("sum", init or quiet) if head == "lm" else ("alpha", init)
    if head == "lm" and side == "ladder":
        side_options = {"heads": 0, **(side_options or {})}
    merge_module, merge_name = _build(MERGES, merge, merge_options, base.kind, base.width, len(laterals))
    side_module: nn.Module | None = None
    side_name: tuple[str, Options] | None = None
    # A side that the merge ignores would only be trained in vain; which one it would be may be named all the same.
    if not isinstance(original(merge_module), Merge) or merge_module.uses_side:
        if side is None:
            raise TaskError(f"merge '{merge_name[0]}' needs a side; name one, or use merge='base-only'")
        side_module, side_name = _build(SIDES, side, side_options, base)
    elif side_options or init not in (None, "zero", "xavier", "low-energy", "silent", "distilled"):
        raise TaskError(f"merge '{merge_name[0]}' reads no side; leave side_options= and init= out")
    head_module, head_name = _build(HEADS, *named_head(head, head_options), base)
    # What a rebuild from `side.json` must know; weights come from the file then.
    recorded: str | None = None
    if init == "zero":
        merge_module, recorded = Gated(merge_module), "zero"
    elif init == "low-energy" and side_module is not None:
        side_module, recorded = LowEnergy(side_module), "low-energy"
    elif init is not None and side_module is not None:
        initialise(base, side_module, *(side_name or (CUSTOM, {})), init)
    norm = GroupNorm(base.kind, base.width) if prenorm else nn.Identity()
    if problem is not None and problem not in PROBLEMS:
        raise UnknownNameError(unknown("problem", problem, PROBLEMS.names(), verb="registered"))
    config = BranchConfig(side_name, merge_name, head_name, list(laterals), prenorm, recorded, problem, base.layouts)
    return Branch(side_module, merge_module, head_module, norm, config).eval()


def _build(
    registry: Any, part: str | nn.Module, options: Mapping[str, Any] | None, *given: Any
) -> tuple[nn.Module, tuple[str, Options]]:
    """A part and what is recorded of it; `given` comes before the options of a registered one."""
    if isinstance(part, str):
        return registry.build(part, *given, options=dict(options or {})), (part, dict(options or {}))
    if options:
        raise TaskError(f"options {dict(options)} are for a registered {registry.kind}; give them to your own module")
    if not isinstance(part, nn.Module):
        raise TaskError(f"a {registry.kind} is a registered name or a torch module, not a {type(part).__name__}")
    return part, (CUSTOM, {})
