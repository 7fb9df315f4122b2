"""Results: their files, their summary over seeds, and their tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from report_parts import dense, result
from sidetuning.errors import ArtifactError, SideTuningError
from sidetuning_bench.report import write_report
from sidetuning_bench.results import RunResult, gaps_table, markdown, measures_table, summary_table


def test_summary_by_hand() -> None:
    forgets = {"accuracy": [[0.9], [0.5, 0.7]], "alone": [0.9, 0.85], "peak_memory_mb": None, "alphas": [None, None]}
    table = summary_table(
        [
            # final accuracies: 0.8 and 0.6, then 0.5 and 0.7
            result(),
            result("finetune", **forgets),
            result(seed=1, accuracy=[[0.6], [0.6, 0.4]], base_seconds=0.5, peak_memory_mb=300.0),
            result("finetune", seed=2, **forgets),
        ]
    )
    assert [*zip(table["Method"], table["Seeds"], strict=True)] == [("sidetune", 2), ("finetune", 2)]
    ours, other = table.to_dict("records")
    # 0.7 and 0.5: deviation 0.1 · √2, over √2
    assert ours["Accuracy, %"] == pytest.approx((60, 10))
    # the last task cannot forget
    assert ours["Forgetting, points"] == (0, 0) and other["Forgetting, points"] == pytest.approx((40, 0))
    # the second error doubles
    assert ours["Rigidity, log ratio"] is None
    assert other["Rigidity, log ratio"] == pytest.approx((0.693147, 0), abs=1e-6)
    # of seed 0 alone, which both have: first and second, once each
    assert ours["Rank, average"] == (1.5, 0) and other["Rank, average"] == (1.5, 0)
    numbers = (
        "Parameters, per task",
        "Parameters, shared",
        "Training, s per task",
        "Base, s, once",
        "Memory, peak, MB",
    )
    assert [ours[name] for name in numbers] == [200, 5000, 3, 10, 300]
    assert math.isnan(other["Memory, peak, MB"])


def test_dense_rigidity_is_of_the_errors_that_were_scored() -> None:
    """Scores f / (f + e) of 1/2 and 2/3 are errors of f and f / 2: learned in the sequence it is twice as large."""
    (run,) = dense("psp")
    table = summary_table([replace(run, accuracy=[[0.7], [0.7, 1 / 2]], alone=[0.7, 2 / 3])])
    assert table["Rigidity, log ratio"][0] == pytest.approx((0.693147, 0), abs=1e-6)


def test_rank_among_those_that_add_little() -> None:
    """Rows by accuracy: a large one, then one that adds a tenth of the 5,000 shared, then one that adds less."""
    table = summary_table(
        [
            result("large", accuracy=[[0.9], [0.9, 0.9]], parameters=[100, 501]),
            result("tenth", accuracy=[[0.8], [0.8, 0.8]], parameters=[500, 500]),
            result("small", accuracy=[[0.7], [0.7, 0.7]], parameters=[1, 1]),
        ]
    )
    assert list(table["Rank, average"]) == [(1, 0), (2, 0), (3, 0)]
    assert list(table["Rank, of small"]) == [None, (1, 0), (2, 0)]
    assert "Rank, of small" in markdown(table)
    assert "Rank, of small" not in markdown(summary_table([result(), result("b")]))


def test_a_task_that_other_work_held_up_does_not_move_its_time() -> None:
    table = summary_table([result(seconds=[2.0, 700.0]), result(seed=1, seconds=[2.0, 2.5])])
    assert list(table["Training, s per task"]) == [2.25]


def test_variants_are_rows_of_their_own_and_ranks_need_company() -> None:
    assert "Rank, average" not in summary_table([result()])
    table = summary_table([result(variant="merge=alpha"), result(variant="merge=sum")])
    assert list(table["Method"]) == ["sidetune · merge=alpha", "sidetune · merge=sum"]
    assert list(table["Rank, average"]) == [(1.5, 0)] * 2
    # no seed in common
    assert "Rank, average" not in summary_table([result(), result("ewc", seed=1)])


def test_markdown() -> None:
    table = markdown(
        summary_table([result(peak_memory_mb=None), result(seed=1, accuracy=[[0.6], [0.6, 0.4]], peak_memory_mb=None)])
    )
    head, line, row = table.splitlines()
    assert "Accuracy, %" in head and "Rank" not in head and "Memory" not in head and "Rigidity" not in head
    assert row.startswith("| sidetune | 60.0 ± 10.0 | 0.0 | 200 | 5,000 | 3.0 | 10.0 | 2 |")
    assert head.count("|") == line.count("|") == row.count("|")
    escaped = markdown(summary_table([result("a|b\n<i>")])).splitlines()
    assert len(escaped) == 3 and escaped[2].startswith("| a\\|b &lt;i> |")


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(SideTuningError, match="no results"):
        write_report([], tmp_path / "r.html", title="none")
    with pytest.raises(SideTuningError, match="ewc learned cats, cows and sidetune learned cats, dogs"):
        summary_table([result(), result("ewc", tasks=["cats", "cows"])])
    with pytest.raises(SideTuningError, match="two results of seed 0"):
        summary_table([result(), result()])
    assert not list(tmp_path.iterdir())


def test_result_survives_its_file(tmp_path: Path) -> None:
    run = result(alone=[0.8, 0.6], alphas=[None, 0.5])
    run.save(tmp_path / "result.json")
    assert RunResult.load(tmp_path / "result.json") == run
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: c.pop("alphas"), "missing 1 required positional argument: 'alphas'"),
        (lambda c: c.update(extra=1), "unexpected keyword argument 'extra'"),
        (lambda c: c.update(tasks=["cats"]), "'accuracy' has 2 entries for 1 tasks"),
        (lambda c: c.update(tasks="ab"), "'tasks' is 'ab'"),
        (lambda c: c["accuracy"][1].pop(), "row 1 of 'accuracy' has 1 numbers, not 2"),
        (lambda c: c["accuracy"][1].__setitem__(0, float("nan")), "an accuracy is nan"),
        (lambda c: c["accuracy"][1].__setitem__(0, 80.0), "an accuracy is 80.0"),
        (lambda c: c["accuracy"][1].__setitem__(0, "0.8"), "is damaged"),
        (lambda c: c.update(seconds=[1.0, -1.0]), "negative"),
        (lambda c: c.update(seed="0"), "'seed' is '0'"),
        (lambda c: c.update(method=3), "'method' is 3"),
        (lambda c: c.update(tasks=[], accuracy=[], alphas=[], parameters=[], seconds=[]), "there are no tasks"),
    ],
)
def test_damaged_results_say_so(tmp_path: Path, damage: Any, words: str) -> None:
    content = asdict(result())
    damage(content)
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        RunResult.load(file)
    assert words in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"method": "side', "\udcff"])
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    file = tmp_path / "result.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=r"result\.json"):
        RunResult.load(file)
    with pytest.raises(ArtifactError, match="does not exist"):
        RunResult.load(tmp_path / "other.json")


def test_tasks_in_their_own_measures() -> None:
    table = measures_table(dense("sidetune", "finetune"))
    assert table.splitlines()[0] == "| Task | Measure | sidetune | finetune |"
    assert (
        "| normal | mean angle, ° ↓ | **20.0** | 45.0 |" in table
        and "| depth | mean error, m ↓ | 3.25 | **2.25** |" in table
    )
    higher = [replace(r, measures=["mean IoU", "F1"]) for r in dense("sidetune", "finetune")]
    assert "**45.0**" in measures_table(higher) and "↓" not in measures_table(higher)
    other = replace(dense("sidetune")[0], method="ewc", measures=["F1", "F1"])
    with pytest.raises(SideTuningError, match="normal is measured by"):
        measures_table([*dense("sidetune"), other])


def test_the_summary_says_of_which_seeds_its_ranks_are() -> None:
    ours, other = result("sidetune"), result("ewc")
    both = [ours, replace(ours, seed=1), other, replace(other, seed=1)]
    assert "Ranks" not in markdown(summary_table(both))
    table = markdown(summary_table([*both, replace(other, method="pnn", parameters=[9000, 9000])]))
    assert table.endswith("|\n\nRanks are of seed 0, which all of them have.\n")  # small ones have both seeds


def test_gaps_to_another_method_are_paired_and_have_the_sign_of_better() -> None:
    ours, other = dense("sidetune", "finetune")
    table = gaps_table([replace(ours, method="independent"), other])
    assert table.splitlines()[2:] == ["| normal | −125.0 |", "| depth | 30.8 |"]  # 20 to 45°; 3.25 to 2.25 m
    higher = [replace(r, measures=["mean IoU", "F1"]) for r in (replace(ours, method="independent"), other)]
    assert "| normal | 125.0 |" in gaps_table(higher)
    unpaired = replace(other, seed=7)
    assert gaps_table([ours, other]) == gaps_table([replace(ours, method="independent"), unpaired]) == ""
    assert gaps_table([replace(ours, method="independent"), other, unpaired]) == table
