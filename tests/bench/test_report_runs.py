"""`report`: one page of finished runs of any scenario."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sidetuning.errors import SideTuningError
from sidetuning_bench import commands
from sidetuning_bench.report_runs import FAMILIES, report

RECORDS = Path(__file__).parents[2] / "bench/records/results"
ADDED = ("command", "machine", "threads", "versions", "date", "protocol")


def finished(folder: Path, scenario: str, *names: str) -> list[Path]:
    """Folders as a scenario leaves them, of recorded results."""
    folders = []
    for name in names:
        content = json.loads((RECORDS / f"{name}.json").read_text())
        run = folder / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"scenario": scenario, "settings": content["settings"]}))
        result = {"memory_mb": None} if scenario == "squad" else {}
        result |= {key: value for key, value in content.items() if key not in ADDED}
        (run / "result.json").write_text(json.dumps(result))
        folders.append(run)
    return folders


def table_of(html: str) -> list[list[str]]:
    """The texts of the first table's rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", html.split("</table>")[0], re.DOTALL)
    return [[" ".join(re.sub("<[^>]+>", " ", c).split()) for c in re.findall(r"<t[hd].*?</t[hd]>", r)] for r in rows]


def test_every_scenario_has_a_family() -> None:
    """The commands import all scenarios."""
    assert callable(commands.main)
    assert set(FAMILIES) == {"icifar", "itaskonomy", "imitation-run", "rl-run", "squad"}


def test_curves_of_finished_agents(tmp_path: Path) -> None:
    names = [f"rl-doom-home-{method}-{seed}" for method in ("features", "sidetune") for seed in range(2)]
    finished(tmp_path / "rl", "rl-run", *names)
    with pytest.raises(SideTuningError, match="holds no run"):
        report([tmp_path / "rl"])
    # The folder of a comparison stands for its runs.
    (tmp_path / "rl/run.json").write_text(json.dumps({"scenario": "rl", "settings": {}}))
    html = report([tmp_path / "rl"]).read_text()
    head, features, sidetune = table_of(html)
    assert head == ["Method", "Success %", "SPL %", "Reward", "Parameters trained", "Steps per second", "Seeds"]
    assert (features[0], features[4], features[6]) == ("features", "83,525", "2") and "±" in features[1]
    assert sidetune[:2] == ["sidetune", "100.0"]
    assert (
        html.count('<svg class="wide-chart"') == 2 and 'class="band-1"' in html and "steps of the environments" in html
    )


def test_scores_of_finished_clones_over_trajectories(tmp_path: Path) -> None:
    names = [f"imitation-sidetune-{count}-{seed}" for count in (5, 20, 100) for seed in range(2)]
    html = report(finished(tmp_path, "imitation-run", *names), tmp_path / "page.html").read_text()
    rows = table_of(html)
    assert [row[0] for row in rows[1:]] == [f"sidetune trajectories={count}" for count in (5, 20, 100)]
    assert "<h1>Imitation: 6 runs</h1>" in html and 'class="line-0"' in html and 'class="line-1"' not in html


def test_scores_of_finished_readers(tmp_path: Path) -> None:
    names = [*(f"squad-epochs-sidetune-match-{seed}" for seed in range(3)), "squad-epochs-sidetune-slim-0"]
    html = report(finished(tmp_path, "squad", *names), tmp_path / "page.html").read_text()
    rows = table_of(html)
    assert rows[0][:3] == ["Method", "F1 %", "Exact %"] and rows[0][-1] == "Seeds" and "<svg" not in html
    assert [(row[0].split()[0], row[-1]) for row in rows[1:]] == [("sidetune", "3"), ("sidetune", "1")]
    assert "side=match" in rows[1][0] and rows[1][1] == "43.6 ± 0.8"


def test_runs_that_fit_on_no_page(tmp_path: Path) -> None:
    (first,) = finished(tmp_path, "rl-run", "rl-doom-home-features-0")
    (other,) = finished(tmp_path, "squad", "squad-epochs-sidetune-slim-0")
    shutil.copytree(first, again := tmp_path / "again")
    for folders, message in (
        ([first, other], "another scenario than the others"),
        ([first, again], "two results of seed 0"),
        ([tmp_path / "nowhere"], "holds no run"),
        ([], "at least one run"),
    ):
        with pytest.raises(SideTuningError, match=message):
            report(folders, tmp_path / "page.html")
    (again / "result.json").unlink()
    with pytest.raises(SideTuningError, match="is not finished"):
        report([again])
    run = json.loads((again / "run.json").read_text())
    (again / "run.json").write_text(json.dumps({**run, "scenario": "walking"}))
    with pytest.raises(SideTuningError, match=r"a run of walking; give one of .*icifar"):
        report([again])
    assert not (tmp_path / "page.html").exists()
