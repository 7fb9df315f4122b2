"""Line charts: the picture and the table show the same numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from sidetuning.errors import SideTuningError
from sidetuning_bench.charts import Chart, Line, Point, colours, write_charts


def chart(**changes: Any) -> Chart:
    lines = [
        Line("sidetune", [Point(20, 30.0, 1.5, 3), Point(100, 20.0, 0.5, 3), Point(5000, 10.0, 0.0, 3)]),
        Line("<b>scratch", [Point(20, 50.0, 1.0, 3), Point(5000, 12.0, 1.0, 3)]),
    ]
    return Chart(**{"title": "normal", "x": "frames", "y": "mean angle, °", "lines": lines, "log_x": True, **changes})


def page(tmp_path: Path, *charts: Chart) -> str:
    return write_charts(charts, tmp_path / "charts.html", title="T & U", lead="a < b").read_text()


def test_marks_stand_where_the_axes_say(tmp_path: Path) -> None:
    html = page(tmp_path, chart())
    wide = html[html.index('<svg class="wide-chart"') : html.index('<svg class="narrow"')]
    text = r'<text style="[^"]*text-anchor: {}[^"]*" x="([\d.]+)" y="([\d.]+)">([^<]*)<'
    x_of = {t: float(x) for x, _, t in re.findall(text.format("middle"), wide)}
    rules = [
        float(y)
        for y in re.findall(r'<path d="M [\d.]+ ([\d.]+) L [\d.]+ \1 " style="fill: none; stroke: var\(--rule\)', wide)
    ]
    y_of = dict(zip([t for _, _, t in re.findall(text.format("end"), wide) if t.isdigit()], rules, strict=False))
    assert list(x_of) == ["20", "100", "5k"] and {"10", "60"} <= set(y_of)
    way = re.findall(r'class="line-0"> <path d="M ([^"]*) " style="[^"]*stroke-linecap', wide)[-1]
    marks = [tuple(map(float, mark.split())) for mark in way.split(" L ")]
    assert [x for x, _ in marks] == pytest.approx([x_of["20"], x_of["100"], x_of["5k"]], abs=0.1)

    def y(value: float) -> float:
        """The place of a value, from the ticks alone."""
        return y_of["10"] + (value - 10) / 50 * (y_of["60"] - y_of["10"])

    assert [v for _, v in marks] == pytest.approx([y(30), y(20), y(10)], abs=0.1)
    share = math.log(100 / 20) / math.log(5000 / 20)
    assert marks[1][0] == pytest.approx(x_of["20"] + share * (x_of["5k"] - x_of["20"]), abs=0.1)
    bar = re.search(r'class="line-0"> <path d="M [\d.]+ ([\d.]+) L [\d.]+ ([\d.]+) "', wide)
    assert bar is not None
    assert sorted(map(float, bar.groups())) == pytest.approx([y(31.5), y(28.5)], abs=0.2)


def test_the_table_has_the_numbers(tmp_path: Path) -> None:
    html = page(tmp_path, chart(decimals=2))
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL)]
    assert rows[0] == ["frames", "20", "100", "5,000"]
    assert rows[1] == ["sidetune", "30.00", "±", "1.50", "20.00", "±", "0.50", "10.00"]
    assert rows[2][1:] == ["50.00", "±", "1.00", "–", "12.00", "±", "1.00"] and "over 3 runs" in html
    assert "&lt;b&gt;scratch" in html and "a &lt; b" in html and "T &amp; U" in html
    assert "http:" not in html and "https:" not in html and "url(" not in html


def test_a_chart_is_reproducible_has_the_colours_of_the_page_and_no_name_twice(tmp_path: Path) -> None:
    html = page(tmp_path, chart(), chart(title="depth", y="$error$, m", log_x=False))
    assert page(tmp_path, chart(), chart(title="depth", y="$error$, m", log_x=False)) == html
    body = html[html.index("<body>") :]
    assert not re.search(r"#[0-9a-f]{6}", body) and "$error$, m" in body
    names = re.findall(r' id="([^"]*)"', body)
    assert len(names) == len(set(names)) and set(re.findall(r'href="#([^"]*)"', body)) <= set(names)
    style = (Path(__file__).parents[2] / "bench/src/sidetuning_bench/templates/chart.mplstyle").read_text()
    assert set(re.findall(r"#[0-9a-f]{6}", style)) <= set(colours().values())


def test_many_points_have_a_band_and_a_table_of_some(tmp_path: Path) -> None:
    lines = [Line("ppo", [Point(1000 * k, k / 50, 0.1) for k in range(101)])]
    html = page(tmp_path, chart(lines=lines, log_x=False))
    assert html.count('class="band-0"') == 2 and len(re.findall(r'class="line-0"> <path', html)) == 2
    heads = re.findall(r'<th scope="col">([^<]*)<', html)
    assert len(heads) == 9 and heads[-1] == "100,000"
    assert {"20k", "100k"} <= set(re.findall(r">([\dk]+)</text>", html))


@pytest.mark.parametrize("values", [(0.0, 1.0), (19.1, 60.9), (-1.0, 3.1), (5.0, 5.0), (0.0, 0.0), (29.0, 100 * 0.29)])
def test_ticks_reach_both_ends(tmp_path: Path, values: tuple[float, float]) -> None:
    """Values that are equal, or differ by rounding alone, are drawn too."""
    html = page(tmp_path, chart(lines=[Line("l", [Point(x, y) for x, y in enumerate(values, 1)])], log_x=False))
    found = re.findall(r'text-anchor: end[^"]*" x="[^"]*" y="[^"]*">([−\d.]+)<', html[: html.index('class="narrow"')])
    ticks = [float(tick.replace("−", "-")) for tick in found]
    assert ticks[0] <= min(values) + 1e-9 and ticks[-1] >= max(values) - 1e-9 and 2 <= len(ticks) <= 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lines": []}, "needs points"),
        ({"lines": [Line(str(i), [Point(1, 1)]) for i in range(7)]}, "at most 6 lines"),
        ({"lines": [Line("a", [Point(1, math.nan)])]}, "not finite"),
        ({"lines": [Line("a", [Point(0, 1)])]}, "not above 0"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SideTuningError, match=message):
        page(tmp_path, chart(**wrong))
    with pytest.raises(SideTuningError, match="no charts"):
        page(tmp_path)
