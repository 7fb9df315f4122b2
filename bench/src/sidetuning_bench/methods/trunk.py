"""A copy of a base's network that a method may train, or run with tensors of its own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Input, Tap
from sidetuning.errors import TaskError
from sidetuning.folding import lay_channels_last, may_be_channels_last
from sidetuning.inputs import call


class Trunk(nn.Module):
    """Prepared inputs to the base's code, through a copy of its network.

    Args:
        base: the base; its own network is not touched.
        pretrained: False draws the weights anew.
        frozen: nothing is trained, and batch norms and dropout stay in evaluation mode.

    Raises:
        TaskError: the base is not a torch module.
    """

    def __init__(self, base: Base, *, pretrained: bool = True, frozen: bool = False) -> None:
        super().__init__()
        if not isinstance(base.net, nn.Module):
            raise TaskError(
                f"this method trains the base's network, and {type(base.net).__name__} is no torch module; "
                "sidetune, features and boosting need none"
            )
        net = copy.deepcopy(base.net).requires_grad_(not frozen)
        for module in net.modules():
            # The base's taps: nobody reads them here, and any hook keeps torch from its fused layers.
            for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Tap)]:
                del module._forward_hooks[key]
        # A bare layer is wrapped, so that each layer has a name.
        self.net = nn.Sequential(net) if isinstance(net, (nn.Conv2d, nn.Linear)) else net
        self.frozen = frozen
        self.select = base.select
        self.images = may_be_channels_last(self.net)
        if not pretrained:
            reinitialise(self.net)
        if self.images:
            lay_channels_last(self.net)
        self.train(not frozen)

    def forward(self, inputs: Input) -> Tensor:
        if not isinstance(inputs, Tensor) and "x" in inputs:
            inputs = inputs["x"]
        if isinstance(inputs, Tensor) and inputs.ndim == 4:
            form = torch.channels_last if self.images else torch.contiguous_format
            inputs = inputs.contiguous(memory_format=form)
        return self.select(call(self.net, inputs))

    def train(self, mode: bool = True) -> Trunk:
        """Set the mode; a frozen trunk stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """The convolutions and linear layers, by name in `net`.

        The joint input projection of `nn.MultiheadAttention` is a parameter, and none of them.
        """
        return {n: m for n, m in self.net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

    def view(self, tensors: Mapping[str, Tensor]) -> Trunk:
        """A copy for one pass that shares all tensors but those given, by name; it takes about 20 µs a module.

        The trunk does not see hooks, modes and tensors that are put into a view, so every thread can have its own.
        """
        view: Trunk = _shallow(self, {})
        for name, tensor in tensors.items():
            owner, _, key = name.rpartition(".")
            module = view.get_submodule(owner)
            entries: dict[str, Any] = module._parameters if key in module._parameters else module._buffers
            entries[key] = tensor
        return view


def _shallow(value: Any, copies: dict[nn.Module, nn.Module]) -> Any:
    """Copies of modules and their containers, each module once; all else, tensors included, is shared."""
    if isinstance(value, nn.Module):
        if value not in copies:
            copies[value] = twin = object.__new__(type(value))
            for key, item in vars(value).items():
                twin.__dict__[key] = _shallow(item, copies)
            twin._forward_hooks = OrderedDict(value._forward_hooks)
        return copies[value]
    if type(value) in (dict, OrderedDict) and value:
        return type(value)((key, _shallow(item, copies)) for key, item in value.items())
    if type(value) in (list, tuple) and value:
        return type(value)(_shallow(item, copies) for item in value)
    if type(value) is MethodType:
        return MethodType(value.__func__, _shallow(value.__self__, copies))
    return value


@torch.no_grad()
def reinitialise(net: nn.Module) -> None:
    """Draw all weights anew, by each module's own `reset_parameters`: torch's initial weights, not the author's.

    A parameter that no module knows how to draw (a class token, a position embedding, a layer scale) is shuffled: that
    keeps its size and forgets what it learned.
    """
    for module in net.modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                flat = parameter.flatten()
                parameter.copy_(flat[torch.randperm(len(flat))].view_as(parameter))
