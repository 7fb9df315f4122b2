"""Asking the run of a trained reader, one of version 0.1.0 too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sidetuning as st
from sidetuning_bench.language import answer

LEGACY = Path(__file__).parents[1] / "legacy/0.1.0"


@pytest.mark.slow
def test_a_run_of_version_0_1_0_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(LEGACY)
    about = json.loads((LEGACY / "runs/squad/about.json").read_text())["answer"]
    asked = answer.Settings("runs/squad/run", "what is the number ?", context="data/text.txt", best=2)
    found = answer.answer(asked)
    assert found.threshold == about["threshold"]
    for span, expected in zip(found.best, about["best"], strict=True):
        assert span._asdict() == pytest.approx(expected, abs=1e-5)
    answer.main(asked)
    assert capsys.readouterr().out.startswith(about["best"][0]["text"])


@pytest.mark.parametrize(
    ("run", "context", "message"),
    [
        ("run", "empty.txt", "is empty"),
        ("run", "nothing.txt", "cannot be read as text"),
        ("nowhere", "text.txt", "holds no run: run.json is missing"),
        ("other", "text.txt", "holds a run of icifar; give one of squad"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: str, context: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "text.txt").write_text("old river")
    settings = {"base": "hf:nothing", "method": "sidetune"}
    for name, scenario in (("run", "squad"), ("other", "icifar")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"scenario": scenario, "settings": settings}))
    with pytest.raises(st.SideTuningError, match=message):
        answer.main(answer.Settings(str(tmp_path / run), "what ?", context=str(tmp_path / context)))
