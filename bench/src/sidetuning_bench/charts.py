"""Line charts with error bars, and their numbers as tables: one HTML file that needs no network.

Matplotlib draws them as SVG with text as text, and colours become variables of the style sheet, for light and dark.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sidetuning.errors import SideTuningError
from sidetuning.files import write_text
from sidetuning_bench.results import Estimate, number_text

# Matplotlib and pandas take a second each to import, and `sidetuning bench --help` needs neither.
if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

TEMPLATES = Path(__file__).parent / "templates"
# Width and height of a chart for wide windows and for phones, in CSS pixels, by the class that shows it there.
SIZES = {"wide-chart": (720, 400), "narrow": (350, 350)}
DASHES = ("-", "--", ":", "-.", (0, (6, 2)), (0, (2, 2)))
# Colour, mark and dashes tell lines apart; colours are variables of report.css.
STYLES = tuple(zip(["blue", "orange", "green", "pink", "gold", "muted"], "os^Dvd", DASHES, strict=True))
COLOURS = len(STYLES)
# From this many points on, errors are a band instead of bars.
BANDS = 16
# Most columns of a table.
COLUMNS = 8
# What matplotlib writes and a page does not need: its own style sheet and font, clipping, and names that repeat.
NOISE = r"""<style.*?</style>| font-family:[^;"]*;| clip-path="[^"]*"| id="[\w.]+_\d+"| transform="rotate\(-0[^"]*\""""


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
        title: Finding or quantity that the chart shows.
        x: Name of the horizontal axis.
        y: Name of the vertical axis, with its unit.
        lines: At most `COLOURS` lines.
        log_x: Whether the horizontal axis is logarithmic.
        decimals: Decimals of the values in the table.
        note: Sentence under the title.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log_x: bool = False
    decimals: int = 1
    note: str = ""


class Film(NamedTuple):
    """An MP4 file that the page takes into itself, with words."""

    title: str
    caption: str
    path: Path


def write_charts(
    charts: Sequence[Chart],
    path: str | Path,
    *,
    title: str,
    lead: str = "",
    films: Sequence[Film] = (),
    table: DataFrame | None = None,
) -> Path:
    """Write a page of a table of texts, charts and films, atomically; the same contents give the same bytes.

    Raises:
        SideTuningError: Nothing to show, a film that cannot be read, a chart without points or with too many lines, a
            value that is not finite, or an x below or at 0 on a logarithmic axis.
    """
    if not charts and not films and table is None:
        raise SideTuningError("there are no charts to write")
    figures = []
    for chart in charts:
        _check(chart)
        words = f"{chart.title}: {chart.y} over {chart.x}; the numbers are in the table below"
        drawings = [draw(partial(_plot, chart), kind, size, words) for kind, size in SIZES.items()]
        runs = max(p.runs for line in chart.lines for p in line.points)
        figures.append((chart, drawings, _numbers(chart), runs))
    shown = [(film, _embedded(film.path)) for film in films]
    values = {"title": title, "lead": lead, "figures": figures, "films": shown, "table": table}
    return write_page("charts.html.j2", path, values)


def _embedded(path: Path) -> str:
    try:
        return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise SideTuningError(f"the film {path} cannot be read ({error.strerror}); make it again") from error


def _numbers(chart: Chart) -> DataFrame:
    """The values of a chart as a table of texts: a row per line, a column for some x, always for the last one."""
    import pandas as pd

    xs = sorted({p.x for line in chart.lines for p in line.points})
    columns = xs[:: -math.ceil(len(xs) / COLUMNS)][::-1]
    rows = []
    for line in chart.lines:
        at = {p.x: Estimate(p.y, p.error) for p in line.points}
        rows.append([line.name, *(number_text(at.get(x), chart.decimals) for x in columns)])
    return pd.DataFrame(rows, columns=[chart.x, *(number_text(x, 0) for x in columns)])


def _check(chart: Chart) -> None:
    points = [p for line in chart.lines for p in line.points]
    if not points or len(chart.lines) > COLOURS:
        wrong = f"'{chart.title}' has {len(chart.lines)} lines"
        raise SideTuningError(f"a chart needs points and at most {COLOURS} lines; {wrong}")
    if not all(math.isfinite(v) for p in points for v in p) or (chart.log_x and min(p.x for p in points) <= 0):
        raise SideTuningError(f"a value of the chart '{chart.title}' cannot be drawn: it is not finite, or not above 0")


def _plot(chart: Chart, figure: Figure) -> None:
    """Draw a chart; the vertical axis starts and ends at ticks."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    figure.set_layout_engine("constrained")
    axes, colour, width = figure.subplots(), colours(), 72 * figure.get_figwidth()
    for i, (line, (name, marker, dashes)) in enumerate(zip(chart.lines, STYLES, strict=False)):
        x, y, error = (np.array([p[k] for p in line.points]) for k in range(3))
        style: Any = {"color": colour[name], "ls": dashes, "label": line.name, "zorder": 10 - i, "gid": f"line-{i}"}
        if len(x) < BANDS:
            axes.errorbar(x, y, error, marker=marker, elinewidth=1.2, **style)
        else:
            axes.plot(x, y, **style)
            axes.fill_between(x, y - error, y + error, color=colour[name], alpha=0.16, linewidth=0, gid=f"band-{i}")
    points = [p for line in chart.lines for p in line.points]
    ends = min(p.y - p.error for p in points), max(p.y + p.error for p in points)
    axes.set_yticks(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(*ends))
    axes.margins(x=0.02)
    axes.set_title(chart.y)
    axes.set_xlabel(chart.x)
    if chart.log_x:
        axes.set_xscale("log")
        axes.set_xticks(sorted({p.x for p in points}))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(int(width // 90), steps=[1, 2, 5, 10]))
    short = EngFormatter(sep="")
    axes.xaxis.set_major_formatter(lambda x, _: short(x) if x >= 1000 else f"{x:g}")
    longest = max(len(line.name) for line in chart.lines)
    figure.legend(loc="outside upper left", ncols=max(1, int(width / (7 * longest + 50))))


def colours() -> dict[str, str]:
    """Variables of report.css and their colours on light pages."""
    light = (TEMPLATES / "report.css").read_text(encoding="utf-8").partition("@media")[0]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light))


def draw(plot: Callable[[Figure], None], kind: str, size: tuple[int, int], description: str) -> Markup:
    """SVG of a class and a size in CSS pixels, with words for screen readers; the same plot gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes names of parts that are unique in a page.
    with rc_context({"svg.hashsalt": f"{kind} {description}"}, TEMPLATES / "chart.mplstyle"):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        plot(figure)
        buffer = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(NOISE, "", buffer.getvalue().partition("<svg ")[2].partition(">")[2], flags=re.DOTALL)
    text = re.sub(r' id="((?:line|band)-\d)"', r' class="\1"', text)
    for name, colour in colours().items():
        text = text.replace(colour, f"var(--{name})")
    start = f'<svg class="{kind}" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(description)}">'
    return Markup(start + " ".join(text.replace("xlink:", "").split()))


@cache
def _environment() -> Environment:
    """All values are escaped."""
    environment = Environment(loader=PackageLoader("sidetuning_bench"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["number"] = number_text
    return environment


def write_page(template: str, path: str | Path, values: dict[str, Any]) -> Path:
    """Fill a template of this package and write the page atomically."""
    page = _environment().get_template(template).render(version=version("sidetuning"), **values)
    write_text(path, page.lstrip())
    return Path(path)
