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
from PIL import Image

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning_bench.charts import SIZES, colours, draw
from sidetuning_bench.pages import write_page
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
    notes: Sequence[str] = (),
    galleries: Sequence[str | Path | None] = (),
) -> Path:
    """Write the report of a run or of a comparison, atomically; the same results give the same bytes.

    Args:
        results: Results of one scenario; several seeds of a method and variant become one row.
        path: The HTML file.
        title: Heading of the page.
        notes: Paragraphs at the end, plain text.
        galleries: For each result the folder of its pictures (`input.png`, and for each task `<task>.truth.png`,
            `<task>.learned.png` and `<task>.end.png`) or None; the report embeds those of the lowest seed of a row.

    Raises:
        SideTuningError: No results, two of one seed, results of different tasks or measures, not one gallery (or None)
            for each result, or a damaged picture.
    """
    groups, summary = groups_of(results), summary_table(results)
    matrices = [_matrix(runs) for runs in groups]
    low = math.floor(min(m.min(axis=None) for m in matrices) / 10) * 10
    high = math.ceil(max(m.max(axis=None) for m in matrices) / 10) * 10
    if low == high:
        low, high = max(low - 10, 0), min(high + 10, 100)
    rows = summary.to_dict("records")
    sizes = {"curve": (300, 190)} if len(rows) > 1 else SIZES
    for row, matrix, group in zip(rows, matrices, groups, strict=True):
        words = f"{summary.columns[1]} over time: {row['Method']}"
        curves = [draw(partial(_curves, matrix, (low, high)), kind, size, words) for kind, size in sizes.items()]
        row |= {"matrix": matrix, "curves": curves, "seed": group[0].seed}
    words, height = f"{summary.columns[1]} and parameters; the numbers are in the summary", 70 + 24 * len(rows)
    sizes = {kind: (width, height) for kind, (width, _) in SIZES.items() if len(rows) > 1}
    dots = [draw(partial(_dots, summary), kind, size, words) for kind, size in sizes.items()]
    content: dict[str, Any] = {
        "scored": is_scored(results),
        "word": "score" if is_scored(results) else "accuracy",
        "rows": rows,
        "ranked": sorted(rows, key=lambda row: -row[summary.columns[1]].mean),
        "forgetful": sorted(rows, key=lambda row: -row["Forgetting, points"].mean),
        "by_size": sorted(rows, key=lambda row: row["Parameters, per task"]),
        "summary": as_texts(summary),
        "rank_note": summary.attrs["ranks"],
        "measures": measures_frame(results),
        "dots": dots,
        "ends": (low, high),
        "alphas": _per_task(groups, "alphas"),
        "seconds": _per_task(groups, "seconds"),
        "parameters": _per_task(groups, "parameters"),
        "memory": _per_task(groups, "memory_mb"),
        "settings": _settings(results),
        "tasks": results[0].tasks,
        "one_order": all(run.tasks == results[0].tasks for run in results),
    }
    shown, content["left_out"] = _pictures(results, galleries)
    pairs = [(row, [_pair(*run, row) for run in shown if _seen(row.task) & {*run[1]}]) for row in measure_rows(results)]
    figures = [figure for figure in pairs if figure[1]]
    return write_page("report.html.j2", path, {"title": title, "notes": notes, "figures": figures, **content})


def _matrix(runs: Sequence[RunResult]) -> DataFrame:
    """Accuracy in % of every task (columns) after learning each task (rows), mean over seeds."""
    import pandas as pd

    mean = 100 * np.mean([[row + [math.nan] * (len(run.tasks) - len(row)) for row in run.accuracy] for run in runs], 0)
    return pd.DataFrame(
        mean, columns=range(1, len(mean) + 1), index=[f"{i} {t}" for i, t in enumerate(runs[0].tasks, 1)]
    )


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
    return pd.json_normalize(content).fillna("null").map(lambda v: v if isinstance(v, str) else json.dumps(v))


def _settings(runs: Sequence[RunResult]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Settings that all runs share, and by label those that they do not; those of seeds are joined by commas."""
    table = flat_settings(runs)
    shared = table.nunique() == 1
    own = table.loc[:, ~shared].groupby([run.label for run in runs], sort=False).agg(lambda c: ", ".join(c.unique()))
    return table.loc[0, shared].to_dict(), own.to_dict("index")


def _curves(matrix: DataFrame, ends: tuple[float, float], figure: Figure) -> None:
    """Accuracy of every task from when it is learned, and the average of those learned so far."""
    from matplotlib.ticker import MaxNLocator

    width, height = 72 * figure.get_size_inches()
    axes = figure.add_axes((30 / width, 24 / height, 1 - 36 / width, 1 - 34 / height))
    colour, n = colours(), len(matrix)
    for k in reversed(range(n)):
        style: Any = (
            {"color": colour["orange"], "linestyle": "--", "linewidth": 2} if k == 0 else {"color": colour["thin"]}
        )
        axes.plot(
            range(k + 1, n + 1),
            matrix.iloc[k:, k],
            **{"linewidth": 1, **style},
            marker="o",
            markersize=3.5,
            markevery=n,
        )
    axes.plot(range(1, n + 1), matrix.mean(axis=1), color=colour["blue"], linewidth=3)
    axes.set_ylim(*ends)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))


class Picture(NamedTuple):
    """An embedded picture."""

    uri: str
    width: int
    height: int


# A run with its embedded pictures by the names of their files, so that no task's name leads elsewhere.
Shown = tuple[RunResult, dict[str, Picture]]


def _pictures(results: Sequence[RunResult], galleries: Sequence[str | Path | None]) -> tuple[list[Shown], list[str]]:
    """The run with the lowest seed that has pictures of each method, and labels of methods that show other frames."""
    if galleries and len(galleries) != len(results):
        raise SideTuningError(f"{len(galleries)} galleries for {len(results)} results; give a folder or None for each")
    found = {
        (run.label, run.seed): sorted(Path(folder).glob("*.png"))
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
    """What a method sees when it has just learned a task and at the end, with the task's measure at both moments."""

    label: str
    learned: str
    end: str
    verdict: str
    files: dict[str, Picture]


def _seen(task: str) -> set[str]:
    return {f"{task}.learned.png", f"{task}.end.png"}


def _pair(run: RunResult, files: dict[str, Picture], row: MeasureRow) -> Pair:
    _, learned, end = own_values(run, row.task)
    if run.tasks[-1] == row.task:
        verdict = "learned last"
    elif learned == end:
        verdict = "unchanged"
    # Nothing where the numbers look the same.
    elif row.text(learned) == row.text(end):
        verdict = ""
    else:
        verdict = "worse" if (end > learned) == row.lower_is_better else "better"
    return Pair(run.label, row.text(learned), row.text(end), verdict, files)


def _embedded(file: Path) -> Picture:
    """A strip of square pictures; a long one is laid out in equal lines."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    # Pillow raises a dozen kinds, some of them its decoders' own.
    except Exception as error:
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


def _dots(summary: DataFrame, figure: Figure) -> None:
    """Accuracy at the end beside parameters per task, a line per method; fewer than one parameter are drawn at one."""
    from matplotlib.ticker import EngFormatter, NullLocator

    colour, rows, (width, height) = colours(), range(len(summary)), 72 * figure.get_size_inches()
    most = 18 if width < 400 else 30
    names = [name if len(name) <= most else name[: most - 1] + "…" for name in summary["Method"]]
    edge = (12 + 7.2 * max(map(len, names))) / width
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(edge, 28 / height, 1 - 24 / width, 1 - 28 / height, wspace=0.1)
    mean, error = zip(*summary.iloc[:, 1], strict=True)
    left.errorbar(mean, rows, xerr=error, fmt="o", color=colour["blue"], markersize=7)
    left.set_title(summary.columns[1])
    left.set_yticks(rows, names)
    left.tick_params(axis="y", labelcolor=colour["text"])
    left.set_ylim(len(summary) - 0.5, -0.5)
    right.plot(summary["Parameters, per task"].clip(lower=1), rows, "D", color=colour["blue"], markersize=6)
    right.set(xscale="log", title="Parameters")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.xaxis.set_minor_locator(NullLocator())
