"""What runs measured, and the summary of several: one row per method and variant, over its seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning.files import write_json
from sidetuning_bench.continual import AccuracyMatrix, average_rank, mean_and_error, rigidity


@dataclass(frozen=True)
class RunResult:
    """What one run measured: one method, in one variant, with one seed.

    Attributes:
        method: "sidetune", "ewc", …
        variant: tells the cells of an ablation of one method apart, such as "merge=alpha"; "" where there is one.
        seed: of the run.
        tasks: names, in the order of learning.
        accuracy: `accuracy[i][j]`, in 0 … 1, is that of task j after learning task i, j <= i.
        alone: accuracy of each task where it is the first one learned; None where that was not measured.
        alphas: the base's weight in the merge of each task; None where the merge has no alpha.
        parameters: how many each task added (trained and kept for it).
        shared_parameters: how many serve all tasks, such as the base's.
        seconds: training time of each task.
        base_seconds: time to compute the base's features; 0 where nothing is computed ahead.
        peak_memory_mb: the most memory the run held, in MB; None where it was not measured.
        memory_mb: the most that it held while each task was learned and measured; None where that was not measured.
        settings: JSON values, shown as they are; they may be nested, such as {"versions": {…}}.
        values: like `accuracy`, in each task's own measure; None where that is the accuracy.
        measures: what the values of each task are, such as "mean angular error, °".

    Raises:
        ArtifactError: lists of the wrong length, or an accuracy outside 0 … 1.
    """

    method: str
    variant: str
    seed: int
    tasks: list[str]
    accuracy: list[list[float]]
    alone: list[float] | None
    alphas: list[float | None]
    parameters: list[int]
    shared_parameters: int
    seconds: list[float]
    base_seconds: float
    peak_memory_mb: float | None
    settings: dict[str, Any]
    values: list[list[float]] | None = None
    measures: list[str] | None = None
    memory_mb: list[float | None] | None = None

    def __post_init__(self) -> None:
        n = len(self.tasks)
        if not n:
            raise ArtifactError("there are no tasks")
        for name in ("accuracy", "alone", "alphas", "parameters", "seconds", "values", "measures", "memory_mb"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ArtifactError(f"'{name}' has {len(values)} entries for {n} tasks")
        for i, row in enumerate(self.accuracy):
            if len(row) != i + 1:
                raise ArtifactError(f"row {i} of 'accuracy' has {len(row)} numbers, not {i + 1}")
        for value in (v for row in [*self.accuracy, self.alone or []] for v in row):
            if not 0 <= value <= 1:  # NaN too
                raise ArtifactError(f"an accuracy is {value}, not in 0 … 1")
        amounts = [*self.parameters, *self.seconds, self.shared_parameters, self.base_seconds, self.peak_memory_mb or 0]
        if not all(0 <= v < math.inf for v in amounts) or not all(math.isfinite(a or 0) for a in self.alphas):
            raise ArtifactError("a number of parameters, a time, a memory or an alpha is negative or not finite")

    @classmethod
    def load(cls, path: str | Path) -> RunResult:
        """Read what `save` wrote.

        Raises:
            ArtifactError: no such file, not JSON, a key missing or unknown, or values that do not fit each other.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} does not exist; run the comparison first") from error
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} is not a result in JSON ({error}); delete it and run again") from error
        names = {f.name for f in fields(cls)}
        optional = {f.name for f in fields(cls) if f.default is not MISSING}
        found = set(content) if isinstance(content, dict) else set()
        for word, keys in (("lacks", names - found - optional), ("has the unknown", found - names)):
            if keys:
                raise ArtifactError(f"{path} {word} {', '.join(map(repr, sorted(keys)))}; delete it and run again")
        try:
            if not all(isinstance(text, str) for text in (content["method"], content["variant"], *content["tasks"])):
                raise TypeError("a name is not a text")
            for key, kind in (("tasks", list), ("settings", dict), ("seed", int)):
                if not isinstance(content[key], kind):
                    raise TypeError(f"'{key}' is {content[key]!r}")
            return cls(**content)
        except (ArtifactError, TypeError) as error:  # a TypeError also where numbers are texts
            raise ArtifactError(f"{path} is damaged: {error}; delete it and run again") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, asdict(self))

    @property
    def label(self) -> str:
        """Method and variant."""
        return f"{self.method} · {self.variant}" if self.variant else self.method

    @property
    def matrix(self) -> AccuracyMatrix:
        """The accuracies with their measures."""
        return AccuracyMatrix(self.tasks, self.accuracy)


SMALL = 0.1  # of what all tasks share: what a task may add to be small


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, 0 for one seed."""

    mean: float
    error: float


@dataclass(frozen=True)
class SummaryRow:
    """One method in one variant, over its seeds.

    Attributes:
        accuracy: average over the tasks at the end, in 0 … 1.
        forgetting: what a task lost from when it was learned to the end, in 0 … 1, average over all tasks but the last.
        rigidity: mean log ratio of errors, learned in sequence over learned alone; None where alone was not measured.
        rank: average over tasks among the rows, 1 the best, over the seeds that all rows have; None for a single row, or where
            rows share no seed.
        small_rank: the same among the rows that add at most a tenth of what all tasks share; None where that is all rows.
        ranked, small_ranked: the seeds that these ranks are of.
        parameters: added per task, mean.
        seconds: of training per task, median over tasks and seeds, which a task that other work held up does not move.
        base_seconds: to compute the base's features, the longest of the seeds.
        peak_memory_mb: the most of the seeds, in MB.
        scored: the tasks have measures of their own, and `accuracy` is a score made of them.
    """

    method: str
    variant: str
    seeds: int
    accuracy: Estimate
    forgetting: Estimate
    rigidity: Estimate | None
    rank: Estimate | None
    small_rank: Estimate | None
    parameters: float
    shared_parameters: int
    seconds: float
    base_seconds: float
    peak_memory_mb: float | None
    scored: bool = False
    ranked: tuple[int, ...] = ()
    small_ranked: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Method and variant."""
        return f"{self.method} · {self.variant}" if self.variant else self.method


class Column(NamedTuple):
    """A column of the summary: its value in a row, and how many decimals it has."""

    heading: str
    unit: str
    value: Callable[[SummaryRow], float | Estimate | None]
    decimals: int = 1


COLUMNS = (
    Column("Accuracy", "%", lambda r: Estimate(100 * r.accuracy.mean, 100 * r.accuracy.error)),
    Column("Forgetting", "points", lambda r: Estimate(100 * r.forgetting.mean, 100 * r.forgetting.error)),
    Column("Rigidity", "log ratio", lambda r: r.rigidity, 2),
    Column("Rank", "average", lambda r: r.rank),
    Column("Rank", "of small", lambda r: r.small_rank),
    Column("Parameters", "per task", lambda r: r.parameters, 0),
    Column("Parameters", "shared", lambda r: r.shared_parameters, 0),
    Column("Training", "s per task", lambda r: r.seconds),
    Column("Base", "s, once", lambda r: r.base_seconds),
    Column("Memory", "peak, MB", lambda r: r.peak_memory_mb, 0),
    Column("Seeds", "", lambda r: r.seeds, 0),
)


def summary_table(results: Sequence[RunResult]) -> list[SummaryRow]:
    """One row per method and variant, in the order of first appearance.

    Raises:
        SideTuningError: no results, two of one seed, or results of different tasks.
    """
    groups = groups_of(results)
    small = [g for g in groups if all(max(r.parameters) <= SMALL * r.shared_parameters for r in g)]
    ranks, small_ranks = _ranks(groups), _ranks(small) if len(small) < len(groups) else {}
    rows = []
    for runs in groups:
        label = runs[0].label
        rank, small_rank = ranks.get(label), small_ranks.get(label)
        rigid = [rigidity(_errors(r, r.matrix.learned), _errors(r, r.alone)) for r in runs if r.alone is not None]
        memory = [r.peak_memory_mb for r in runs if r.peak_memory_mb is not None]
        row = SummaryRow(
            method=runs[0].method,
            variant=runs[0].variant,
            seeds=len(runs),
            accuracy=_estimate([r.matrix.average for r in runs]),
            forgetting=_estimate([0.0 - r.matrix.backward_transfer for r in runs]),
            rigidity=_estimate(rigid) if rigid else None,
            rank=_estimate(rank) if rank else None,
            small_rank=_estimate(small_rank) if small_rank else None,
            parameters=mean([p for r in runs for p in r.parameters]),
            shared_parameters=max(r.shared_parameters for r in runs),
            seconds=median([s for r in runs for s in r.seconds]),
            base_seconds=max(r.base_seconds for r in runs),
            peak_memory_mb=max(memory, default=None),
            scored=any(r.measures is not None and r.values is not None for r in runs),
            ranked=tuple(shared_seeds(groups)),
            small_ranked=tuple(shared_seeds(small)),
        )
        rows.append(row)
    return rows


def markdown(rows: Sequence[SummaryRow]) -> str:
    """The summary as a table in Markdown, without the columns that nobody has; ± is the standard error over seeds.

    A sentence after it says of which seeds the ranks are, where some rows have more.
    """
    columns = used_columns(rows)
    text = _line(["Method", *(f"{c.heading}, {c.unit}".removesuffix(", ") for c in columns)]) + _line(
        ["---", *("---:" for _ in columns)]
    )
    text += "".join(_line([_escaped(r.label), *(number_text(c.value(r), c.decimals) for c in columns)]) for r in rows)
    note = rank_note(rows)
    return f"{text}\n{note}\n" if note else text


def rank_note(rows: Sequence[SummaryRow]) -> str:
    """Of which seeds the ranks are; nothing where these are all that any row has."""
    notes = []
    for kind, seeds, ranks in (
        ("Ranks", rows[0].ranked, [r.rank for r in rows]),
        ("Ranks of small", rows[0].small_ranked, [r.small_rank for r in rows]),
    ):
        if any(ranks) and len(seeds) < max(r.seeds for r, rank in zip(rows, ranks, strict=True) if rank):
            which = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
            notes.append(f"{kind} are of {which}, which all of them have.")
    return " ".join(notes)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _escaped(name: str) -> str:
    return " ".join(name.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def is_error(measure: str) -> bool:
    """Whether lower values of a measure are better."""
    return measure.startswith(("mean error", "rms error", "mean angle"))


class MeasureRow(NamedTuple):
    """A task in its own measure: its value at the end, with each method and variant."""

    task: str
    measure: str  # "mean angle, °"
    values: list[Estimate]  # one per row of the summary
    decimals: int  # for three digits of the largest value

    @property
    def lower_is_better(self) -> bool:
        """Whether it is an error."""
        return is_error(self.measure)

    @property
    def best(self) -> list[bool]:
        """Which values are the best; several are where they look the same."""
        shown = [round(v.mean, self.decimals) for v in self.values]
        top = min(shown) if self.lower_is_better else max(shown)
        return [v == top for v in shown]

    def text(self, value: float) -> str:
        """A value with its unit: 21.4°, 4.76 m, 0.443."""
        unit = self.measure.partition(", ")[2]
        return number_text(value, self.decimals) + (" " * (unit not in ("", "°")) + unit)


def measure_rows(results: Sequence[RunResult]) -> list[MeasureRow]:
    """Every task in its own measure, which is the accuracy in % where a result has none.

    Raises:
        SideTuningError: results that cannot be compared, or two measures of one task.
    """
    groups = groups_of(results)
    rows = []
    for task in results[0].tasks:
        runs = [[own_values(run, task) for run in group] for group in groups]
        measures = sorted({measure for group in runs for measure, _, _ in group})
        if len(measures) > 1:
            raise SideTuningError(f"{task} is measured by {' and by '.join(measures)}; make a report of each")
        largest = max(abs(v) for group in runs for _, *values in group for v in values)
        decimals = min(max(2 - math.floor(math.log10(largest)), 1), 4) if 0 < largest < math.inf else 1
        rows.append(
            MeasureRow(task, measures[0], [_estimate([end for _, _, end in group]) for group in runs], decimals)
        )
    return rows


def own_values(run: RunResult, task: str) -> tuple[str, float, float]:
    """The measure of a task, and its values when it was learned and at the end."""
    i = run.tasks.index(task)
    if run.measures is None or run.values is None:
        return "accuracy, %", 100 * run.accuracy[i][i], 100 * run.accuracy[-1][i]
    return run.measures[i], run.values[i][i], run.values[-1][i]


def measures_table(results: Sequence[RunResult]) -> str:
    """Tasks in their own measures at the end, methods as columns, as a table in Markdown; the best of each row is bold.

    ± is the standard error over seeds; ↓ says that lower is better.

    Raises:
        SideTuningError: results that cannot be compared, or two measures of one task.
    """
    labels = [_escaped(runs[0].label) for runs in groups_of(results)]
    text = _line(["Task", "Measure", *labels]) + _line(["---", "---", *("---:" for _ in labels)])
    for row in measure_rows(results):
        cells = [number_text(value, row.decimals) for value in row.values]
        if len(labels) > 1:
            cells = [f"**{cell}**" if best else cell for cell, best in zip(cells, row.best, strict=True)]
        text += _line([_escaped(row.task), f"{_escaped(row.measure)} {'↓' if row.lower_is_better else '↑'}", *cells])
    return text


def gaps_table(results: Sequence[RunResult], reference: str = "independent") -> str:
    """How much better than a reference method each other one is at the end, task by task, in % of its value, as a table in Markdown.

    Differences are paired: of the seeds that both have; ± is the standard error over these. Empty where the reference or a seed is missing.

    Raises:
        SideTuningError: results that cannot be compared.
    """
    groups = groups_of(results)
    base = next(({run.seed: run for run in g} for g in groups if (g[0].method, g[0].variant) == (reference, "")), {})
    others = [[r for r in g if r.seed in base] for g in groups if g[0].method != reference]
    others = [runs for runs in others if runs]
    if not others:
        return ""
    text = _line([f"Better than {reference}, %", *(_escaped(runs[0].label) for runs in others)])
    text += _line(["---", *("---:" for _ in others)])
    for task in results[0].tasks:
        cells = [number_text(_estimate([_gain(run, base[run.seed], task) for run in runs])) for runs in others]
        text += _line([_escaped(task), *cells])
    return text


def _gain(run: RunResult, reference: RunResult, task: str) -> float:
    """In % of the reference's value, above 0 where the run is better."""
    (measure, _, value), (_, _, other) = own_values(run, task), own_values(reference, task)
    gain = 100 * (value - other) / other if other else math.nan
    return -gain if is_error(measure) else gain


def groups_of(results: Sequence[RunResult]) -> list[list[RunResult]]:
    """The runs of every method and variant, by seed; of all results, once they are found to be comparable."""
    if not results:
        raise SideTuningError("there are no results to report; run the comparison first")
    groups: dict[tuple[str, str], dict[int, RunResult]] = {}
    for result in results:
        if sorted(result.tasks) != sorted(results[0].tasks):
            raise SideTuningError(
                f"{result.label} learned {', '.join(result.tasks)} and {results[0].label} {', '.join(results[0].tasks)}; "
                "make a report of results on the same tasks"
            )
        runs = groups.setdefault((result.method, result.variant), {})
        if runs and result.tasks != next(iter(runs.values())).tasks:
            raise SideTuningError(f"{result.label} learned its tasks in different orders; give each order a variant")
        if result.seed in runs:
            raise SideTuningError(f"{result.label} has two results of seed {result.seed}; give one of them")
        runs[result.seed] = result
    return [[runs[seed] for seed in sorted(runs)] for runs in groups.values()]


def shared_seeds(groups: Sequence[Sequence[RunResult]]) -> list[int]:
    """The seeds that all of several rows have, on which they are ranked."""
    return sorted(set.intersection(*({run.seed for run in runs} for runs in groups))) if len(groups) > 1 else []


def _ranks(groups: Sequence[Sequence[RunResult]]) -> dict[str, list[float]]:
    """The average rank of every row, by its label, with each seed that all rows have."""
    finals = {
        runs[0].label: {run.seed: [a for _, a in sorted(zip(run.tasks, run.matrix.final, strict=True))] for run in runs}
        for runs in groups
    }
    by_seed = [average_rank({label: f[seed] for label, f in finals.items()}) for seed in shared_seeds(groups)]
    return {label: [ranks[label] for ranks in by_seed] for label in finals}


def _errors(run: RunResult, scores: Sequence[float]) -> list[float]:
    """Errors of accuracies or scores. An error e that was scored as f / (f + e) comes back in units of f."""
    errors = run.measures or [""] * len(scores)
    return [(1 - s) / max(s, 1e-9) if is_error(m) else 1 - s for m, s in zip(errors, scores, strict=True)]


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(*mean_and_error(values))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def means(lists: Sequence[Sequence[float]]) -> list[float]:
    """The mean of equally long lists, entry by entry."""
    return [mean(column) for column in zip(*lists, strict=True)]


def used_columns(rows: Sequence[SummaryRow]) -> list[Column]:
    """The columns that any row has a value in; accuracies made of other measures are called scores."""
    columns = [c for c in COLUMNS if any(c.value(row) is not None for row in rows)]
    if any(row.scored for row in rows):
        columns[0] = columns[0]._replace(heading="Score")
    return columns


def number_text(value: float | Estimate | None, decimals: int = 1) -> str:
    """A number for people: 12,345.6, 83.1 ± 0.2, – for none; never a negative zero."""
    if value is None:
        return "–"
    mean, error = value if isinstance(value, Estimate) else (value, 0.0)
    text = f"{mean:,.{decimals}f}"
    text = text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")
    return f"{text} ± {error:,.{decimals}f}" if error else text
