"""What runs measured, and tables of several: one row per method and variant, over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning.files import check_signed, read_json, signed, write_json
from sidetuning_bench.continual import AccuracyMatrix, average_rank, mean_and_error, rigidity

# Pandas takes a second to import, and `sidetuning bench --help` needs none.
if TYPE_CHECKING:
    from pandas import DataFrame

MEND = "delete it and run again"
# A method is small where a task adds at most this fraction of what all tasks share.
SMALL = 0.1


@dataclass(frozen=True)
class RunResult:
    """What one run of a sequence of tasks measured: one method, in one variant, with one seed.

    Attributes:
        method: Name of the method, such as "sidetune".
        variant: Text that tells the cells of an ablation of one method apart, such as "merge=alpha"; may be empty.
        tasks: Names, in the order of learning.
        accuracy: `accuracy[i][j]`, in 0 … 1, is that of task j after learning task i, j <= i.
        alone: Accuracy of each task where it is the first one learned; None where that was not measured.
        alphas: The base's weight in the merge of each task; None where the merge has no alpha.
        parameters: Number of parameters that each task added (trained and kept for it).
        shared_parameters: Number of parameters that serve all tasks, such as the base's.
        seconds: Training time of each task.
        base_seconds: Time to compute the base's features; 0 where nothing is computed ahead.
        peak_memory_mb: Most memory the run held, in MB; None where it was not measured.
        settings: JSON values, shown as they are; they may be nested, such as {"versions": {…}}.
        values: Like `accuracy`, in each task's own measure; None where that is the accuracy.
        measures: What the values of each task are, such as "mean angular error, °".
        memory_mb: Most memory while each task was learned and measured, in MB; None where that was not measured.

    Raises:
        ArtifactError: Lists of the wrong length, or an accuracy outside 0 … 1.
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
        for name, kind in (("method", str), ("variant", str), ("seed", int), ("tasks", list), ("settings", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ArtifactError(f"'{name}' is {getattr(self, name)!r}")
        n = len(self.tasks)
        if not n or not all(isinstance(task, str) for task in self.tasks):
            raise ArtifactError("there are no tasks, or one has no name")
        for name in ("accuracy", "alone", "alphas", "parameters", "seconds", "values", "measures", "memory_mb"):
            values = getattr(self, name)
            if values is not None and len(values) != n:
                raise ArtifactError(f"'{name}' has {len(values)} entries for {n} tasks")
        for i, row in enumerate(self.accuracy):
            if len(row) != i + 1:
                raise ArtifactError(f"row {i} of 'accuracy' has {len(row)} numbers, not {i + 1}")
        for value in (v for row in [*self.accuracy, self.alone or []] for v in row):
            # Not the other way round, so that NaN is refused too.
            if not 0 <= value <= 1:
                raise ArtifactError(f"an accuracy is {value}, not in 0 … 1")
        amounts = [*self.parameters, *self.seconds, self.shared_parameters, self.base_seconds, self.peak_memory_mb or 0]
        if not all(0 <= v < math.inf for v in amounts) or not all(math.isfinite(a or 0) for a in self.alphas):
            raise ArtifactError("a number of parameters, a time, a memory or an alpha is negative or not finite")

    @classmethod
    def load(cls, path: str | Path) -> RunResult:
        """Read what `save` wrote.

        Raises:
            ArtifactError: No such file, not JSON, a key missing or unknown, or values that do not fit each other.
        """
        try:
            content = check_signed(read_json(path, {}, MEND), str(path), MEND, needed=False)
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} does not exist; run the comparison first") from error
        try:
            return cls(**content)
        # A TypeError names a key that is missing or unknown, or comes from a text in place of a number.
        except (ArtifactError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged: {error}; {MEND}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, signed(asdict(self)))

    @property
    def label(self) -> str:
        """Method and variant."""
        return f"{self.method} · {self.variant}" if self.variant else self.method

    @property
    def matrix(self) -> AccuracyMatrix:
        """The accuracies with their measures."""
        return AccuracyMatrix(self.tasks, self.accuracy)


class Estimate(NamedTuple):
    """A mean over seeds and its standard error, 0 for one seed."""

    mean: float
    error: float


def estimate(values: Sequence[float], scale: float = 1.0) -> Estimate | None:
    """Mean and standard error of values over seeds, times a scale; None of no values."""
    return Estimate(*(scale * number for number in mean_and_error(values))) if values else None


# Decimals of the columns of tables; others have one.
WHOLE = ("Parameters, per task", "Parameters, shared", "Parameters trained", "Memory, peak, MB", "Steps per second")
DECIMALS = {"Rigidity, log ratio": 2, **dict.fromkeys((*WHOLE, "Seeds"), 0)}


def summary_table(results: Sequence[RunResult]) -> DataFrame:
    """One row per method and variant, in the order of first appearance; cells are numbers, `Estimate`s or None.

    Columns that no row has a value in are left out. `attrs["ranks"]` is a sentence that names the seeds of the ranks.
    Accuracy and Forgetting are those at the end, the latter over all tasks but the last. Rigidity compares with tasks
    learned alone. Ranks are of the seeds that all rows have. Training is the median over tasks and seeds, which one
    task that other work held up does not move; Base and Memory are the most of the seeds.

    Raises:
        SideTuningError: No results, two of one seed, or results of different tasks.
    """
    import pandas as pd

    groups = groups_of(results)
    small = [g for g in groups if all(max(r.parameters) <= SMALL * r.shared_parameters for r in g)]
    ranks, note = _ranks(groups, "Ranks")
    small_ranks, small_note = _ranks(small, "Ranks of small") if len(small) < len(groups) else ({}, "")
    rows, word = [], "Score, %" if is_scored(results) else "Accuracy, %"
    for runs in groups:
        label = runs[0].label
        rigid = [rigidity(_errors(r, r.matrix.learned), _errors(r, r.alone)) for r in runs if r.alone is not None]
        cells = {
            "Method": label,
            word: estimate([r.matrix.average for r in runs], 100),
            "Forgetting, points": estimate([0.0 - r.matrix.backward_transfer for r in runs], 100),
            "Rigidity, log ratio": estimate(rigid),
            "Rank, average": estimate(ranks.get(label, [])),
            "Rank, of small": estimate(small_ranks.get(label, [])),
            "Parameters, per task": fmean([p for r in runs for p in r.parameters]),
            "Parameters, shared": max(r.shared_parameters for r in runs),
            "Training, s per task": median([s for r in runs for s in r.seconds]),
            "Base, s, once": max(r.base_seconds for r in runs),
            "Memory, peak, MB": max((r.peak_memory_mb for r in runs if r.peak_memory_mb is not None), default=None),
            "Seeds": len(runs),
        }
        rows.append(cells)
    frame = pd.DataFrame(rows).dropna(axis=1, how="all")
    frame.attrs["ranks"] = f"{note} {small_note}".strip()
    return frame


def is_scored(results: Sequence[RunResult]) -> bool:
    """Whether tasks have measures of their own, so that their accuracies are scores made of these."""
    return any(r.measures is not None and r.values is not None for r in results)


def as_texts(frame: DataFrame) -> DataFrame:
    """A table with its numbers as texts."""
    return frame.apply(lambda c: [v if isinstance(v, str) else number_text(v, DECIMALS.get(c.name, 1)) for v in c])


def markdown(summary: DataFrame) -> str:
    """A summary in Markdown, with the sentence on ranks after it; ± is the standard error over seeds."""
    note = summary.attrs["ranks"]
    return markdown_table(as_texts(summary)) + (f"\n{note}\n" if note else "")


def markdown_table(frame: DataFrame, left: int = 1) -> str:
    """A table of texts in Markdown; all columns but the first `left` are aligned right."""
    lines = [frame.columns, ["---"] * left + ["---:"] * (len(frame.columns) - left), *frame.to_numpy()]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def is_error(measure: str) -> bool:
    """Whether lower values of a measure are better."""
    return measure.startswith(("mean error", "rms error", "mean angle"))


class MeasureRow(NamedTuple):
    """A task in its own measure ("mean angle, °"): its value at the end, with each method and variant."""

    task: str
    measure: str
    values: list[Estimate]
    decimals: int

    @property
    def lower_is_better(self) -> bool:
        """Whether it is an error."""
        return is_error(self.measure)

    def text(self, value: float) -> str:
        """A value with its unit: 21.4°, 4.76 m, 0.443."""
        unit = self.measure.partition(", ")[2]
        return number_text(value, self.decimals) + (" " * (unit not in ("", "°")) + unit)


def measure_rows(results: Sequence[RunResult]) -> list[MeasureRow]:
    """Every task in its own measure, which is the accuracy in % where a result has none, with three digits.

    Raises:
        SideTuningError: Results that cannot be compared, or two measures of one task.
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
        ends = [Estimate(*mean_and_error([end for _, _, end in group])) for group in runs]
        rows.append(MeasureRow(task, measures[0], ends, decimals))
    return rows


def own_values(run: RunResult, task: str) -> tuple[str, float, float]:
    """The measure of a task, and its values when it was learned and at the end."""
    i = run.tasks.index(task)
    if run.measures is None or run.values is None:
        return "accuracy, %", 100 * run.accuracy[i][i], 100 * run.accuracy[-1][i]
    return run.measures[i], run.values[i][i], run.values[-1][i]


def measures_frame(results: Sequence[RunResult]) -> DataFrame:
    """Tasks in their own measures at the end as texts, a column per method; the best of a row is between asterisks."""
    import pandas as pd

    labels = [runs[0].label for runs in groups_of(results)]
    lines = []
    for row in measure_rows(results):
        # Several are the best where they look the same.
        shown = [round(value.mean, row.decimals) for value in row.values]
        best = min(shown) if row.lower_is_better else max(shown)
        marks = ["**" * (value == best and len(labels) > 1) for value in shown]
        cells = [m + number_text(value, row.decimals) + m for value, m in zip(row.values, marks, strict=True)]
        lines.append([row.task, f"{row.measure} {'↓' if row.lower_is_better else '↑'}", *cells])
    return pd.DataFrame(lines, columns=["Task", "Measure", *labels])


def measures_table(results: Sequence[RunResult]) -> str:
    """Tasks in their own measures at the end, in Markdown; ↓ means that lower is better.

    Raises:
        SideTuningError: Results that cannot be compared, or two measures of one task.
    """
    return markdown_table(measures_frame(results), left=2)


def gaps_table(results: Sequence[RunResult], reference: str = "independent") -> str:
    """How much better than a reference each method is at the end of each task, in % of its value, in Markdown.

    Differences are paired by seed; ± is the standard error over these. Empty where the reference or a seed is missing.

    Raises:
        SideTuningError: Results that cannot be compared.
    """
    import pandas as pd

    groups, tasks = groups_of(results), results[0].tasks
    base = {run.seed: run for runs in groups for run in runs if (run.method, run.variant) == (reference, "")}
    table = {f"Better than {reference}, %": tasks}
    for group in groups:
        runs = [run for run in group if run.seed in base and run.method != reference]
        if runs:
            gains = [[_gain(run, base[run.seed], task) for run in runs] for task in tasks]
            table[runs[0].label] = [number_text(estimate(values)) for values in gains]
    return markdown_table(pd.DataFrame(table)) if len(table) > 1 else ""


def _gain(run: RunResult, reference: RunResult, task: str) -> float:
    """In % of the reference's value, above 0 where the run is better."""
    (measure, _, value), (_, _, other) = own_values(run, task), own_values(reference, task)
    gain = 100 * (value - other) / other if other else math.nan
    return -gain if is_error(measure) else gain


def groups_of(results: Sequence[RunResult]) -> list[list[RunResult]]:
    """The runs of every method and variant, by seed, once all results are found to be comparable."""
    if not results:
        raise SideTuningError("there are no results to report; run the comparison first")
    groups: dict[str, dict[int, RunResult]] = {}
    for result in results:
        if sorted(result.tasks) != sorted(results[0].tasks):
            learned = " and ".join(f"{r.label} learned {', '.join(r.tasks)}" for r in (result, results[0]))
            raise SideTuningError(f"{learned}; make a report of results on the same tasks")
        runs = groups.setdefault(result.label, {})
        if any(run.tasks != result.tasks for run in runs.values()):
            raise SideTuningError(f"{result.label} learned its tasks in different orders; give each order a variant")
        if result.seed in runs:
            raise SideTuningError(f"{result.label} has two results of seed {result.seed}; give one of them")
        runs[result.seed] = result
    return [[runs[seed] for seed in sorted(runs)] for runs in groups.values()]


def _ranks(groups: Sequence[Sequence[RunResult]], name: str) -> tuple[dict[str, list[float]], str]:
    """The average rank of every row with each seed that all rows have, and a sentence where that is not every seed."""
    finals = {
        runs[0].label: {run.seed: [a for _, a in sorted(zip(run.tasks, run.matrix.final, strict=True))] for run in runs}
        for runs in groups
    }
    shared = sorted(set.intersection(*map(set, finals.values()))) if len(groups) > 1 else []
    by_seed = [average_rank({label: runs[seed] for label, runs in finals.items()}) for seed in shared]
    partial = shared and len(shared) < max(map(len, groups))
    note = f"{name} are of seed{'s' * (len(shared) > 1)} {', '.join(map(str, shared))}, which all of them have."
    return {label: [ranks[label] for ranks in by_seed] for label in finals}, note if partial else ""


def _errors(run: RunResult, scores: Sequence[float]) -> list[float]:
    """Errors of accuracies or scores. An error e that was scored as f / (f + e) comes back in units of f."""
    errors = run.measures or [""] * len(scores)
    return [(1 - s) / max(s, 1e-9) if is_error(m) else 1 - s for m, s in zip(errors, scores, strict=True)]


def number_text(value: float | Estimate | None, decimals: int = 1) -> str:
    """A number for people: 12,345.6, 83.1 ± 0.2, – for none; never a negative zero."""
    # NaN, the only value that differs from itself, is pandas' missing value.
    if value is None or value != value:
        return "–"
    mean, error = value if isinstance(value, Estimate) else (value, 0.0)
    text = f"{mean:,.{decimals}f}"
    text = text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")
    return f"{text} ± {error:,.{decimals}f}" if error else text
