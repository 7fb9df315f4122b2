"""What `fit` calls while it trains: to log, to stop, to keep the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from sidetuning.errors import TaskError, TrainingError
from sidetuning.files import atomic_write, read_safetensors
from sidetuning.launch import processes
from sidetuning.objective import Objective

# Numbers of a validation of which the smallest is the best; of others it is the largest.
LOWER = ("loss", "mae", "mse", "rmse", "perplexity")


class Callback:
    """Called while a task is trained; derive from it, and write over what you need."""

    def on_start(self, validations: Sequence[Mapping[str, float]]) -> None:
        """Before the first step, with the validations of a call that was interrupted."""

    def on_step(self, step: int, loss: float) -> bool | None:
        """After a step of the optimiser, the first of which is 1, with its loss. Return True to stop training."""

    def on_evaluate(self, scores: Mapping[str, float]) -> bool | None:
        """After a validation, with its numbers and the "step". Return True to stop training."""

    def on_end(self) -> None:
        """When training has ended or failed."""


class Deadline(Callback):
    """Stops training after some time.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def on_step(self, step: int, loss: float) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.ends


class Tracker(Callback):
    """Logs to a tracker of accelerate, such as "tensorboard" or "wandb".

    Args:
        name: of the tracker, which must be installed.
        folder: where it writes, if it writes files.
        run: name of the run.
    """

    def __init__(self, name: str, folder: str | Path, run: str) -> None:
        from accelerate import Accelerator

        processes()
        told = f"the tracker '{name}' cannot be used; install its package, or leave tracker= out"
        try:
            self.accelerator = Accelerator(log_with=name, project_dir=str(folder))
            self.accelerator.init_trackers(run)
        except (ImportError, ValueError) as error:
            raise TaskError(f"{told} ({error})") from error
        if not self.accelerator.trackers:
            raise TaskError(told)

    def on_step(self, step: int, loss: float) -> None:
        """Log the loss."""
        self.accelerator.log({"loss": loss}, step=step)

    def on_evaluate(self, scores: Mapping[str, float]) -> None:
        """Log the numbers."""
        values = {f"validation/{name}": value for name, value in scores.items() if name != "step"}
        self.accelerator.log(values, step=int(scores["step"]))

    def on_end(self) -> None:
        """Write what is left; what accelerate does at the end of training ends the processes' group too."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


class Best(Callback):
    """Keeps the weights of the best validation, and stops where it does not come again.

    Args:
        module: what is trained.
        monitor: the number of a validation that decides; of a loss or an error the smallest is the best.
        patience: validations without a better one after which training stops; None never stops.
        path: file that keeps the weights of an interrupted run.
    """

    def __init__(self, module: nn.Module, monitor: str, patience: int | None, path: Path | None) -> None:
        self.module, self.monitor, self.patience, self.path = module, monitor, patience, path
        self.rows: list[Mapping[str, float]] = []
        self.weights: dict[str, Tensor] | None = None

    def on_start(self, validations: Sequence[Mapping[str, float]]) -> None:
        """Take up the validations before an interruption."""
        self.rows = list(validations)

    def check(self, scores: Iterable[str]) -> None:
        """Raise TaskError where a validation with these metrics has no number that decides."""
        names = dict.fromkeys(["loss", *scores])
        if self.monitor not in {*names, "samples"}:
            shown = ", ".join(name for name in names if name not in ("step", "samples"))
            raise TaskError(f"the validation has no number '{self.monitor}'; monitor= is one of {shown}")

    def _value(self, scores: Mapping[str, float]) -> float:
        self.check(scores)
        value = scores[self.monitor]
        if math.isnan(value):
            return -math.inf
        return -value if self.monitor in LOWER else value

    def _best(self) -> int:
        values = [self._value(row) for row in self.rows]
        return values.index(max(values))

    def on_evaluate(self, scores: Mapping[str, float]) -> bool:
        """Keep the weights if they are the best, and say whether to stop."""
        self.rows.append(scores)
        best = self._best()
        if best == len(self.rows) - 1:
            self.weights = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
            if self.path is not None:
                with atomic_write(self.path) as temporary:
                    temporary.write_bytes(save({k: v.cpu().contiguous() for k, v in self.weights.items()}))
        return self.patience is not None and len(self.rows) - 1 - best >= self.patience

    def restore(self) -> None:
        """Give the module the weights of its best validation, if there was one."""
        if self.weights is None and self.path is not None and self.path.exists():
            found = load(read_safetensors(self.path))
            # Version 0.2.0 kept the branch alone.
            own = self.module.state_dict()
            self.weights = {key if key in own else f"part.{key}": value for key, value in found.items()}
        if self.weights is None and self.rows:
            raise TrainingError(
                f"{self.path} is missing, which held the weights of the best validation; the task has the last ones, "
                "and without the file of the run's state it learns anew"
            )
        if self.weights is not None:
            self.module.load_state_dict(self.weights)


def best_of(
    objective: Objective, monitor: str, patience: int | None, keep: bool, path: Any, validate: Any, metrics: Any
) -> list[Best]:
    """What keeps the best weights, where it is asked for; its file lies beside that of the run's state, `path`."""
    if validate is None and (keep or patience is not None or metrics is not None):
        raise TaskError("keep_best=, patience= and metrics= look at validations: give validate=, a loader")
    if patience is not None and patience < 1:
        raise TaskError(f"patience must be 1 or more, not {patience}")
    if not keep and patience is None:
        if monitor != "loss":
            raise TaskError("monitor= says which validation is the best: give keep_best=True or patience= too")
        return []
    best = Best(objective, monitor, patience, None if path is None else Path(f"{path}.best"))
    if metrics is None and (problem := objective.problem) is not None:
        metrics = problem.final(dict.fromkeys(problem.metrics(), 0.0))
    if metrics is not None:
        best.check(metrics)
    return [best]
