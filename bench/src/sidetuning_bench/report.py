"""The report of one run, or of a comparison of methods over seeds: one HTML file that needs no network.

The charts are plain SVG that the template draws, coloured by CSS, so that one file serves light, dark, print and phone.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning_bench.pages import write_page
from sidetuning_bench.results import (
    MeasureRow,
    RunResult,
    SummaryRow,
    groups_of,
    mean,
    means,
    measure_rows,
    own_values,
    rank_note,
    summary_table,
    used_columns,
)

SCATTER = ((720, 400), (340, 440))  # width and height in SVG units, for wide windows and for phones
LEFT, TOP, RIGHT, BOTTOM = 36, 28, 14, 50  # margins of the scatter, in SVG units: room for its axes
GLYPH = 6.8  # mean width of a letter of a label at 12.5 units, a little generous
SIDE = 128  # pixels of the embedded pictures: larger ones are made smaller
QUALITY = 85  # of JPEG, where that is smaller than PNG


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
        results: of one scenario; several seeds of a method and variant become one row.
        path: of the HTML file.
        title: its heading.
        notes: paragraphs at the end, plain text.
        galleries: for each result the folder of its pictures (see `scenarios.gallery`) or None; the report shows, and
            embeds, those of the lowest seed of a method and variant. What is not there is not shown.

    Returns:
        The path.

    Raises:
        SideTuningError: no results, two of one seed, results of different tasks or measures, not one gallery (or None)
            for each result, or a damaged picture.
    """
    rows = summary_table(results)
    groups = groups_of(results)
    measures = measure_rows(results)
    figures, left_out = _figures(results, rows, measures, galleries)
    values = [v for r in results for row in r.accuracy for v in row]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10
    if low == high:  # all on one tick
        low, high = max(low - 0.1, 0.0), min(high + 0.1, 1.0)
    panels = [_panel(row, runs) for row, runs in zip(rows, groups, strict=True)]
    return write_page(
        "report.html.j2",
        path,
        title=title,
        notes=notes,
        rows=rows,
        panels=panels,
        tasks=results[0].tasks,
        one_order=all(r.tasks == results[0].tasks for r in results),
        columns=used_columns(rows),
        rank_note=rank_note(rows),
        scored=any(row.scored for row in rows),
        measures=measures,
        figures=figures,
        left_out=left_out,
        scatters=[_scatter(rows, *size) for size in SCATTER] if len(rows) > 1 else [],
        low=low,
        high=high,
        ticks=[v for v in range(0, 101, 10 if high - low < 0.55 else 20) if 100 * low - 1e-6 <= v <= 100 * high + 1e-6],
        costs=[panel.row.base_seconds + sum(panel.seconds) for panel in panels],
        settings=_settings(groups),
    )


def _settings(groups: Sequence[Sequence[RunResult]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Settings that all runs share, and those of every row that they do not; seeds are joined by commas."""

    def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)

    every = [[dict(flat(run.settings)) for run in runs] for runs in groups]
    first, *others = [settings for row in every for settings in row]
    common = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    own = []
    for row in every:
        keys = dict.fromkeys(k for settings in row for k in settings if k not in common)
        own.append({k: ", ".join(dict.fromkeys(s[k] for s in row if k in s)) for k in keys})
    return common, own


@dataclass(frozen=True)
class Panel:
    """A row of the summary with what the sections on single methods show: means over its seeds, an entry per task."""

    row: SummaryRow
    tasks: list[str]
    seeds: list[int]
    matrix: list[list[float]]
    average: list[float]  # over the tasks learned so far
    alphas: list[float | None]
    parameters: list[float]
    seconds: list[float]
    memory: list[float]  # empty where it was not measured


def _panel(row: SummaryRow, runs: Sequence[RunResult]) -> Panel:
    measured = [[m for m in run.memory_mb or () if m is not None] for run in runs]
    matrix = [means(rows) for rows in zip(*(run.accuracy for run in runs), strict=True)]
    alphas = [[a for a in column if a is not None] for column in zip(*(run.alphas for run in runs), strict=True)]
    return Panel(
        row=row,
        tasks=runs[0].tasks,
        seeds=[run.seed for run in runs],
        matrix=matrix,
        average=[mean(line) for line in matrix],
        alphas=[mean(column) if column else None for column in alphas],
        parameters=means([run.parameters for run in runs]),
        seconds=means([run.seconds for run in runs]),
        memory=means(measured) if all(len(m) == len(runs[0].tasks) for m in measured) else [],
    )


class Strip(NamedTuple):
    """Pictures side by side as one embedded picture."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    value: str  # the task's measure at that moment; "" for input and truth


class Pair(NamedTuple):
    """What a method sees: when it has just learned the task, and at the end. Either may be missing."""

    row: SummaryRow
    measure: str  # "mean angle"
    change: str  # "21.4° → 48.0°"
    verdict: str  # worse, better, unchanged, learned last; "" where the numbers look the same
    learned: Strip | None
    end: Strip | None


class Figure(NamedTuple):
    """The pictures of one task."""

    measure: MeasureRow
    frames: list[Strip]  # input and truth
    pairs: list[Pair]


def _figures(
    results: Sequence[RunResult], rows: Sequence[SummaryRow], measures: Sequence[MeasureRow], galleries: Sequence[str | Path | None]
) -> tuple[list[Figure], list[str]]:  # fmt: skip
    """A figure for every task that a method has pictures of, and the labels of methods that show other frames."""
    if not galleries:
        return [], []
    if len(galleries) != len(results):
        raise SideTuningError(f"{len(galleries)} galleries for {len(results)} results; give a folder or None for each")
    found = {  # file names, so that no task's name leads elsewhere
        (run.method, run.variant, run.seed): {file.name: file for file in sorted(Path(folder).iterdir())}
        for run, folder in zip(results, galleries, strict=True)
        if folder is not None and Path(folder).is_dir()
    }
    first: Image.Image | None = None
    shown, left_out = [], []
    for row, runs in zip(rows, groups_of(results), strict=True):
        run, files = next(((r, f) for r in runs if (f := found.get((r.method, r.variant, r.seed)))), (None, {}))
        frames = _picture(files["input.png"]) if "input.png" in files else None
        first = first or frames
        if (
            frames is not None
            and first is not None
            and (frames.size, frames.tobytes()) != (first.size, first.tobytes())
        ):
            left_out.append(row.label)
        elif run is not None:
            shown.append((row, run, files))

    figures = []
    for measure in measures:
        task, name = measure.task, measure.measure.partition(", ")[0]
        pairs = []
        for row, run, files in shown:
            _, *values = own_values(run, task)
            learned, end = map(measure.text, values)
            strips = [
                _strip(
                    files.get(f"{task}.{moment}.png"),
                    f"{task}, {row.label}, {words.lower()}: {name} {value}",
                    words,
                    value,
                )
                for moment, words, value in (("learned", "When learned", learned), ("end", "At the end", end))
            ]
            if any(strips):
                pairs.append(Pair(row, name, f"{learned} → {end}", _verdict(run, measure), *strips))
        of_frames = [
            next((s for _, _, files in shown if (s := _strip(files.get(file), alt, caption))), None)
            for file, alt, caption in (
                ("input.png", f"{task}: the input", "Input"),
                (f"{task}.truth.png", f"{task}: the truth", "Truth"),
            )
        ]
        if pairs:
            figures.append(Figure(measure, [strip for strip in of_frames if strip], pairs))
    return figures, left_out


def _verdict(run: RunResult, measure: MeasureRow) -> str:
    """What became of a task from when it was learned to the end."""
    _, learned, end = own_values(run, measure.task)
    if run.tasks[-1] == measure.task:
        return "learned last"
    if learned == end:
        return "unchanged"
    if measure.text(learned) == measure.text(end):
        return ""
    return "worse" if (end > learned) == measure.lower_is_better else "better"


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except Exception as error:  # Pillow raises a dozen kinds, some of them its decoders' own
        raise ArtifactError(f"{path} is not a picture ({error}); delete it to do without, or run again") from error


def _strip(path: Path | None, alt: str, caption: str, value: str = "") -> Strip | None:
    """A strip of square pictures, embedded; a long one is laid out in equal lines. None where there is no file."""
    if path is None:
        return None
    picture = _picture(path)
    if picture.height > SIDE:
        picture = picture.resize((max(1, round(picture.width * SIDE / picture.height)), SIDE), Image.Resampling.LANCZOS)
    side, count = picture.height, picture.width // picture.height
    columns = next((c for c in (4, 5, 3) if count % c == 0), count)
    if count > 5 and columns < count and picture.width == count * side:
        lines = [picture.crop((x, 0, x + columns * side, side)) for x in range(0, picture.width, columns * side)]
        picture = Image.new("RGB", (columns * side, len(lines) * side))
        for i, line in enumerate(lines):
            picture.paste(line, (0, i * side))
    encoded = {}
    for kind, options in (("jpeg", {"quality": QUALITY, "optimize": True}), ("png", {})):
        buffer = BytesIO()
        picture.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind, content = min(encoded.items(), key=lambda item: len(item[1]))
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Strip(uri, picture.width, picture.height, alt, caption, value)


class Spot(NamedTuple):
    """Where a label goes, in SVG units."""

    x: float
    y: float
    anchor: str  # text-anchor
    leader: bool  # it is so far from its point that a line must lead to it


class Mark(NamedTuple):
    """A point of the scatter and its standard error, in SVG units, with its label."""

    row: SummaryRow
    x: float
    y: float
    error: float
    label: str
    spot: Spot


class Scatter(NamedTuple):
    """Average accuracy over parameters per task; ticks are (position, text)."""

    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]


def _scatter(rows: Sequence[SummaryRow], width: int, height: int) -> Scatter:
    """The parameters are on a logarithmic axis, where fewer than one count as one."""
    means = [100 * row.accuracy.mean for row in rows]
    step = 5 if max(means) - min(means) < 30 else 10
    bottom, top = step * math.floor(min(means) / step - 0.2), step * math.ceil(max(means) / step + 0.2)
    logs = [math.log10(max(row.parameters, 1)) for row in rows]
    first, last = math.floor(min(logs)), math.floor(max(logs)) + 1

    def x(log: float) -> float:
        return round(LEFT + (log - first) / (last - first) * (width - LEFT - RIGHT), 1)

    def y(percent: float) -> float:
        return round(height - BOTTOM - (percent - bottom) / (top - bottom) * (height - TOP - BOTTOM), 1)

    points = [(x(log), y(mean)) for log, mean in zip(logs, means, strict=True)]
    names = [row.label if len(row.label) <= 26 else row.label[:25] + "…" for row in rows]
    spots = _spots(points, names, width, height)
    errors = [round(y(0) - y(100 * row.accuracy.error), 1) for row in rows]
    return Scatter(
        width,
        height,
        [(x(e), f"{10 ** (e % 3)}{('', 'k', 'M', 'G', 'T')[e // 3]}") for e in range(first, last + 1)],
        [(y(v), str(v)) for v in range(bottom, top + 1, step) if 0 <= v <= 100],
        [Mark(r, *p, e, n, s) for r, p, e, n, s in zip(rows, points, errors, names, spots, strict=True)],
    )


def _spots(points: Sequence[tuple[float, float]], names: Sequence[str], width: int, height: int) -> list[Spot]:
    """The nearest spot around each point that touches no point, no other label and no edge."""
    taken = [(x - 9, y - 6, x + 9, y + 6) for x, y in points]
    spots = []
    for (x, y), name in zip(points, names, strict=True):
        for radius, degrees in [
            (r, d) for r in range(9, 200, 7) for d in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300)
        ]:
            dx, dy = radius * math.cos(math.radians(degrees)), -radius * math.sin(math.radians(degrees))
            anchor, share = ("middle", 0.5) if abs(dx) < 1 else ("start", 0.0) if dx > 0 else ("end", 1.0)
            left = x + dx - share * len(name) * GLYPH
            box = (left, y + dy - 8, left + len(name) * GLYPH, y + dy + 8)
            inside = box[0] > LEFT and box[1] > TOP - 8 and box[2] < width and box[3] < height - BOTTOM
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                break
        taken.append(box)
        spots.append(Spot(round(x + dx, 1), round(y + dy, 1), anchor, radius > 16 or degrees % 90 != 0))
    return spots
