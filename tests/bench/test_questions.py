"""Questions with all faults of their files, windows of their contexts, and the best answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sidetuning as st
from sidetuning.cache import cache_tokens
from sidetuning.errors import DataError
from sidetuning_bench.language.questions import Answer, Question, make_windows, n_best, read_questions
from sidetuning_bench.language.tokenizer import load_tokenizer
from text_parts import entry, squad_file

transformers = pytest.importorskip("transformers")

LEGACY = Path(__file__).parents[1] / "legacy/0.1.0"


@pytest.fixture(scope="module")
def tokenizer(encoder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(encoder)


def read_answer(context: str, text: str) -> Answer:
    return Answer(text, context.index(text))


def test_faults_of_the_data_are_mended_and_counted(tmp_path: Path) -> None:
    file = squad_file(
        tmp_path / "train-v2.0.json",
        entry("good"),
        entry("shifted", answers=[("1822", 3)]),
        entry("nearest", context="1822 or 1822 or 1822", answers=[("1822", 9)]),
        entry("nowhere", answers=[("1999", 15)]),
        entry("none", answers=[], is_impossible=True),
        entry("plausible", answers=[("1822", 15)], is_impossible=True, plausible_answers=[{"text": "made"}]),
        entry("empty context", context="  "),
        entry("empty question", question=""),
        entry("empty answer", answers=[("", 0), ("1822", 15)]),
        entry("unicode", context="né à Zürich — 🗼 1822", answers=[("Zürich", 5)]),
        entry("spaces", answers=[(" 1822 ", 14)]),
        entry("before the start", answers=[("1822", -6)]),
    )
    found = read_questions(tmp_path, "train")
    answers = {q.id: q.answers for q in found.items}
    kept = "good,shifted,nearest,nowhere,none,plausible,empty answer,unicode,spaces,before the start"
    assert ",".join(answers) == kept
    assert answers["shifted"] == (("1822", 15),) and answers["nearest"] == (("1822", 8),)
    assert answers["nowhere"] == answers["none"] == answers["plausible"] == ()
    kinds = {q.id: (q.golds, q.teaches) for q in found.items}
    # Not taught as having no answer.
    assert kinds["nowhere"] == (["1999"], False) and kinds["none"] == ([], True)
    assert answers["spaces"] == (("1822", 15),) and answers["before the start"] == (("1822", 15),)
    assert found.problems == {
        "answers that start elsewhere, found again": 3,
        "answers that are not in their context, kept for the metric alone": 1,
        "questions or contexts without text, left out": 2,
        "answers without text, left out": 1,
    }
    assert [q.id for q in read_questions(file, limit=3).items] == ["good", "nowhere", "empty answer"]

    with pytest.raises(DataError, match="two questions with the id a"):
        read_questions(squad_file(tmp_path / "twice.json", entry("a"), entry("a")))
    with pytest.raises(DataError, match="no dev"):
        read_questions(tmp_path, "dev")
    for content in ("{}", "[1]", '{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}', "x"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match="no SQuAD file"):
            read_questions(tmp_path / "bad.json")
    (tmp_path / "none.json").write_text('{"data": []}')
    with pytest.raises(DataError, match="holds no question"):
        read_questions(tmp_path / "none.json")
    with pytest.raises(DataError, match="has no text"):
        read_questions(squad_file(tmp_path / "types.json", entry("a", answers=[("x", "1")])))
    with pytest.raises(DataError, match="has no text"):
        read_questions(squad_file(tmp_path / "types.json", entry("a", answers=[(1822, 1)])))
    squad_file(tmp_path / "train-v1.1.json", entry("a"))
    with pytest.raises(DataError, match=r"several files of train \(train-v1.1.json, train-v2.0.json\)"):
        read_questions(tmp_path, "train")
    with pytest.raises(DataError, match="does not exist"):
        read_questions(tmp_path / "nothing")


def test_the_hubs_layout(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": ["a", "b"],
        "title": ["t", "t"],
        "context": ["it was made in 1822 ."] * 2,
        "question": ["what ?", "who ?"],
        "answers": [{"text": ["1822"], "answer_start": [15]}, {"text": [], "answer_start": []}],
    }
    (tmp_path / "squad_v2").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "squad_v2" / "validation-00000-of-00001.parquet")
    found = read_questions(tmp_path, "dev")
    assert [q.answers for q in found.items] == [(("1822", 15),), ()] and not found.problems
    (tmp_path / "squad_v2" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="no parquet file of SQuAD"):
        read_questions(tmp_path, "train")


def test_windows_cover_the_context_and_know_the_answer(tokenizer: Any) -> None:
    context = " ".join([*(["old river"] * 20), "1822", *(["new tower"] * 20)])
    questions = [
        Question("a", "what is the number ?", context, (read_answer(context, "1822"),)),
        Question("b", "who ?", "it was made .", ()),
    ]
    windows = make_windows(questions, tokenizer, length=40, stride=12)
    assert max(windows.lengths()) == 40 and set(windows.question) == {0, 1} and not windows.problems
    covered, before = set(), None
    for w in np.flatnonzero(windows.question == 0):
        place = windows.offsets[w]
        known = place[place[:, 0] >= 0]
        words = {context[a:b] for a, b in known}
        # The question is not among the offsets.
        assert words <= {"old", "river", "1822", "new", "tower"}
        covered |= {tuple(p) for p in known}
        if before is not None:
            # The stride is what two windows share.
            assert len({tuple(p) for p in known} & before) == 12
        before = {tuple(p) for p in known}
        start, end = windows.labels[w]
        holds = [i for i, p in enumerate(place) if context[p[0] : p[1]] == "1822" and p[0] >= 0]
        assert [start, end] == (holds * 2 if holds else [0, 0])
        types = windows.types[w]
        assert list(types) == sorted(types) and types[0] == 0 and types[-1] == 1
    assert len(covered) == 81
    batch = windows.batch([0, len(windows) - 1])
    assert batch["input_ids"].shape == (2, 40) and batch["attention_mask"].sum(1).tolist() == [
        40,
        windows.lengths()[-1],
    ]
    same = tokenizer("who ?", "it was made .")
    assert windows.ids[-1].tolist() == same["input_ids"] and windows.types[-1].tolist() == same["token_type_ids"]


def test_long_questions_and_answers_are_counted(tokenizer: Any) -> None:
    context = " ".join(["old river"] * 30)
    long = Question("q", " ".join(["what"] * 60), context, (read_answer(context, "river old"),))
    windows = make_windows([long], tokenizer, length=40, stride=12)
    assert windows.problems == {"questions longer than their window, cut": 1} and max(windows.lengths()) <= 40
    assert (windows.labels.sum(1) > 0).any()
    wide = Question("w", "what ?", context, (read_answer(context, context),))
    assert make_windows([wide], tokenizer, length=40, stride=12).problems == {
        "answers longer than their window, learned as none": 1
    }
    with pytest.raises(DataError, match="no room for a question"):
        make_windows([long], tokenizer, length=40, stride=20)
    with pytest.raises(DataError, match="fast tokenizers"):
        make_windows([long], SimpleNamespace(is_fast=False))


def test_the_best_answer_of_all_windows(tokenizer: Any) -> None:
    context = " ".join(["old"] * 30 + ["1822", "1823"] + ["new"] * 30)
    question = Question("a", "what ?", context, (read_answer(context, "1822 1823"),))
    windows = make_windows([question], tokenizer, length=40, stride=12)
    assert len(windows) == 3 or len(windows) == 2
    scores = {w: np.zeros((len(windows.ids[w]), 2), np.float32) for w in range(len(windows))}
    w = int(np.flatnonzero(windows.labels.sum(1) > 0)[0])
    start, end = windows.labels[w]
    for v in scores.values():
        # No answer scores 3.
        v[0] = 1.5
        # Tokens of the question never answer.
        v[1:3] = 50
    # But 2 here, and the smallest counts.
    scores[w][0] = 1.0
    scores[w][start, 0], scores[w][end, 1] = 3.0, 2.5
    ((best,),) = n_best([question], windows, scores, 1)
    assert best.text == "1822 1823" == context[best.start : best.end] and best.score == 5.5
    assert best.null == 2.0 and best.null_odds == -3.5
    # An end before its start would score 18.
    scores[w][end, 0], scores[w][start, 1] = 9.0, 9.0
    assert n_best([question], windows, scores, 1)[0][0][:4] == ("1822", best.start, best.start + 4, 12.0)

    (window,) = make_windows([question], tokenizer, length=80, stride=12).ids
    one = make_windows([question], tokenizer, length=80, stride=12)
    n = len(window)
    crossed = np.zeros((n, 2), np.float32)
    # The likely starts lie after the likely ends.
    crossed[n // 2 :, 0], crossed[: n // 2, 1] = 5, 5
    crossed[n // 2, 1] = 1
    ((best,),) = n_best([question], one, {0: crossed}, 1)
    assert best.score == 6 and best.text == context[best.start : best.end] != ""


def test_the_n_best_answers_are_different_spans(tokenizer: Any) -> None:
    context = " ".join(["old"] * 30 + ["1822", "1823"] + ["new"] * 30)
    question = Question("a", "what ?", context, ())
    windows = make_windows([question], tokenizer, length=40, stride=12)
    scores = {w: np.zeros((len(windows.ids[w]), 2), np.float32) for w in range(len(windows))}
    seen = 0
    for w, place in enumerate(windows.offsets):
        for i in np.flatnonzero(place[:, 0] >= 0):
            word = context[place[i, 0] : place[i, 1]]
            seen += word == "1822"
            scores[w][i] = {"1822": (4 + w, 1), "1823": (2, 3)}.get(word, (-9, -9))
    # Two windows hold the same span.
    assert seen > 1
    (best,) = n_best([question], windows, scores, 3)
    assert [p.text for p in best] == ["1822 1823", "1822", "1823"]
    assert [p.score for p in best] == sorted((p.score for p in best), reverse=True)
    assert [best[:1]] == n_best([question], windows, scores, 1)
    silent = [Question("a", "what ?", " ", ())]
    (empty,) = n_best(silent, make_windows(silent, tokenizer, 40, 10), {0: np.ones((5, 2), np.float32)}, 3)
    assert [p.text for p in empty] == [""]


def test_special_tokens_that_somebody_wrote_are_text(tokenizer: Any) -> None:
    (plain,) = make_windows([Question("a", "what ?", "it was made", ())], tokenizer, 40, 10).ids
    (window,) = make_windows([Question("a", "what [SEP] ?", "it [CLS] was made", ())], tokenizer, 40, 10).ids
    for token in (tokenizer.sep_token_id, tokenizer.cls_token_id):
        assert (window == token).sum() == (plain == token).sum()


@pytest.mark.parametrize("name", ["tokens-float16", "tokens-float32"])
def test_token_caches_of_version_0_1_0_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions make the same windows, and these the name of the same cache."""
    monkeypatch.chdir(LEGACY)
    about = json.loads((LEGACY / "caches" / name / "about.json").read_text())
    expected = load_file(LEGACY / "caches" / name / "expected.safetensors")
    base = st.load_base(**about["base"]["load_base"])
    windows = make_windows(read_questions("data/squad", "train").items, load_tokenizer(base, 40), 40, 8)
    assert windows.fingerprint() == about["texts_fingerprint"]
    shutil.copytree(LEGACY / "caches" / name, tmp_path / "caches")
    # Its probe is one pass over the example, and none over the texts.
    base.identity()
    monkeypatch.setattr(st.Base, "encode", lambda *_: pytest.fail("the base ran again"))
    labels = torch.from_numpy(windows.labels)
    cached = cache_tokens(base, windows, labels, tmp_path / "caches", progress=False, **about["arguments"])
    assert cached.folder.name == about["key"]
    inputs, features, y = cached.__getitems__(about["rows"])
    found = {**{f"x.{k}": v for k, v in inputs.items()}, "out": features.out, "y": y}
    found.update({f"tap.{tap}": value for tap, value in features.taps.items()})
    assert set(found) == set(expected)
    for field, value in found.items():
        assert torch.allclose(value, expected[field], atol=1e-6), field


SPACED = [
    ("made in New  York City .", "New York City", "New  York City"),
    ("costs 1 , 000 dollars", "1,000", "1 , 000"),
    ("in the U.S. Congress", "U. S.\tCongress", "U.S. Congress"),
    ("a line\nbreak here", "line break", "line\nbreak"),
    ("from 10\u00a0km away", "10 km", "10\u00a0km"),
]


@pytest.mark.parametrize(("context", "answer", "found"), SPACED)
def test_an_answer_that_differs_in_white_space_is_found(context: str, answer: str, found: str, tmp_path: Path) -> None:
    read = read_questions(squad_file(tmp_path / "train.json", entry("a", context=context, answers=[(answer, 0)])))
    assert read.items[0].answers == ((found, context.index(found)),) and read.items[0].lost == ()
    assert read.problems == {"answers that differ in white space, found again": 1}


@pytest.mark.parametrize(("context", "answer"), [("a thing", "at"), ("the nth eme", "theme"), ("1 2", "1  3")])
def test_parts_of_other_words_are_no_answer(context: str, answer: str, tmp_path: Path) -> None:
    read = read_questions(squad_file(tmp_path / "train.json", entry("a", context=context, answers=[(answer, 0)])))
    assert read.items[0].answers == () and read.items[0].lost == (answer,)


ROW = {"id": "1", "context": "it was made in 1822\u2028.", "question": "when ?"}


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["1822"], "answer_start": [15]},
        [{"text": "1822", "answer_start": 15}],
        {"text": [], "answer_start": []},
    ],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_questions_a_line_or_in_a_list(answers: Any, name: str, tmp_path: Path) -> None:
    rows = [{**ROW, "answers": answers}, {**ROW, "id": 2, "answers": answers}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    found = read_questions(tmp_path, "train")
    assert [q.id for q in found.items] == ["1", "2"]
    assert found.items[0].golds == (["1822"] if "1822" in str(answers) else [])
    (tmp_path / name).write_text(json.dumps(rows), encoding="utf-16")
    assert read_questions(tmp_path, "train").items == found.items


def test_articles_a_line(tmp_path: Path) -> None:
    paragraph = {"context": ROW["context"], "qas": [{"id": "q", "question": "when ?", "answers": []}]}
    (tmp_path / "train.jsonl").write_text(json.dumps({"title": "t", "paragraphs": [paragraph]}) + "\n")
    assert [q.context for q in read_questions(tmp_path, "train").items] == [ROW["context"]]


def test_files_beside_a_split_are_no_part_of_it(tmp_path: Path) -> None:
    file = squad_file(tmp_path / "train-v2.0.json", entry("a"))
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    shutil.copy(file, tmp_path / ".ipynb_checkpoints" / "train-v2.0-checkpoint.json")
    assert len(read_questions(tmp_path, "train")) == 1
