"""A copy of the base as the side: whole (the paper's transfer experiments) or slimmed to a fraction of its width."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Input
from sidetuning.errors import ShapeError
from sidetuning.folding import lay_channels_last, may_be_channels_last
from sidetuning.inputs import call, map_input
from sidetuning.probe import probe_input


def copy(base: Base, width: float = 1.0, channels_last: bool | None = None) -> nn.Module:
    """A trainable copy of the base's network with its weights.

    Args:
        base: must wrap a module.
        width: fraction of the channels to keep; below 1 the least important ones (by the L2 norm of their weights) are
            pruned with `torch-pruning` (extra "slim") and the code is projected back to the base's width.
        channels_last: memory layout of images and convolutions; by default where it is faster and safe.
    """
    if not isinstance(base.net, nn.Module):
        raise ShapeError("the copy side copies a network, and this base is only callable; use another side")
    if not 0 < width <= 1:
        raise ShapeError(f"the copy side keeps a fraction of the channels in (0, 1], not {width}")
    try:
        net = copying.deepcopy(base.net).requires_grad_(True)
        if base.dtype != base.like.dtype:
            # A side of a network in half precision learns in full.
            net = net.to(base.like.dtype)
    except Exception as error:
        # Compiled and quantised networks refuse it, each in its own way.
        raise ShapeError(f"the network cannot be copied and trained ({error}); use another side") from error
    if width < 1:
        _slim(net, base, width)
    _drop_dead(net.eval(), base)
    return CopySide(net, base, may_be_channels_last(net) if channels_last is None else channels_last)


class Dead(nn.Module):
    """Stands for a part that is run, though the code does not depend on it, such as a pooler."""

    def forward(self, first: Any, *others: Any, **named: Any) -> Any:
        return first


def _drop_dead(net: nn.Module, base: Base) -> None:
    """Take out parts that are run and change nothing. One that is not run, such as an expert, may be run next time."""
    ran: set[str] = set()
    plain = inputs = base.prepare(base.example)

    def code() -> Tensor:
        return base.select(call(net, map_input(inputs, torch.clone)))

    try:
        # An example may be zeros, of which a part that matters makes nothing.
        inputs = base.prepare(probe_input(base.example))
        code()
    except Exception:
        # Some entries must fit each other, such as boxes.
        inputs = plain
    weights = dict(net.named_parameters())
    handles = [part.register_forward_hook(partial(_note, ran, name)) for name, part in net.named_modules() if name]
    with torch.enable_grad():
        before = code()
        for handle in handles:
            handle.remove()
        if not before.requires_grad:
            return
        try:
            gradients = torch.autograd.grad(before.sum(), list(weights.values()), allow_unused=True)
        except Exception:
            # Some are differentiated in training mode alone; nothing is known of their parts then.
            return
        unused = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
        for name in sorted(ran):
            own = {key for key in unused if key.startswith(f"{name}.")}
            if not own or own != {key for key in weights if key.startswith(f"{name}.")}:
                continue
            unused -= own
            place, _, last = name.rpartition(".")
            parent, part = net.get_submodule(place), net.get_submodule(name)
            setattr(parent, last, Dead())
            try:
                same = torch.equal(code(), before)
            except Exception:
                # What follows may not take what comes before, and fails in its own way.
                same = False
            if not same:
                setattr(parent, last, part)


def _note(ran: set[str], name: str, *_: Any) -> None:
    ran.add(name)


class CopySide(nn.Module):
    """Shape: as the base's input -> the base's output shape."""

    def __init__(self, net: nn.Module, base: Base, channels_last: bool) -> None:
        super().__init__()
        self.net = net
        self.channels_last = channels_last
        if channels_last:
            lay_channels_last(net)
        self.select = base.select
        code = base.select(call(net.eval(), base.prepare(base.example)))
        channels = code.shape[-1] if base.kind == "sequence" else code.shape[1]
        if channels == base.width:
            self.project: nn.Module = nn.Identity()
        else:
            self.project = nn.Conv2d(channels, base.width, 1) if base.kind == "map" else nn.Linear(channels, base.width)

    def forward(self, *tensors: Tensor, **named: Any) -> Tensor:
        given: Input = {**dict(zip(("x",), tensors, strict=True)), **named} if tensors else named
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        given = map_input(given, lambda x: x.contiguous(memory_format=form) if x.ndim == 4 else x)
        code = self.select(call(self.net, given))
        return self.project(code)  # type: ignore[no-any-return]


def _slim(net: nn.Module, base: Base, width: float) -> None:
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise ImportError(
            "a slimmed copy needs torch-pruning: pip install 'sidetuning[slim]', or use width=1"
        ) from error
    example = base.prepare(base.example)
    with torch.enable_grad():
        pruner = tp.pruner.MagnitudePruner(
            net.eval(),
            dict(example) if isinstance(example, Mapping) else example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - width,
            output_transform=base.select,
        )
        pruner.step()
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(True)
            parameter.grad = None
