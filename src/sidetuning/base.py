"""The frozen base: runs a pretrained network as it is, and shields it from everything that could change it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sidetuning import identity
from sidetuning.errors import ShapeError, UnknownNameError
from sidetuning.folding import fold
from sidetuning.registry import unknown

# One tensor, or the keyword arguments of the network. A mapping may hold two keys that are no arguments: "x", the one
# tensor of a network that takes no names, and "extra", (b, n) numbers that only heads see, such as an agent's compass.
Input = Tensor | Mapping[str, Any]
Kind = Literal["vector", "map", "sequence"]
# By dimensions without the batch.
KINDS: dict[int, Kind] = {1: "vector", 2: "sequence", 3: "map"}


class Features(NamedTuple):
    """What a base returns.

    Attributes:
        out: the code that merges see: (b, d), (b, c, h, w) or (b, t, d).
        taps: named inner activations, batch first; channels first where they are maps.
    """

    out: Tensor
    # Named tuples share their defaults; nothing writes to this one.
    taps: dict[str, Tensor] = {}  # noqa: RUF012

    def rows(self, rows: Tensor) -> Features:
        """The features of some samples of the batch."""
        return Features(self.out[rows], {name: tap[rows] for name, tap in self.taps.items()})


@dataclass(frozen=True)
class BaseSpec:
    """How to build a base again: the arguments of `load_base`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True)
class Select:
    """Picks the code out of what a network (the base, or a copy of it) returned, channels first."""

    output: str | int | Callable[[Any], Tensor] | None
    channels_last: bool

    def __call__(self, returned: Any) -> Tensor:
        output = self.output
        if callable(output):
            returned = output(returned)
        elif isinstance(output, str):
            try:
                returned = returned[output] if isinstance(returned, Mapping) else getattr(returned, output)
            except (KeyError, AttributeError) as error:
                names = list(returned) if isinstance(returned, Mapping) else [n for n in dir(returned) if n[0] != "_"]
                raise UnknownNameError(unknown("output", output, names, verb="of the network")) from error
        elif output is not None:
            returned = returned[output]
        if not isinstance(returned, Tensor):
            raise ShapeError(f"the base returns a {type(returned).__name__}, not a tensor: pick one with output=")
        return self.channels_first(returned)

    def channels_first(self, x: Tensor) -> Tensor:
        """(b, h, w, c) to (b, c, h, w) where the network is channels last; others as they are."""
        return x.permute(0, 3, 1, 2) if self.channels_last and x.ndim == 4 else x


# What the taps of the pass under way have seen, in this thread: tap -> (output, its version). None outside of a pass.
_seen: ContextVar[dict[Tap, tuple[Any, int]] | None] = ContextVar("taps", default=None)


class Tap:
    """A forward hook, put on a module of the network once: it hands each output to the pass that runs."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        seen = _seen.get()
        if seen is not None:
            # The layers of transformers return tuples.
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            seen[self] = (tensor, _version(tensor))

    def __deepcopy__(self, memo: Any) -> Tap:
        # A copy of the network, such as the folded one, is tapped in the same places.
        return self


class Base(nn.Module):
    """A frozen network: always in evaluation mode, without gradients, never part of a checkpoint.

    The network is kept out of torch's module tree, so `parameters()`, `state_dict()`, `train()`, `apply()` and
    `requires_grad_()` of any parent pass it by; `.to()` and the like still move it.

    Args:
        net: a module, or anything callable.
        example: one input as the network takes it, batch dimension included; sets the shapes of everything else.
        output: picks the code out of what `net` returns: a key or attribute, an index, or a function; by default the
            tensor itself.
        taps: names of submodules of `net` whose outputs are returned too.
        channels_last: 4-d outputs and taps are (b, h, w, c) and are turned channels first.
        mean, std: per-channel normalisation of image inputs in [0, 1]; uint8 inputs are divided by 255 first.
        spec: how `load_base` builds it again; None for a base of your own.

    Raises:
        UnknownNameError: a tap or an output that `net` does not have.
        ShapeError: an output that is not (b, d), (b, t, d) or (b, c, h, w); a tap that is not run, or is written over.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        net: Callable[..., Any],
        *,
        example: Input,
        output: str | int | Callable[[Any], Tensor] | None = None,
        taps: Sequence[str] = (),
        channels_last: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        spec: BaseSpec | None = None,
    ) -> None:
        super().__init__()
        if isinstance(net, nn.Module):
            net.requires_grad_(False).eval()
        # A tuple: torch registers modules that are attributes, and must not register this one.
        self._hidden = (net,)
        self.select = Select(output, channels_last)
        self.spec = spec
        # Weights of sides that ship for this base: the side's name -> its file, and the options it was built with.
        self.distilled: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._sha256: tuple[object, str] | None = None
        self._taps: dict[str, Tap] = {}
        self.example = example
        for name, values in (("mean", mean), ("std", std)):
            norm = None if values is None else torch.tensor(values, device=self.device).view(-1, 1, 1)
            self.register_buffer(name, norm, persistent=False)
        self._run_example(taps)
        self.kind: Kind = KINDS[len(self.output_shape)]
        self.width: int = self.output_shape[-1] if self.kind == "sequence" else self.output_shape[0]

    def _run_example(self, taps: Sequence[str]) -> None:
        """Put hooks on the taps, and keep what the base makes of its example: all shapes come from there."""
        self._taps = {name: self._hook(name) for name in taps}
        self.example = to_device(self.example, self.device)
        features = self(self.example)
        self.output_shape = tuple(features.out.shape[1:])
        if len(self.output_shape) not in KINDS:
            raise ShapeError(
                f"the base returns {tuple(features.out.shape)}; side-tuning needs (b, d), (b, t, d) or (b, c, h, w): "
                "pick one tensor with output="
            )
        self.example_features = features

    def _hook(self, tap: str) -> Tap:
        """The hook on the module `tap`, which is put there once, whoever asks for it."""
        modules = dict(self.net.named_modules()) if isinstance(self.net, nn.Module) else {}
        if not tap or tap not in modules:
            names = [name for name in modules if name][:40]
            raise UnknownNameError(unknown("tap", tap, names, verb="in the base"))
        hooks = [hook for hook in modules[tap]._forward_hooks.values() if isinstance(hook, Tap)]
        if not hooks:
            hooks = [Tap()]
            modules[tap].register_forward_hook(hooks[0])
        return hooks[0]

    @property
    def net(self) -> Callable[..., Any]:
        """The wrapped network."""
        return self._hidden[0]

    @property
    def tap_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tap without the batch, as the example has it."""
        return {name: tuple(tap.shape[1:]) for name, tap in self.example_features.taps.items()}

    def prepare(self, x: Input) -> Input:
        """Turn a raw input into what base and side see: uint8 images scaled to [0, 1], then normalised."""
        if not isinstance(x, Tensor):
            return {**x, "x": self.prepare(x["x"])} if "x" in x else x
        if x.dtype == torch.uint8:
            x = x.to(torch.get_default_dtype()) / 255
        if self.mean is not None and self.std is not None:
            if x.ndim < 3 or x.shape[-3] not in (1, self.mean.shape[0]):
                raise ShapeError(f"this base takes images (b, {self.mean.shape[0]}, h, w), not {tuple(x.shape)}")
            x = (x - self.mean) / self.std
        return x

    # Not inference_mode: its tensors cannot be saved for the backward pass of a merge.
    @torch.no_grad()
    def encode(self, inputs: Input) -> Features:
        """Run the network on a prepared input."""
        net = self.net
        if isinstance(net, nn.Module) and net.training:
            # Whoever has the network put it there, and its statistics would move.
            net.eval()
        seen: dict[Tap, tuple[Any, int]] = {}
        token = _seen.set(seen if self._taps else None)
        try:
            out = self.select(call(net, inputs))
        finally:
            _seen.reset(token)
        return Features(out, {name: self._tapped(name, seen.get(tap)) for name, tap in self._taps.items()})

    def _tapped(self, name: str, seen: tuple[Any, int] | None) -> Tensor:
        """What the tap `name` has seen, checked."""
        if seen is None:
            raise ShapeError(f"the tap '{name}' is not run by the network; tap a module that is")
        tensor, version = seen
        if not isinstance(tensor, Tensor):
            raise ShapeError(
                f"the tap '{name}' returns a {type(tensor).__name__}, not a tensor; tap a module within it"
            )
        if _version(tensor) != version:
            raise ShapeError(
                f"what the tap '{name}' returns is written over in place by what follows it; tap that instead"
            )
        return self.select.channels_first(tensor)

    def forward(self, x: Input) -> Features:
        """Prepare and encode a raw input."""
        return self.encode(self.prepare(x))

    def with_taps(self, taps: Sequence[str]) -> Base:
        """The same network with these taps instead; no pass is made where all of them are here already."""
        if tuple(taps) == tuple(self._taps):
            return self
        other = copy.copy(self)
        if all(tap in self._taps for tap in taps):
            other._taps = {tap: self._taps[tap] for tap in taps}
            kept = {tap: self.example_features.taps[tap] for tap in taps}
            other.example_features = Features(self.example_features.out, kept)
        else:
            other._run_example(taps)
        return other

    def with_example(self, example: Input) -> Base:
        """The same network for inputs of another size; parts are built for the shapes that this example gives."""
        other = copy.copy(self)
        other.example = example
        other._run_example(tuple(self._taps))
        return other

    def folded(self) -> Base:
        """A copy for inference with batch norms folded into convolutions; itself where the network cannot be traced.

        Features differ from this base's by rounding only (about 1e-6 of their size).
        """
        net = fold(self.net, tuple(self._taps)) if isinstance(self.net, nn.Module) else None
        if net is None:
            return self
        other = copy.copy(self)
        other._hidden = (net,)
        return other

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie; of a network without any, where the example lies."""
        weights = chain(self.net.parameters(), self.net.buffers()) if isinstance(self.net, nn.Module) else iter(())
        values = [self.example] if isinstance(self.example, Tensor) else self.example.values()
        return next(chain(weights, (value for value in values if isinstance(value, Tensor)))).device

    def identity(self) -> identity.Identity:
        """Its weights, preparation and choice of the output; weights that did not change are hashed once."""
        version = identity.weights_version(self.net)
        if self._sha256 is None or self._sha256[0] != version:
            self._sha256 = version, identity.weights_sha256(self.net, self.output_shape)
        prepared = identity.preparation(self.mean, self.std, self.select.output, self.select.channels_last)
        return identity.Identity(self._sha256[1], self.kind, self.output_shape, prepared)

    def parameter_count(self) -> int:
        """Parameters of the network, all frozen."""
        net = self.net
        return sum(p.numel() for p in net.parameters()) if isinstance(net, nn.Module) else 0

    def train(self, mode: bool = True) -> Base:
        """Stays in evaluation mode: batch norms and dropout of a pretrained network must not move."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Base:
        # What `.to()`, `.cuda()` and `.half()` call; the one door left open to the hidden network.
        super()._apply(fn, recurse)
        if isinstance(self.net, nn.Module):
            self.net._apply(fn, recurse)
        self.example = _map(self.example, fn)
        out, taps = self.example_features
        self.example_features = Features(fn(out), {name: fn(tap) for name, tap in taps.items()})
        return self

    def extra_repr(self) -> str:
        name = self.spec.name if self.spec else type(self.net).__name__
        return f"{name}, {self.kind} {self.output_shape}, {self.parameter_count():,} frozen parameters"


def call(net: Callable[..., Any], x: Input) -> Any:
    """Run `net` on a tensor, or on a mapping splatted into keyword arguments; see `Input` for its two other keys."""
    if isinstance(x, Tensor):
        return net(x)
    named = {key: value for key, value in x.items() if key not in ("x", "extra")}
    return net(x["x"], **named) if "x" in x else net(**named)


def entry(inputs: Input, name: str) -> Tensor | None:
    """The tensor called `name` in a mapping, such as "attention_mask" (b, t); None where there is none."""
    return None if isinstance(inputs, Tensor) else inputs.get(name)


def take_rows(x: Input, rows: Tensor) -> Input:
    """Some samples of a batch."""
    return _map(x, lambda tensor: tensor[rows])


def to_device(x: Input, device: torch.device) -> Input:
    """An input on a device."""
    return _map(x, lambda tensor: tensor.to(device))


def _map(x: Input, fn: Callable[[Tensor], Tensor]) -> Input:
    if isinstance(x, Tensor):
        return fn(x)
    return {key: fn(value) if isinstance(value, Tensor) else value for key, value in x.items()}


def _version(tensor: Any) -> int:
    """What writes in place raise; tensors of inference mode have no version."""
    return 0 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version
