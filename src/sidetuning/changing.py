"""Add samples to a task that was solved in closed form, and take some out, without the others."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sidetuning.artifacts import tensors_sha256
from sidetuning.beside import is_of_base, read_beside
from sidetuning.branch import Branch
from sidetuning.closed_form import SolveResult, keep, ready, settle
from sidetuning.errors import DataError, TaskError
from sidetuning.files import check_json
from sidetuning.heads import InUnits
from sidetuning.problems import Classes, Labels
from sidetuning.sides.initialise import layout
from sidetuning.sums import Sums, check_views, collect, last_linear
from sidetuning.training import in_evaluation
from sidetuning.tuner import SideTuner

if TYPE_CHECKING:
    from accelerate import Accelerator


def update(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    *,
    new_labels: int | Sequence[str] = 0,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> SolveResult:
    """Add samples to a task that `solve(keep_statistics=True)` learned, without the earlier ones.

    The result is that of solving anew with both: bitwise where the batches are the same and come in the same order, in
    one process; else the sums agree to 1e-10 of their size, given equal features.

    Args:
        model: the model.
        task: the task, with its statistics.
        loader: the further samples.
        new_labels: classes that join the task after those that it has: how many, or their names where it has names.
            `loader` has them as the next class numbers.
        accelerator, progress: as in `solve`.

    Raises:
        TaskError: no statistics were kept, the task was changed since or meanwhile, or its classes cannot grow.
        DataError, TrainingError: as in `solve`; nothing is changed then.
    """
    return _change(model, task, loader, 1, new_labels, accelerator, progress)


def forget(
    model: SideTuner,
    task: str,
    samples: Iterable[Any],
    *,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> SolveResult:
    """Take samples out of a task that `solve(keep_statistics=True)` learned, without the others.

    The result is that of solving anew without them: the sums agree to 1e-10 of their size, given equal features. What
    `learn_routes` kept of the task is dropped, since the samples are in it.

    Args:
        model: the model.
        task: the task, with its statistics.
        samples: a loader of samples that the task learned, each with the target that it had.
        accelerator, progress: as in `solve`.

    Raises:
        TaskError: as in `update`.
        DataError: samples that the task has not learned, as far as its sums tell, or all of them; nothing is changed.
    """
    return _change(model, task, samples, -1, 0, accelerator, progress)


@torch.no_grad()
def _change(
    model: SideTuner,
    task: str,
    loader: Iterable[Any],
    sign: int,
    new_labels: int | Sequence[str],
    given: Accelerator | None,
    progress: bool,
) -> SolveResult:
    """What `update` and `forget` do: of a copy of the task, which takes its place when all went well."""
    started = time.monotonic()
    old, accelerator = ready(model, task, loader, None, 1, given)
    sums, text = kept_sums(model, task, old)
    sums = sums.to(accelerator.device)
    # Sums are never written over.
    branch = copy.deepcopy(old, {id(old.beside): dict(old.beside)})
    if new_labels:
        _grow(branch, task, new_labels)
        sums = sums.wider(last_linear(branch, task).out_features - len(sums.y))
    layer = last_linear(branch, task)
    with in_evaluation(branch):
        arguments = (model, branch, task, layer, loader, accelerator, progress)
        how = partial(collect, *arguments, views=text["views"], exact=True, further=True)
        # Batch by batch into the same sums, as solving anew adds them.
        total = how(sums=sums) if sign > 0 else sums.plus(how(), -1)
        if sign < 0:
            _check_forgotten(task, branch, sums, total)
        chosen, error = settle(branch, layer, total, text["strength"])
    if sign < 0:
        branch.beside.pop("route", None)
    keep(model, branch, total, text["strength"], text["views"])
    _replace(model, task, branch, text["weights"])
    return SolveResult(int(total.count), chosen, error, time.monotonic() - started)


def _replace(model: SideTuner, task: str, branch: Branch, before: str) -> None:
    """Let a changed copy of a task take its place at once: no thread sees half of the change.

    Raises:
        TaskError: the task, whose weights had the hash `before`, was changed or removed meanwhile.
    """
    with model._changes:
        if task not in model or tensors_sha256(model[task]) != before:
            raise TaskError(f"task '{task}' was changed or removed meanwhile; give these samples again")
        model._owners.remove(task)
        model._owners.add(task, branch)
        model.branches[task] = branch


def kept_sums(model: SideTuner, task: str, branch: Branch) -> tuple[Sums, dict[str, Any]]:
    """The statistics of a task, and how it was solved.

    Raises:
        TaskError: there are none, or the task or its base has other weights than it was solved with.
    """
    if "statistics" not in branch.beside:
        raise TaskError(f"no statistics of task '{task}' were kept; solve it with keep_statistics=True first")
    kept = read_beside(branch.beside["statistics"])
    schema = {"weights": str, "base": str, "views": int, "strength?": float, "identity?": dict}
    check_json(kept.text, f"the statistics of task '{task}'", schema, "solve it again with keep_statistics=True")
    if kept.text["weights"] != tensors_sha256(branch) or not is_of_base(kept.text, model.base.identity()):
        raise TaskError(
            f"task '{task}' or its base changed since it was solved, so that its statistics are of other features; "
            "solve it again with keep_statistics=True"
        )
    check_views(kept.text["views"])
    layer = last_linear(branch, task)
    return Sums.read(kept, layer.in_features, layer.out_features, torch.device("cpu")), kept.text


def _grow(branch: Branch, task: str, new_labels: int | Sequence[str]) -> None:
    """Give a task of classes further outputs."""
    if isinstance(new_labels, str):
        raise TaskError(f"new_labels= is a list of names, such as ['{new_labels}']")
    more = new_labels if isinstance(new_labels, int) else len(new_labels)
    name, options = branch.config.head
    if name not in ("linear", "random") or type(branch.problem) is not Classes or more < 1:
        raise TaskError(
            f"classes join a task of the problem 'classes' with a linear or random head; task '{task}' has the problem "
            f"'{type(branch.problem).__name__.lower()}' and the head '{name}', and {more} join"
        )
    if (branch.labels is None) != isinstance(new_labels, int):
        has = (
            "no names of its classes; say how many join"
            if branch.labels is None
            else "names of its classes; give theirs"
        )
        raise TaskError(f"task '{task}' has {has}, new_labels=")
    if branch.labels is not None and not isinstance(new_labels, int):
        names = [*branch.labels, *(str(label) for label in new_labels)]
        if len(set(names)) < len(names):
            raise TaskError(f"task '{task}' has the classes {branch.labels}, and {list(new_labels)} repeat one")
        branch.labels = names
    layer = last_linear(branch, task)
    layer.out_features += more
    for weight in (layer.weight, layer.bias):
        weight.data = torch.cat([weight.data, weight.new_zeros(more, *weight.shape[1:])])
    assert isinstance(branch.head, InUnits)
    branch.head.channels = layer.out_features
    branch.config = replace(branch.config, head=(name, {**options, "outputs": layer.out_features}))
    branch.built = layout(branch)


def _check_forgotten(task: str, branch: Branch, before: Sums, after: Sums) -> None:
    """Raise DataError where sums tell that samples were taken out that had not been learned."""
    if float(after.count) < 1:
        raise DataError(f"task '{task}' learned {int(before.count)} rows and all are to be forgotten; remove the task")
    _, _, scatter, _, spread = after.centred()
    # Features that are computed again, in other batches, agree to some 1e-7.
    wrong = any(
        bool((left < -limit * whole.abs().clamp(min=1e-30)).any())
        for left, whole, limit in ((scatter.diagonal(), before.xx.diagonal(), 1e-6), (spread, before.yy, 1e-9))
    )
    if isinstance(branch.problem, (Classes, Labels)):
        wrong = wrong or bool((after.y < -1e-6).any())
    if wrong:
        raise DataError(
            f"some of these samples were not learned by task '{task}' with these targets; give those that were"
        )
