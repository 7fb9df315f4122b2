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

from sidetuning.errors import ShapeError, UnknownNameError, told
from sidetuning.folding import fold
from sidetuning.identity import Identity, preparation, structure_sha256, weights_sha256, weights_version
from sidetuning.inputs import IMAGES, FirstWeight, arguments_of, call, freeze, map_input, modules_of, to_device
from sidetuning.inputs import Input as Input
from sidetuning.probe import check_base, probe_input, probe_of, shapes_of
from sidetuning.registry import unknown

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


def _tap_of(module: nn.Module) -> Tap:
    """The hook on a module, which is put there once, whoever asks for it."""
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, Tap)]
    if not hooks:
        hooks = [Tap()]
        module.register_forward_hook(hooks[0])
    return hooks[0]


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
        # Tuples: torch registers modules that are attributes, and must not register these.
        self._hidden = (net,)
        self._modules_run = tuple(modules_of(net))
        for module in self._networks():
            freeze(module)
            for part in module.modules():
                # A hook turns torch's fused path off, which rounds in another way: no task's taps may decide that.
                if isinstance(part, (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)):
                    _tap_of(part)
        self.select = Select(output, channels_last)
        self.spec = spec
        # Weights of sides that ship for this base: the side's name -> its file, and the options it was built with.
        self.distilled: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._sha256: tuple[object, str] | None = None
        self._first = FirstWeight(self._modules_run)
        self._taps: dict[str, Tap] = {}
        self._writes = False
        self.example = example
        # Networks of transformers swallow every name, and do nothing with most.
        optional = dict.fromkeys(["x", "extra", *(() if isinstance(example, Tensor) else example)], False)
        self._entries = {**optional, **arguments_of(net)}
        for name, values in (("mean", mean), ("std", std)):
            norm = None if values is None else torch.tensor(values, device=self.device).view(-1, 1, 1)
            self.register_buffer(name, norm, persistent=False)
        self._run_example(taps)
        self.kind: Kind = KINDS[len(self.output_shape)]
        self.width: int = self.output_shape[-1] if self.kind == "sequence" else self.output_shape[0]
        self._writes = check_base(lambda x: self(x).out, self.example)
        self._probe: list[float] | None = None

    def _run_example(self, taps: Sequence[str]) -> None:
        """Put hooks on the taps, and keep what the base makes of its example: all shapes come from there."""
        self._taps = {name: self._hook(name) for name in taps}
        self.example = to_device(self.example, self.device)
        with told("the base does not run on its example ({}); give another example="):
            features = self(self.example)
        self.output_shape = tuple(features.out.shape[1:])
        if len(self.output_shape) not in KINDS:
            raise ShapeError(
                f"the base returns {tuple(features.out.shape)}; side-tuning needs (b, d), (b, t, d) or (b, c, h, w): "
                "pick one tensor with output="
            )
        self.example_features = features

    def _hook(self, tap: str) -> Tap:
        """The hook on the module `tap`."""
        modules = dict(self.net.named_modules()) if isinstance(self.net, nn.Module) else {}
        if not tap or tap not in modules:
            names = [name for name in modules if name][:40]
            raise UnknownNameError(unknown("tap", tap, names, verb="in the base"))
        return _tap_of(modules[tap])

    @property
    def net(self) -> Callable[..., Any]:
        """The wrapped network."""
        return self._hidden[0]

    def _networks(self) -> list[nn.Module]:
        """The modules that run: the network, or those behind a bound method, a partial or a callable object."""
        return list(self._modules_run)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the network's weights; None where it has none of floating point."""
        return self._first.dtype

    @property
    def tap_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tap without the batch, as the example has it."""
        return {name: tuple(tap.shape[1:]) for name, tap in self.example_features.taps.items()}

    def prepare(self, x: Input) -> Input:
        """Turn a raw input into what base and side see, on the base's device and of its type.

        Images are uint8 or in [0, 1]; they are normalised, also as the entries "x" and "pixel_values" of a mapping.

        Raises:
            ShapeError: images of another shape, or with values of another range: normalised already, or up to 255.
            UnknownNameError: an entry of a mapping that the network does not read, or one that it lacks.
        """
        if isinstance(x, Tensor):
            return self._prepare(x)
        if strange := [key for key in x if key not in self._entries]:
            raise UnknownNameError(unknown("input", strange[0], sorted(self._entries), verb="read by the network"))
        if missing := [key for key, needed in self._entries.items() if needed and key not in x and "x" not in x]:
            raise UnknownNameError(f"the network reads '{missing[0]}', which the input lacks; it has {', '.join(x)}")
        moved = to_device(x, self.device)
        assert not isinstance(moved, Tensor)
        return {**moved, **{key: self._prepare(moved[key]) for key in IMAGES if isinstance(moved.get(key), Tensor)}}

    def _prepare(self, x: Tensor) -> Tensor:
        x, own = x.to(self.device), self.dtype
        whole = x.dtype == torch.uint8
        if whole:
            x = x.to(own or torch.get_default_dtype()) / 255
        elif x.is_floating_point() and own is not None:
            x = x.to(own)
        if self.mean is None or self.std is None:
            return x
        if x.ndim < 3 or x.shape[-3] not in (1, self.mean.shape[0]):
            raise ShapeError(f"this base takes images (b, {self.mean.shape[0]}, h, w), not {tuple(x.shape)}")
        low, high = (float(v) for v in x.detach().aminmax()) if x.numel() and not whole else (0.0, 0.0)
        # Resizing by cubic splines overshoots a little.
        if not x.is_floating_point() or low < -0.25 or high > 1.25:
            raise ShapeError(
                "this base takes images as uint8, or as floats in [0, 1], and normalises them itself; these are "
                f"{x.dtype} from {low:.3g} to {high:.3g}"
            )
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def encode(self, inputs: Input) -> Features:
        """Run the network on a prepared input; without a graph, unless the input asks for its gradient."""
        for module in self._networks():
            if getattr(module, "training", False):
                # Whoever has the network put it there, and its statistics would move.
                module.eval()
        if self._writes:
            inputs = map_input(inputs, torch.clone)
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs.values()
        wanted = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
        seen: dict[Tap, tuple[Any, int]] = {}
        token = _seen.set(seen if self._taps else None)
        try:
            # Not inference_mode: its tensors cannot be saved for the backward pass of a merge.
            with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
                out = self.select(call(self.net, inputs))
        finally:
            _seen.reset(token)
        return Features(out, {name: self._tapped(name, seen.get(tap)) for name, tap in self._taps.items()})

    def features(self, inputs: Input, given: Features | Tensor | None = None) -> Features:
        """What the network makes of prepared `inputs`, or the features of them that are `given`, checked."""
        if given is None:
            return self.encode(inputs)
        given = Features(given) if isinstance(given, Tensor) else given
        expected = self.output_shape[-1:] if self.kind == "sequence" else self.output_shape
        if tuple(given.out.shape[-len(expected) :]) != expected:
            raise ShapeError(f"the features given are {tuple(given.out.shape)}; this base returns (b, {expected})")
        return given

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
        other.example, other._probe, other._sha256 = example, None, None
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
        other._hidden, other._modules_run, other._first = (net,), (net,), FirstWeight((net,))
        x = probe_input(self.example)
        pairs = zip(_tensors(self(x)), _tensors(other(x)), strict=True)
        # What tracing does not see, such as hooks or a method that was replaced, is lost in the copy.
        exact = all((a - b).norm() <= 1e-4 * a.norm() for a, b in pairs)
        return other if exact else self

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie; of a network without any, where the example lies."""
        weights = chain.from_iterable(chain(net.parameters(), net.buffers()) for net in self._networks())
        values = [self.example] if isinstance(self.example, Tensor) else self.example.values()
        others = chain(weights, (value for value in values if isinstance(value, Tensor)))
        return self._first.device or next(others).device

    def identity(self) -> Identity:
        """Its weights, preparation, choice of the output and behaviour; weights that did not change are hashed once."""
        nets = self._networks()
        version = [weights_version(net) for net in nets]
        if self._sha256 is None or self._sha256[0] != version:
            # The probe is of the weights that it is taken with.
            self._probe = None
            self._sha256 = version, weights_sha256(self.net, nets, self.output_shape)
        if self._probe is None:
            self._probe = probe_of(lambda x: self(x).out, self.example)
        prepared = preparation(self.mean, self.std, self.select.output, self.select.channels_last)
        shapes = shapes_of(self.example)
        return Identity(self._sha256[1], self.kind, self.output_shape, prepared, tuple(self._probe), shapes)

    def structure(self) -> str:
        """Hash of how the network is built, which names its cached features beside the identity."""
        return structure_sha256(self.net, self._networks())

    def parameter_count(self) -> int:
        """Parameters of the network, all frozen."""
        return sum(p.numel() for net in self._networks() for p in net.parameters())

    def train(self, mode: bool = True) -> Base:
        """Stays in evaluation mode: batch norms and dropout of a pretrained network must not move."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Base:
        # What `.to()`, `.cuda()` and `.half()` call; the one door left open to the hidden network.
        super()._apply(fn, recurse)
        for net in self._networks():
            net._apply(fn, recurse)
        self.example = map_input(self.example, fn)
        out, taps = self.example_features
        self.example_features = Features(fn(out), {name: fn(tap) for name, tap in taps.items()})
        return self

    def extra_repr(self) -> str:
        name = self.spec.name if self.spec else type(self.net).__name__
        return f"{name}, {self.kind} {self.output_shape}, {self.parameter_count():,} frozen parameters"


def _tensors(features: Features) -> list[Tensor]:
    return [features.out, *features.taps.values()]


def _version(tensor: Any) -> int:
    """What writes in place raise; tensors of inference mode have no version."""
    return 0 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version
