"""The state of a training run on disk: a run that is killed and resumed ends with bitwise the same weights."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sidetuning.errors import TrainingError
from sidetuning.files import atomic_write

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


@dataclass
class Position:
    """Where a run is: everything but the weights, the optimiser and the generators."""

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


def save_state(
    path: Path,
    state: Position,
    objective: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    accelerator: Accelerator,
) -> None:
    if not accelerator.is_main_process:
        return
    content = {
        "position": vars(state),
        "objective": objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "rng": generators(),
    }
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def restore_state(
    path: Path, state: Position, objective: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None
) -> dict[str, Any]:
    """Read `path` into the run and return the states of the generators."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        position = content["position"]
    except Exception as error:
        raise TrainingError(f"{path} cannot be read as a resume file ({error}); delete it to start over") from error
    if (position["seed"], position["steps"]) != (state.seed, state.steps):
        raise TrainingError(
            f"{path} belongs to a run of {position['steps']} steps with seed {position['seed']}, this one has "
            f"{state.steps} steps and seed {state.seed}; give another resume file, or delete this one to start over"
        )
    for name in ("label", "optimizer"):
        if position.get(name, "") != getattr(state, name):
            raise TrainingError(
                f"{path} holds the state of {position.get(name) or 'something else'}, not of {getattr(state, name)}; give "
                "another resume file, or delete this one to start over"
            )
    try:
        # Version 0.1.0 called the trained module of `fit` its branch.
        weights = {
            key.replace("branch.", "part.", 1) if key[:7] == "branch." else key: v
            for key, v in content["objective"].items()
        }
        objective.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(
            f"{path} holds the weights of another network ({error}); delete it to start over"
        ) from error
    optimizer.load_state_dict(content["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(content["scheduler"])
    vars(state).update(position)
    rng: dict[str, Any] = content["rng"]
    return rng


def generators() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators, of types that `torch.load(weights_only=True)` reads."""
    state = np.random.get_state(legacy=False)
    state["state"]["key"] = torch.from_numpy(state["state"]["key"].astype(np.int64))
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_generators(states: dict[str, Any]) -> None:
    numpy = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
