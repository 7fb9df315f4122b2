"""`sidetuning predict` shows each task's answer as its problem has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import sidetuning as st
from conftest import map_base
from sidetuning.commands.predict import Answer, Settings, _texts, _written, answered, main


def test_labels_have_a_probability_each_numbers_their_value_and_classes_the_first(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(tmp_path / "1.png")
    model = st.SideTuner(st.load_base("resnet44-cifar10"))
    model.add_task("tags", side="fcn4", head=3, labels=["cat", "indoor", "night"], problem="labels", seed=0)
    model.add_task("age", side="fcn4", head=1, labels=["years"], problem="numbers", seed=0)
    model.add_task("kind", side="fcn4", head=2, labels=["cat", "dog"], seed=0)
    st.fit(model, "tags", [(x, torch.ones(12, 3))], steps=30, lr=1e-2, progress=False)
    for task in model.tasks:
        model.save_task(task, tmp_path / "model" / task)
    (found,) = answered(Settings(str(tmp_path / "model"), (str(tmp_path / "1.png"),)))
    answers = {task: {a.label: a.value for a in found if a.task == task} for task in model.tasks}
    expected = model.forward_all(x[:1].float() / 255)
    assert answers["tags"] == pytest.approx(
        dict(zip(["cat", "indoor", "night"], expected["tags"][0].sigmoid().tolist())), abs=1e-4
    )
    assert min(value or 0.0 for value in answers["tags"].values()) > 0.8
    assert answers["age"] == pytest.approx({"years": float(expected["age"].detach())}, abs=1e-4)
    best = int(expected["kind"].argmax())
    assert answers["kind"] == pytest.approx(
        {["cat", "dog"][best]: float(expected["kind"].softmax(1).max().detach())}, abs=1e-4
    )


def test_lines_of_a_file_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, long = tmp_path / "a.txt", "x" * 300 + ".txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes("one\u2028 line\r\n\nnext".encode(encoding))
        assert [name for name, _ in _texts([str(file), long], False)] == ["one\u2028 line", "next", long]
    file.write_bytes("café".encode("latin-1"))
    with file.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        for source, name in ((str(file), str(file)), ("-", "standard input")):
            with pytest.raises(st.DataError, match=f"{name} is no text in UTF-8 or UTF-16"):
                list(_texts([source], False))


def test_numbers_are_whole_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer("a\u202e.png", "price", "price", 1253864.75, number=True), Answer("b", "kind", "cat", 1 / 3)
    monkeypatch.setattr("sidetuning.commands.predict.answered", lambda settings: iter([[one] for one in answer]))
    main(Settings("model", (), csv=True))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "a\u202e.png,price,price,1253864.75",
        "b,kind,cat,0.3333333333333333",
    ]
    main(Settings("model", (), json=True))
    assert json.loads(capsys.readouterr().out.splitlines()[0])["source"] == "a\u202e.png"
    main(Settings("model", ()))
    shown = capsys.readouterr().out
    assert "1.25386e+06" in shown and "0.33 " in shown


def test_pictures_of_different_sources_have_different_names(tmp_path: Path) -> None:
    model, settings, written = st.SideTuner(map_base()), Settings("m", (), out=str(tmp_path)), set[str]()
    sources = [("p", "1/a.png"), ("p", "2/a.png"), ("p-2", "3/a.png"), ("P", "4/a.png")]
    paths = [_written(model, task, source, torch.zeros(4, 4), settings, written) for task, source in sources]
    assert len({path.lower() for path in paths}) == 4
