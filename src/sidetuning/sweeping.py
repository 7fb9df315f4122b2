"""Many candidates on one cache: here in turns, or in processes of other machines, which end with the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from sidetuning.base import Base
from sidetuning.callbacks import LOWER
from sidetuning.candidates import NOT_ENDED, Candidate, SweepResult, Trial, kin, learn
from sidetuning.errors import TaskError
from sidetuning.files import held_folder
from sidetuning.launch import Workers


def sweep(
    base: Base,
    cached: Any,
    candidates: Iterable[Candidate],
    *,
    validation: Any,
    best_by: str = "loss",
    batch_size: int = 128,
    budget: float | None = None,
    out: str | Path | None = None,
    workers: Workers | None = None,
    progress: bool = True,
) -> SweepResult:
    """Learn many candidates side by side, and score each on the same validation data.

    Args:
        base: the base.
        cached: its cached features to learn from, as `cache_features` returns them.
        candidates: what to try.
        validation: cached features to score them on, with the labels of the same problem.
        best_by: the score that decides: the lowest of losses and errors, the highest of others.
        batch_size: samples per batch.
        budget: time in seconds; candidates that have not ended by then are stopped, and resume if the same call is made
            again with `out`.
        out: a folder: each candidate that ends is saved there as a task, and the same call resumes there.
        workers: what runs candidates in other processes, such as `sidetuning.integrations.ray.RayWorkers()`; all of
            them see `out` and the caches. By default they take turns in this process.
        progress: show a bar.

    Raises:
        TaskError: two candidates of one name, an unknown score, or a folder with another candidate of that name.
    """
    wanted = list(candidates)
    names = [candidate.name for candidate in wanted]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise TaskError(f"two candidates are called '{doubled}'; give each a name of its own")
    if not wanted:
        raise TaskError("there is no candidate; give at least one Candidate(name, task={…})")
    if idle := next((c.name for c in wanted if c.fit is None and not c.solve), None):
        raise TaskError(f"candidate '{idle}' has neither fit= nor solve=; give one, or it learns nothing")
    if workers is not None and out is None:
        raise TaskError("workers= needs out=, a folder that all workers see; what they learn is saved there")
    data, folder = (cached, validation), None if out is None else Path(out).absolute()
    told = dict[str, Trial]()
    with nullcontext() if folder is None else held_folder(folder):
        if workers is not None and folder is not None:
            until = None if budget is None else time.time() + budget
            work = partial(_learn_apart, base, data, batch_size, folder, until)
            told = {trial.name: trial for trial in _spread(workers, work, wanted, progress)}
            # What has ended is read below, and nothing else is learned here.
            budget = 0.0
        model, trials = learn(base, data, wanted, batch_size, folder, budget, progress)
    for trial in trials:
        if trial.error == NOT_ENDED != told.get(trial.name, trial).error:
            raise TaskError(
                f"a worker learned '{trial.name}', and {folder} lacks it here; give out= a folder that all share"
            )
    known = {name for trial in trials for name in trial.scores}
    if known and best_by not in known:
        raise TaskError(f"candidates have no score '{best_by}'; give best_by= one of {', '.join(sorted(known))}")
    sign = 1 if best_by in LOWER else -1
    numbers = {trial.name: sign * trial.scores.get(best_by, math.nan) for trial in trials}
    # What is no number is the last of those that ended.
    trials.sort(key=lambda trial: (not trial.scores, math.isnan(numbers[trial.name]), numbers[trial.name]))
    return SweepResult(trials, model)


def _spread(workers: Workers, work: Any, candidates: Sequence[Candidate], progress: bool) -> Iterator[Trial]:
    """Outcomes of candidates, each of a call of its own; solutions that differ in strength alone share one."""
    from tqdm import tqdm

    groups: dict[Any, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.name if candidate.fit is not None else kin(candidate), []).append(candidate)
    calls = {group[0].name: (group,) for group in groups.values()}
    for _, trials in tqdm(workers(work, calls), "candidates", len(calls), disable=not progress, leave=False):
        yield from trials


def _learn_apart(
    base: Base, data: tuple[Any, Any], batch_size: int, folder: Path, until: float | None, group: Sequence[Candidate]
) -> list[Trial]:
    """Learn some candidates in the process of a worker, until a time of the clock; their tasks are in the folder."""
    # Raises where the worker does not see it; hours of work would lie on a disk of its own.
    folder.stat()
    return learn(base, data, group, batch_size, folder, until and until - time.time(), False)[1]
