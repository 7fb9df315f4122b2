"""The numbers in the documents are those of the committed results."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

from run import RECORDS, main
from sidetuning import cli
from sidetuning.errors import UnknownNameError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Gives what --table prints for a record."""

    def table(record: str) -> str:
        main([*record.split(), "--table"])
        return capsys.readouterr().out.strip()

    return table


def test_the_icifar_table_is_made_from_the_results(printed: Callable[[str], str]) -> None:
    table = printed("icifar")
    assert table.count("\n") == 5
    assert table in (ROOT / "docs/benchmarks.md").read_text()


def test_the_tables_of_engines_are_made_from_the_results(printed: Callable[[str], str]) -> None:
    table = printed("engines")
    assert table.count("**") == 6 and table in (ROOT / "docs/how-to/engines.md").read_text()


def test_the_tables_of_the_campaign_are_made_from_its_results(printed: Callable[[str], str]) -> None:
    assert printed("campaign") in (ROOT / "docs/reliability.md").read_text()


def test_the_tables_of_grids_are_made_from_the_results(printed: Callable[[str], str]) -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    for grid in re.findall(r"compare icifar [^`]*--grid (\w+)|`--grid (\w+)`", text):
        grid = grid[0] or grid[1]
        table = printed(f"compare icifar --grid {grid}")
        assert table.count("\n") > 2 and table in text, grid


@pytest.mark.parametrize(
    ("record", "rows"), [("squad", 7), ("squad --grid seconds", 7), ("squad --grid all", 1), ("squad-cost", 9)]
)
def test_the_tables_of_language_are_made_from_the_results(
    record: str, rows: int, printed: Callable[[str], str]
) -> None:
    table = printed(record)
    assert table.count("\n") == rows + 1 and table in (ROOT / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("record", "count"),
    # A comparison has a sentence on ranks, too.
    [
        ("itaskonomy-settings", 2),
        ("dense-constants", 1),
        ("rooms", 2),
        ("compare itaskonomy", 2),
        ("compare itaskonomy --units range", 4),
        ("transfer --units range", 2),
        ("transfer --targets normal --frames 20 100 500 2000", 1),
    ],
)
def test_the_tables_of_dense_tasks_are_made_from_the_results(
    record: str, count: int, printed: Callable[[str], str]
) -> None:
    tables = printed(record).split("\n\n")
    assert len(tables) == count and all(table in (ROOT / "docs/benchmarks.md").read_text() for table in tables)


@pytest.mark.parametrize(
    ("record", "count"),
    [("rl --env doom-home", 1), ("rl --env doom-pointnav", 1), ("imitation", 3), ("rl-speed", 1)],
)
def test_the_tables_of_agents_are_made_from_the_results(record: str, count: int, printed: Callable[[str], str]) -> None:
    tables = [part for part in printed(record).split("\n\n") if part.startswith("|")]
    assert sum(table in (ROOT / "docs/benchmarks.md").read_text() for table in tables) == count  # without some measures


def test_the_table_of_the_zoo_is_made_from_the_results(printed: Callable[[str], str]) -> None:
    table = printed("zoo")
    assert table.count("\n") == 11 and table in (ROOT / "docs/zoo.md").read_text()


@pytest.mark.parametrize(
    ("record", "page"),
    [
        ("closed-form", "closed_form.md"),
        ("route-kinds", "closed_form.md"),
        ("generators", "generate.md"),
        ("five-jobs", "peers.md"),
        ("own-data", "peers.md"),
        ("serving", "serve.md"),
    ],
)
def test_the_tables_of_a_page_are_made_from_the_results(record: str, page: str, printed: Callable[[str], str]) -> None:
    tables = printed(record).split("\n\n")
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert all(table in text for table in tables) and any(table.startswith("|") for table in tables)


def test_the_readme_has_the_five_jobs_of_the_results(printed: Callable[[str], str]) -> None:
    text = (ROOT / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed("five-jobs").splitlines()[2:]]
    assert len(rows) == 4
    for name, lines, learned, _, kept, moved, loaded, _ in rows:
        assert f"| {name} | {lines} | {learned} | {kept} | {moved} | {loaded} |" in text
    # Ours is the shortest.
    assert min(rows, key=lambda row: int(row[1]))[0] == "sidetuning"


def test_the_readme_has_sizes_and_costs_of_the_results(printed: Callable[[str], str]) -> None:
    def result(name: str) -> Any:
        return json.loads((ROOT / f"bench/records/results/{name}.json").read_text())

    (table,) = re.findall(r"## Which side and merge\n\n(.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    steps = result("cost")["milliseconds_per_step"]
    assert f"{steps['first']:.0f} ms a step; {steps['live']:.0f} ms with the base" in table
    dense = printed("compare itaskonomy")
    ladder, match = (result(f"squad-epochs-{name}-0")["added"] for name in ("ladder", "sidetune-match"))
    numbers = [f"{result('closed-form-0')['width_3800']['numbers']:,}", f"{ladder:,}", f"{match:,}"]
    rows = printed("compare icifar --grid merge").splitlines()
    small = next(row.split("|") for row in rows if "merge=mlp2 |" in row)
    numbers += [dense.splitlines()[2].split("|")[6].strip()]
    assert all(number in table for number in numbers), numbers
    assert any(cell.strip() == "43,706" for cell in small) and "43,706" in table
    solved = printed("closed-form").splitlines()[2].split("|")
    assert f"{float(solved[4].split()[0]):.0f} s of one core" in table and f"{solved[2].split()[0]} %" in table
    side, features = (float(dense.splitlines()[i].split("|")[8]) for i in (2, 4))
    assert f"about {side / features:.1f} times the time of features alone" in table
    costs = {line.split("|")[1].strip(): line.split("|") for line in printed("squad-cost").splitlines()}
    for name in ("sidetune, match", "ladder"):
        assert f"{costs[name][3].strip().rstrip('%')} % of LoRA's time" in table, name


def test_the_load_on_a_server_is_that_of_its_result(printed: Callable[[str], str]) -> None:
    assert printed("serving-churn") in (ROOT / "docs/serve.md").read_text()


def test_how_often_clones_of_five_trajectories_stop_elsewhere_is_counted_in_the_results() -> None:
    def share(method: str, trajectories: int) -> float:
        files = [*(ROOT / "bench/records/results").glob(f"imitation-{method}-{trajectories}-?.json")]
        ends = [episode for file in files for episode in json.loads(file.read_text())["episodes"]]
        assert len(files) == 3 and len(ends) == 300
        return sum(not success and steps < 200 for success, _, _, steps in ends) / 3  # in % of the episodes

    sides, features = share("sidetune", 5), share("features", 5)
    few = f"side-tuned clones end {sides:.0f} % of the episodes by stopping elsewhere, features {features:.0f} %"
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


def test_the_ranks_over_three_seeds_are_those_of_the_results(printed: Callable[[str], str]) -> None:
    summary = printed("compare itaskonomy --units range --methods sidetune features finetune piggyback").split("\n\n")[
        0
    ]
    rows = [[cell.strip() for cell in line.split("|")] for line in summary.splitlines()]
    rank = rows[0].index("Rank, average")
    said = ", ".join(f"{row[1].removeprefix('sidetune · ')} {row[rank]}" for row in rows[2:])
    assert said in (ROOT / "docs/benchmarks.md").read_text()


def test_no_document_names_a_path_of_one_machine() -> None:
    files = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("bench/records/results/*"),
        *ROOT.glob("bench/**/*.md"),
    ]
    assert files
    assert not [f for f in files if "/work/" in f.read_text() or "/root/" in f.read_text() or "/tmp/" in f.read_text()]


def test_every_record_can_be_named_and_explains_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("vizdoom", "stable_baselines3", "transformers", "minari"):
        pytest.importorskip(extra)
    main([])
    assert "Records: batch-statistics, campaign, " in capsys.readouterr().out
    for name in RECORDS.names():
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and "--table" in capsys.readouterr().out
    with pytest.raises(UnknownNameError, match="did you mean 'icifar'"):
        main(["icifarr"])
    commands = re.findall(r"`python bench/records/run.py ([\w-]+)", (ROOT / "docs/benchmarks.md").read_text())
    assert len(commands) > 15 and set(commands) <= set(RECORDS.names())


class Parsed(Exception):
    """A command was understood; nothing of it is run."""


def test_every_command_of_the_documents_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for extra in ("vizdoom", "stable_baselines3", "transformers", "minari"):
        pytest.importorskip(extra)
    parse: Callable[..., Any] = tyro.cli

    def only_parse(*given: Any, **options: Any) -> None:
        parse(*given, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_parse)
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    joined = "\n".join(texts).replace("\\\n", " ")
    commands = sorted(set(re.findall(r"^sidetuning (.*)$", joined, re.MULTILINE)))
    assert len(commands) > 25
    for command in commands:
        arguments = shlex.split(command, comments=True)
        if "--help" in arguments or "--version" in arguments:
            continue
        with pytest.raises(Parsed):
            cli.run(arguments)
            pytest.fail(f"not parsed: sidetuning {command}")
