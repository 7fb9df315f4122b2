"""What is served: a moment of a model folder, which changes while requests are answered, and batches of queries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sidetuning.artifacts import CONFIG, TENSORS, read_task
from sidetuning.base import Base
from sidetuning.branch import Branch
from sidetuning.engines import NEEDED, with_engine
from sidetuning.errors import ArtifactError, DataError, SideTuningError
from sidetuning.folder import task_folders
from sidetuning.inputs import take_rows, to_device
from sidetuning.launch import M, on_device
from sidetuning.loading import in_order, load
from sidetuning.predicting import Answers, answers, groups, read, run
from sidetuning.problems import Next
from sidetuning.transforms import TextTransform, Transform, WordTransform
from sidetuning.tuner import SideTuner

# When and how a file was last replaced: equal stamps, equal content.
Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Moment:
    """A base and its tasks, which do not change. A request is answered by the moment in which it came.

    Attributes:
        base: with the taps of all its tasks.
        branches: the tasks.
        versions: the first digits of the hash of each task's weights.
    """

    base: Base
    branches: Mapping[str, Branch]
    versions: Mapping[str, str]

    def asked(self) -> list[str]:
        """The tasks that answer where none is named: not those that write, unless there is no other."""
        answering = [name for name, branch in self.branches.items() if not isinstance(branch.problem, Next)]
        return answering or list(self.branches)

    def queries(self, sources: Sequence[Any], tasks: Sequence[str], top: int | None) -> list[list[Query]]:
        """What to run for each source: a query for each preprocessing that its tasks were trained with.

        Images are decoded and resized here, in the thread of the request.

        Raises:
            DataError: a source that is none for this base.
        """
        by_transform = groups(self.base, self.branches, tasks)
        found = []
        for source in sources:
            prepared = [
                (self._sample(transform, source), transform, names) for transform, names in by_transform.items()
            ]
            found.append([Query(self, transform, sample, names, top) for sample, transform, names in prepared])
        return found

    def _sample(self, transform: Transform, source: Any) -> Any:
        texts = isinstance(transform, TextTransform)
        if texts != isinstance(source, (str, tuple, list)):
            given, wanted = ("an image", "texts") if texts else ("a text", "images")
            raise DataError(f"this model reads {wanted}, not {given}")
        other = tuple if isinstance(transform, WordTransform) else list
        if isinstance(source, other):
            given, wanted = ("a pair", "words") if other is tuple else ("words", "whole texts")
            raise DataError(
                f"a task that reads {wanted} is not asked with {given}; ask with a text, or name other tasks"
            )
        # Texts are padded to the longest of a batch.
        return source if texts else transform(source)


@dataclass(frozen=True)
class Query:
    """One source, prepared in one way, and the tasks that are asked."""

    moment: Moment
    transform: Transform
    sample: Any
    tasks: list[str]
    top: int | None


@dataclass(frozen=True)
class Reply:
    """The answers to a query.

    Attributes:
        answers: of each task.
        rows: sources that shared the base pass.
        base_seconds: duration of the base pass.
        side_seconds: duration of side, merge and head of each task, for all sources that asked it. Tasks that read
            each other's sides run together, and share their time equally.
    """

    answers: dict[str, Answers]
    rows: int
    base_seconds: float
    side_seconds: dict[str, float] = field(default_factory=dict)


def reply(queries: Sequence[Query]) -> list[Reply]:
    """Answer queries with one base pass for each preprocessing, whatever tasks they ask."""
    together: dict[Any, list[int]] = {}
    for i, query in enumerate(queries):
        kind = isinstance(query.sample, tuple)
        together.setdefault((id(query.moment), query.transform, kind), []).append(i)
    found: dict[int, Reply] = {}
    for places in together.values():
        found |= zip(places, _one_pass([queries[i] for i in places]), strict=True)
    return [found[i] for i in range(len(queries))]


@torch.no_grad()
def _one_pass(queries: Sequence[Query]) -> list[Reply]:
    """Answer queries of one moment and one preprocessing."""
    moment, samples = queries[0].moment, [query.sample for query in queries]
    images = isinstance(samples[0], Tensor)
    x, about = (torch.stack(samples), [None] * len(samples)) if images else read(queries[0].transform, samples)
    start = time.perf_counter()
    inputs = moment.base.prepare(to_device(x, moment.base.device))
    features = moment.base.encode(inputs)
    base_seconds = _now(moment.base) - start
    replies = [Reply({}, len(queries), base_seconds) for _ in queries]
    for tasks, rows in _shared(queries):
        start = time.perf_counter()
        # Views of everything where all ask; indexing would copy.
        chosen = slice(None) if len(rows) == len(queries) else torch.tensor(rows, device=features.out.device)
        outputs = run(tasks, moment.branches, take_rows(inputs, chosen), features.rows(chosen))
        seconds = (_now(moment.base) - start) / len(tasks)
        for task, output in outputs.items():
            for row, values in zip(rows, output.cpu(), strict=True):
                branch, top = moment.branches[task], queries[row].top
                replies[row].answers[task] = answers(branch, values, top=top, about=about[row])
                replies[row].side_seconds[task] = seconds
    return replies


def _shared(queries: Sequence[Query]) -> list[tuple[list[str], tuple[int, ...]]]:
    """Tasks and the rows that ask them; tasks that read sides run together, so that a shared side runs once."""
    rows: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        for task in query.tasks:
            rows.setdefault(task, []).append(row)
    branches = queries[0].moment.branches
    reading = {task for task in rows if branches[task].config.laterals}
    reading |= {lateral for task in reading for lateral in branches[task].config.laterals if lateral in rows}
    together: dict[Any, list[str]] = {}
    for task, asked in rows.items():
        together.setdefault((tuple(asked), None if task in reading else task), []).append(task)
    return [(tasks, asked) for (asked, _), tasks in together.items()]


def _now(base: Base) -> float:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
    return time.perf_counter()


class Served:
    """A model folder that is looked at again and again: tasks that were added, replaced or removed are taken over.

    The times and sizes of its files are compared, which works on every file system and gives nobody a door to knock
    at. A new moment replaces the old one as a whole. A folder that does not fit together, such as a task that was
    trained beside another lateral than is there now, leaves the old moment; the error is told.

    Args:
        path: a model folder, or the folder of one task.
        base: the base, where it cannot be built from its recorded spec.
        engine: what runs the base, as of `with_engine`; tasks that read other taps are refused then. By default what
            the folder says.
        told: called after each change with the names of the tasks, or with the error.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        base: Base | None = None,
        engine: str | None = None,
        told: Callable[[list[str] | Exception], None] = lambda found: None,
    ) -> None:
        self.path, self.told = Path(path), told
        self.error: Exception | None = None
        self._stop = threading.Event()
        # Reads one task, for the base. Without the taps of tasks, which may go.
        model = load(path, base=base, max_tasks_in_memory=1)
        model = placed(model, engine) if base is None else model
        self._base = model.base.with_taps(model._taps)
        # Of each task that is served: the stamps of its files, and what its text says.
        self._kept: dict[Path, tuple[Stamp, dict[str, Any]]] = {}
        self.moment = Moment(self._base, {}, {})
        self._seen = self._look()
        while True:
            try:
                # A branch and its version are of one reading: the folder may change meanwhile.
                self.moment, self._kept = self._rebuilt(self._seen)
                break
            except SideTuningError:
                seen, self._seen = self._seen, self._look()
                if seen == self._seen:
                    raise
        if engine is not None:
            # With the taps of all tasks that are there.
            self._base = with_engine(self.moment.base, engine)
            self.moment, self._kept = self._rebuilt(self._seen)

    def _look(self) -> dict[Path, Stamp]:
        """The task folders, each with the stamps of its files."""
        folders = [self.path] if (self.path / CONFIG).exists() else task_folders(self.path)
        found = {}
        for folder in folders:
            stamps = []
            for name in (CONFIG, TENSORS):
                try:
                    about = (folder / name).stat()
                except OSError:
                    # It is being removed.
                    continue
                stamps.append((about.st_mtime_ns, about.st_size, about.st_ino))
            found[folder] = tuple(stamps)
        return found

    def refresh(self) -> bool:
        """Take over what changed in the folder; returns whether anything did."""
        failure: Exception | None = None
        try:
            stamps = self._look()
        except OSError as error:
            # It may be back in a moment, as a file system of another machine is.
            stamps, failure = {}, error
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            if not stamps:
                raise failure or ArtifactError(f"{self.path} holds no task any more; the last ones are served on")
            self.moment, self._kept = self._rebuilt(stamps)
        except Exception as error:
            # Damaged files of any kind; what was served is served on.
            self.error = error
            self.told(error)
        else:
            self.error = None
            self.told(list(self.moment.branches))
        return True

    def _rebuilt(self, stamps: Mapping[Path, Stamp]) -> tuple[Moment, dict[Path, tuple[Stamp, dict[str, Any]]]]:
        """The moment of what is in the folder; branches that did not change are those of the moment before."""
        model, identity, before = SideTuner(self._base), self._base.identity(), self.moment.branches
        same = {folder for folder in stamps if folder in self._kept and self._kept[folder][0] == stamps[folder]}
        read = {folder: read_task(folder) for folder in stamps if folder not in same}
        configs = {folder: read[folder][0] if folder in read else self._kept[folder][1] for folder in stamps}
        untouched = set[str]()
        for folder in in_order(self.path, configs):
            name, laterals = configs[folder]["task"], configs[folder]["parts"]["laterals"]
            if folder in same and untouched.issuperset(laterals):
                model.add_branch(name, before[name])
                untouched.add(name)
            else:
                # Raises where it was trained beside another lateral than is there now.
                model._add_saved(folder, read.get(folder) or read_task(folder), identity)
        kept = {folder: (stamps[folder], config) for folder, config in configs.items()}
        return moment_of(model, kept), kept

    def watch(self, seconds: float) -> threading.Thread:
        """Look again every so many seconds, in a thread of its own, until `close`."""

        def look() -> None:
            while not self._stop.wait(seconds):
                self.refresh()

        thread = threading.Thread(target=look, name="watch", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Look no more."""
        self._stop.set()


def placed(model: M, engine: str | None) -> M:
    """A model, or a base, on the GPU where there is one, unless its engine runs on the CPU alone."""
    return model if engine in NEEDED else on_device(model)


def moment_of(model: SideTuner, kept: Mapping[Path, tuple[Stamp, dict[str, Any]]]) -> Moment:
    """The moment of a model whose tasks were read from files."""
    versions = {config["task"]: config["tensors_sha256"][:12] for _, config in kept.values()}
    branches: dict[str, Branch] = {task: model[task] for task in model.tasks}
    return Moment(model.base, MappingProxyType(branches), MappingProxyType(versions))
