"""Learning tasks one after another, and measuring every task after each: what the incremental scenarios share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning.files import held_folder
from sidetuning.terminal import say, say_markdown
from sidetuning_bench.methods import Method, Recipe, Task, saved_tasks
from sidetuning_bench.options import FREE, flat, with_values
from sidetuning_bench.results import RunResult, markdown_table, own_values
from sidetuning_bench.runs import Run, peak_memory_mb

S = TypeVar("S")
Row = dict[str, Any]


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
        evaluate: how well a method does it, on images that it was not trained on.
    """

    task: Task
    loader: Callable[[], Iterable[Any]]
    evaluate: Callable[[Method], Score]


@dataclass(frozen=True)
class Course:
    """The lessons of a run, and how they are learned.

    Attributes:
        settings: of the scenario, with its groups `method` and `run`.
        build: makes the method without tasks.
        lessons: the tasks, in order.
        recipe: how each is trained.
        base_seconds: time of computing the base's features.
        alone: learn every task as if it were the first, with a method of its own.
        learned: called with the method and a task's name after each task, before it is saved; after a kill it may be
            called again.
        measures: name of each task's own measure, where that is not the accuracy.
        fingerprints: of what the run is of, recorded with the settings.
    """

    settings: Any
    build: Callable[[], Method]
    lessons: Sequence[Lesson]
    recipe: Recipe
    base_seconds: float
    alone: bool = False
    learned: Callable[[Method, str], None] = lambda method, name: None
    measures: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [lesson.task.name for lesson in self.lessons]


def learn_in_order(folder: Run, course: Course) -> RunResult:
    """Learn the lessons in order in a run's folder, saving after each; evaluate every task so far after every task.

    Of a method that is not `sequential` a task is evaluated when it is learned and after the last one; in between the
    former stands. What the folder holds already is not learned again.

    Raises:
        ArtifactError: a task is saved, and its row of metrics is lost; or another process works in the folder.
    """
    with held_folder(folder.folder):
        done = saved_rows(folder, course)
        methods = [course.build() for _ in done] if course.alone and done else [course.build()]
        for method, name in zip(methods, done, strict=False):
            method.load(folder.tasks(name if course.alone else ""))
        file = folder.folder / "result.json"
        if len(done) == len(course.lessons) and file.exists():
            return RunResult.load(file)
        for i, name in enumerate(course.names):
            if name not in done:
                if course.alone and i:
                    methods.append(course.build())
                learn_lesson(folder, course, methods[-1], i, done)
            folder.done(name)
        result = result_of(course, [done[name] for name in course.names], methods[0].uses_features)
        result.matrix.save(folder.folder / "matrix.json")
        result.save(file)
        return result


def saved_rows(folder: Run, course: Course) -> dict[str, Row]:
    """The rows of the tasks that are learned and saved, by name."""
    rows = {row["task"]: row for row in folder.metrics()}
    saved = [n for n in course.names if n in saved_tasks(folder.tasks(n if course.alone else ""))]
    # A task is saved after its row is written.
    if lost := [name for name in saved if name not in rows]:
        raise ArtifactError(
            f"{folder.folder}/metrics.jsonl is damaged: {lost[0]} is learned, and its row is not there; delete "
            f"{folder.folder} and run again"
        )
    return {name: rows[name] for name in saved}


def learn_lesson(folder: Run, course: Course, method: Method, index: int, done: dict[str, Row]) -> None:
    """Learn one task, evaluate all so far, save the method, and add the row to `done`."""
    lesson, options = course.lessons[index], course.settings.run
    name = lesson.task.name
    if options.progress:
        say(f"task {index + 1} of {len(course.lessons)}: {name}", error=True)
    held = peak_memory_mb(anew=True)
    resume = folder.resume(name)
    trained = method.learn(
        lesson.task,
        lesson.loader(),
        course.recipe,
        resume=resume,
        save_every=options.save_every,
        progress=options.progress,
    )
    # Tasks that do not touch each other are measured when they are learned, and again at the end.
    stands = course.alone or (not method.sequential and index + 1 < len(course.lessons))
    scores = [
        Score(done[n]["accuracy"][-1], done[n]["values"][-1]) if stands and n != name else other.evaluate(method)
        for n, other in zip(course.names[: index + 1], course.lessons, strict=False)
    ]
    memory = peak_memory_mb()
    row: Row = {
        "task": name,
        "accuracy": [s.score for s in scores],
        "values": [s.value for s in scores],
        "seconds": trained.seconds,
        "loss": trained.losses[-1],
        "added": method.added(name),
        "shared": method.shared(),
        "alpha": method.alpha(name),
        "base_seconds": course.base_seconds,
        "memory_mb": memory,
        "peak_memory_mb": max(filter(None, (held, memory)), default=None),
    }
    rows = {row["task"]: row for row in folder.metrics()}
    # Killed between the next lines; the resume file has brought back what was learned.
    if name in rows:
        row = rows[name]
    else:
        folder.append(row)
    course.learned(method, name)
    method.save(folder.tasks(name if course.alone else ""), metrics={"accuracy": scores[-1].score})
    done[name] = row


def result_of(course: Course, rows: Sequence[Row], uses_features: bool) -> RunResult:
    """The result of a finished run."""
    settings, memory = course.settings, [row.get("memory_mb") for row in rows]
    recorded = {name: value for name, value in flat(settings).items() if name not in FREE}
    if course.fingerprints:
        recorded["fingerprints"] = dict(course.fingerprints)
    return RunResult(
        method=settings.method.name,
        variant="",
        seed=settings.run.seed,
        tasks=course.names,
        accuracy=[row["accuracy"] for row in rows],
        alone=None,
        alphas=[row["alpha"] for row in rows],
        parameters=[row["added"] for row in rows],
        shared_parameters=rows[-1]["shared"],
        seconds=[row["seconds"] for row in rows],
        base_seconds=max(row["base_seconds"] for row in rows) if uses_features else 0.0,
        peak_memory_mb=max((m for row in rows if (m := row["peak_memory_mb"]) is not None), default=None),
        settings=recorded,
        values=[row["values"] for row in rows] if course.measures else None,
        measures=[course.measures[name] for name in course.names] if course.measures else None,
        memory_mb=memory if all("memory_mb" in row for row in rows) else None,
    )


def with_recipe(settings: S, best: Mapping[str, Any]) -> S:
    """The settings with those that their recipe sets, where it is "best".

    Args:
        settings: of a scenario, with a `recipe`.
        best: what that recipe sets, by flat name.

    Raises:
        SideTuningError: one of these is neither what the recipe sets nor its default, or the method is another.
    """
    given, default = flat(settings), flat(type(settings)())
    if given["recipe"] == "paper":
        return settings
    if given["method"] != "sidetune":
        raise SideTuningError(f"--recipe best is side-tuning's; leave out it or {given['method']}")
    for name, value in best.items():
        if given[name] not in (value, default[name]):
            flag = name.replace("_", "-")
            raise SideTuningError(f"--recipe best sets --{flag} itself, to {value}; leave one of them out")
    return with_values(settings, best)


def print_result(result: RunResult, title: str, folder: str) -> None:
    """Print the table of a run, and what it took."""
    from pandas import DataFrame

    matrix = result.matrix
    measures, learned, ends = zip(*(own_values(result, task) for task in result.tasks), strict=True)
    columns: dict[str, Iterable[str]] = {"task": result.tasks}
    if result.measures is not None:
        columns |= {"measure": measures, "score": [f"{100 * score:.1f}" for score in matrix.final]}
    columns |= {"when learned": [f"{value:.4g}" for value in learned], "at the end": [f"{value:.4g}" for value in ends]}
    if result.measures is None:
        columns["forgotten"] = [f"{100 * lost:.1f}" for lost in matrix.forgetting]
    columns["alpha"] = ["–" if alpha is None else f"{alpha:.3f}" for alpha in result.alphas]
    columns["seconds"] = [f"{seconds:.1f}" for seconds in result.seconds]
    average, lost = 100 * matrix.average, 100 * (0.0 - matrix.backward_transfer)
    added, shared = max(result.parameters), result.shared_parameters
    share = f" ({added / shared:.1%})" if shared else ""
    say_markdown(f"{title}, {result.method}, seed {result.seed}\n\n{markdown_table(DataFrame(columns))}")
    say(
        f"average score at the end: {average:.1f}; lost on earlier tasks, on average: {lost:.1f} points.\n"
        f"shared by all tasks: {shared:,} parameters; each task adds at most {added:,}{share}.\n"
        f"base features: {result.base_seconds:.1f} s; training: {sum(result.seconds):.1f} s. Run folder: {folder}"
    )
