"""Line charts with error bars, and their numbers as tables: one HTML file that needs no network.

The charts are plain SVG, coloured by CSS, so that one file serves light, dark, print and phone.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sidetuning.errors import SideTuningError
from sidetuning_bench.pages import write_page

SIZES = ((720, 380), (350, 300))  # of the charts for wide and for narrow screens, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 46  # margins of the frame
COLOURS = 6  # that the style sheet has
BANDS = 16  # from so many points, errors are a band instead of bars
COLUMNS = 8  # of a table, at most


class Point(NamedTuple):
    """A measured value, its standard error and the number of runs behind it."""

    x: float
    y: float
    error: float = 0.0
    runs: int = 1


@dataclass(frozen=True)
class Line:
    """Points of one name, in the order of x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """Lines over one axis.

    Attributes:
        title: what is shown.
        x: name of the horizontal axis.
        y: name of the vertical axis, with its unit.
        lines: at most six, told apart by colour, mark and dashes.
        log_x: the horizontal axis is logarithmic.
        decimals: of the values in the table.
        note: a sentence under the title.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    decimals: int = 1
    note: str = ""


class Film(NamedTuple):
    """A film with words: an MP4 file that the page takes into itself."""

    title: str
    caption: str
    path: Path


class Drawn(NamedTuple):
    """A line in SVG units: its path, its marks (x, y, half height of the error) and the band of its errors, if it has one."""

    path: str
    marks: list[tuple[float, float, float]]
    band: str


class Drawing(NamedTuple):
    """A chart in SVG units; ticks are (position, text)."""

    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Drawn]


class Figure(NamedTuple):
    """What the page shows of a chart."""

    chart: Chart
    drawings: list[Drawing]
    columns: list[float]
    rows: list[tuple[str, list[Point | None]]]
    runs: int


def write_charts(
    charts: Sequence[Chart],
    path: str | Path,
    *,
    title: str,
    lead: str = "",
    notes: Sequence[str] = (),
    films: Sequence[Film] = (),
) -> Path:
    """Write a page of charts, and of films below them, atomically; the same charts give the same bytes.

    Raises:
        SideTuningError: nothing to show, a film that cannot be read, a chart without points or with more than six lines, a value that is not finite, or an
            x below or at 0 on a logarithmic axis.
    """
    if not charts and not films:
        raise SideTuningError("there are no charts to write")
    figures = [_figure(chart) for chart in charts]
    shown = [(film, _embedded(film.path)) for film in films]
    return write_page("charts.html.j2", path, title=title, lead=lead, notes=notes, figures=figures, films=shown)


def _embedded(path: Path) -> str:
    try:
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise SideTuningError(f"the film {path} cannot be read ({error.strerror}); make it again") from error


def _figure(chart: Chart) -> Figure:
    points = [p for line in chart.lines for p in line.points]
    if not points or len(chart.lines) > COLOURS:
        raise SideTuningError(
            f"a chart needs points and at most {COLOURS} lines; '{chart.title}' has {len(chart.lines)} lines"
        )
    if not all(math.isfinite(v) for p in points for v in p) or (chart.log_x and min(p.x for p in points) <= 0):
        raise SideTuningError(f"a value of the chart '{chart.title}' cannot be drawn: it is not finite, or not above 0")
    xs = sorted({p.x for p in points})
    step = math.ceil(len(xs) / COLUMNS)
    columns = xs[::-step][::-1]  # the last one always
    rows: list[tuple[str, list[Point | None]]] = []
    for line in chart.lines:
        at = {p.x: p for p in line.points}
        rows.append((line.name, [at.get(x) for x in columns]))
    return Figure(chart, [_draw(chart, xs, *size) for size in SIZES], columns, rows, max(p.runs for p in points))


def _draw(chart: Chart, xs: Sequence[float], width: int, height: int) -> Drawing:
    """Place the points of a chart; the axes start and end at ticks, but x ends with the lines."""
    points = [p for line in chart.lines for p in line.points]
    y_ticks = ticks(min(p.y - p.error for p in points), max(p.y + p.error for p in points), 6)
    scale = math.log if chart.log_x else float
    x_ticks = list(xs) if chart.log_x else ticks(xs[0], xs[-1], 4 if width < 400 else 8)
    if xs[-1] > xs[0]:
        x_ticks = [tick for tick in x_ticks if tick <= xs[-1]]
        left, right = scale(x_ticks[0]), scale(xs[-1])
    else:
        left, right = scale(xs[0]) - 1, scale(xs[0]) + 1
        x_ticks = list(xs)

    def x(value: float) -> float:
        return round(LEFT + (scale(value) - left) / (right - left) * (width - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(height - BOTTOM - share * (height - TOP - BOTTOM), 1)

    lines = []
    for line in chart.lines:
        marks = [(x(p.x), y(p.y), round(y(p.y) - y(p.y + p.error), 1)) for p in line.points]
        path = "M" + "L".join(f"{a} {b}" for a, b, _ in marks) if marks else ""
        band = ""
        if len(marks) >= BANDS:
            outline = [(a, b - e) for a, b, e in marks] + [(a, b + e) for a, b, e in reversed(marks)]
            band = "M" + "L".join(f"{a} {round(b, 1)}" for a, b in outline) + "Z"
        lines.append(Drawn(path, marks, band))
    return Drawing(
        width, height, [(x(v), number(v)) for v in x_ticks], [(y(v), number(v, y_ticks[1] - y_ticks[0])) for v in y_ticks], lines
    )  # fmt: skip


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that reach from below `low` to above `high`, `most` or fewer."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal but for rounding
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    exponent = math.floor(math.log10((high - low) / most))
    for step in (m * 10.0**e for e in (exponent, exponent + 1, exponent + 2) for m in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return [round(k * step, 12) for k in range(first, last + 1)]
    raise AssertionError("a step of a hundred times the range is enough")


def number(value: float, step: float = 1.0) -> str:
    """A tick: with as many decimals as its step has; 20,000 as 20k."""
    if step >= 1 and value and value % 1000 == 0:
        return f"{value / 1e6:g}M" if value % 1_000_000 == 0 else f"{value / 1000:g}k"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if value % 1 or step < 1 else 0
    return f"{value:.{decimals}f}".replace("-", "−")
