"""`sidetuning train`, `evaluate` and `predict` on data of one's own, as the quickstart shows them."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import sidetuning as st
from conftest import map_base
from data_parts import write_digits, write_texts
from sidetuning.cli import main
from sidetuning.commands.train import seconds_of
from sidetuning.pictures import save_map
from sidetuning.report import charts, write_report
from sidetuning.tags import entity_counts, entity_f1
from text_parts import tagged, write_encoder, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two folders of photographs, and a model that has learned both."""
    root = tmp_path_factory.mktemp("own")
    write_digits(root / "round", (0, 6, 8), 30)
    write_digits(root / "straight", (1, 4, 7), 30)
    write_digits(root / "holdout", (0, 6, 8), 10, first=40)
    out = str(root / "my-model")
    first = ["train", str(root / "round"), "--base", "resnet44-cifar10", "--task", "round", "--out", out]
    main([*first, "--budget", "2s", "--quiet"])
    main(["train", str(root / "straight"), "--task", "straight", "--out", out, "--side", "none", "--quiet"])
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    done = capsys.readouterr()
    return done.out, done.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("sidetuning: ")
    return told


def test_a_model_folder_holds_both_tasks_and_nothing_else(place: Path) -> None:
    model = st.load(place / "my-model")
    assert set(model.tasks) == {"round", "straight"} and model["round"].labels == ["digit-0", "digit-6", "digit-8"]
    names = {path.name for path in (place / "my-model").rglob("*") if path.is_file()}
    assert names == {"side.json", "side.safetensors", "training.json", "report.json", "report.html"}


@pytest.mark.slow
def test_what_forgetting_would_have_been_is_shown(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(place / "my-model", tmp_path / "my-model"))
    for name in ("training.json", "report.json"):
        # As of a task that was not learned from data here.
        (out / "tasks/straight" / name).unlink()
    told = ("--task", "holdout", "--out", out, "--side", "none", "--budget", "2s", "--forgetting")
    _, notes = run(capsys, "train", place / "holdout", *told)
    assert "straight is left out of what forgetting would have been: it was not learned by sidetuning train" in notes
    found = json.loads((out / "tasks/holdout/training.json").read_text())["forgetting"]
    (row,) = found["tasks"]
    scored = json.loads((out / "tasks/round/report.json").read_text())["scores"]
    assert found["steps"] > 0 and row["task"] == "round" and row["rows"] == scored["samples"]
    assert row["before"] == pytest.approx(scored["accuracy"]) and 0 <= row["after"] <= 1
    page = (out / "report.html").read_text()
    assert page.count("What forgetting would have been") == 1 and "round, accuracy" in page
    # It stays where the task is scored again, and data that have gone are told.
    main(["evaluate", str(out), "--task", "holdout", str(place / "holdout"), "--report", "--quiet"])
    assert "What forgetting would have been" in (out / "report.html").read_text()
    elsewhere = json.loads((out / "tasks/round/training.json").read_text()) | {"data": str(tmp_path / "gone")}
    (out / "tasks/round/training.json").write_text(json.dumps(elsewhere))
    _, notes = run(capsys, "train", place / "holdout", *told, "--replace")
    assert "round is left out" in notes and "no other task whose data can be read" in notes


def test_a_holdout_is_scored(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "evaluate", place / "my-model", "--task", "round", place / "holdout", "--quiet")
    share = re.findall(r"accuracy ([\d.]+)%, 95 % interval ([\d.]+)% to ([\d.]+)%", out)[0]
    assert float(share[1]) < float(share[0]) < float(share[2]) and float(share[0]) > 60
    out, _ = run(capsys, "evaluate", place / "my-model", "--task", "round", place / "holdout", "--json", "--quiet")
    told = json.loads(out)
    assert told["scores"]["samples"] == 30 and [row["rows"] for row in told["classes"]] == [10, 10, 10]
    assert round(100 * told["scores"]["accuracy"], 1) == float(share[0])


def test_classes_that_the_task_does_not_have_are_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, notes = run(capsys, "evaluate", place / "my-model", "--task", "straight", write_both(place))
    assert "left out: 10 with the unknown class 'digit-0'" in notes
    told = refused(capsys, "evaluate", place / "my-model", "--task", "straight", place / "holdout")
    assert "no row can be used: left out: 10 with the unknown class 'digit-0'" in told
    assert told.endswith("the task's answers are digit-1, digit-4, digit-7")


def test_a_holdout_of_one_class_is_scored(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(place / "holdout" / "digit-6", tmp_path / "one" / "digit-6")
    out, _ = run(capsys, "evaluate", place / "my-model", "--task", "round", tmp_path / "one", "--json", "--quiet")
    assert json.loads(out)["scores"]["samples"] == 10


def test_info_and_report_count_the_same_parameters(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "info", place / "my-model", "--json")
    for task in json.loads(out):
        report = json.loads((place / "my-model/tasks" / task["task"] / "report.json").read_text())
        assert task["parameters"] == report["parameters"]


def test_what_was_kept_is_told_with_its_reason(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parts = ("--base", "resnet44-cifar10", "--task", "round", "--out", tmp_path / "model", "--side", "none", "--quiet")
    out, _ = run(capsys, "train", place / "round", *parts)
    assert "kept: linear head, closed form, which has the lowest loss on the validation rows" in out
    assert "these rows chose the side" in out
    for split, count in (("train", 20), ("validation", 5), ("test", 5)):
        write_digits(tmp_path / "given" / split, (0, 6), count, first={"train": 0, "validation": 25}.get(split, 30))
    out, _ = run(capsys, "train", tmp_path / "given", *parts, "--replace")
    assert "on 10 test rows" in out and "these rows chose the side" not in out


def write_both(place: Path) -> Path:
    folder = place / "both"
    if not folder.exists():
        write_digits(folder, (0, 1, 7), 10, first=40)
    return folder


def test_answers_are_tables_lines_of_json_and_csv(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((place / "holdout").rglob("*.png"))
    out, _ = run(capsys, "predict", place / "my-model", *files[:2], "--top", 2, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["source"] for row in rows] == [str(file) for file in files[:2]]
    model = st.load(place / "my-model")
    expected = model.predict(files[0], top=2)
    for task in model.tasks:
        found = {answer["label"]: answer["value"] for answer in rows[0]["tasks"][task]}
        assert found == pytest.approx(dict(expected[task]), abs=1e-5) and len(found) == 2
    out, _ = run(capsys, "predict", place / "my-model", place / "holdout", "--csv", "--task", "round", "--quiet")
    lines = out.splitlines()
    assert lines[0] == "source,task,answer,value" and len(lines) == 31
    assert lines[1].split(",")[1:3] == ["round", expected["round"][0].label]
    out, _ = run(capsys, "predict", place / "my-model", files[0])
    assert "round" in out and "straight" in out and expected["round"][0].label in out


def test_a_broken_image_does_not_stop_the_others(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(place / "holdout", tmp_path / "some"))
    (folder / "broken.png").write_bytes(b"no image")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(place / "my-model"), str(folder), "--csv", "--task", "round"])
    done = capsys.readouterr()
    assert stop.value.code == 1 and len(done.out.splitlines()) == 31
    assert "broken.png" in done.err and "(1 of 31 could not be read)" in done.err


def test_an_image_may_come_from_standard_input(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next((place / "holdout").rglob("*.png"))
    with file.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        out, _ = run(capsys, "predict", place / "my-model", "-", "--json")
    assert (
        json.loads(out)["tasks"] == json.loads(run(capsys, "predict", place / "my-model", file, "--json")[0])["tasks"]
    )


def test_the_report_needs_no_network_and_shows_mistakes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "evaluate", place / "my-model", "--task", "straight", write_both(place), "--report", "--quiet")
    page = (place / "my-model/report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page) and "http" not in page.replace("http://www.w3.org", "")
    for part in ("Calibration", "Confusion", "What was tried", "The data", "prefers-color-scheme"):
        assert part in page
    ids = re.findall(r'id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    told = json.loads((place / "my-model/tasks/round/report.json").read_text())
    assert page.count("data:image/jpeg") >= len(told["mistakes"])


def test_the_report_says_of_other_rows_that_they_are_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, page = place / "my-model", place / "my-model/report.html"

    def reported(data: Path) -> str:
        run(capsys, "evaluate", model, "--task", "straight", data, "--report", "--quiet")
        text = page.read_text()
        return text[text.index('id="straight"') :].partition("</section>")[0]

    learned = reported(Path(json.loads((model / "tasks/straight/training.json").read_text())["data"]))
    assert " train rows" in learned and "The task learned from such rows" in learned
    others = write_both(place).rename(place / "later")
    assert " later rows" in reported(others) and "too good" not in reported(others)


def test_tasks_are_not_overwritten_unless_asked(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(place / "my-model", out)
    arguments = ("train", place / "holdout", "--task", "round", "--out", out, "--side", "none", "--quiet")
    assert "has a task 'round' already" in refused(capsys, *arguments)
    before = (out / "tasks/round/side.safetensors").read_bytes()
    other = (out / "tasks/straight/side.safetensors").read_bytes()
    assert "round: " in run(capsys, *arguments, "--replace")[0]
    assert (out / "tasks/round/side.safetensors").read_bytes() != before
    assert (out / "tasks/straight/side.safetensors").read_bytes() == other


def test_learning_curves_are_drawn_where_there_are_some() -> None:
    attempt = {"name": "fusion + alpha, lr 0.003", "score": 0.8, "curve": [0.5, 0.7, 0.8]}
    task = {"task": "pets", "measure": "accuracy", "chosen": attempt["name"], "attempts": [attempt], "calibration": []}
    (chart,) = charts(task)
    assert chart["title"] == "Learning curves" and "fusion + alpha" in chart["svg"] and "var(--blue)" in chart["svg"]
    assert charts({**task, "attempts": [{**attempt, "curve": [0.5]}]}) == []


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("train", place / "round", "--base", "resnet44-cifar10", "--task", "round", "--out", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidetuning.automatic.fit", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--budget", "2s", "--quiet"])
    assert stop.value.code == 130
    # What was learned first answers already.
    assert st.load(tmp_path)["round"].side is None
    _, said = run(capsys, *arguments, "--budget", "2s")
    assert "caching" not in said and "fusion" in said and not (tmp_path / ".work").exists()


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_texts_come_from_a_table_a_file_and_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "encoder").mkdir()
    write_encoder(tmp_path / "encoder")
    table, out = write_texts(tmp_path / "a.jsonl", 120), tmp_path / "model"
    base = f"hf:{tmp_path / 'encoder'}"
    done, notes = run(capsys, "train", table, "--base", base, "--task", "about", "--out", out, "--budget", "1s")
    assert "texts are taken from the column 'text'" in notes and "saved in" in done
    texts = ["the old tower was red in the big river", "the old tower was 1815 in the big river"]
    (tmp_path / "asked.txt").write_text("\n".join(texts))
    for sources in (texts, [str(tmp_path / "asked.txt")]):
        told, _ = run(capsys, "predict", out, *sources, "--csv")
        assert [line.split(",")[2] for line in told.splitlines()] == ["answer", "colour", "number"]
    assert "What was tried" in (out / "report.html").read_text()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sentences whose words have classes, and a model that has learned them."""
    root = tmp_path_factory.mktemp("words")
    (root / "encoder").mkdir()
    write_encoder(root / "encoder")
    write_rows(root / "words.jsonl", tagged(60))
    write_rows(root / "holdout.jsonl", tagged(20, seed=1))
    model = ["--base", f"hf:{root / 'encoder'}", "--task", "ner", "--out", str(root / "model")]
    main(["train", str(root / "words.jsonl"), *model, "--side", "none", "--quiet"])
    return root


def test_classes_of_words_are_scored_and_reported(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, holdout = words / "model", words / "holdout.jsonl"
    out, _ = run(capsys, "evaluate", model, "--task", "ner", holdout, "--report", "--quiet")
    assert "entity f1 0." in out and "words" in out and "95 % interval" in out
    told = json.loads(run(capsys, "evaluate", model, "--task", "ner", holdout, "--json", "--quiet")[0])
    rows = [json.loads(line) for line in holdout.read_text().splitlines()]
    names = ["B-DATE", "B-LOC", "I-LOC", "O"]
    found = st.load(model).predict([row["tokens"] for row in rows])["ner"]
    said = [[word.answers[0].label for word in text] for text in found]
    right = [a == b for answers, row in zip(said, rows) for a, b in zip(answers, row["ner_tags"])]
    f1 = entity_f1([entity_counts(answers, row["ner_tags"]) for answers, row in zip(said, rows)])
    scores = told["scores"]
    assert scores["samples"] == len(right) and [row["name"] for row in told["classes"]] == names
    assert scores["accuracy"] == pytest.approx(sum(right) / len(right)) and scores["entity f1"] == pytest.approx(f1)
    assert scores["low"] < scores["accuracy"] < scores["high"]
    page = (model / "report.html").read_text()
    assert "entity f1 " in page and "holdout words; with 95 % confidence" in page and "Confusion: words of" in page
    report = json.loads((model / "tasks/ner/report.json").read_text())
    before, word, after = report["mistakes"][0]["marked"]
    place = re.fullmatch(r"row (\d+) of train, word (\d+)", report["mistakes"][0]["place"])
    assert place is not None and f"<mark>{word}</mark>" in page
    text = rows[int(place[1]) - 1]["tokens"]
    assert [*before.split(), word, *after.split()] == text and text[int(place[2]) - 1] == word
    # What was written before reports knew of words is read.
    older = {key: value for key, value in report.items() if key not in ("each", "forgetting")}
    kept = ("place", "truth", "answer", "value", "image")
    older["mistakes"] = [{**{key: row[key] for key in kept}, "text": "a b"} for row in report["mistakes"]]
    (model / "tasks/ner/report.json").write_text(json.dumps(older))
    assert "<blockquote>a b</blockquote>" in write_report(model, st.load(model)).read_text()


def test_words_are_answered_as_tables_json_and_csv(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, given = "what is the old tower?", '["old", "tower", "\\u0000"]'
    out, _ = run(capsys, "predict", words / "model", text, given, "--csv")
    lines = list(csv.reader(out.splitlines()))
    assert lines[0] == ["source", "task", "word", "answer", "value"] and len(lines) == 1 + 6 + 3
    assert [line[2] for line in lines[1:7]] == ["what", "is", "the", "old", "tower", "?"]
    assert lines[-1][-2:] == ["", ""]
    out, _ = run(capsys, "predict", words / "model", text, given, "--json", "--top", 2)
    first, second = (json.loads(line)["tasks"]["ner"] for line in out.splitlines())
    assert [answer["word"] for answer in first[:4]] == ["what", "what", "is", "is"]
    assert second[0]["label"] == lines[7][3] and second[-1] == {"word": "\0", "label": None, "value": None}
    out, _ = run(capsys, "predict", words / "model", text)
    assert "word" in out and "tower" in out and "LOC" in out
    assert "no spaces between its words" in refused(capsys, "predict", words / "model", "我爱北京")


def test_words_and_whole_texts_are_not_taken_for_each_other(
    words: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evaluate = ("evaluate", words / "model", "--task", "ner")
    assert "holds no lists of words" in refused(capsys, *evaluate, write_texts(tmp_path / "a.jsonl", 10))
    again = ("train", words / "words.jsonl", "--task", "more", "--out", words / "model", "--side", "none", "--balance")
    assert "leave --balance out" in refused(capsys, *again)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("2m", 120), ("1h", 3600), ("5", 5), ("0.5m", 30)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "two", "-1s", "nan", "0s"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(st.TaskError, match="--budget is a time such as 30s"):
        seconds_of(text)


def test_mistakes_are_one_sentence(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = place / "my-model"
    new = ("--task", "new", "--out")
    assert "name its base" in refused(capsys, "train", place / "round", *new, tmp_path / "none")
    assert "is built on resnet44-cifar10" in refused(
        capsys, "train", place / "round", "--base", "timm:resnet18", *new, out
    )
    assert "does not exist" in refused(capsys, "train", place / "nowhere.csv", *new, out)
    assert "--budget is a time" in refused(capsys, "train", place / "round", *new, out, "--budget", "soon")
    assert "did you mean 'round'" in refused(capsys, "evaluate", out, "--task", "rond", place / "holdout")
    assert "did you mean 'round'" in refused(capsys, "predict", out, "a.png", "--task", "rond")
    assert "missing.png cannot be read" in refused(capsys, "predict", out, place / "missing.png")
    assert "choose --json or --csv" in refused(capsys, "predict", out, "a.png", "--json", "--csv")
    nameless = st.SideTuner(st.load_base("resnet44-cifar10"))
    nameless.add_task("t", side=None, merge="base-only", head=3)
    nameless.save(tmp_path / "nameless")
    told = refused(capsys, "evaluate", tmp_path / "nameless", "--task", "t", place / "holdout")
    assert "has no names of its classes" in told
    (tmp_path / "empty").mkdir()
    assert "holds no image file" in refused(capsys, "predict", out, tmp_path / "empty")


def test_dense_tasks_write_pictures(tmp_path: Path) -> None:
    model = st.SideTuner(map_base())
    model.add_task("parts", side="fcn4", head="pixels", head_options={"channels": 5}, problem="classes", seed=0)
    answer = model.predict(torch.zeros(3, 40, 40, dtype=torch.uint8))["parts"]
    path = save_map(answer, tmp_path, "a photo-parts")
    assert path == tmp_path / "a-photo-parts.png" and path.stat().st_size > 0
    assert (tmp_path / "a-photo-parts.npy").exists()
    assert save_map(torch.rand(1, 8, 8), tmp_path, "depth").exists()


def test_a_broken_image_takes_no_answer_from_the_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted((place / "holdout").rglob("*.png"))[:2]
    broken = place / "broken.png"
    broken.write_bytes(b"nothing")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", str(place / "my-model"), *map(str, [files[0], broken, files[1]]), "--task", "round"])
    told = capsys.readouterr()
    assert told.out.count("digit-") >= 2 and "1 of 3 could not be read" in told.err


def test_a_folder_for_pictures_is_refused_where_no_task_makes_any(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = next((place / "holdout").rglob("*.png"))
    told = refused(capsys, "predict", place / "my-model", file, "--out", tmp_path / "pictures")
    assert told.endswith("no task that was asked answers with a picture; leave --out out")


def test_what_a_model_is_built_on_is_not_another_base(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = tmp_path / "other.safetensors"
    weights.touch()
    again = ("train", place / "holdout", "--task", "more", "--out", place / "my-model", "--quiet")
    assert "is built on other weights" in refused(capsys, *again, "--weights", weights)
    for name in ("hf:44-cifar10", "timm:resnet44-cifar10"):
        assert "is built on resnet44-cifar10, not" in refused(capsys, *again, "--base", name)
