"""The report of one run, or of a comparison of methods over seeds: one HTML file that needs no network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from sidetuning.errors import ArtifactError, DataError, SideTuningError
from sidetuning.images import open_image
from sidetuning_bench.charts import SIZES, colours, draw, write_page
from sidetuning_bench.results import (
    MeasureRow,
    RunResult,
    as_texts,
    groups_of,
    is_scored,
    measure_rows,
    measures_frame,
    own_values,
    summary_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Embedded pictures are made smaller than this height in pixels, and are JPEG of this quality where PNG is larger.
SIDE = 128
QUALITY = 85


def write_report(
    results: Sequence[RunResult],
    path: str | Path,
    *,
    title: str,
    galleries: Sequence[str | Path | None] = (),
    hero: bool = False,
) -> Path:
    """Write the report of a run or of a comparison, atomically; the same results give the same bytes.

    Args:
        results: Results of one scenario; several seeds of a method and variant become one row.
        path: The HTML file.
        title: Heading of the page.
        galleries: For each result the folder of its pictures, if there is one (`input.png`, and for each task
            `<task>.truth.png`, `<task>.learned.png` and `<task>.end.png`), or None; the report embeds those of the
            lowest seed of a row.
        hero: Show the pictures first, as they were after each task.

    Raises:
        SideTuningError: No results, two of one seed, results of different tasks or measures, not one gallery (or None)
            for each result, or a damaged picture.
    """
    groups, summary = groups_of(results), summary_table(results)
    matrices = [_matrix(runs) for runs in groups]
    low, high = _ends(matrices)
    score, rows = summary.columns[1], summary.to_dict("records")
    sizes = {"curve": (300, 190)} if len(rows) > 1 else SIZES
    for row, matrix, runs in zip(rows, matrices, groups, strict=True):
        plot, words = partial(_curves, matrix, (low, high)), f"{score} over time: {row['Method']}"
        curves = [draw(plot, kind, size, words) for kind, size in sizes.items()]
        row |= {"matrix": matrix, "curves": curves, "seed": runs[0].seed}
    content: dict[str, Any] = {
        "scored": is_scored(results),
        "word": "score" if is_scored(results) else "accuracy",
        "rows": rows,
        "ranked": sorted(rows, key=lambda row: -row[score].mean),
        "forgetful": sorted(rows, key=lambda row: -row["Forgetting, points"].mean),
        "by_size": sorted(rows, key=lambda row: row["Parameters, per task"]),
        "summary": as_texts(summary),
        "rank_note": summary.attrs["ranks"],
        "measures": measures_frame(results),
        "dots": _dots(summary) if len(rows) > 1 else [],
        "ends": (low, high),
        "alphas": _per_task(groups, "alphas"),
        "seconds": _per_task(groups, "seconds"),
        "parameters": _per_task(groups, "parameters"),
        "memory": _per_task(groups, "memory_mb"),
        "settings": _settings(results),
        "tasks": results[0].tasks,
        "one_order": all(run.tasks == results[0].tasks for run in results),
        "hero": hero,
    }
    shown, content["left_out"] = _pictures(results, galleries, "*.png" if hero else "*[!0-9].png")
    figures = [(row, pairs) for row in measure_rows(results) if (pairs := _pairs(row, shown))]
    return write_page("report.html.j2", path, {"title": title, "figures": figures, **content})


def _matrix(runs: Sequence[RunResult]) -> DataFrame:
    """Accuracy in % of every task (columns) after learning each task (rows), mean over seeds."""
    import pandas as pd

    n, names = len(runs[0].tasks), [f"{i} {task}" for i, task in enumerate(runs[0].tasks, 1)]
    mean = 100 * np.mean([[row + [math.nan] * (n - len(row)) for row in run.accuracy] for run in runs], axis=0)
    return pd.DataFrame(mean, columns=range(1, n + 1), index=names)


def _ends(matrices: Sequence[DataFrame]) -> tuple[int, int]:
    """Ends of the axis of all accuracies: multiples of 10 %."""
    low = 10 * math.floor(min(matrix.min(axis=None) for matrix in matrices) / 10)
    high = 10 * math.ceil(max(matrix.max(axis=None) for matrix in matrices) / 10)
    return (low, high) if low < high else (max(low - 10, 0), min(high + 10, 100))


def _per_task(groups: Sequence[Sequence[RunResult]], name: str) -> DataFrame:
    """A field of the results: a row per method that has it, its mean over seeds for each task."""
    import pandas as pd

    lists = {runs[0].label: [getattr(run, name) or [None] * len(run.tasks) for run in runs] for runs in groups}
    means = {label: pd.DataFrame(values, dtype=float).mean() for label, values in lists.items()}
    return pd.DataFrame(means).T.dropna(how="all").rename(columns=lambda i: i + 1)


def flat_settings(runs: Sequence[Any]) -> DataFrame:
    """Settings of runs as texts, a row per run; what a run does not have is "null"."""
    import pandas as pd

    # Numbers stay as they are written.
    content = json.loads(json.dumps([run.settings for run in runs], default=str), parse_int=str, parse_float=str)
    return (
        pd.json_normalize(content)
        .astype(object)
        .fillna("null")
        .map(lambda v: v if isinstance(v, str) else json.dumps(v))
    )


def _settings(runs: Sequence[RunResult]) -> tuple[DataFrame, DataFrame]:
    """Settings that all runs share, and by method those that they do not; those of seeds are joined by commas."""
    import pandas as pd

    table = flat_settings(runs)
    shared = table.nunique() == 1
    own = table.loc[:, ~shared].groupby([run.label for run in runs], sort=False).agg(lambda c: ", ".join(c.unique()))
    texts = ["; ".join(f"{key}={value}" for key, value in row.items()) for _, row in own.iterrows()]
    common = pd.DataFrame({"Setting": table.columns[shared], "Value": table.loc[0, shared].to_list()})
    return common, pd.DataFrame({"Method": own.index, "Settings": texts})


def _curves(matrix: DataFrame, ends: tuple[float, float], figure: Figure) -> None:
    """Accuracy of every task from when it is learned, and the average of those learned so far."""
    from matplotlib.ticker import MaxNLocator

    width, height = 72 * figure.get_size_inches()
    axes = figure.add_axes((30 / width, 24 / height, 1 - 36 / width, 1 - 34 / height))
    colour, numbers = colours(), matrix.columns
    axes.plot(numbers, matrix, color=colour["thin"], linewidth=1)
    axes.plot(numbers, np.diag(matrix), "o", color=colour["thin"], markersize=3.5)
    axes.plot(numbers, matrix[1], color=colour["orange"], linestyle="--")
    axes.plot(numbers, matrix.mean(axis=1), color=colour["blue"], linewidth=3)
    axes.set_ylim(*ends)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


class Picture(NamedTuple):
    """An embedded picture."""

    uri: str
    width: int
    height: int


# A run with its embedded pictures by the names of their files, so that no task's name leads elsewhere.
Shown = tuple[RunResult, dict[str, Picture]]


def _pictures(
    results: Sequence[RunResult], galleries: Sequence[str | Path | None], wanted: str
) -> tuple[list[Shown], list[str]]:
    """The run with the lowest seed that has pictures of each method, and labels of methods that show other frames."""
    if galleries and len(galleries) != len(results):
        raise SideTuningError(f"{len(galleries)} galleries for {len(results)} results; give a folder or None for each")
    found = {
        (run.label, run.seed): sorted(Path(folder).glob(wanted))
        for run, folder in zip(results, galleries, strict=False)
        if folder is not None
    }
    shown: list[Shown] = []
    left_out, frames = [], None
    for runs in groups_of(results):
        run = next((run for run in runs if found.get((run.label, run.seed))), None)
        if run is not None:
            pictures = {file.name: _embedded(file) for file in found[run.label, run.seed]}
            frames = frames or pictures.get("input.png")
            if pictures.get("input.png", frames) == frames:
                shown.append((run, pictures))
            else:
                left_out.append(run.label)
    return shown, left_out


class Pair(NamedTuple):
    """What a method sees when it has just learned a task and at the end, with the task's measure at both moments.

    `moments` are its pictures after each task; None before it is learned, or where there is none.
    """

    label: str
    learned: str
    end: str
    verdict: str
    files: dict[str, Picture]
    moments: list[Picture | None]


def _pairs(row: MeasureRow, shown: Sequence[Shown]) -> list[Pair]:
    """A pair for each method that has pictures of a task."""
    pairs = []
    for run, files in shown:
        _, learned, end = own_values(run, row.task)
        # Nothing is said where the numbers look the same.
        same, worse = row.text(learned) == row.text(end), (end > learned) == row.lower_is_better
        verdict = "unchanged" if learned == end else "" if same else "worse" if worse else "better"
        verdict = "learned last" if run.tasks[-1] == row.task else verdict
        if {f"{row.task}.learned.png", f"{row.task}.end.png"} & files.keys():
            moments = [files.get(f"{row.task}.after{k}.png") for k in range(1, len(run.tasks) + 1)]
            pairs.append(Pair(run.label, row.text(learned), row.text(end), verdict, files, moments))
    return pairs


def _embedded(file: Path) -> Picture:
    """A strip of square pictures; a long one is laid out in equal lines."""
    try:
        with open_image(file) as opened:
            picture = opened.convert("RGB")
    except (DataError, OSError) as error:
        raise ArtifactError(f"{file} is not a picture ({error}); delete it to do without, or run again") from error
    if picture.height > SIDE:
        picture = picture.resize((max(1, round(picture.width * SIDE / picture.height)), SIDE), Image.Resampling.LANCZOS)
    side, count = picture.height, picture.width // picture.height
    columns = next((c for c in (4, 5, 3) if count % c == 0), count)
    if count > 5 and columns < count and picture.width == count * side:
        lines = np.asarray(picture).reshape(side, count // columns, columns * side, 3).swapaxes(0, 1)
        picture = Image.fromarray(lines.reshape(-1, columns * side, 3))
    encoded = []
    for kind, options in (("jpeg", {"quality": QUALITY, "optimize": True}), ("png", {})):
        buffer = BytesIO()
        picture.save(buffer, kind, **options)
        encoded.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return Picture(min(encoded, key=len), picture.width, picture.height)


def _dots(summary: DataFrame) -> list[Markup]:
    """Accuracy at the end beside parameters per task, a line per method, in all sizes."""
    words, height = f"{summary.columns[1]} and parameters; the numbers are in the summary", 60 + 24 * len(summary)
    return [draw(partial(_plot_dots, summary), kind, (width, height), words) for kind, (width, _) in SIZES.items()]


def _plot_dots(summary: DataFrame, figure: Figure) -> None:
    """Fewer than one parameter are drawn at one, because the axis is logarithmic."""
    from matplotlib.ticker import EngFormatter, NullLocator

    colour, rows, (width, height) = colours(), range(len(summary)), 72 * figure.get_size_inches()
    most = 18 if width < 400 else 30
    names = [name if len(name) <= most else name[: most - 1] + "…" for name in summary["Method"]]
    edge = (12 + 7 * max(map(len, names))) / width
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(edge, 28 / height, 1 - 18 / width, 1 - 28 / height, wspace=0.1)
    mean, error = zip(*summary.iloc[:, 1], strict=True)
    left.errorbar(mean, rows, xerr=error, fmt="o", color=colour["blue"], markersize=7, capsize=0)
    left.set_title(summary.columns[1])
    left.set_yticks(rows, names)
    left.tick_params(axis="y", labelcolor=colour["text"])
    left.set_ylim(len(summary) - 0.5, -0.5)
    right.plot(summary["Parameters, per task"].clip(lower=1), rows, "D", color=colour["blue"], markersize=6)
    right.set(xscale="log", title="Parameters")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.xaxis.set_minor_locator(NullLocator())
