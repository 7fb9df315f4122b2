"""What is read out of a network: its code, its inner activations, and which of their dimensions holds the channels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sidetuning.errors import ShapeError, UnknownNameError
from sidetuning.registry import unknown

# Where the channels of a 4-d activation are: (b, c, h, w), or (b, h, w, c).
Layout = Literal["nchw", "nhwc"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")
# What `taps=` takes: names, or names and the layouts of those that are told, None for the others.
Taps = Sequence[str] | Mapping[str, str | None]
# What the taps of the pass under way have seen, in this thread: tap -> (output, its version). None outside of a pass.
seen: ContextVar[dict[Tap, tuple[Any, int]] | None] = ContextVar("taps", default=None)
# Modules whose outputs are channels first, by torch's own definition.
FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


class Features(NamedTuple):
    """What a base returns.

    Attributes:
        out: the code that merges see: (b, d), (b, c, h, w) or (b, t, d).
        taps: named inner activations, batch first; channels first where they are maps.
    """

    out: Tensor
    # Named tuples share their defaults; nothing writes to this one.
    taps: dict[str, Tensor] = {}  # noqa: RUF012

    def rows(self, rows: Tensor | slice) -> Features:
        """The features of some samples of the batch."""
        return self.each(lambda tensor: tensor[rows])

    def each(self, function: Callable[[Tensor], Tensor]) -> Features:
        """A function of the code and of each tap."""
        return Features(function(self.out), {name: function(tap) for name, tap in self.taps.items()})

    def tensors(self) -> list[Tensor]:
        """The code and all taps."""
        return [self.out, *self.taps.values()]


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
        return channels_first(returned, "nhwc" if self.channels_last else None)


class Tap:
    """A forward hook, put on a module of the network once: it hands each output to the pass that runs."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        activations = seen.get()
        if activations is not None:
            tensor = first_of(output)
            activations[self] = (tensor, version(tensor))

    def __deepcopy__(self, memo: Any) -> Tap:
        # A copy of the network, such as the folded one, is tapped in the same places.
        return self


def first_of(output: Any) -> Any:
    """The layers of transformers return tuples."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def version(tensor: Any) -> int:
    """What writes in place raise; tensors of inference mode have no version."""
    return 0 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


def tap_of(module: nn.Module) -> Tap:
    """The hook on a module, which is put there once, whoever asks for it."""
    hooks = [hook for hook in module._forward_hooks.values() if isinstance(hook, Tap)]
    if not hooks:
        hooks = [Tap()]
        module.register_forward_hook(hooks[0])
    return hooks[0]


def hooks_on(net: Any, taps: Taps) -> dict[str, Tap]:
    """The hook on the module of each name.

    Raises:
        UnknownNameError: a module that the network does not have, or a layout that is none.
    """
    modules = dict(net.named_modules()) if isinstance(net, nn.Module) else {}
    for layout in layouts_told(taps).values():
        if layout is not None and layout not in LAYOUTS:
            raise UnknownNameError(unknown("layout", str(layout), LAYOUTS, verb="known"))
    for name in taps:
        if not name or name not in modules:
            names = [name for name in modules if name][:40]
            raise UnknownNameError(unknown("tap", name, names, verb="in the base"))
    return {name: tap_of(modules[name]) for name in taps}


def channels_first(x: Tensor, layout: str | None) -> Tensor:
    """(b, h, w, c) to (b, c, h, w) where that is the layout; others as they are."""
    return x.permute(0, 3, 1, 2) if layout == "nhwc" and x.ndim == 4 else x


def layouts_told(taps: Taps) -> dict[str, str | None]:
    """The layout that is given for each tap."""
    return dict(taps) if isinstance(taps, Mapping) else dict.fromkeys(taps)


class Evidence:
    """What the modules of a network tell, in one pass, of where channels are.

    A convolution or a batch norm gives (b, c, h, w) and a linear layer (b, h, w, c), whatever a network is called.
    """

    def __init__(self) -> None:
        # Shapes without the batch -> the layouts that some module gave them in.
        self._shapes: dict[tuple[int, ...], set[Layout]] = {}
        self._widths: set[int] = set()
        # Other threads may run the same network on other inputs meanwhile.
        self._thread = threading.get_ident()

    @contextmanager
    def of(self, nets: Sequence[nn.Module]) -> Iterator[Evidence]:
        """Gather it from the passes within."""
        leaves = [part for net in nets for part in net.modules() if isinstance(part, (*FIRST, nn.Linear, nn.LayerNorm))]
        handles = [leaf.register_forward_hook(self._see) for leaf in leaves]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or threading.get_ident() != self._thread:
            return
        width = _width(module)
        layout: Layout | None = "nchw" if isinstance(module, FIRST) else "nhwc"
        if isinstance(module, nn.LayerNorm) and type(module).forward is not nn.LayerNorm.forward and output.ndim == 4:
            # One of a network's own, which may turn its input.
            sides = [side for side, n in zip(LAYOUTS, (output.shape[1], output.shape[3]), strict=True) if n == width]
            layout = sides[0] if len(sides) == 1 else None
        if width is not None:
            self._widths.add(width)
        if output.ndim == 4 and layout is not None:
            self._shapes.setdefault(tuple(output.shape[1:]), set()).add(layout)

    def layout(self, shape: Sequence[int]) -> Layout | None:
        """The layout of an activation of `shape`, without the batch; None where it cannot be told."""
        given = self._shapes.get(tuple(shape), set())
        if len(given) == 1:
            return next(iter(given))
        places = [layout for layout, n in zip(LAYOUTS, (shape[0], shape[2]), strict=True) if n in self._widths]
        return places[0] if not given and len(places) == 1 else None


def _width(module: nn.Module) -> int | None:
    """How many channels a module gives."""
    for name in ("out_channels", "out_features", "num_features", "num_channels"):
        if isinstance(width := module.__dict__.get(name), int):
            return width
    shape = module.__dict__.get("normalized_shape")
    return int(shape[-1]) if shape else None


def layouts_of(
    shapes: Mapping[str, Sequence[int]],
    told: Mapping[str, str | None],
    every: Layout | None,
    nets: Sequence[nn.Module],
    run: Callable[[], Any],
) -> dict[str, Layout]:
    """The layout of each 4-d activation: as told, or as the network's modules tell.

    Args:
        shapes: of each activation, without the batch; "" is the output's, which is channels first by default.
        told: layouts that are given.
        every: the layout of all maps that have none in `told`.
        nets: the modules that run.
        run: makes one pass.

    Raises:
        ShapeError: a layout that cannot be told, or one for an activation that is no map.
    """
    maps = [name for name, shape in shapes.items() if len(shape) == 3]
    flat = [name for name, layout in told.items() if name and layout is not None and name not in maps]
    if flat:
        raise ShapeError(f"the tap '{flat[0]}' returns {tuple(shapes[flat[0]])}, which is no map; leave its layout out")
    given: dict[str, Any] = {name: told.get(name) or every for name in maps}
    if not all(given.values()):
        with Evidence().of(nets) as evidence, torch.no_grad():
            run()
        given = {name: layout or evidence.layout(shapes[name]) for name, layout in given.items()}
    given = {name: layout or (None if name else "nchw") for name, layout in given.items()}
    for name in [name for name, layout in given.items() if layout is None]:
        raise ShapeError(
            f"which dimension of the tap '{name}', (b, {', '.join(map(str, shapes[name]))}), holds the channels cannot "
            f"be told from the network; say it, taps={{'{name}': 'nhwc'}} or 'nchw'"
        )
    return given
