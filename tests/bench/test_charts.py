"""Line charts: what they show stands in the picture and in the table."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from sidetuning.errors import SideTuningError
from sidetuning_bench.charts import Chart, Line, Point, number, ticks, write_charts


def chart(**changes):
    lines = [
        Line("sidetune", [Point(20, 30.0, 1.5, 3), Point(100, 20.0, 0.5, 3), Point(5000, 10.0, 0.0, 3)]),
        Line("<b>scratch", [Point(20, 50.0, 1.0, 3), Point(5000, 12.0, 1.0, 3)]),
    ]
    return Chart(**{"title": "normal", "x": "frames", "y": "mean angle, °", "lines": lines, "log_x": True, **changes})


def page(tmp_path: Path, *charts: Chart) -> str:
    return write_charts(charts, tmp_path / "charts.html", title="T & U", lead="lead", notes=["a < b"]).read_text()


def test_marks_stand_where_the_axes_say(tmp_path):
    html = page(tmp_path, chart())
    wide = html[html.index('<svg class="wide-chart"') : html.index('<svg class="narrow"')]
    y_of = {t: float(y) for y, t in re.findall(r'y1="([\d.]+)" y2="\1"/><text[^>]*>([^<]*)<', wide)}
    x_of = {t: float(x) for x, t in re.findall(r'x1="([\d.]+)" x2="\1"[^>]*/><text[^>]*>([^<]*)<', wide)}
    assert list(x_of) == ["20", "100", "5k"] and {"10", "60"} <= set(y_of)
    group = wide[wide.index('class="line line0"') :]
    marks = [(float(x), float(y)) for x, y in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", group)]
    assert [x for x, _ in marks] == [x_of["20"], x_of["100"], x_of["5k"]]

    def y(value):  # from the ticks alone
        return y_of["10"] + (value - 10) / 50 * (y_of["60"] - y_of["10"])

    assert [v for _, v in marks] == pytest.approx([y(30), y(20), y(10)], abs=0.1)
    share = math.log(100 / 20) / math.log(5000 / 20)
    assert marks[1][0] == pytest.approx(x_of["20"] + share * (x_of["5k"] - x_of["20"]), abs=0.1)
    bars = re.findall(r'bar-of-error" d="M[\d.]+ ([\d.]+)V([\d.]+)', group)
    assert len(bars) == 2 and [float(v) for v in bars[0]] == pytest.approx([y(31.5), y(28.5)], abs=0.2)


def test_the_table_has_the_numbers(tmp_path):
    html = page(tmp_path, chart(decimals=2))
    rows = [re.sub(r"<[^>]+>", " ", r).split() for r in re.findall(r"<tr>.*?</tr>", html, re.S)]
    assert rows[0] == ["frames", "20", "100", "5,000"]
    assert rows[1] == ["sidetune", "30.00", "±", "1.50", "20.00", "±", "0.50", "10.00"]
    assert rows[2][1:] == ["50.00", "±", "1.00", "–", "12.00", "±", "1.00"] and "over 3 runs" in html
    assert (
        "&lt;b&gt;scratch" in html
        and "a &lt; b" in html
        and "T &amp; U" in html
        and "http:" not in html
        and "https:" not in html
    )


def test_many_points_have_a_band_and_a_table_of_some(tmp_path):
    lines = [Line("ppo", [Point(1000 * k, k / 50, 0.1) for k in range(101)])]
    html = page(tmp_path, chart(lines=lines, log_x=False))
    assert html.count('class="band"') == 2 and 'class="mark"' not in html
    heads = re.findall(r'<th scope="col">([^<]*)<', html)
    assert len(heads) == 9 and heads[-1] == "100,000"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (19.1, 60.9, [0, 20, 40, 60, 80]),
        (-1.0, 3.1, [-1, 0, 1, 2, 3, 4]),
        (5.0, 5.0, [2, 4, 6, 8]),
        (0.0, 0.0, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_reach_both_ends(low, high, expected):
    found = ticks(low, high, 6)
    assert found[0] <= low and found[-1] >= high and len(found) <= 6
    assert found == pytest.approx(expected)


def test_values_that_differ_by_rounding_are_drawn(tmp_path):
    points = [Point(1, 29.0), Point(2, 100 * 0.29)]
    page = write_charts([Chart("a", "x", "y", [Line("l", points)])], tmp_path / "page.html", title="t").read_text()
    assert points[0].y != points[1].y and "29.0" in page


def test_ticks_are_written_short():
    assert [number(v) for v in (0, 20, 500, 20_000, 2_000_000, -3)] == ["0", "20", "500", "20k", "2M", "−3"]
    assert [number(v, 0.05) for v in (0.1, 0.15)] == ["0.10", "0.15"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lines": []}, "needs points"),
        ({"lines": [Line(str(i), [Point(1, 1)]) for i in range(7)]}, "at most 6 lines"),
        ({"lines": [Line("a", [Point(1, math.nan)])]}, "not finite"),
        ({"lines": [Line("a", [Point(0, 1)])]}, "not above 0"),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, wrong, message):
    with pytest.raises(SideTuningError, match=message):
        page(tmp_path, chart(**wrong))
    with pytest.raises(SideTuningError, match="no charts"):
        page(tmp_path)
