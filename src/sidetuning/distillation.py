"""Start a side as a small imitation of the base: the paper's default initialisation (section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.errors import TaskError
from sidetuning.inputs import entry
from sidetuning.launch import default_accelerator
from sidetuning.loop import TrainResult, train
from sidetuning.objective import unpack
from sidetuning.training import trainable
from sidetuning.tuner import SideTuner

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


def distill(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    *,
    steps: int,
    lr: float = 1e-3,
    optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    clip: float | None = 1.0,
    seed: int = 0,
    resume: str | Path | None = None,
    save_every: float = 60.0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train the side of `task` to return what the base returns; no labels are used.

    Args:
        model: the model.
        task: a task with a side.
        loader: batches as `fit` takes them; the labels are ignored.
        steps: optimiser steps.
        lr, optimizer, scheduler, clip, seed, resume, save_every, accelerator, progress: as in `fit`.
        loss: `loss(side, base)` on codes, a mean; of texts with a mask on those of their tokens, (tokens, d).

    Raises:
        TaskError: the task has no side, is frozen, or is a lateral of another.
        DataError: a data set in place of a loader.
    """
    side = model[task].side
    if side is None:
        raise TaskError(f"task '{task}' has no side to distil into")
    trainable(model, task, loader)
    if accelerator is None:
        accelerator = default_accelerator()
    model.to(accelerator.device)
    built = optimizer(side.parameters(), lr=lr)
    return train(
        _Imitation(model, task, loss),
        loader,
        built,
        steps=steps,
        accelerator=accelerator,
        scheduler=None if scheduler is None else scheduler(built),
        clip=clip,
        seed=seed,
        resume=resume,
        save_every=save_every,
        progress=f"distilling {task}" if progress else None,
        label=f"imitation {task}",
    )


class _Imitation(nn.Module):
    """The distance between a task's side and the base; holds the side alone."""

    def __init__(self, model: SideTuner, task: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.side, self.loss = model[task].side, loss
        # A tuple: torch would register them.
        self._given = (model.base, model[task])

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and its weight in a mean over several: its samples, or its tokens."""
        base, branch = self._given
        x, features, _ = unpack(batch)
        inputs = base.prepare(x)
        known = base.features(inputs, features)
        side = branch.side_output(inputs, known)
        assert side is not None
        out, mask = known.out, entry(inputs, "attention_mask")
        if base.kind == "sequence" and mask is not None and mask.shape == out.shape[:2]:
            # What padding gives is nobody's, and 0 in a cache.
            side, out = side[mask != 0], out[mask != 0]
        weight = out[..., 0].numel() if base.kind == "sequence" else len(out)
        return self.loss(side, out), torch.as_tensor(weight, device=out.device)
