"""Batch norms folded into the convolutions before them: a frozen network runs faster without."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized


def fold(net: nn.Module, taps: Sequence[str] = ()) -> nn.Module | None:
    """A copy of `net` for inference, channels last, with its batch norms folded; None where it cannot be traced.

    Outputs differ by rounding only, about 1e-6 of their size. Pairs that a tap lies between stay as they are.
    """
    if not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        return None
    # Tracing runs the network's own code, which may keep what it computes: in a copy, which shares the tensors.
    tensors = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    try:
        pairs = _foldable(copy.deepcopy(net, tensors))
    except Exception:
        # Tracing fails in as many ways as there are networks, and the plain one always works.
        return None
    folded = copy.deepcopy(net)
    for conv, norm in pairs:
        if any(_within(conv, tap) != _within(norm, tap) for tap in taps):
            continue
        conv_module: Any = folded.get_submodule(conv)
        norm_module: Any = folded.get_submodule(norm)
        for name, module in ((conv, fuse_conv_bn_eval(conv_module, norm_module)), (norm, nn.Identity())):
            parent, _, child = name.rpartition(".")
            setattr(folded.get_submodule(parent), child, module)
    return lay_channels_last(folded)


def lay_channels_last(net: nn.Module) -> nn.Module:
    """Lay images' weights out channels last; torch's own `.to(memory_format=)` fails at those of videos."""
    return net._apply(lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor)


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def _foldable(net: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms that alone read them, each called once."""
    nodes = list(torch.fx.symbolic_trace(net).graph.nodes)
    modules = dict(net.named_modules())
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    pairs = []
    for node in nodes:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
            continue
        before = node.args[0]
        if isinstance(before, torch.fx.Node) and before.op == "call_module" and len(before.users) == 1:
            conv, norm = str(before.target), str(node.target)
            once = calls.count(conv) == calls.count(norm) == 1
            # No weight norm, and nothing that changes the input of the convolution.
            plain = not modules[conv]._forward_pre_hooks and not is_parametrized(modules[conv])
            if once and plain and isinstance(modules[conv], nn.Conv2d):
                pairs.append((conv, norm))
    return pairs


def may_be_channels_last(net: nn.Module) -> bool:
    """Whether to train a network's convolutions channels last, which is faster on CPUs and tensor cores alike.

    Not where it has strided 1x1 convolutions: their backward pass then writes past its memory on CPUs, in torch itself.
    """
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    strided = any(set(conv.kernel_size) == {1} and set(conv.stride) != {1} for conv in convolutions)
    return bool(convolutions) and not strided
