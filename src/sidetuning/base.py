"""The frozen base: runs a pretrained network as it is, and shields it from everything that could change it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidetuning.content import structure_sha256, weights_sha256, weights_version
from sidetuning.errors import ShapeError, told
from sidetuning.folding import fold
from sidetuning.identity import BaseSpec as BaseSpec
from sidetuning.identity import Identity, preparation
from sidetuning.inputs import (
    IMAGES,
    FirstWeight,
    call,
    check_entries,
    counted,
    entries_of,
    example_record,
    freeze,
    map_input,
    to_device,
    trained_with,
)
from sidetuning.inputs import Input as Input
from sidetuning.language import LanguageModel
from sidetuning.outputs import Features as Features
from sidetuning.outputs import Layout as Layout
from sidetuning.outputs import Select, channels_first, hooks_on, layouts_of, layouts_told, seen, tap_of, version
from sidetuning.outputs import Tap as Tap
from sidetuning.outputs import Taps as Taps
from sidetuning.probe import check_base, is_causal, probe_input, probe_of, shapes_of
from sidetuning.reach import modules_of
from sidetuning.running import Engine
from sidetuning.transforms import Transform, for_example

Kind = Literal["vector", "map", "sequence"]
# By dimensions without the batch.
KINDS: dict[int, Kind] = {1: "vector", 2: "sequence", 3: "map"}


class Base(nn.Module):
    """A frozen network: always in evaluation mode, without gradients, never part of a checkpoint.

    The network is kept out of torch's module tree, so `parameters()`, `state_dict()`, `train()`, `apply()` and
    `requires_grad_()` of any parent pass it by; `.to()` and the like still move it.

    Args:
        net: a module, or anything callable.
        example: one input as the network takes it, batch dimension included; sets the shapes of everything else.
        output: picks the code out of what `net` returns: a key or attribute, an index, or a function; by default the
            tensor itself.
        taps: names of submodules of `net` whose outputs are returned too. Maps are turned channels first: where their
            channels are is told by the network's modules, or by you, `taps={"blocks.11": "nhwc"}`.
        channels_last: a 4-d output is (b, h, w, c) and is turned channels first; by default as the modules tell.
        mean, std: per-channel normalisation of image inputs in [0, 1]; uint8 inputs are divided by 255 first.
        bgr: the network takes the channels of images in reverse order.
        transform: turns files, images or texts into its input; by default images are resized to the example's size.
        spec: how `load_base` builds it again; None for a base of your own.

    Attributes:
        layouts: of each tap that is a map, where the network has its channels.
        engine: how the network is run; see `with_engine`.
        causal: the code of a token depends on it and on earlier ones alone.
        lm: the causal language model around the network, where it is one's backbone.

    Raises:
        UnknownNameError: a tap or an output that `net` does not have.
        ShapeError: an output that is not (b, d), (b, t, d) or (b, c, h, w); a tap that is not run, or is written over,
            or whose channels cannot be told; a network that does not take the example.
    """

    causal = False
    lm: LanguageModel | None = None
    mean: Tensor | None
    std: Tensor | None
    # Empty; of the type that features have, which `.to()` changes with everything else.
    like: Tensor

    def __init__(
        self,
        net: Callable[..., Any],
        *,
        example: Input,
        output: str | int | Callable[[Any], Tensor] | None = None,
        taps: Taps = (),
        channels_last: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bgr: bool = False,
        transform: Transform | None = None,
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
                    tap_of(part)
        self.select = Select(output, bool(channels_last))
        self.spec, self.bgr, self._transform, self.engine = spec, bgr, transform, Engine()
        # Weights of sides that ship for this base: the side's name -> its file, and the options it was built with.
        self.distilled: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._sha256: tuple[object, str] | None = None
        self._first = FirstWeight(self._modules_run)
        self._writes = False
        self.example = map_input(example, lambda x: x)
        # Networks of transformers swallow every name, and do nothing with most.
        self._entries = entries_of(net, example)
        if (mean is None) != (std is None):
            raise ShapeError("normalisation needs both mean= and std=; give both, or neither")
        for name, values in (("mean", mean), ("std", std)):
            norm = None if values is None else torch.tensor(values, device=self.device).view(-1, 1, 1)
            self.register_buffer(name, norm, persistent=False)
        # Sides of a half-precision network are trained in full precision.
        dtype = torch.float64 if self.dtype == torch.float64 else torch.get_default_dtype()
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=self.device), persistent=False)
        self._run_example(taps, channels_last=channels_last)
        self.kind: Kind = KINDS[len(self.output_shape)]
        self.width: int = self.output_shape[-1] if self.kind == "sequence" else self.output_shape[0]
        self._writes = check_base(lambda x: self(x).out, self.example)
        self.causal = self.kind == "sequence" and is_causal(lambda x: self(x).out, self.example)
        self._probe: list[float] | None = None

    def _run_example(self, taps: Taps, every: Layout | None = None, channels_last: bool | None = False) -> None:
        """Put hooks on the taps, and keep what the base makes of its example: all shapes come from there."""
        self._taps, self.layouts = hooks_on(self.net, taps), {}
        self.example = to_device(self.example, self.device)
        with told("the base does not run on its example ({}); give another example="):
            features = self(self.example)
        if features.out.ndim - 1 not in KINDS:
            wanted = "side-tuning needs (b, d), (b, t, d) or (b, c, h, w): pick one tensor with output="
            raise ShapeError(f"the base returns {tuple(features.out.shape)}; {wanted}")
        for name, tap in features.taps.items():
            if tap.ndim == 0 or len(tap) != len(features.out):
                raise ShapeError(
                    f"the tap '{name}' returns {tuple(tap.shape)} for a batch of {len(features.out)}; tap a module "
                    "whose first dimension is the batch"
                )
        out = features.out
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in [*features.taps.items(), ("", out)]}
        known = {**layouts_told(taps), "": None if channels_last is None else "nchw"}
        layouts = layouts_of(shapes, known, every, self._networks(), lambda: self(self.example))
        if layouts.pop("", None) == "nhwc":
            self.select, out = Select(self.select.output, True), channels_first(out, "nhwc")
        self.layouts = layouts
        turned = {name: channels_first(tap, layouts.get(name)) for name, tap in features.taps.items()}
        self.example_features = Features(out, turned)
        self.output_shape = tuple(out.shape[1:])

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

    def _given(self) -> torch.dtype | None:
        """The type of floats that the network is given where it is not that of its sides."""
        own = self.dtype
        return None if own == self.like.dtype else own

    @property
    def tap_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tap without the batch, as the example has it."""
        return {name: tuple(tap.shape[1:]) for name, tap in self.example_features.taps.items()}

    def prepare(self, x: Input) -> Input:
        """Turn a raw input into what base and side see, on the base's device and of the type of its features.

        Images are uint8 or in [0, 1]; they are normalised, also as the entries "x" and "pixel_values" of a mapping.

        Raises:
            ShapeError: images of another shape, or with values of another range: normalised already, or up to 255; or
                the state of an earlier part of a text.
            UnknownNameError: an entry of a mapping that the network does not read, or one that it lacks.
        """
        if isinstance(x, Tensor):
            return self._prepare(x)
        check_entries(self._entries, x)
        moved = counted(to_device(x, self.device), self.causal and "position_ids" in self._entries)
        return {**moved, **{key: self._prepare(moved[key]) for key in IMAGES if isinstance(moved.get(key), Tensor)}}

    def _prepare(self, x: Tensor) -> Tensor:
        x, own = x.to(self.device), self.dtype
        whole = x.dtype == torch.uint8
        if whole:
            x = x.to(self.like.dtype) / 255
        elif x.is_floating_point() and own is not None:
            x = x.to(self.like.dtype)
        if self.mean is None or self.std is None:
            if whole and (trained := trained_with(self.net)):
                raise ShapeError(
                    f"this network was trained on images normalised by {trained}; give Base mean= and std= to take "
                    "uint8 images, or give floats that are normalised already"
                )
            return x.flip(-3) if self.bgr else x
        if x.ndim < 3 or x.shape[-3] not in (1, self.mean.shape[0]):
            raise ShapeError(f"this base takes images (b, {self.mean.shape[0]}, h, w), not {tuple(x.shape)}")
        low, high = (float(v) for v in x.detach().nan_to_num(0.5).aminmax()) if x.numel() and not whole else (0.0, 0.0)
        # Resizing by cubic splines overshoots a little; pixels that are no number hide no others.
        if not x.is_floating_point() or low < -0.25 or high > 1.25:
            raise ShapeError(
                "this base takes images as uint8, or as floats in [0, 1], and normalises them itself; these are "
                f"{x.dtype} from {low:.3g} to {high:.3g}"
            )
        x = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        return x.flip(-3) if self.bgr else x

    def encode(self, inputs: Input) -> Features:
        """Run the network on a prepared input; without a graph, unless the input asks for its gradient."""
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs.values()
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
        if (made := self.engine.features(inputs, wanted)) is not None:
            return Features(made.out, {name: made.taps[name] for name in self._taps})
        if self._writes:
            inputs = map_input(inputs, torch.clone)
        given = self._given()
        # Not inference_mode: its tensors cannot be saved for the backward pass of a merge.
        with torch.set_grad_enabled(wanted):
            if given is not None:
                inputs = map_input(inputs, lambda x: x.to(given) if x.is_floating_point() else x)
            return self.observe(lambda: call(self.net, inputs))[1]

    def observe(self, run: Callable[[], Any]) -> tuple[Any, Features]:
        """What a pass of the network that `run` makes returns, and the features in it."""
        for module in self._networks():
            if getattr(module, "training", False):
                # Whoever has the network put it there, and its statistics would move.
                module.eval()
        activations: dict[Tap, tuple[Any, int]] = {}
        token = seen.set(activations if self._taps else None)
        try:
            out = self.select(returned := run())
        finally:
            seen.reset(token)
        features = Features(out, {name: self._tapped(name, activations.get(tap)) for name, tap in self._taps.items()})
        whole = self._given() is None and self.dtype is not None
        return returned, features if whole else features.each(lambda tensor: tensor.to(self.like.dtype))

    def features(self, inputs: Input, given: Features | Tensor | None = None) -> Features:
        """What the network makes of prepared `inputs`, or the features of them that are `given`, checked."""
        if given is None:
            return self.encode(inputs)
        given = Features(given) if isinstance(given, Tensor) else given
        expected = self.output_shape[-1:] if self.kind == "sequence" else self.output_shape
        if tuple(given.out.shape[-len(expected) :]) != expected:
            raise ShapeError(f"the features given are {tuple(given.out.shape)}; this base returns (b, {expected})")
        return given

    def _tapped(self, name: str, activation: tuple[Any, int] | None) -> Tensor:
        """What the tap `name` has seen, checked."""
        if activation is None:
            raise ShapeError(f"the tap '{name}' is not run by the network; tap a module that is")
        tensor, before = activation
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"the tap '{name}' returns a {type(tensor).__name__}, not a tensor; tap a module in it")
        if version(tensor) != before:
            raise ShapeError(f"what the tap '{name}' returns is written over in place by what follows; tap that")
        return channels_first(tensor, self.layouts.get(name))

    def forward(self, x: Input) -> Features:
        """Prepare and encode a raw input."""
        return self.encode(self.prepare(x))

    def with_taps(self, taps: Taps, every: Layout | None = None) -> Base:
        """The same network with these taps instead; no pass is made where all of them are here already.

        Args:
            taps: their names, or a mapping of names to "nchw", "nhwc", or None where the network tells.
            every: the layout of all maps that have none in `taps`.
        """
        named: dict[str, Any] = layouts_told(taps)
        same = every is None and all(
            tap in self._taps and layout in (None, self.layouts.get(tap)) for tap, layout in named.items()
        )
        if same and list(named) == list(self._taps):
            return self
        self.engine.check_taps([] if same else list(named), list(self._taps))
        other = copy.copy(self)
        if same:
            other._taps = {tap: self._taps[tap] for tap in named}
            other.layouts = {tap: self.layouts[tap] for tap in named if tap in self.layouts}
            kept = {tap: self.example_features.taps[tap] for tap in named}
            other.example_features = Features(self.example_features.out, kept)
        else:
            before = {} if every else self.layouts
            other._run_example({tap: layout or before.get(tap) for tap, layout in named.items()}, every)
        return other

    def with_example(self, example: Input) -> Base:
        """The same network for inputs of another size; parts are built for the shapes that this example gives."""
        other = copy.copy(self)
        other.example, other._probe, other._sha256 = map_input(example, lambda x: x), None, None
        other.engine = Engine() if self.engine.run else self.engine
        other._run_example({tap: self.layouts.get(tap) for tap in self._taps})
        if self.spec is not None:
            other.spec = replace(self.spec, options={**self.spec.options, "example": example_record(example)})
        return self.engine.rebuilt(other)

    def with_net(self, net: nn.Module, lm: LanguageModel | None = None) -> Base:
        """The same base with `net` for its network, which gives the same shapes, and with `lm` around that."""
        other = copy.copy(self)
        other._hidden, other._modules_run, other._first = (net,), (net,), FirstWeight((net,))
        other._sha256, other._probe, other.lm = None, None, lm
        return other

    def folded(self) -> Base:
        """A copy for inference with batch norms folded into convolutions; itself where the network cannot be traced.

        Features differ from this base's by rounding only (about 1e-6 of their size).
        """
        net = fold(self.net, tuple(self._taps)) if isinstance(self.net, nn.Module) and not self.engine.run else None
        if net is None:
            return self
        other = self.with_net(net)
        x = probe_input(self.example)
        pairs = zip(self(x).tensors(), other(x).tensors(), strict=True)
        # What tracing does not see, such as hooks or a method that was replaced, is lost in the copy.
        exact = all((a - b).norm() <= 1e-4 * a.norm() for a, b in pairs)
        return other if exact else self

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie; of a network without any, where the example lies."""
        weights = chain.from_iterable(chain(net.parameters(), net.buffers()) for net in self._networks())
        values = [self.example] if isinstance(self.example, Tensor) else self.example.values()
        return self._first.device or next(chain(weights, (v for v in values if isinstance(v, Tensor)))).device

    def identity(self) -> Identity:
        """Its weights, preparation, choice of the output and behaviour; weights that did not change are hashed once."""
        nets = self._networks()
        version = weights_version(self.net, nets)
        if self._sha256 is None or self._sha256[0] != version:
            # The probe is of the weights that it is taken with.
            self._probe = None
            self._sha256 = version, weights_sha256(self.net, nets, self.output_shape)
            self.engine.check_weights(self._sha256[1])
        if self._probe is None:
            self._probe = probe_of(lambda x: self(x).out, self.example)
        prepared = preparation(self.mean, self.std, self.select.output, self.select.channels_last, self.bgr)
        prepared, probe, shapes = prepared | self.engine.told(), tuple(self._probe), shapes_of(self.example)
        return Identity(self._sha256[1], self.kind, self.output_shape, prepared, probe, shapes)

    @property
    def transform(self) -> Transform | None:
        """Makes its input of a file, an image or a text, at the example's size; None where it reads neither."""
        return for_example(self._transform, self.example)

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
        self.engine = self.engine.moved(self.like, fn(self.like))
        super()._apply(fn, recurse)
        before = self._first.dtype, self._first.device
        for net in [*self._networks(), *([self.lm.net] if self.lm else [])]:
            net._apply(fn, recurse)
        if (self._first.dtype, self._first.device) != before:
            # LeViT keeps biases of the old type until it trains. Where nothing is moved, other threads may be served.
            with contextlib.suppress(NotImplementedError):
                for net in self._networks():
                    net.train().eval()
        self.example = map_input(self.example, fn)
        self.example_features = self.example_features.each(fn)
        return self

    def extra_repr(self) -> str:
        name = self.spec.name if self.spec else type(self.net).__name__
        return f"{name}, {self.kind} {self.output_shape}, {self.parameter_count():,} frozen parameters"
