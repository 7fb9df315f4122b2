"""Learning tasks one after another, and measuring every task after each: what the incremental scenarios share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sidetuning.errors import ArtifactError
from sidetuning_bench.continual import AccuracyMatrix
from sidetuning_bench.methods import Method, Recipe, Task, saved_tasks
from sidetuning_bench.results import RunResult
from sidetuning_bench.runs import Run, peak_memory_mb


class Score(NamedTuple):
    """How well a task is done: in 0 … 1, higher is better, and in the task's own measure."""

    score: float
    value: float


@dataclass(frozen=True)
class Lesson:
    """A task with what it is learned from.

    Attributes:
        task: the task.
        loader: makes the loader of its training batches.
        evaluate: how well a method does it, on frames that it was not trained on.
    """

    task: Task
    loader: Callable[[], Iterable[Any]]
    evaluate: Callable[[Method], Score]


def learn_in_order(
    folder: Run,
    build: Callable[[], Method],
    lessons: Sequence[Lesson],
    recipe: Recipe,
    *,
    settings: Mapping[str, Any],
    method_name: str,
    seed: int,
    base_seconds: float,
    alone: bool = False,
    save_every: float = 10.0,
    progress: bool = True,
    learned: Callable[[Method, str], None] = lambda method, name: None,
    measures: Mapping[str, str] | None = None,
) -> RunResult:
    """Learn the lessons in order in a run's folder, saving after each; evaluate every task so far after every task.

    Of a method that is not `sequential` a task is evaluated when it is learned and after the last one; in between the former stands.

    Args:
        folder: the run; what it holds already is not learned again.
        build: makes a method without tasks.
        lessons: the tasks.
        recipe: how each is trained.
        settings, method_name, seed, base_seconds: recorded in the result.
        alone: learn every task as if it were the first, with a method of its own.
        save_every: seconds between two resume files.
        progress: show bars.
        learned: called with the method and the task's name after each task, before it is saved; it may be called again after a kill.
        measures: the name of each task's own measure, where it is not the accuracy.
    """
    names = [lesson.task.name for lesson in lessons]
    rows = {row["task"]: row for row in folder.metrics()}
    saved = [n for n in names if n in saved_tasks(folder.tasks(n if alone else ""))]
    if lost := [name for name in saved if name not in rows]:  # a task is saved after its row is written
        raise ArtifactError(
            f"{folder.folder}/metrics.jsonl is damaged: {lost[0]} is learned, and its row is not there; delete "
            f"{folder.folder} and run again"
        )
    done = {name: rows[name] for name in saved}
    matrix = AccuracyMatrix(names)
    methods = [build() for _ in done] if alone and done else [build()]
    for method, name in zip(methods, done, strict=False):
        method.load(folder.tasks(name if alone else ""))
    file = folder.folder / "result.json"
    if len(done) == len(names) and file.exists():
        return RunResult.load(file)
    for i, (lesson, name) in enumerate(zip(lessons, names, strict=True)):
        if name in done:
            folder.done(name)
            matrix.add(done[name]["accuracy"])
            continue
        if alone and i:
            methods.append(build())
        method = methods[-1]
        held = peak_memory_mb()
        peak_memory_mb(anew=True)
        result = method.learn(
            lesson.task, lesson.loader(), recipe, resume=folder.resume(name), save_every=save_every, progress=progress
        )
        # Tasks that do not touch each other are measured when they are learned, and again at the end.
        kept = alone or (not method.sequential and i + 1 < len(names))
        scores = [
            Score(done[n]["accuracy"][-1], done[n]["values"][-1]) if kept and n != name else other.evaluate(method)
            for n, other in zip(names[: i + 1], lessons, strict=False)
        ]
        memory = peak_memory_mb()
        row: dict[str, Any] = {
            "task": name, "accuracy": [s.score for s in scores], "values": [s.value for s in scores], "seconds": result.seconds,
            "loss": result.losses[-1], "added": method.added(name), "shared": method.shared(), "alpha": method.alpha(name),
            "base_seconds": base_seconds, "memory_mb": memory, "peak_memory_mb": max(filter(None, (held, memory)), default=None),
        }  # fmt: skip
        matrix.add(row["accuracy"])
        if name in rows:  # killed between the next lines; its resume file has brought back what it had learned
            row = rows[name]
        else:
            folder.append(row)
        learned(method, name)
        method.save(folder.tasks(name if alone else ""), metrics={"accuracy": scores[-1].score})
        folder.done(name)
        done[name] = row
    matrix.save(folder.folder / "matrix.json")
    learned_rows = [done[name] for name in names]
    final = RunResult(
        method=method_name, variant="", seed=seed, tasks=names, accuracy=matrix.rows, alone=None,
        alphas=[row["alpha"] for row in learned_rows], parameters=[row["added"] for row in learned_rows],
        shared_parameters=learned_rows[-1]["shared"], seconds=[row["seconds"] for row in learned_rows],
        base_seconds=max(row["base_seconds"] for row in learned_rows) if methods[0].uses_features else 0.0,
        peak_memory_mb=max((m for row in learned_rows if (m := row["peak_memory_mb"]) is not None), default=None), settings=dict(settings),
        memory_mb=[row["memory_mb"] for row in learned_rows] if all("memory_mb" in row for row in learned_rows) else None,
        values=[row["values"] for row in learned_rows] if measures else None,
        measures=[measures[name] for name in names] if measures else None,
    )  # fmt: skip
    final.save(file)
    return final


def costs(result: RunResult, folder: str) -> str:
    """What a run took, for people: parameters, times, where it lies."""
    added, shared = max(result.parameters), result.shared_parameters
    share = f" ({added / shared:.1%})" if shared else ""
    return (
        f"shared by all tasks: {shared:,} parameters; each task adds at most {added:,}{share}.\n"
        f"base features: {result.base_seconds:.1f} s; training: {sum(result.seconds):.1f} s. Run folder: {folder}"
    )
