"""Let a model's router know a task, from the task's own data alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sidetuning.beside import Beside, base_text
from sidetuning.branch import Branch
from sidetuning.errors import DataError, TaskError, TrainingError
from sidetuning.objective import check_loader, unpack
from sidetuning.problems import IGNORED, Classes, check_range
from sidetuning.router import Space, kept_routes, text_of
from sidetuning.sums import averaged, check_views
from sidetuning.tuner import SideTuner

# Every tenth row is held out of a task's sums, up to this many.
HELD = 512


@torch.no_grad()
def learn_routes(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    *,
    width: int = 2000,
    grid: int = 4,
    seed: int = 0,
    views: int = 1,
    progress: bool = True,
) -> int:
    """Let `model.route` know a task, from the task's own data alone; no output of any task changes.

    The task keeps the means of its classes and the scatter around them, in a random expansion of the base's taps, and
    one row in ten, up to 512, on which probabilities are calibrated. They are saved beside the task, in
    `route.safetensors` (about 2 `width`² bytes and 2,048 `width`), and are gone with it. What was known of it before is
    replaced.

    Args:
        model: the model.
        task: the task.
        loader: as in `fit`.
        width, grid, seed: those of `Expansion`, equal for all tasks of a model.
        views: as in `solve`; `route` is then asked with as many, since single views lie further off.
        progress: show a bar.

    Returns:
        The number of rows.

    Raises:
        TaskError: other tasks of the model have routes of other features.
        DataError: fewer than 20 rows, labels without an output, or views of one sample with different targets.
        TrainingError: features that are not finite.
    """
    from tqdm import tqdm

    check_loader(loader)
    check_views(views)
    branch = model[task]
    space = Space(model.base, width, grid, seed)
    others = {name: kept for name, kept in kept_routes(model._in_memory(), model._shelf).items() if name != task}
    for name in list(others)[:1]:
        # Taps that came with later tasks do not matter.
        known = Space.read(model.base, text_of(name, others[name])["space"])
        if {**known.text, "taps": {}} != {**space.text, "taps": {}}:
            raise TaskError(f"the route of task '{name}' is in the features {known.text}, and this one in {space.text}")
        space = known
    classes: dict[int, list[Any]] = {}
    held: list[Tensor] = []
    scatter = torch.zeros(space.width, space.width, dtype=torch.float64)
    rows = 0
    for batch in tqdm(loader, task, disable=not progress, leave=False):
        x, given, target = unpack(batch)
        z = space(model.base, x, given)
        if len(target) != len(z):
            raise DataError(f"a batch has {len(z)} inputs and {len(target)} targets; give one each")
        z, labels = averaged(z, views), averaged(_labels(branch, target), views, equal=True)
        z, labels = z[labels != IGNORED].double().cpu(), labels[labels != IGNORED].cpu()
        out = (torch.arange(rows, rows + len(z)) % 10 == 9) & (torch.arange(rows, rows + len(z)) < 10 * HELD)
        held.append(z[out])
        rows += len(z)
        z, labels = z[~out], labels[~out]
        scatter += z.T @ z
        for label in labels.unique().tolist():
            some = z[labels == label]
            entry = classes.setdefault(label, [0, torch.zeros(space.width, dtype=torch.float64)])
            entry[0], entry[1] = entry[0] + len(some), entry[1] + some.sum(0)
    if rows < 20:
        raise DataError(f"a route is learned from 20 rows or more, and task '{task}' was given {rows}")
    names = sorted(classes)
    counts = torch.tensor([classes[name][0] for name in names], dtype=torch.float64)
    means = torch.stack([classes[name][1] for name in names]) / counts.unsqueeze(1)
    scatter -= (means * counts.unsqueeze(1)).T @ means
    if not all(bool(found.isfinite().all()) for found in (scatter, means, *held)):
        raise TrainingError(f"features of task '{task}' are not finite; look for NaN in the inputs")
    lower = torch.tril_indices(space.width, space.width)
    tensors = {"counts": counts, "means": means.float(), "scatter": scatter[lower[0], lower[1]].float()}
    text = {"space": space.text, **base_text(model.base.identity())}
    # It may have left memory since.
    branch = model[task]
    branch.beside = {**branch.beside, "route": Beside(text, {**tensors, "held": torch.cat(held).float()})}
    return rows


def _labels(branch: Branch, target: Tensor) -> Tensor:
    """The class of each sample, where a task has classes; else 0."""
    target = target.squeeze(1) if target.ndim == 2 and target.shape[1] == 1 else target
    if type(branch.problem) is Classes and target.ndim == 1 and not target.is_floating_point():
        target = target.long()
        if (classes := getattr(branch.head, "channels", None)) is not None:
            check_range(target, classes, IGNORED)
        return target
    return torch.zeros(len(target), dtype=torch.long, device=target.device)
