"""Heads: from the merged code to a task's output.

A plain module is called as `head(code)`; one that reads more of the input derives from `Head`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input, Kind
from sidetuning.content import tensor_bytes
from sidetuning.errors import ArtifactError, TaskError
from sidetuning.expansion import Expansion
from sidetuning.inputs import entry, original
from sidetuning.language import LanguageModel
from sidetuning.problems import along
from sidetuning.registry import Registry
from sidetuning.sides.fit import masked_mean


class Head(nn.Module):
    """A head that reads more than the code: a mask, or numbers that came with the input."""

    def forward(self, code: Tensor, inputs: Input) -> Tensor:
        """The task's output.

        Args:
            code: what the merge made, of the shape of the base's output.
            inputs: the prepared input: a tensor, or a mapping with entries such as "attention_mask" (b, t).
        """
        raise NotImplementedError


class Wide(Head):
    """A head that reads more of the base than the code: its taps, through a fixed expansion.

    Attributes:
        expansion: what it reads. Tasks whose expansions have equal keys share one where they run together.
    """

    expansion: Expansion

    def forward(self, code: Tensor, inputs: Input, wide: Tensor | None = None) -> Tensor:
        """The task's output; `wide` (b, width) is what the expansion made of the base's features."""
        raise NotImplementedError


class InUnits(nn.Module):
    """A head that ends in a linear layer, and can answer in the units of its targets: centre + scale * layer(code).

    The layer then learns numbers around 0 of size 1, whatever the units are: metres, years, a hundredth of a range.

    Attributes:
        units: a buffer (2, channels) of centres and scales; None leaves the layer's numbers as they are.
        built: `weights_sha256` before anything was learned.
    """

    units: Tensor | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.built = channels, ""
        self.register_buffer("units", None)

    def set_units(self, centre: Any, scale: Any) -> None:
        """Set centre and scale, once built: numbers, or lists with one number per channel; None for both leaves them.

        Raises:
            TaskError: one of the two is missing, a scale is not positive, or there are not as many as channels.
        """
        self.built = self.weights_sha256()
        if centre is None and scale is None:
            return
        try:
            rows = [torch.as_tensor(row, dtype=torch.float32).expand(self.channels) for row in (centre, scale)]
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(
                f"a head's centre and scale are a number each, or {self.channels} numbers, not {centre} and {scale}"
            ) from error
        if not bool(torch.stack(rows).isfinite().all()) or bool((rows[1] <= 0).any()):
            raise TaskError(f"a head's scale is positive, and its centre a number; they are {scale} and {centre}")
        self.units = torch.stack(rows)

    def weights_sha256(self) -> str:
        """A hash of its weights, of few bits: another type of the same weights is the same."""
        return hashlib.sha256(b"".join(tensor_bytes(p.bfloat16()).numpy().data for p in self.parameters())).hexdigest()

    @property
    def fresh(self) -> bool:
        """Whether nothing was learned: it has no units, and its weights are as they were built."""
        return self.units is None and self.built == self.weights_sha256()

    def in_units(self, out: Tensor) -> Tensor:
        """The layer's numbers (b, channels, …) in the units of the targets, in float32 at least."""
        if self.units is None:
            return out
        centre, scale = (along(row, out) for row in self.units)
        return centre + scale * out

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> InUnits:
        # A half-precision network would round depths of 0.97 ± 0.01 away.
        units = self.units
        super()._apply(fn, recurse)
        if units is not None and self.units is not None:
            self.units = self.units if self.units.dtype == units.dtype else units.to(self.units.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # A task that is built anew takes the units that were learned; torch refuses where they are missing.
        if f"{prefix}units" in state_dict and self.units is None:
            self.units = torch.empty(2, self.channels, device=next(self.parameters()).device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


# What expansions made of a batch, by their keys, for all tasks that read it.
Shared = dict[Any, Tensor]


def run_head(
    head: nn.Module, code: Tensor, inputs: Input, features: Features | None = None, shared: Shared | None = None
) -> Tensor:
    """Call a head as its kind wants it.

    Args:
        head: the head.
        code: what the merge made.
        inputs: the prepared input.
        features: what the base made of it.
        shared: what other tasks' expansions made of the same batch; its own is added.
    """
    own = original(head)
    if not isinstance(own, Wide):
        out: Tensor = head(code, inputs) if isinstance(own, Head) else head(code)
        return out
    if features is None:
        raise TaskError("this head reads the base's taps, which this method does not give it; use head=NUMBER")
    shared = {} if shared is None else shared
    if own.expansion.key not in shared:
        shared[own.expansion.key] = own.expansion(inputs, features)
    out = head(code, inputs, shared[own.expansion.key])
    return out


# Registered heads that can answer in the units of their targets.
IN_UNITS = ("linear", "random", "pixels")
HEADS: Registry[Callable[..., nn.Module]] = Registry("head", group="sidetuning.heads")


def named_head(head: Any, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """A head and its options, where a number is short for the outputs of a linear one."""
    return ("linear", {"outputs": head, **(options or {})}) if isinstance(head, int) else (head, dict(options or {}))


@HEADS.register("identity")
def identity(base: Base) -> nn.Module:
    """The merged code itself."""
    return nn.Identity()


@HEADS.register("linear")
def linear(base: Base, outputs: int = 1, centre: Any = None, scale: Any = None) -> nn.Module:
    """A linear classifier (or regressor) on the pooled code -> (b, outputs). `head=37` is short for it.

    `centre` and `scale` of the targets, one number or `outputs` numbers, are measured by `fit` where none are given.
    """
    head = Linear(base.kind, base.width, outputs)
    head.set_units(centre, scale)
    return head


@HEADS.register("random")
def random(
    base: Base, outputs: int = 1, width: int = 2000, grid: int = 8, seed: int = 0, centre: Any = None, scale: Any = None
) -> nn.Module:
    """A linear layer on a fixed random expansion of the base's taps, beside the pooled code -> (b, outputs).

    `solve` learns it in one pass, and better than a linear head on the code alone; it stores `width` + the code's width
    numbers per output. A side that `fit` trains afterwards goes in by the code.

    Args:
        base: the base, with the taps that are read.
        outputs: number of outputs.
        width, grid, seed: those of `Expansion`; tasks in which they are equal share its time.
        centre, scale: those of `linear`.
    """
    head = Random(base, outputs, Expansion(base, width, grid, seed))
    head.set_units(centre, scale)
    return head


@HEADS.register("span")
def span(base: Base) -> nn.Module:
    """Start and end scores per token -> (b, t, 2), for extractive question answering."""
    if base.kind != "sequence":
        raise TaskError(f"head 'span' scores the tokens of a sequence, and this base returns a {base.kind}")
    return Span(base.width)


@HEADS.register("tokens")
def tokens(base: Base, outputs: int = 1) -> nn.Module:
    """Scores of each token -> (b, t, outputs), as of a guard that reads what a generator writes."""
    if base.kind != "sequence":
        raise TaskError(f"head 'tokens' scores the tokens of a sequence, and this base returns a {base.kind}")
    if outputs < 1:
        raise TaskError(f"a head of tokens needs at least one output, not {outputs}")
    return nn.Linear(base.width, outputs)


@HEADS.register("lm")
def lm(base: Base, sha256: str | None = None) -> nn.Module:
    """The base's own output embedding: scores of the next token -> (b, t, vocabulary).

    It is frozen, the same for all tasks, and no part of a task's file, which records its hash.

    Args:
        base: a causal language model that was loaded with its output embedding.
        sha256: what the output embedding must be.
    """
    if base.lm is None:
        raise TaskError(
            "head 'lm' is the output embedding of a causal language model, and this base has none: load one with "
            "load_base('hf:…') whose checkpoint holds it, as AutoModelForCausalLM saves it"
        )
    if sha256 not in (None, base.lm.sha256()):
        raise ArtifactError(
            "the task was trained with another output embedding than this base has; load the base that it was trained "
            "on, or pass any_base=True"
        )
    return LanguageHead(base.lm)


@HEADS.register("pixels")
def pixels(base: Base, channels: int = 1, hidden: int = 64, centre: Any = None, scale: Any = None) -> nn.Module:
    """A convolutional decoder from a map to images of the input's size -> (b, channels, H, W).

    Args:
        channels: channels of the images.
        hidden: channels of the decoder.
        centre, scale: those of `linear`, one number or one per channel.
    """
    if base.kind != "map" or not isinstance(base.example, Tensor):
        raise TaskError(f"head 'pixels' decodes a map into an image, and this base returns a {base.kind}")
    head = Pixels(base.width, base.output_shape[1:], base.example.shape[-2:], channels, hidden)
    head.set_units(centre, scale)
    return head


def pooled(code: Tensor, kind: Kind, inputs: Input) -> Tensor:
    """Maps and sequences by their mean, over unmasked tokens -> (b, d)."""
    if kind == "map":
        return code.mean((2, 3))
    return masked_mean(code, entry(inputs, "attention_mask")) if kind == "sequence" else code


class Linear(InUnits, Head):
    """Pools maps and sequences by their mean (over unmasked tokens), then applies one linear layer.

    Shape: (b, d), (b, d, h, w) or (b, t, d) -> (b, outputs).
    """

    def __init__(self, kind: Kind, width: int, outputs: int) -> None:
        super().__init__(outputs)
        if outputs < 1:
            raise TaskError(f"a linear head needs at least one output, not {outputs}")
        self.kind = kind
        self.linear = nn.Linear(width, outputs)

    def forward(self, code: Tensor, inputs: Input) -> Tensor:
        return self.in_units(self.linear(pooled(code, self.kind, inputs)))


class Random(Linear, Wide):
    """One linear layer on an expansion and on the pooled code, normalised: its gradient is a side's.

    Shape: as `Linear`.
    """

    def __init__(self, base: Base, outputs: int, expansion: Expansion) -> None:
        super().__init__(base.kind, base.width + expansion.width, outputs)
        self.expansion = expansion

    def forward(self, code: Tensor, inputs: Input, wide: Tensor | None = None) -> Tensor:
        assert wide is not None
        code = pooled(code, self.kind, inputs)
        return self.in_units(self.linear(torch.cat([wide, F.layer_norm(code, code.shape[1:])], 1)))


class Span(Head):
    """Start and end logits; padding can never be chosen. Shape: (b, t, d) -> (b, t, 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)

    def forward(self, code: Tensor, inputs: Input) -> Tensor:
        logits: Tensor = self.linear(code)
        mask = entry(inputs, "attention_mask")
        if mask is None:
            return logits
        return logits.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(logits.dtype).min)


class LanguageHead(nn.Module):
    """The output embedding of a language model, which holds it; nothing here is trained or saved.

    Shape: (b, t, d) -> (b, t, vocabulary).
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def __deepcopy__(self, memo: Any) -> LanguageHead:
        # A copy of a task has the same base; one of a whole model has that model's.
        return LanguageHead(memo.get(id(self.model), self.model)).train(self.training)

    def forward(self, code: Tensor) -> Tensor:
        return self.model.logits(code)


class Pixels(InUnits):
    """Doubles the map's size until it covers the image: nearest upsampling, 3x3 convolution, group norm, ReLU.

    The last doubling is a sub-pixel convolution (Shi et al. 2016): layers at the full size would cost the most.

    Shape: (b, c, h, w) -> (b, channels, H, W).
    """

    def __init__(self, width: int, code: tuple[int, ...], image: torch.Size, channels: int, hidden: int) -> None:
        super().__init__(channels)
        self.scale = (image[0] / code[0], image[1] / code[1])
        doublings = max(0, math.ceil(math.log2(max(self.scale))))
        layers: list[nn.Module] = []
        inputs = width
        for i in range(max(1, doublings)):
            # Group norm wants an even number.
            outputs = max(hidden >> max(0, i - 1), 8) // 2 * 2
            if i:
                layers.append(nn.Upsample(scale_factor=2))
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.GroupNorm(2, outputs), nn.ReLU()]
            inputs = outputs
        self.decoder = nn.Sequential(*layers)
        last = 2 if doublings else 1
        self.out = nn.Sequential(nn.Conv2d(inputs, channels * last**2, 3, padding=1), nn.PixelShuffle(last))
        # A step takes two thirds of the time, on CPUs.
        self.to(memory_format=torch.channels_last)

    def forward(self, code: Tensor) -> Tensor:
        x = self.out(self.decoder(code.contiguous(memory_format=torch.channels_last)))
        image = (round(code.shape[-2] * self.scale[0]), round(code.shape[-1] * self.scale[1]))
        if x.shape[-2:] != image:
            x = nn.functional.interpolate(x, image, mode="bilinear", align_corners=False)
        return self.in_units(x)
