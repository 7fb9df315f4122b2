"""The frozen base: runs a pretrained network as it is, and shields it from everything that could change it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

from sidetuning.errors import ShapeError, UnknownNameError
from sidetuning.registry import Registry, unknown

PlainInput = Tensor | Mapping[str, Any]  # one tensor, or the keyword arguments of the network


class Observation(NamedTuple):
    """An input with numbers that only heads see (those that say `uses_extra`): an agent's compass beside its camera.

    Attributes:
        x: what the base and the side see: a tensor, or the keyword arguments of the network.
        extra: (b, n).
    """

    x: PlainInput
    extra: Tensor


Input = PlainInput | Observation
Kind = Literal["vector", "map", "sequence"]
KINDS: dict[int, Kind] = {1: "vector", 2: "sequence", 3: "map"}  # by dimensions without the batch


class Features(NamedTuple):
    """What a base returns.

    Attributes:
        out: the code that merges see: (b, d), (b, c, h, w) or (b, t, d).
        taps: named inner activations, batch first; channels first where they are maps.
    """

    out: Tensor
    taps: dict[str, Tensor] = {}  # noqa: RUF012  (named tuples share their defaults; nothing writes to this one)


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


def call(net: Callable[..., Any], x: Input) -> Any:
    """Run `net` on a tensor, or on a mapping splatted into keyword arguments."""
    if isinstance(x, Observation):
        x = x.x
    return net(**x) if isinstance(x, Mapping) else net(x)


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
        example: PlainInput,
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
        self._hidden = (net,)  # a tuple: torch registers modules that are attributes, and must not register this one
        self.select = Select(output, channels_last)
        self.spec = spec
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.example = example
        features = self._set_taps(taps)
        self.output_shape = tuple(features.out.shape[1:])
        if len(self.output_shape) not in KINDS:
            raise ShapeError(
                f"the base returns {tuple(features.out.shape)}; side-tuning needs (b, d), (b, t, d) or (b, c, h, w): "
                "pick one tensor with output="
            )
        self.kind: Kind = KINDS[len(self.output_shape)]
        self.width: int = self.output_shape[-1] if self.kind == "sequence" else self.output_shape[0]

    def _set_taps(self, taps: Sequence[str]) -> Features:
        """Choose the taps, and see what the example gives then."""
        net = self.net
        for tap in taps:
            names = [n for n, _ in net.named_modules() if n] if isinstance(net, nn.Module) else []
            if tap not in names:
                raise UnknownNameError(
                    unknown("tap", tap, names[:40] if len(names) > 40 else names, verb="in the base")
                )
        self._taps = tuple(taps)
        found: dict[str, tuple[Tensor, int]] = {}  # each with its version, which writes in place raise
        watch = [
            net.get_submodule(tap).register_forward_hook(self._keep(found, tap, _versioned))  # type: ignore[attr-defined]
            for tap in taps
        ]
        try:
            features = self(self.example)
        finally:
            for hook in watch:
                hook.remove()
        for tap in taps:
            if tap not in found:
                raise ShapeError(f"the tap '{tap}' is not run by the network; tap a module that is")
            tensor, version = found[tap]
            if _versioned(tensor)[1] != version:
                raise ShapeError(
                    f"what the tap '{tap}' returns is written over in place by what follows it; tap that instead"
                )
        self.tap_shapes = {name: tuple(tap.shape[1:]) for name, tap in features.taps.items()}
        return features

    @property
    def net(self) -> Callable[..., Any]:
        """The wrapped network."""
        return self._hidden[0]

    def prepare(self, x: Input) -> Input:
        """Turn a raw input into what base and side see: uint8 images scaled to [0, 1], then normalised."""
        if isinstance(x, Observation):
            return Observation(self._prepare(x.x), x.extra)
        return self._prepare(x)

    def _prepare(self, x: PlainInput) -> PlainInput:
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.uint8:
            x = x.to(torch.get_default_dtype()) / 255
        if self.mean is not None and self.std is not None:
            if x.ndim < 3 or x.shape[-3] not in (1, self.mean.shape[0]):
                raise ShapeError(f"this base takes images (b, {self.mean.shape[0]}, h, w), not {tuple(x.shape)}")
            x = (x - self.mean) / self.std
        return x

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the backward pass of a merge
    def encode(self, inputs: Input) -> Features:
        """Run the network on a prepared input."""
        taps: dict[str, Tensor] = {}
        net = self.net
        hooks = []
        if isinstance(net, nn.Module):
            if net.training:  # whoever has the network put it there, and its statistics would move
                net.eval()
            for name in self._taps:
                hooks.append(net.get_submodule(name).register_forward_hook(self._keep(taps, name)))
        try:
            out = self.select(call(net, inputs))
        finally:
            for hook in hooks:
                hook.remove()
        return Features(out, taps)

    def forward(self, x: Input) -> Features:
        """Prepare and encode a raw input."""
        return self.encode(self.prepare(x))

    def _keep(
        self, kept: dict[str, Any], name: str, what: Callable[[Tensor], Any] | None = None
    ) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output  # transformers' layers return tuples
            if not isinstance(tensor, Tensor):
                raise ShapeError(
                    f"the tap '{name}' returns a {type(tensor).__name__}, not a tensor; tap a module within it"
                )
            kept[name] = self.select.channels_first(tensor) if what is None else what(tensor)

        return hook

    def with_taps(self, taps: Sequence[str]) -> Base:
        """The same network with these taps instead."""
        other = copy.copy(self)
        other._set_taps(taps)
        return other

    def with_example(self, example: PlainInput) -> Base:
        """The same network for inputs of another size; parts are built for the shapes that this example gives."""
        other = copy.copy(self)
        other.example = example
        other.output_shape = tuple(other._set_taps(self._taps).out.shape[1:])
        return other

    def folded(self) -> Base:
        """A copy for inference with batch norms folded into convolutions; itself where the network cannot be traced.

        Features differ from this base's by rounding only (about 1e-6 of their size).
        """
        net = self.net
        if not isinstance(net, nn.Module) or not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
            return self
        try:
            pairs = _foldable(net)
        except Exception:  # tracing fails in as many ways as there are networks, and the plain one always works
            return self
        fused = copy.deepcopy(net)
        for conv, norm in pairs:
            if any(_within(conv, tap) != _within(norm, tap) for tap in self._taps):
                continue  # the tap sees what lies between them
            conv_module: Any = fused.get_submodule(conv)
            norm_module: Any = fused.get_submodule(norm)
            for name, module in ((conv, fuse_conv_bn_eval(conv_module, norm_module)), (norm, nn.Identity())):
                parent, _, child = name.rpartition(".")
                setattr(fused.get_submodule(parent), child, module)
        other = copy.copy(self)
        other._hidden = (fused.to(memory_format=torch.channels_last),)
        return other

    @property
    def device(self) -> torch.device:
        """Where the network runs: where its example input lies."""
        example = self.example
        tensors = [example] if isinstance(example, Tensor) else [v for v in example.values() if isinstance(v, Tensor)]
        return tensors[0].device

    def fingerprint(self) -> str:
        """sha256 over the names, shapes, types and bytes of the network's weights and buffers.

        A plain function has none: its qualified name and the shape of its output stand for it.
        """
        digest = hashlib.sha256()
        net = self.net
        own = getattr(net, "fingerprint", None)
        if callable(own):
            digest.update(str(own()).encode())
        elif isinstance(net, nn.Module):
            for name, tensor in sorted(net.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            name = getattr(net, "__qualname__", type(net).__qualname__)
            digest.update(f"{getattr(net, '__module__', '')}.{name} {self.output_shape}".encode())
        return digest.hexdigest()

    def preparation(self) -> dict[str, Any]:
        """What `fingerprint` does not know: normalisation (to three decimals) and the choice of the output, as JSON values."""
        norm = [None if t is None else [round(float(v), 3) for v in t.flatten()] for t in (self.mean, self.std)]
        output = self.select.output
        name = getattr(output, "__qualname__", type(output).__qualname__) if callable(output) else output
        return {"mean": norm[0], "std": norm[1], "output": name, "channels_last": self.select.channels_last}

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
        self.example = to_device(self.example, fn)
        return self

    def extra_repr(self) -> str:
        name = self.spec.name if self.spec else type(self.net).__name__
        return f"{name}, {self.kind} {self.output_shape}, {self.parameter_count():,} frozen parameters"


def _versioned(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor and its version, which writes in place raise; tensors of inference mode have none."""
    return tensor, 0 if tensor.is_inference() else tensor._version


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def _foldable(net: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms that alone read them, each called once."""
    nodes = list(torch.fx.symbolic_trace(net).graph.nodes)
    modules = dict(net.named_modules())
    calls = [str(n.target) for n in nodes if n.op == "call_module"]
    pairs = []
    for node in nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
            continue
        before = node.args[0]
        if isinstance(before, torch.fx.Node) and before.op == "call_module" and len(before.users) == 1:
            conv, norm = str(before.target), str(node.target)
            once = calls.count(conv) == calls.count(norm) == 1
            plain = not modules[conv]._forward_pre_hooks and not is_parametrized(modules[conv])  # no weight norm
            if once and plain and isinstance(modules[conv], nn.Conv2d):
                pairs.append((conv, norm))
    return pairs


def to_device(x: PlainInput, fn: Callable[[Tensor], Tensor]) -> PlainInput:
    """Apply `fn` to a tensor, or to the floating tensors' companions in a mapping."""
    if isinstance(x, Tensor):
        return fn(x)
    return {k: fn(v) if isinstance(v, Tensor) else v for k, v in x.items()}


BASES: Registry[Callable[..., Base]] = Registry(
    "base",
    {
        "resnet44-cifar10": "sidetuning.bases:resnet44_cifar10",
        "resnet-doom-curvature": "sidetuning.bases:resnet_doom_curvature",
    },
)
SCHEMES: Registry[Callable[..., Base]] = Registry(
    "base scheme",
    {
        "timm": "sidetuning.integrations.timm:load",
        "hf": "sidetuning.integrations.transformers:load",
        "onnx": "sidetuning.integrations.onnx:load",
    },
)


def load_base(
    name: str,
    *,
    taps: Sequence[str] = (),
    output: str | None = None,
    revision: str | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
) -> Base:
    """Build a pretrained base by name.

    Args:
        name: a packaged base ("resnet44-cifar10"), "timm:NAME", "hf:NAME_OR_FOLDER" or "onnx:PATH".
        taps: names of submodules whose outputs are returned too.
        output: which output to use; "map" gives a timm model's spatial features instead of the pooled ones, and a
            transformers model takes the name of a field ("last_hidden_state" by default).
        revision: of a model on the Hub.
        pretrained: False builds timm and transformers models with random weights.
        weights: a safetensors file to use instead of the weights that the name stands for.

    Raises:
        UnknownNameError: no such base, scheme or tap.
        ImportError: the optional package behind the scheme is not installed.
        OSError: the weights can neither be found nor downloaded.
    """
    scheme, colon, rest = name.partition(":")
    if colon:
        build = SCHEMES[scheme]
        base = build(rest, taps=taps, output=output, revision=revision, pretrained=pretrained, weights=weights)
        if scheme in ("hf", "onnx") and Path(rest).exists():
            name = f"{scheme}:{Path(rest).resolve()}"  # found from every folder
    else:
        if name not in BASES and any(name.endswith(s) for s in (".onnx", ".safetensors")):
            raise UnknownNameError(f"'{name}' is a file; write onnx:{name}, or give a base's name and weights={name}")
        base = BASES[name](taps=taps, weights=weights)
    options: dict[str, Any] = {"taps": list(taps), "output": output, "pretrained": pretrained}
    options["weights"] = None if weights is None else str(Path(weights).resolve())
    base.spec = BaseSpec(name, {k: v for k, v in options.items() if v not in (None, [], True)}, revision)
    return base


def packaged(file: str) -> Path:
    """The path of a file shipped in `sidetuning/bases`."""
    return Path(str(files("sidetuning.bases").joinpath(file)))
