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
    before = Generators()
    try:
        seed_all(seed)
        yield
    finally:
        before.set()


class Generators:
    """The states of python's, numpy's and torch's generators at one moment."""

    def __init__(self) -> None:
        self.python, self.torch = random.getstate(), torch.get_rng_state()
        self.numpy: Any = np.random.get_state(legacy=False)
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def set(self) -> None:
        """Put all generators into these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def key(self) -> tuple[Any, ...]:
        """Equal where the states of all generators but those of GPUs are."""
        state, gauss = self.numpy["state"], (self.numpy["has_gauss"], self.numpy["gauss"])
        return self.python, state["key"].tobytes(), state["pos"], gauss, self.torch.numpy().tobytes()


def seed_all(seed: int) -> None:
    if not isinstance(seed, (int, np.integer)) or not -(2**63) <= seed < 2**63:
        raise SideTuningError(f"a seed is a whole number of at most 64 bits, not {seed!r:.50}; give another")
    seed = int(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mix(seed: int, epoch: int) -> int:
    return (int(seed) * 1_000_003 + epoch * 7_919 + 1) % 2**63


def seed_loader(loader: Iterable[Any], seed: int) -> None:
    """A loader or sampler with a generator of its own does not hear the global seed, nor do workers that stay."""
    if getattr(loader, "_iterator", None) is not None:
        vars(loader)["_iterator"] = None
    batches = getattr(loader, "batch_sampler", None)
    for holder in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
