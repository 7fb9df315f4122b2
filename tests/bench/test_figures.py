"""The figures and numbers of `docs/results.md` are those of the committed results."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest

import figures


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_shows_the_results(name: str) -> None:
    file = figures.FOLDER / f"{name}.svg"
    found = re.search("<desc>(.*)</desc>", file.read_text(encoding="utf-8"))
    assert found is not None and json.loads(unescape(found[1])) == figures.FIGURES[name][0](), "run make figures"
    assert file.stat().st_size < 300_000


def test_a_figure_is_drawn_again_to_the_byte() -> None:
    assert figures.svg("cost") == figures.svg("cost")


def test_the_ten_numbers_are_those_of_the_results() -> None:
    table = figures.table()
    assert table.count("\n") == 11 and table in (figures.ROOT / "docs/results.md").read_text(encoding="utf-8")
    for pattern in re.findall(r"`([\w*-]+\.json)`", table):
        assert [*(figures.ROOT / "bench/records/results").glob(pattern)], pattern


@pytest.mark.parametrize("page", ["fidelity.md", "results.md"])
def test_numbers_with_an_error_stand_in_the_tables(page: str) -> None:
    tables = (figures.ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").replace("−", "")
    found = re.findall(r"\d+\.\d+ ± \d+\.\d+", (figures.ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(found) > 8 and not [number for number in found if number not in tables]


def test_every_record_that_a_page_links_exists() -> None:
    links = re.findall(r"\.\./(bench/records/results/[\w.-]+)", (figures.ROOT / "docs/fidelity.md").read_text())
    assert len(links) > 3 and all((figures.ROOT / link).is_file() for link in links)
