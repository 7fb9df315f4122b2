"""A copy of a base's network that a method may train, or thread its own parameters through."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sidetuning.base import Base, Input, call
from sidetuning.errors import TaskError


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
        bare = isinstance(net, (nn.Conv2d, nn.Linear))
        self.net = nn.Sequential(net) if bare else net  # so that each layer has a name
        self.frozen = frozen
        self.select = base.select
        self.images = any(isinstance(m, nn.Conv2d) for m in self.net.modules())
        if not pretrained:
            reinitialise(self.net)
        if self.images:
            self.net.to(memory_format=torch.channels_last)  # faster convolutions, on CPUs and tensor cores alike
        self.train(not frozen)

    def forward(self, inputs: Input) -> Tensor:
        if not isinstance(inputs, Tensor) and "x" in inputs:
            inputs = inputs["x"]
        if self.images and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.select(call(self.net, inputs))

    def train(self, mode: bool = True) -> Trunk:
        """A frozen trunk stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """The convolutions and linear layers, by name in `net`; not the joint input projection of `nn.MultiheadAttention`."""
        return {n: m for n, m in self.net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@torch.no_grad()
def reinitialise(net: nn.Module) -> None:
    """Draw all weights anew, by each module's own `reset_parameters`: as torch builds them, not as the net's author may have.

    A parameter that no module knows how to draw (a class token, a position embedding, a layer scale) is shuffled: that keeps
    its size and forgets what it learned.
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
