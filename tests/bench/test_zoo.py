"""A slice of the sweep over models: each cell is right, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import zoo
from record import RESULTS
from sidetuning.errors import ShapeError
from zoo_models import IMAGES, TEXTS, TIMM

SLICE = ["timm:resnet10t", "timm:mobilenetv3_small_050", "hf:bert", "hf:gpt2", "hf:swin", "hf:vit_mae"]


@pytest.mark.slow
def test_a_slice_of_the_zoo(tmp_path: Path) -> None:
    rows = zoo.try_models(SLICE, tmp_path)
    refused = rows.pop("hf:vit_mae")["cells"]
    assert list(refused) == ["load"] and refused["load"].startswith("refused: the base gives other outputs")
    for name, row in rows.items():
        assert row["cells"] == dict.fromkeys(zoo.CELLS, "right"), name


def test_a_cell_is_right_refused_wrong_or_a_traceback(tmp_path: Path) -> None:
    trial = zoo.Trial("timm:none", tmp_path)

    def refuse() -> str:
        raise ShapeError("two words")

    for answer, kind in (
        (lambda: None, "right"),
        (lambda: "0.5 away", "wrong: 0.5 away"),
        (refuse, "refused: two words"),
    ):
        trial.attempt("load", answer)
        assert trial.cells["load"] == kind
    trial.attempt("load", lambda: str(1 / 0))
    assert trial.cells["load"] == "traceback: ZeroDivisionError: division by zero"


def test_a_process_that_dies_costs_one_model_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "for name in sys.argv[3:]:\n"
        "    folder = pathlib.Path(sys.argv[2]) / name.replace(':', '-')\n"
        "    folder.mkdir(exist_ok=True)\n"
        "    (folder / 'cells.json').write_text(json.dumps({'cells': {'load': 'traceback: the process died'}}))\n"
        "    if name == 'hf:b': os._exit(139)\n"
        "    (folder / 'cells.json').write_text(json.dumps({'cells': {'load': 'right'}}))\n"
    )
    monkeypatch.setattr(zoo, "__file__", str(script))
    rows = zoo.try_models(["hf:a", "hf:b", "hf:c"], tmp_path)
    assert [rows[name]["cells"]["load"] for name in rows] == ["right", "traceback: the process died", "right"]


def test_the_zoo_is_large_and_its_record_has_no_silent_cell() -> None:
    assert len(set(TIMM)) == len(TIMM) >= 150 and len({*TEXTS, *IMAGES}) >= 60
    rows = json.loads((RESULTS / "zoo.json").read_text())["rows"]
    faults = {
        (name, cell): text
        for name, row in rows.items()
        for cell, text in row["cells"].items()
        if not text.startswith(("right", "refused: "))
    }
    assert not faults
