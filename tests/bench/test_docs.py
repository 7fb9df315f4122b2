"""The numbers in the documents are those of the committed results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def printed(script: str) -> str:
    """What a benchmark's --table prints."""
    command = [sys.executable, *f"bench/records/{script} --table".split()]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def test_the_icifar_table_is_made_from_the_results() -> None:
    table = printed("icifar.py")
    assert table.count("\n") == 5
    assert table in (ROOT / "docs/benchmarks.md").read_text()


def test_the_tables_of_grids_are_made_from_the_results() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    for grid in re.findall(r"compare\.py icifar [^`]*--grid (\w+)|`--grid (\w+)`", text):
        grid = grid[0] or grid[1]
        table = printed(f"compare.py icifar --grid {grid}")
        assert table.count("\n") > 2 and table in text, grid


@pytest.mark.parametrize(
    ("script", "rows"),
    [("squad.py", 7), ("squad.py --grid seconds", 7), ("squad.py --grid all", 1), ("squad_cost.py", 9)],
)
def test_the_tables_of_language_are_made_from_the_results(script: str, rows: int) -> None:
    table = printed(script)
    assert table.count("\n") == rows + 1 and table in (ROOT / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("dense_settings.py", 2),
        ("dense_constants.py", 1),
        ("compare.py itaskonomy --grid methods", 4),  # with a sentence on ranks
        ("transfer.py", 2),
    ],
)
def test_the_tables_of_dense_tasks_are_made_from_the_results(script: str, count: int) -> None:
    tables = printed(script).split("\n\n")
    assert len(tables) == count and all(table in (ROOT / "docs/benchmarks.md").read_text() for table in tables)


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("agents.py rl --env doom-home", 1),
        ("agents.py rl --env doom-pointnav", 1),
        ("agents.py imitation", 3),
        ("agents.py speed", 1),
    ],
)
def test_the_tables_of_agents_are_made_from_the_results(script: str, count: int) -> None:
    tables = [part for part in printed(script).split("\n\n") if part.startswith("|")]
    assert sum(table in (ROOT / "docs/benchmarks.md").read_text() for table in tables) == count  # without some measures


def test_how_often_clones_of_five_trajectories_stop_elsewhere_is_counted_in_the_results() -> None:
    def share(method: str, trajectories: int) -> float:
        files = [*(ROOT / "bench/records/results").glob(f"imitation-{method}-{trajectories}-?.json")]
        ends = [episode for file in files for episode in json.loads(file.read_text())["episodes"]]
        assert len(files) == 3 and len(ends) == 300
        return sum(not success and steps < 200 for success, _, _, steps in ends) / 3  # in % of the episodes

    few = f"side-tuned clones end {share('sidetune', 5):.0f} % of the episodes by stopping elsewhere, features {share('features', 5):.0f} %"
    assert few in (ROOT / "docs/benchmarks.md").read_text()
    assert all(share(method, n) == 0 for method in ("sidetune", "features") for n in (100, 500))


def test_the_numbers_of_levels_are_those_of_the_environments() -> None:
    nav = pytest.importorskip("sidetuning_bench.doom.nav")
    all_levels = [len(nav.MAPS[split]) for split in ("train", "val", "test")]
    winding = [len([m for m in nav.MAPS[split] if m not in nav.OPEN]) for split in ("train", "val", "test")]
    text = (ROOT / "docs/agents.md").read_text()
    assert (
        "train {}, val {}, test {} levels".format(*all_levels) in text
        and "it has {}, {} and {}".format(*winding) in text
    )


def test_the_ranks_over_three_seeds_are_those_of_the_results() -> None:
    summary = printed("compare.py itaskonomy --methods sidetune features finetune piggyback").split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in summary.splitlines()]
    rank = rows[0].index("Rank, average")
    said = ", ".join(f"{row[1].removeprefix('sidetune · ')} {row[rank]}" for row in rows[2:])
    assert said in (ROOT / "docs/benchmarks.md").read_text()


def test_no_document_names_a_path_of_one_machine() -> None:
    files = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("bench/records/results/*"),
        *ROOT.glob("bench/**/*.md"),
    ]
    assert files
    assert not [f for f in files if "/work/" in f.read_text() or "/root/" in f.read_text() or "/tmp/" in f.read_text()]
