"""Groups of settings that scenarios share, as nested frozen dataclasses; tyro flattens them on the command line.

METHODS = {"sidetune": SideTuneOptions(merge="alpha"), "psp": PSPOptions()}

@dataclass(frozen=True)
class Settings:                                  # sidetuning bench pets --batch 8 psp --statistics task
    data: str = "runs/pets"                      # the scenario's own settings
    # A dataclass per method, with the settings that this method reads.
    method: Annotated[MethodOptions, choice(METHODS)] = METHODS["sidetune"]
    # Groups, with the scenario's own defaults; ruff wants a call here inside `field`.
    training: Training = field(default=Training(batch=16))
    run: RunOptions = field(default=RunOptions(out="runs/pets"))

check(settings)                                  # raises where a value breaks a rule of its type (Count, Names, …)
flat(settings)                                   # {"data": …, "method": "psp", "statistics": "task", "batch": 8, …}
with_values(settings, {"batch": 4, "seed": 1})   # `dataclasses.replace` by flat names
translated(old, flat(settings))                  # what version 0.1.0 wrote, by today's names
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass, replace
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import tyro

from sidetuning.base import Base
from sidetuning.errors import SideTuningError
from sidetuning_bench.methods import METHODS, Method, Recipe, one_cycle

S = TypeVar("S")

# Settings that may differ when a run resumes: paths and habits, which do not change its numbers.
FREE = ("data", "out", "cache", "save_every", "progress")
# Names of settings in version 0.1.0, which wrote the settings of all methods beside each other.
RENAMED = {"psp_statistics": "statistics", "ewc_coefficient": "coefficient", "lora_rank": "rank"}


@dataclass(frozen=True)
class Rule:
    """What values a type of setting can have: `problem(value)` says what is wrong with one, or None."""

    problem: Callable[[Any], str | None]


def must(words: str, holds: Callable[[Any], bool]) -> Rule:
    """A rule that is told in words."""
    return Rule(lambda value: None if holds(value) else f"must {words}, not {value}")


# NaN breaks each of these rules, too.
Count = Annotated[int, must("be 1 or more", lambda n: n >= 1)]
Natural = Annotated[int, must("be 0 or more", lambda n: n >= 0)]
Positive = Annotated[float, must("be above 0", lambda x: x > 0)]
NotNegative = Annotated[float, must("be 0 or more", lambda x: x >= 0)]
Share = Annotated[float, must("be above 0 and at most 1", lambda x: 0 < x <= 1)]
Probability = Annotated[float, must("be from 0 to 1", lambda x: 0 <= x <= 1)]
# Larger pictures fill the memory, and more processes do not start.
Pixels = Annotated[Count, must("be at most 8192", lambda n: n <= 8192)]
Workers = Annotated[Count, must("be at most 1024", lambda n: n <= 1024)]
Once = must("name something, and nothing twice", lambda values: 0 < len(values) == len(set(values)))
Names = Annotated[tuple[str, ...], Once]


@dataclass(frozen=True)
class RunOptions:
    """Where a run lies, and how it runs."""

    out: str
    """Folder of the run; the same command resumes there."""
    cache: str = "~/.cache/sidetuning"
    """Folder of base features, shared by all runs."""
    seed: Natural = 0
    """Seed for initial weights and data order."""
    save_every: NotNegative = 10.0
    """Seconds between two resume files while a task is trained."""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class GridOptions:
    """Where the runs of a grid lie, and how many there are."""

    out: str
    """Folder of all runs, their table and their report; the same command resumes there."""
    seeds: Count = 3
    """Number of runs of every cell, with seeds 0, 1, …"""
    progress: bool = True
    """Show progress bars."""


@dataclass(frozen=True)
class Training:
    """How every method is trained."""

    batch: Count = 128
    """Examples per optimiser step."""
    lr: Positive | None = None
    """Learning rate, at its peak; None for the method's own."""
    weight_decay: NotNegative = 0.0
    """Weight decay of kernels and matrices; merges, norms and biases have none."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training; fast where the processor knows bfloat16."""


@dataclass(frozen=True)
class ImageTraining(Training):
    """How every method is trained on images."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW."""
    schedule: Literal["constant", "one-cycle"] = "constant"
    """Schedule of the learning rate; one-cycle warms up, and then falls to near 0."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; None for no limit."""

    def recipe(self, steps: int, seed: int, rise: float) -> Recipe:
        """The recipe of these settings.

        Args:
            steps: optimiser steps per task.
            seed: orders the batches.
            rise: share of the steps in which one-cycle warms up.
        """
        lr = self.lr or 1e-3
        optimizer = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        scheduler = one_cycle(lr, rise) if self.schedule == "one-cycle" else None
        return Recipe(steps, lr, self.weight_decay, self.clip, optimizer, scheduler, seed, self.precision)


@dataclass(frozen=True)
class SideOptions:
    """A side network, and how it is fused with the base."""

    side: str = "fcn4"
    """Side network."""
    side_width: Positive = 1.0
    """Width of the side network: fraction of the channels of fcn4 and fcn5, or of the base's that copy keeps."""
    merge: str = "mlp2"
    """How base and side are fused: mlp2, alpha, base-only, side-only, …"""
    init: str | None = "distilled"
    """How the side starts: distilled, xavier, low-energy, zero, or a safetensors file of its weights."""

    def side_options(self, base: Base) -> dict[str, Any]:
        """Arguments of the side. The code of a base that returns a map has both signs, and so has that of fcn5."""
        if self.side not in ("fcn4", "fcn5", "copy"):
            return {}
        # Distilled sides are packaged with the options that they were made with.
        width = {} if self.side_width == 1 else {"width": self.side_width}
        return {**width, "signed": True} if self.side == "fcn5" and base.kind == "map" else width


@dataclass(frozen=True)
class MethodOptions:
    """The settings that one method reads; a method without settings is this alone.

    Attributes:
        name: under which the method is registered.
    """

    name: ClassVar[str]

    def arguments(self, base: Base, seed: int) -> dict[str, Any]:
        """Arguments of the method."""
        return asdict(self)

    def build(self, base: Base, seed: int) -> Method:
        """The method on a base, without tasks."""
        return METHODS.build(self.name, base, options=self.arguments(base, seed))

    @property
    def tapped(self) -> tuple[str, ...]:
        """Inner modules of the base whose outputs the method reads."""
        return ()


@dataclass(frozen=True)
class BranchOptions(SideOptions, MethodOptions):
    """What side-tuning and boosting share."""

    side_shift: Natural = 0
    """Augmentation of the side "fusion": maps are moved at random by up to this many cells of the largest one."""
    taps: tuple[str, ...] = ()
    """Inner modules of the base whose outputs sides such as fusion and ladder read; kept in half precision."""
    prenorm: bool = False
    """Group-normalise the merged code before the head, as the original code does."""

    def arguments(self, base: Base, seed: int) -> dict[str, Any]:
        if self.side_shift and self.side != "fusion":
            raise SideTuningError("--side-shift is of the side fusion; leave it out")
        own = {name: value for name, value in asdict(self).items() if name not in ("side_width", "side_shift", "taps")}
        shift = {"shift": self.side_shift} if self.side == "fusion" else {}
        return {**own, "side_options": {**self.side_options(base), **shift}}

    @property
    def tapped(self) -> tuple[str, ...]:
        return self.taps


@dataclass(frozen=True)
class SideTuneOptions(BranchOptions):
    """Side-tuning: a frozen base, and a side, merge and head per task."""

    name = "sidetune"
    dense: bool = False
    """Feed the sides of all earlier tasks into the merge (the paper's dense variant)."""


@dataclass(frozen=True)
class BoostingOptions(BranchOptions):
    """Boosting: several sides per task, trained one after another."""

    name = "boosting"
    stages: Count = 2
    """Number of sides per task."""


@dataclass(frozen=True)
class FeaturesOptions(MethodOptions):
    """Fixed features: a head on the frozen base."""

    name = "features"
    prenorm: bool = False
    """Group-normalise the code before the head, as the original code does."""


@dataclass(frozen=True)
class FineTuneOptions(MethodOptions):
    """Fine-tuning: one network, trained on one task after another."""

    name = "finetune"


@dataclass(frozen=True)
class IndependentOptions(MethodOptions):
    """Independent networks: a fine-tuned copy of the base per task."""

    name = "independent"


@dataclass(frozen=True)
class ScratchOptions(MethodOptions):
    """From scratch: a network of the base's shape per task, from random weights."""

    name = "scratch"


@dataclass(frozen=True)
class EWCOptions(MethodOptions):
    """Elastic weight consolidation: fine-tuning, with a penalty on changes of weights that earlier tasks need."""

    name = "ewc"
    coefficient: Positive = 100.0
    """Coefficient of the penalty: small coefficients forget, large ones stop learning."""


@dataclass(frozen=True)
class PSPOptions(MethodOptions):
    """Parameter superposition: one network, whose weights every task sees through its own random signs."""

    name = "psp"
    statistics: Literal["batch", "task"] = "batch"
    """Statistics of batch norms in tests: those of the batch, or running ones of each task."""

    def arguments(self, base: Base, seed: int) -> dict[str, Any]:
        return {"seed": seed, **asdict(self)}


@dataclass(frozen=True)
class PNNOptions(MethodOptions):
    """Progressive networks: a column per task, which reads from the columns before it."""

    name = "pnn"


@dataclass(frozen=True)
class ResidualAdapterOptions(MethodOptions):
    """Residual adapters: small convolutions inside the frozen base, per task."""

    name = "residual-adapter"


@dataclass(frozen=True)
class LoRAOptions(MethodOptions):
    """LoRA: low-rank updates of the frozen base's weights, per task."""

    name = "lora"
    rank: Count = 8
    """Rank of the LoRA updates."""


@dataclass(frozen=True)
class PiggybackOptions(MethodOptions):
    """Piggyback: a binary mask on the frozen base's weights, per task."""

    name = "piggyback"


def image_methods(sidetune: SideTuneOptions, boosting: BoostingOptions, ewc: EWCOptions) -> dict[str, MethodOptions]:
    """The methods that learn images of any kind, by name, with a scenario's defaults."""
    others = (FeaturesOptions, FineTuneOptions, IndependentOptions, ScratchOptions, PSPOptions, PNNOptions)
    more = (ResidualAdapterOptions, LoRAOptions, PiggybackOptions)
    return {method.name: method for method in (sidetune, boosting, ewc, *(kind() for kind in (*others, *more)))}


def choice(methods: Mapping[str, MethodOptions]) -> Any:
    """The annotation of a setting that chooses one of several methods, as a subcommand of the command line."""
    descriptions = {name: inspect.cleandoc(method.__doc__ or "") for name, method in methods.items()}
    union = tyro.extras.subcommand_type_from_defaults(methods, descriptions, prefix_names=False)
    return tyro.conf.arg(constructor=union)


def leaves(settings: Any) -> Iterator[tuple[type, Field[Any], Any]]:
    """Every setting of nested groups: the class that declares it, its field, its value."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield type(settings), field, value


def flat(settings: Any) -> dict[str, Any]:
    """Nested settings by name, in one mapping; a method is its name as "method", beside its settings."""
    methods = [v for f in fields(settings) if isinstance(v := getattr(settings, f.name), MethodOptions)]
    found = {field.name: value for _, field, value in leaves(settings)}
    return {"method": methods[0].name, **found} if methods else found


def defaults(settings: Any) -> dict[str, Any]:
    """The defaults of the settings in these groups, for a run that was written before there was such a setting."""
    return {field.name: field.default for _, field, _ in leaves(settings) if field.default is not MISSING}


def with_values(settings: S, values: Mapping[str, Any]) -> S:
    """A copy with other values, by flat name; "method" is another method's options.

    Raises:
        TypeError: there is no setting of such a name.
    """
    left, changed = dict(values), {}
    for field in fields(settings):  # type: ignore[arg-type]
        value = left.pop(field.name, getattr(settings, field.name))
        if is_dataclass(value):
            inner = {name: left.pop(name) for name in flat(value) if name in left}
            value = with_values(value, inner) if inner else value
        changed[field.name] = value
    if left:
        raise TypeError(f"{type(settings).__name__} has no setting {', '.join(left)}")
    return replace(settings, **changed)  # type: ignore[type-var, no-any-return]


def translated(saved: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Settings that version 0.1.0 wrote, by today's names.

    It wrote those of all methods beside each other, and refused to change one that the method does not read: these are
    left out.
    """
    renamed = {RENAMED.get(name, name): value for name, value in saved.items()}
    return {name: value for name, value in renamed.items() if name in names}


def check(settings: Any) -> None:
    """Check every setting against the rules that its type names.

    Raises:
        SideTuningError: a value breaks one.
    """
    for owner, field, value in leaves(settings):
        hint = get_type_hints(owner, include_extras=True)[field.name]
        for problem in problems(hint, value):
            raise SideTuningError(f"--{field.name.replace('_', '-')} {problem}")


def problems(hint: Any, value: Any) -> Iterator[str]:
    """What the rules inside a type say of a value, a number below 2**31; None breaks none of them."""
    origin, arms = get_origin(hint), get_args(hint)
    if value is None:
        return
    if origin is Annotated:
        yield from filter(None, (rule.problem(value) for rule in arms[1:] if isinstance(rule, Rule)))
        yield from problems(arms[0], value)
    elif origin is tuple:
        for item in value:
            yield from problems(arms[0], item)
    elif origin in (Union, UnionType):
        for arm in arms:
            yield from problems(arm, value)
    elif isinstance(value, (int, float)) and not abs(value) < 2**31:
        yield f"must be a number between -{2**31:,} and {2**31:,}"
