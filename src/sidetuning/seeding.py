"""Randomness that a seed decides: everything random is a function of (seed, epoch)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from sidetuning.errors import SideTuningError


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed python, numpy and torch inside the block and put their generators back as they were after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(enabled=True):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_all(seed: int) -> None:
    if not isinstance(seed, (int, np.integer)) or not -(2**63) <= seed < 2**63:
        raise SideTuningError(f"a seed is a whole number of at most 64 bits, not {seed!r:.50}; give another")
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mix(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch * 7_919 + 1) % 2**63


def seed_loader(loader: Iterable[Any], seed: int) -> None:
    """A loader or sampler with a generator of its own does not hear the global seed."""
    batches = getattr(loader, "batch_sampler", None)
    for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
