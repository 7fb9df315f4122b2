"""The demo, small: it ends with a report that shows pictures, and goes on where it stopped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_parts import write_digits
from sidetuning.cli import main as sidetuning
from sidetuning_bench.__main__ import main


@pytest.mark.slow
def test_the_demo_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vizdoom", reason="the Doom engine is an extra")
    monkeypatch.chdir(tmp_path)
    given = ["demo", "--frames", "58", "--epochs", "0.5"]
    main(given)
    page = (tmp_path / "runs/demo/report.html").read_text()
    assert "data:image/" in page and "finetune" in page and "sidetune" in page
    # The pictures come first, as they were after each of the five tasks; without scripts as they are at the end.
    assert page.index('id="pictures"') < page.index('id="summary"')
    assert 'type="range" min="1" max="5"' in page and page.count('data-moment="1" alt="normal') == 2
    assert page.count(" hidden>") > 20 and "Side-tuning forgot " in page
    said = capfd.readouterr().out
    assert "side-tuning 0.0 points" in said and "report.html" in said
    main(given)  # all is there already
    assert "58 labelled frames" in capfd.readouterr().out
    assert (tmp_path / "runs/demo/report.html").read_text() == page


@pytest.mark.slow
def test_the_quick_demo_learns_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    monkeypatch.chdir(tmp_path)
    main(["demo", "--quick", "--epochs", "1"])
    said = capfd.readouterr().out
    assert "side-tuning 0.0 points" in said and "Side-tuning forgot nothing. Fine-tuning forgot " in said
    assert (tmp_path / "runs/demo/digits/tasks/0-or-1/side.json").exists()
    page = (tmp_path / "runs/demo/digits/report.html").read_text()
    assert "Side-tuning forgot nothing." in page and "<svg" in page
    # The command for one's own photographs needs nothing more than photographs, and what its extras bring.
    (command,) = re.findall(r"^sidetuning (train photos/ .*?)</code>", page, re.MULTILINE)
    write_digits(tmp_path / "photos", (0, 1), 10)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        sidetuning(command.replace("timm:resnet50", "timm:resnet50x").split())
    assert "did you mean 'resnet50'" in capfd.readouterr().err


def test_without_the_engine_the_demo_names_the_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sidetuning.errors import SideTuningError
    from sidetuning_bench.dense import render_doom
    from sidetuning_bench.doom.engine import EngineError

    monkeypatch.chdir(tmp_path)
    for error, hint in ((EngineError("rendering needs cv2"), True), (SideTuningError("other settings"), False)):

        def fails(settings: render_doom.Settings, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(render_doom, "run", fails)
        with pytest.raises(SystemExit) as stop:
            main(["demo"])
        said = capsys.readouterr().err
        assert stop.value.code == 1 and str(error) in said and ("--quick" in said) == hint
