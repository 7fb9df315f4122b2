"""Which inner modules of a base a side reads, where nobody says: the last stages, or blocks spread evenly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sidetuning.base import Base
from sidetuning.errors import SideTuningError

# Taps at most of networks whose blocks get smaller, and of those whose blocks are all of one size.
STAGES, BLOCKS = 3, 4


def with_chosen_taps(base: Base) -> Base:
    """The base with taps for the sides "fusion" and "ladder"; itself where it has taps, or none can be chosen."""
    if base.tap_shapes:
        return base
    for names in candidates(base.net):
        try:
            tapped = base.with_taps(names)
        except SideTuningError:
            # Not run, written over in place, or no tensor: another choice may do.
            continue
        shapes = tapped.tap_shapes.values()
        if {len(shape) for shape in shapes} in ({2}, {3}):
            return tapped
    return base


def candidates(net: Any) -> list[list[str]]:
    """Choices of modules, the best first: what timm tells, stages of residual networks, layers of transformers."""
    found = []
    told = getattr(getattr(net, "feature_info", None), "info", None) or getattr(net, "feature_info", None)
    if isinstance(told, list) and all(isinstance(entry, Mapping) and entry.get("module") for entry in told):
        names = [str(entry["module"]) for entry in told]
        smaller = len({entry.get("reduction") for entry in told}) > 1
        found.append(names[-STAGES:] if smaller else spread(names))
    if isinstance(net, nn.Module):
        stages = [child for child, m in net.named_children() if isinstance(m, nn.Sequential) and len(m) > 1]
        if len(stages) > 1:
            found.append(stages[-STAGES:])
        # The longest list of blocks of one kind, as transformers have it.
        lists = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        alike = [(name, m) for name, m in lists if name and len(m) > 2 and len({type(block) for block in m}) == 1]
        if alike:
            name, blocks = max(alike, key=lambda pair: len(pair[1]))
            found.append(spread([f"{name}.{k}" for k in range(len(blocks))]))
    return found


def spread(names: list[str]) -> list[str]:
    """Some of the names, evenly over all, the last one included."""
    count = min(BLOCKS, len(names))
    return [names[(k + 1) * len(names) // count - 1] for k in range(count)]
