"""The state of a training run on disk: a run that is killed and resumed ends with bitwise the same weights."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sidetuning.errors import TrainingError
from sidetuning.files import atomic_write

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass
class Position:
    """Where a run is: everything but the weights, the optimiser and the generators. Times are in seconds."""

    seed: int
    steps: int
    label: str = ""
    optimizer: str = ""
    seconds: float = 0.0
    step: int = 0
    epoch: int = 0
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


class State:
    """Everything that the rest of a run depends on; read from `path` where an interrupted call left it.

    Raises:
        TrainingError: the file cannot be read, or holds the state of another run.
    """

    def __init__(
        self,
        path: Path | None,
        position: Position,
        objective: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> None:
        self.path, self.position, self.objective = path, position, objective
        self.optimizer, self.scheduler = optimizer, scheduler
        # The states of the generators where the run was interrupted, until they are set.
        self._generators: dict[str, Any] | None = None
        if path is not None and path.exists():
            self._restore(path)

    def save(self) -> None:
        """Write it to `path`, if there is one."""
        if self.path is None:
            return
        content = {
            "position": vars(self.position),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": _generators(),
        }
        with atomic_write(self.path) as temporary:
            torch.save(content, temporary)

    def _restore(self, path: Path) -> None:
        mend = "give another resume file, or delete this one to start over"
        try:
            content = torch.load(path, weights_only=True, map_location="cpu")
            found, own = content["position"], self.position
        except Exception as error:
            raise TrainingError(f"{path} cannot be read as a resume file ({error}); delete it to start over") from error
        if (found["seed"], found["steps"]) != (own.seed, own.steps):
            raise TrainingError(
                f"{path} belongs to a run of {found['steps']} steps with seed {found['seed']}, this one has "
                f"{own.steps} steps and seed {own.seed}; {mend}"
            )
        for name in ("label", "optimizer"):
            if (before := found.get(name, "")) != (now := getattr(own, name)):
                raise TrainingError(f"{path} holds the state of {before or 'something else'}, not of {now}; {mend}")
        # Version 0.1.0 called what `fit` trains its branch.
        weights = {re.sub("^branch[.]", "part.", key): value for key, value in content["objective"].items()}
        try:
            self.objective.load_state_dict(weights)
        except RuntimeError as error:
            raise TrainingError(f"{path} holds the weights of another network ({error}); {mend}") from error
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(content["scheduler"])
        vars(own).update(found)
        self._generators = content["rng"]

    def set_generators(self) -> None:
        """Draw on where the interrupted call stopped; nothing where there was none."""
        states, self._generators = self._generators, None
        if states is None:
            return
        numpy = states["numpy"]
        key = numpy["state"]["key"].numpy().astype(np.uint32)
        random.setstate(states["python"])
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
        torch.set_rng_state(states["torch"])
        if states["cuda"]:
            torch.cuda.set_rng_state_all(states["cuda"])


def _generators() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators, of types that `torch.load(weights_only=True)` reads."""
    state = np.random.get_state(legacy=False)
    state["state"]["key"] = torch.from_numpy(state["state"]["key"].astype(np.int64))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": state, "torch": torch.get_rng_state(), "cuda": cuda}
