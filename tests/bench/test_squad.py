"""The scenario of question answering: what is learned, how runs resume, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sidetuning as st
from sidetuning import loop
from sidetuning.cli import main
from sidetuning_bench.language import answer, squad
from sidetuning_bench.language.methods import METHODS
from sidetuning_bench.language.questions import read_questions
from sidetuning_bench.methods import load_method
from sidetuning_bench.options import with_values
from text_parts import NUMBERS, SPECIAL, WORDS, Lines, number_questions, write_tokenizer

pytest.importorskip("transformers")


def settings_for(folder: Path, questions: Path, encoder: Path, values: Mapping[str, Any]) -> squad.Settings:
    """Small windows and sides, of the questions and the base that the tests share."""
    small = {
        "method": "sidetune",
        "data": str(questions),
        "base": f"hf:{encoder}",
        "out": str(folder / "run"),
        "cache": str(folder / "cache"),
        "length": 48,
        "stride": 8,
        "width": 16,
        "progress": False,
    }
    return squad.settings_of({**small, **values})


@pytest.mark.slow
def test_a_side_learns_to_answer_and_can_be_asked(
    questions_folder: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = f"squad --data {questions_folder} --base hf:{encoder} --length 48 --stride 8 --cache cache --no-progress"
    main(["bench", *f"{shown} --epochs 40 --lr 1e-2 --batch 48 --out run sidetune --width 16".split()])
    printed = capfd.readouterr()
    assert "F1, %: " in printed.out and "Loading" not in printed.err
    result = json.loads(Path("run/result.json").read_text())
    # A model that never answers scores 33.
    assert result["scores"]["f1"] > 90 and result["scores"]["no_answer"] > 80
    answers = json.loads(Path("run/predictions.json").read_text())
    odds = json.loads(Path("run/null_odds.json").read_text())
    assert len(answers) == 60 and all(answers.values()) and 15 < sum(v > 0 for v in odds.values()) < 25
    settings = settings_for(tmp_path, questions_folder, encoder, {"epochs": 40.0, "lr": 1e-2, "batch": 48})
    before = Path("run/result.json").read_bytes()
    squad.run(settings)
    assert Path("run/result.json").read_bytes() == before
    with pytest.raises(st.SideTuningError, match="other settings"):
        squad.run(with_values(settings, {"epochs": 2.0}))

    Path("text.txt").write_text("old river made in 1844 by tower")
    question = ["answer", "run", "what is the number ?", "--context", "text.txt"]
    main(["bench", *question])
    printed = capfd.readouterr()
    assert printed.out.startswith("1844\n") and "characters 18 to 22" in printed.out
    Path("text.txt").write_text("old river made by tower")
    main(["bench", *question])
    assert capfd.readouterr().out.startswith("no answer")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "nobody/squad"}, "could not be read from the Hub"),
        ({"data": "some/where/else"}, "does not exist"),
        ({"data": "dev.json"}, "is one file"),
        ({"base": "hf:."}, "cannot load"),
        ({"base": "resnet44-cifar10"}, "texts need an encoder"),
        ({"side": "slimm"}, "slimm"),
        ({"method": "ladder", "rungs": 9}, "the base has 3 layers"),
        ({"method": "ladder", "width": 10}, "multiple of its 4 heads"),
        ({"length": 80}, "cannot read 80 tokens at once, 64 at most"),
        ({"stride": -5}, "--stride must be 0 or more"),
        ({"epochs": 0.0}, "--epochs must be above 0"),
        ({"method": "lora", "rank": 0}, "--rank must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    values: dict[str, Any],
    message: str,
    questions_folder: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(questions_folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(st.SideTuningError, match=message):
        squad.run(settings_for(tmp_path, questions_folder, encoder, values))


def test_a_method_has_no_settings_that_it_does_not_read() -> None:
    with pytest.raises(TypeError, match="has no setting init"):
        with_values(squad.Settings(method=METHODS["features"]), {"init": "zero"})


def test_a_run_is_of_one_data_set_and_one_tokenizer(questions_folder: Path, encoder: Path, tmp_path: Path) -> None:
    mine, others = tmp_path / "encoder", tmp_path / "others"
    shutil.copytree(encoder, mine)
    values = {"method": "features", "epochs": 0.1, "questions": 30, "test_questions": 5}
    settings = settings_for(tmp_path, questions_folder, mine, values)
    squad.run(settings)
    others.mkdir()
    number_questions(others / "train.json", 40, 7)
    number_questions(others / "dev.json", 20, 8)
    with pytest.raises(st.SideTuningError, match="a run of another data; choose"):
        squad.run(with_values(settings, {"data": str(others)}))
    moved = shutil.copytree(questions_folder, tmp_path / "moved")
    assert squad.run(with_values(settings, {"data": str(moved)})).test_questions == 5

    (tmp_path / "text.txt").write_text("old river made in 1844 by tower")
    ask = answer.Settings(str(tmp_path / "run"), "what ?", context=str(tmp_path / "text.txt"))
    assert answer.answer(ask).best
    words = [*SPECIAL, *reversed(WORDS), *NUMBERS]
    for vocabulary, message in ((words, "has another tokenizer"), ([*words, "extra"], "belongs to another network")):
        write_tokenizer(mine, vocabulary)
        with pytest.raises(st.SideTuningError, match=message):
            answer.answer(ask)


def test_a_run_resumes_where_it_stopped(
    questions_folder: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"epochs": 1.0, "layers": 1, "questions": 120, "test_questions": 30, "save_every": 0.0}
    settings = settings_for(tmp_path, questions_folder, encoder, values)
    squad.run(with_values(settings, {"out": str(tmp_path / "whole")}))
    step, calls = loop._Run.step, 0

    def stopped(run: Any, batch: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        step(run, batch)

    monkeypatch.setattr(loop._Run, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        squad.run(settings)
    monkeypatch.setattr(loop._Run, "step", step)
    result = squad.run(settings)
    # The peak of the first part is not known.
    assert result.steps == 8 and result.memory_mb is None
    for name in ("predictions.json", "null_odds.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_ladder_reads_layers_spread_up_to_the_last(encoder: Path, tmp_path: Path) -> None:
    for rungs, layers in ((1, [2]), (2, [0, 2]), (3, [0, 1, 2])):
        settings = settings_for(tmp_path, tmp_path, encoder, {"method": "ladder", "rungs": rungs})
        assert squad.taps_of(settings) == ["embeddings", *(f"encoder.layer.{i}" for i in layers)]


@pytest.mark.slow
def test_a_distilled_side_starts_near_the_base(questions_folder: Path, encoder: Path, tmp_path: Path) -> None:
    values = {"width": 32, "epochs": 0.1, "lr": 1e-6, "test_questions": 3, "side": "slim"}
    values |= {"init": "distilled", "distill_epochs": 8.0}
    settings = settings_for(tmp_path, questions_folder, encoder, values)
    assert squad.run(settings).seconds > 0
    base = st.load_base(settings.base, taps=squad.taps_of(settings))
    # What was learned is all in the task.
    (tmp_path / "run" / "side.safetensors").unlink()
    method: Any = load_method(tmp_path / "run" / "tasks", base)
    texts = Lines(vocabulary=40).batch([0, 1, 2])
    features, real = base(texts), texts["attention_mask"] > 0
    fresh = st.SideTuner(base)
    fresh.add_task("a", side="slim", side_options={"width": 32, "layers": 4}, head="identity")
    trained = method.model["squad"].side_output(texts, features)
    built = fresh["a"].side_output(texts, features)
    near, far = ((out - features.out)[real].square().mean().item() for out in (trained, built))
    assert near < 0.5 * far and near < features.out[real].var()


def test_answerable_questions_are_answered_each(questions_folder: Path, encoder: Path, tmp_path: Path) -> None:
    values = {"method": "features", "epochs": 0.1, "questions": 30, "answerable": True}
    result = squad.run(settings_for(tmp_path, questions_folder, encoder, values))
    given = json.loads((tmp_path / "run" / "predictions.json").read_text())
    test = read_questions(questions_folder, "dev")
    assert set(given) == {question.id for question in test.items if question.golds} and len(given) < len(test)
    assert result.scores["f1"] == result.scores["has_answer"] and not {"no_answer", "area"} & set(result.scores)


@pytest.mark.parametrize("name", ["match", "slim", "top", "copy", "ladder", "features", "finetune", "scratch", "lora"])
def test_every_method_reads(name: str, questions_folder: Path, encoder: Path, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    values: dict[str, Any] = {"epochs": 0.2, "questions": 120, "test_questions": 12, "layers": 1}
    branches = ("match", "slim", "top", "copy", "ladder")
    values |= {"method": "sidetune", "side": name} if name in branches[:4] else {"method": name}
    result = squad.run(settings_for(tmp_path, questions_folder, encoder, values))
    assert result.questions == 120 and result.test_questions == 12 and 0 <= result.scores["f1"] <= 100
    assert result.added > 0 and result.steps == round(0.2 * 120 / 16)
    assert (result.alpha is not None) == (name in branches)
    best = json.loads((tmp_path / "run" / "nbest_predictions.json").read_text())
    first = {question: spans[0]["text"] for question, spans in best.items()}
    assert first == json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert max(map(len, best.values())) == 5
    (tmp_path / "text.txt").write_text("old river made in 1844 by tower")
    asked = answer.Settings(str(tmp_path / "run"), "what is ?", str(tmp_path / "text.txt"), best=3, threshold=-1e9)
    found = answer.answer(asked)
    assert len(found.best) == 3 and found.none and found.best[0].score >= found.best[1].score
    sizes = {"features": 66, "finetune": result.shared + 66}
    assert result.added == sizes.get(name, result.added)
