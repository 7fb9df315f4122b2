"""Question answering: data with all its faults, windows, the official metric, cached tokens, sides for texts, and learning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sidetuning as st
from sidetuning.cache import cache_tokens
from sidetuning.errors import DataError, ShapeError
from sidetuning_bench.language import metric as squad_metric
from sidetuning_bench.language.questions import Question, make_windows, n_best, read_questions
from sidetuning_bench.methods import load_method

transformers = pytest.importorskip("transformers")

WORDS = [
    "what",
    "is",
    "the",
    "number",
    "who",
    "?",
    ".",
    ",",
    "red",
    "green",
    "blue",
    "it",
    "was",
    "made",
    "in",
    "by",
    "a",
    "an",
    "of",
    "tower",
    "river",
    "old",
    "new",
    "big",
    "small",
]
NUMBERS = [str(n) for n in range(1800, 1860)]
DATA = Path(__file__).parent / "data"


def entry(name, question="what is the number ?", context="it was made in 1822 .", answers=(("1822", 15),), **more):
    given = [{"text": t, "answer_start": s} for t, s in answers]
    return context, {"id": name, "question": question, "answers": given, **more}


def squad_file(path, *entries):
    paragraphs = [{"context": context, "qas": [qa]} for context, qa in entries]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return path


def test_faults_of_the_data_are_mended_and_counted(tmp_path):
    file = squad_file(
        tmp_path / "train-v2.0.json",
        entry("good"),
        entry("shifted", answers=[("1822", 3)]),
        entry("nearest", context="1822 or 1822 or 1822", answers=[("1822", 9)]),
        entry("nowhere", answers=[("1999", 15)]),
        entry("none", answers=[], is_impossible=True),
        entry("plausible", answers=[("1822", 15)], is_impossible=True, plausible_answers=[{"text": "made", "answer_start": 7}]),
        entry("empty context", context="  "),
        entry("empty question", question=""),
        entry("empty answer", answers=[("", 0), ("1822", 15)]),
        entry("unicode", context="né à Zürich — 🗼 1822", answers=[("Zürich", 5)]),
        entry("spaces", answers=[(" 1822 ", 14)]),
        entry("before the start", answers=[("1822", -6)]),
    )  # fmt: skip
    found = read_questions(tmp_path, "train")
    answers = {q.id: q.answers for q in found.items}
    assert list(answers) == [
        "good",
        "shifted",
        "nearest",
        "nowhere",
        "none",
        "plausible",
        "empty answer",
        "unicode",
        "spaces",
        "before the start",
    ]
    assert answers["shifted"] == (("1822", 15),) and answers["nearest"] == (("1822", 8),)
    assert answers["nowhere"] == answers["none"] == answers["plausible"] == ()
    kinds = {q.id: (q.golds, q.teaches) for q in found.items}
    assert kinds["nowhere"] == (["1999"], False) and kinds["none"] == ([], True)  # not taught as having no answer
    assert answers["spaces"] == (("1822", 15),) and answers["before the start"] == (("1822", 15),)
    assert found.problems == {
        "answers that start elsewhere, found again": 3, "answers that are not in their context, kept for the metric alone": 1,
        "questions or contexts without text, left out": 2, "answers without text, left out": 1,
    }  # fmt: skip
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


def test_the_hubs_layout(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": ["a", "b"], "title": ["t", "t"], "context": ["it was made in 1822 ."] * 2, "question": ["what ?", "who ?"],
        "answers": [{"text": ["1822"], "answer_start": [15]}, {"text": [], "answer_start": []}],
    }  # fmt: skip
    (tmp_path / "squad_v2").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "squad_v2" / "validation-00000-of-00001.parquet")
    found = read_questions(tmp_path, "dev")
    assert [q.answers for q in found.items] == [(("1822", 15),), ()] and not found.problems
    (tmp_path / "squad_v2" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="no parquet file of SQuAD"):
        read_questions(tmp_path, "train")


# windows ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT with random weights and a tokenizer of its own, as a folder of transformers."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *NUMBERS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    with st.seeded(0):
        transformers.BertModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return transformers.AutoTokenizer.from_pretrained(encoder)


def test_windows_cover_the_context_and_know_the_answer(tokenizer):
    context = " ".join([*(["old river"] * 20), "1822", *(["new tower"] * 20)])
    questions = [
        Question("a", "what is the number ?", context, ((("1822"), context.index("1822")),)),
        Question("b", "who ?", "it was made .", ()),
    ]
    questions[0] = Question("a", questions[0].question, context, (read_answer(context, "1822"),))
    windows = make_windows(questions, tokenizer, length=40, stride=12)
    assert max(windows.lengths()) == 40 and set(windows.question) == {0, 1} and not windows.problems
    covered, before = set(), None
    for w in np.flatnonzero(windows.question == 0):
        place = windows.offsets[w]
        known = place[place[:, 0] >= 0]
        words = {context[a:b] for a, b in known}
        assert words <= {"old", "river", "1822", "new", "tower"}  # the question is not among the offsets
        covered |= {tuple(p) for p in known}
        if before is not None:
            assert len({tuple(p) for p in known} & before) == 12  # the stride is what two windows share
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


def read_answer(context, text):
    from sidetuning_bench.language.questions import Answer

    return Answer(text, context.index(text))


def test_long_questions_and_answers_are_counted(tokenizer):
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


def test_the_best_answer_of_all_windows(tokenizer):
    context = " ".join(["old"] * 30 + ["1822", "1823"] + ["new"] * 30)
    question = Question("a", "what ?", context, (read_answer(context, "1822 1823"),))
    windows = make_windows([question], tokenizer, length=40, stride=12)
    assert len(windows) == 3 or len(windows) == 2
    scores = {w: np.zeros((len(windows.ids[w]), 2), np.float32) for w in range(len(windows))}
    w = int(np.flatnonzero(windows.labels.sum(1) > 0)[0])
    start, end = windows.labels[w]
    for v in scores.values():
        v[0] = 1.5  # no answer scores 3
        v[1:3] = 50  # tokens of the question never answer
    scores[w][0] = 1.0  # but 2 here, and the smallest counts
    scores[w][start, 0], scores[w][end, 1] = 3.0, 2.5
    ((best,),) = n_best([question], windows, scores, 1)
    assert best.text == "1822 1823" == context[best.start : best.end] and best.score == 5.5
    assert best.null == 2.0 and best.null_odds == -3.5
    scores[w][end, 0], scores[w][start, 1] = 9.0, 9.0  # an end before its start would score 18
    assert n_best([question], windows, scores, 1)[0][0][:4] == ("1822", best.start, best.start + 4, 12.0)

    (window,) = make_windows([question], tokenizer, length=80, stride=12).ids
    one = make_windows([question], tokenizer, length=80, stride=12)
    n = len(window)
    crossed = np.zeros((n, 2), np.float32)
    crossed[n // 2 :, 0], crossed[: n // 2, 1] = 5, 5  # the likely starts lie after the likely ends
    crossed[n // 2, 1] = 1
    ((best,),) = n_best([question], one, {0: crossed}, 1)
    assert best.score == 6 and best.text == context[best.start : best.end] != ""


def test_the_n_best_answers_are_different_spans(tokenizer):
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
    assert seen > 1  # two windows hold the same span
    (best,) = n_best([question], windows, scores, 3)
    assert [p.text for p in best] == ["1822 1823", "1822", "1823"]
    assert [p.score for p in best] == sorted((p.score for p in best), reverse=True)
    assert [best[:1]] == n_best([question], windows, scores, 1)
    silent = [Question("a", "what ?", " ", ())]
    (empty,) = n_best(silent, make_windows(silent, tokenizer, 40, 10), {0: np.ones((5, 2), np.float32)}, 3)
    assert [p.text for p in empty] == [""]


def test_special_tokens_that_somebody_wrote_are_text(tokenizer):
    (plain,) = make_windows([Question("a", "what ?", "it was made", ())], tokenizer, 40, 10).ids
    (window,) = make_windows([Question("a", "what [SEP] ?", "it [CLS] was made", ())], tokenizer, 40, 10).ids
    for token in (tokenizer.sep_token_id, tokenizer.cls_token_id):
        assert (window == token).sum() == (plain == token).sum()


# the metric -------------------------------------------------------------------------------------------------------------


def test_the_metric_is_the_official_one():
    """Predictions of a trained reader, and what the official script of SQuAD v2 (evaluate-v2.0.py) makes of them."""
    found = json.loads((DATA / "squad_official.json").read_text())
    rows = found["rows"]  # answers, prediction, odds of there being none, official exact and F1
    assert len(rows) >= 1000
    golds, texts, odds = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    assert any(not g for g in golds) and any(not t for t in texts) and any(len(set(g)) > 2 for g in golds)
    assert any(any(ord(c) > 127 for c in t) for t in texts)
    for gold, text, _, exact, f1 in rows:
        assert squad_metric.against(gold, text) == (exact, pytest.approx(f1, abs=1e-12)), (gold, text)
    scores = squad_metric.score(golds, texts, odds)._asdict()
    for name, value in found["official"].items():
        assert scores[name] == pytest.approx(value, abs=1e-9), name


def test_edges_of_the_metric():
    assert squad_metric.normalise("The  Cat's, a hat!") == "cats hat"
    assert squad_metric.against(["the"], "") == (1.0, 1.0)  # answers of articles alone do not count
    # Yet silence is wrong where an answer was given, as officially.
    assert squad_metric.score([["the"]], ["x"], [1.0]).f1 == 0
    assert squad_metric.against([], "x") == (0.0, 0.0) and squad_metric.against([], "") == (1.0, 1.0)
    assert squad_metric.against(["a b c", "x y"], "x") == (0.0, pytest.approx(2 / 3))
    scores = squad_metric.score([["x"], []], ["x", "y"], [-1.0, 1.0])
    assert scores.exact == scores.f1 == scores.best_f1 == scores.has_answer_exact == 100
    assert squad_metric.score([["x"], []], ["x", "y"], [-1.0, 1.0], threshold=-2.0).f1 == 50
    assert squad_metric.score([["x"], []], ["x", "y"], [-1.0, 1.0], threshold=2.0).no_answer == 0
    scores = squad_metric.score([["x"], ["y"]], ["x", "z"], [2.0, 3.0])  # silent, and wrongly so
    assert (
        scores.f1 == 0
        and scores.best_f1 == 50
        and scores.best_threshold == 2.0
        and scores.no_answer != scores.no_answer
    )


# cached tokens and sides ------------------------------------------------------------------------------------------------


class Lines:
    """Texts of different lengths."""

    def __init__(self, count=40, seed=0, vocabulary=50):
        rng = np.random.default_rng(seed)
        self.ids = [rng.integers(5, vocabulary, int(n)) for n in rng.integers(3, 30, count)]

    def __len__(self):
        return len(self.ids)

    def lengths(self):
        return np.array([len(i) for i in self.ids])

    def batch(self, rows, pad=0):
        longest = max(len(self.ids[r]) for r in rows) + pad
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for k, r in enumerate(rows):
            ids[k, : len(self.ids[r])], mask[k, : len(self.ids[r])] = torch.from_numpy(self.ids[r]), 1
        return {"input_ids": ids, "attention_mask": mask}

    def fingerprint(self):
        return str(sum(int(i.sum()) for i in self.ids))


TAPS = ("embeddings", "encoder.layer.0", "encoder.layer.1")


@pytest.fixture(scope="module")
def base(encoder):
    return st.load_base(f"hf:{encoder}", taps=TAPS)


@pytest.mark.parametrize("side", ["slim", "convolutional", "ladder", "top", "match"])
def test_padding_and_companions_never_matter(base, side):
    model = st.SideTuner(base)
    with st.seeded(0):
        model.add_task("qa", side=side, head="span", side_options={} if side == "top" else {"width": 16})
    texts = Lines()
    with torch.no_grad():
        alone = model(texts.batch([4]), "qa")[0]
        n = len(texts.ids[4])
        padded = model(texts.batch([4], pad=9), "qa")[0]
        among = model(texts.batch([0, 4, 9, 11]), "qa")[1]
        assert torch.allclose(alone, padded[:n], atol=1e-5) and torch.allclose(alone, among[:n], atol=1e-5)
        assert (padded[n:] < -1e30).all()  # padding can never be chosen
        batch = texts.batch([4], pad=9)
        batch["input_ids"][0, n:] = 7  # nor does what stands there
        assert torch.allclose(model(batch, "qa")[0][:n], alone, atol=1e-5)
        other = texts.batch([4])
        other["input_ids"][0, 1] += 1
        assert not torch.allclose(model(other, "qa")[0], alone, atol=1e-3)


def test_sides_for_texts_say_what_they_need(encoder):
    plain = st.SideTuner(st.load_base(f"hf:{encoder}"))
    with pytest.raises(ShapeError, match="taps"):
        plain.add_task("qa", side="slim", head="span")
    tapped = st.SideTuner(st.load_base(f"hf:{encoder}", taps=["embeddings"]))
    with pytest.raises(ShapeError, match="multiple of its 4 heads"):
        tapped.add_task("qa", side="slim", head="span", side_options={"width": 10})
    with pytest.raises(ShapeError, match="make it odd"):
        tapped.add_task("qa", side="convolutional", head="span", side_options={"kernel": 4})
    with pytest.raises(ShapeError, match="compares tokens"):
        plain.add_task("qa", side="match", head="span")
    with pytest.raises(ShapeError, match="multiple of its 4 heads"):
        tapped.add_task("qa", side="match", head="span", side_options={"width": 10})
    with pytest.raises(ShapeError, match="must be a text encoder"):
        vectors = st.Base(
            torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)), example=torch.zeros(1, 5, 4), taps=["0"]
        )
        st.SideTuner(vectors).add_task("qa", side="match", head="span")
    highest = st.SideTuner(st.load_base(f"hf:{encoder}", taps=["encoder.layer.2"]))
    for model in (plain, highest):  # nothing to copy from, and nothing left to copy
        with pytest.raises(ShapeError, match=r"layers above the last tap.*'encoder\.layer\.1'"):
            model.add_task("qa", side="top", head="span")
    with pytest.raises(ShapeError, match="no text encoder"):
        st.SideTuner(st.load_base("resnet44-cifar10")).add_task("qa", side="top", head=3)


def test_the_match_side_compares_with_the_question():
    """Ids 2 … 3 question 3 … text 3, as encoders of pairs have them; padding is left or right."""
    from sidetuning_bench.language.sides import two_texts

    ids = torch.tensor([[2, 5, 6, 3, 7, 5, 8, 3, 0, 0], [0, 2, 5, 3, 3, 9, 9, 9, 9, 3], [2, 5, 6, 7, 8, 9, 4, 3, 0, 0]])
    first, second = two_texts(ids, (ids > 0).long())
    assert first.int().tolist() == [[0, 1, 1] + [0] * 7, [0, 0, 1] + [0] * 7, [0] + [1] * 6 + [0] * 3]
    assert second.int().tolist() == [[0] * 4 + [1] * 3 + [0] * 3, [0] * 5 + [1] * 4 + [0], [0] * 10]


def test_the_match_side_finds_what_the_question_names(encoder):
    """Which token of the text is also in the question: other words in the test than in training."""
    base = st.load_base(f"hf:{encoder}", taps=["embeddings", "encoder.layer.1"])
    model, generator = st.SideTuner(base), torch.Generator().manual_seed(0)

    def batch(low, high, n=64):
        text = torch.stack([low + torch.randperm(high - low, generator=generator)[:8] for _ in range(n)])
        place = torch.randint(8, (n,), generator=generator)
        asked, one = text[torch.arange(n), place, None], torch.ones(n, 1, dtype=torch.long)
        ids = torch.cat([2 * one, asked, 3 * one, text, 3 * one], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": place + 3}

    with st.seeded(0):
        model.add_task("qa", side="match", head="span", side_options={"width": 16})
    loss = lambda scores, y: torch.nn.functional.cross_entropy(scores[..., 0], y)  # noqa: E731
    st.fit(model, "qa", [batch(5, 25) for _ in range(60)], steps=60, lr=1e-2, loss=loss, progress=False)
    test = batch(25, 40)
    labels = test.pop("labels")
    right = model(test, "qa")[..., 0].argmax(1) == labels
    assert right.float().mean() > 0.8  # chance is 0.12


@pytest.mark.parametrize(("tap", "layers"), [("embeddings", 3), ("encoder.layer.0", 2), ("encoder.layer.1", 1)])
def test_the_top_starts_as_the_base(encoder, tap, layers):
    base = st.load_base(f"hf:{encoder}", taps=[tap])
    model = st.SideTuner(base)
    branch = model.add_task("qa", side="top", head="identity")
    batch = Lines().batch([0, 4, 9])
    features, real = base(batch), batch["attention_mask"] > 0
    assert torch.equal(branch.side_output(batch, features)[real], features.out[real])
    layer = sum(p.numel() for p in base.net.encoder.layer[0].parameters())
    assert sum(p.numel() for p in branch.side.parameters()) == layers * layer  # no table of embeddings, no pooler
    before = base.identity().sha256
    st.fit(model, "qa", [{**batch, "labels": features.out}], steps=2, lr=0.1, loss=lambda out, y: (out - y - 1).square().mean(), progress=False)  # fmt: skip
    assert base.identity().sha256 == before and torch.equal(base(batch).out, features.out)
    assert not torch.equal(branch.side_output(batch, features)[real], features.out[real])


@pytest.mark.parametrize(
    ("kind", "layer", "options"),
    [
        ("DistilBert", "transformer.layer.1", {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48}),
        ("Roberta", "encoder.layer.1", {"pad_token_id": 1}),
        ("Electra", "encoder.layer.1", {"embedding_size": 16}),
        ("ModernBert", "layers.1", {"pad_token_id": 0}),
    ],
)
def test_other_encoders_serve_as_bases(kind, layer, options, tokenizer, tmp_path):
    """Those that know no segments are not given any."""
    from sidetuning.integrations.transformers import from_model

    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    special = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=64, **special, **({} if kind == "DistilBert" else shape), **options
    )  # fmt: skip
    with st.seeded(0):
        base = from_model(getattr(transformers, f"{kind}Model")(config), taps=["embeddings", layer])
    plain = SimpleNamespace(is_fast=True, model_input_names=["input_ids", "attention_mask"])
    proxy = type(
        "Plain", (), {"__call__": lambda _, *a, **k: tokenizer(*a, **k), "__getattr__": lambda _, n: getattr(plain, n)}
    )()
    questions = [Question("a", "what ?", "it was made in 1822 .", ()), Question("b", "who ?", "it was big", ())]
    windows = make_windows(questions, proxy, length=40, stride=8)
    assert set(windows.batch([0, 1])) == {"input_ids", "attention_mask"}
    cached = cache_tokens(base, windows, torch.zeros(2, 2), tmp_path, dtype="float32", progress=False)
    inputs, features, _ = cached.__getitems__([0, 1])
    model, real = st.SideTuner(base), inputs["attention_mask"] > 0
    for side in ("slim", "ladder", "match", "top"):
        branch = model.add_task(side, side=side, head="identity")
        live = branch.side_output(inputs, base(inputs))
        assert torch.allclose(branch.side_output(inputs, features)[real], live[real], atol=1e-4)
    assert torch.allclose(live[real], features.out[real], atol=1e-4)  # the top, a copy


def test_memory_is_counted_anew():
    """In a process of its own: of a large one, which has run other tests, the system may put pages away at the same time."""
    code = (
        "import torch\nfrom sidetuning_bench.runs import peak_memory_mb as memory_mb\n"
        "large = torch.ones(100_000_000)\ndel large\n"  # 400 MB
        "high, anew, before = memory_mb(), memory_mb(anew=True), memory_mb()\n"
        "kept = torch.ones(20_000_000)\nprint(high, anew, before, memory_mb(), len(kept))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    high, anew, before, after, kept = map(float, done.stdout.split())
    if anew > high - 300:
        pytest.skip("this system keeps the old peak")
    assert 60 < after - before < 120 and kept


def test_two_tasks_of_texts_share_one_base_pass(base, monkeypatch):
    """Answers and topics from one model, and a task per sample in one batch; what was learned first stays bitwise."""
    texts = Lines()
    model = st.SideTuner(base)
    spans = torch.stack([torch.tensor([1, 2])] * 8)
    with st.seeded(0):
        model.add_task("qa", side="slim", head="span", side_options={"width": 16})
    batch = texts.batch(range(8))
    from sidetuning_bench.language.squad import span_loss

    st.fit(model, "qa", [{**batch, "labels": spans}], steps=5, loss=span_loss, progress=False)
    before = model(batch, "qa")
    with st.seeded(1):
        model.add_task("topic", side="ladder", head=3, side_options={"width": 16})
    st.fit(model, "topic", [{**batch, "labels": torch.arange(8) % 3}], steps=5, progress=False)
    assert torch.equal(model(batch, "qa"), before)
    passes = []
    monkeypatch.setattr(type(base), "encode", counted(type(base).encode, passes))
    both = model.forward_all(batch)
    assert len(passes) == 1 and both["qa"].shape[-1] == 2 and both["topic"].shape == (8, 3)
    tasks = ["qa", "topic"] * 4
    mixed = model(batch, tasks=tasks)
    assert len(passes) == 2
    for i, task in enumerate(tasks):
        assert torch.allclose(mixed[i], both[task][i], atol=1e-5)


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call


# the scenario -----------------------------------------------------------------------------------------------------------


def numbers(path, count, seed):
    """Sentences where the answer is the number, or there is none."""
    rng = np.random.default_rng(seed)
    entries = []
    for k in range(count):
        words = list(rng.choice(WORDS[8:], 12))
        has = k % 3 > 0
        if has:
            words[int(rng.integers(2, 10))] = str(rng.choice(NUMBERS))
        context = " ".join(words)
        year = next((w for w in words if w in NUMBERS), "")
        entries.append(entry(f"{seed}-{k}", context=context, answers=[(year, context.index(year))] if has else []))
    return squad_file(path, *entries)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    numbers(folder / "train.json", 240, 0)
    numbers(folder / "dev.json", 60, 1)
    return folder


def command(tmp_path, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-m", "sidetuning_bench", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)


def squad(data, encoder, *more):
    return (
        "squad", "--data", data, "--base", f"hf:{encoder}", "--length", 48, "--stride", 8, "--cache", "cache", "--no-progress",
        "--width", 16, *more,
    )  # fmt: skip


def test_a_side_learns_to_answer_and_can_be_asked(data, encoder, tmp_path):
    done = command(tmp_path, *squad(data, encoder, "--epochs", 40, "--lr", "5e-3", "--out", "run"))
    assert done.returncode == 0, done.stderr
    assert "F1" in done.stdout and "Traceback" not in done.stderr and "Loading" not in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"]["f1"] > 90 and result["scores"]["no_answer"] > 80  # never to answer would give 33
    answers = json.loads((tmp_path / "run" / "predictions.json").read_text())
    odds = json.loads((tmp_path / "run" / "null_odds.json").read_text())
    assert len(answers) == 60 and all(answers.values()) and 15 < sum(v > 0 for v in odds.values()) < 25
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert command(tmp_path, *squad(data, encoder, "--epochs", 40, "--lr", "5e-3", "--out", "run")).returncode == 0
    assert (tmp_path / "run" / "result.json").read_bytes() == before

    (tmp_path / "text.txt").write_text("old river made in 1844 by tower")
    done = command(tmp_path, "answer", "run", "what is the number ?", "--context", "text.txt")
    assert done.returncode == 0 and done.stdout.startswith("1844\n") and "characters 18 to 22" in done.stdout, (
        done.stderr
    )
    (tmp_path / "text.txt").write_text("old river made by tower")
    assert command(tmp_path, "answer", "run", "what is the number ?", "--context", "text.txt").stdout.startswith(
        "no answer"
    )
    (tmp_path / "empty.txt").write_text(" ")
    done = command(tmp_path, "answer", "run", "what ?", "--context", "nothing.txt")
    assert done.returncode == 1 and "cannot be read as text" in done.stderr and "Traceback" not in done.stderr
    done = command(tmp_path, *squad("nobody/squad", encoder, "--out", "other"))
    assert done.returncode == 1 and "could not be read from the Hub" in done.stderr and "Traceback" not in done.stderr
    from sidetuning_bench.language import answer
    from sidetuning_bench.language import squad as scenario

    first = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    given = scenario.Settings(**{**first, "data": str(data), "out": str(tmp_path / "run"), "progress": False})
    other = replace(given, out=str(tmp_path / "other"))
    for settings, message in (
        (replace(given, epochs=2), "other settings"),
        (replace(other, base=f"hf:{tmp_path}"), "cannot load"),
        (replace(other, base="resnet44-cifar10"), "texts need an encoder"),
        (replace(other, method="ladder", rungs=9), "the base has 3 layers"),
        (replace(other, data="some/where/else"), "does not exist"),
        (replace(other, data=str(data / "dev.json")), "is one file"),
        (replace(other, side="slimm"), "slimm"),
        (replace(other, method="ladder", width=10), "multiple of its 4 heads"),
        (replace(other, length=80), "cannot read 80 tokens at once, 64 at most"),
        (replace(other, stride=-5), "--stride must be 0 or more"),
        (replace(other, epochs=0.0), "--epochs must be above 0"),
        (replace(other, method="lora", rank=0), "--rank must be 1 or more"),
        (replace(other, method="features", init="zero"), "features has none"),
    ):
        with pytest.raises(st.SideTuningError, match=message):
            scenario.run(settings)
    for run, context, message in (("run", "empty.txt", "is empty"), ("nowhere", "text.txt", "holds no run of squad")):
        with pytest.raises(st.SideTuningError, match=message):
            answer.main(answer.Settings(str(tmp_path / run), "what ?", context=str(tmp_path / context)))


def test_a_run_is_of_one_data_set_and_one_tokenizer(data, encoder, tmp_path):
    from sidetuning_bench.language import answer
    from sidetuning_bench.language import squad as scenario

    mine = tmp_path / "encoder"
    shutil.copytree(encoder, mine)
    settings = scenario.Settings(
        data=str(data), base=f"hf:{mine}", method="features", out=str(tmp_path / "run"), length=48, stride=8, epochs=0.1,
        questions=30, test_questions=5, cache=str(tmp_path / "cache"), progress=False,
    )  # fmt: skip
    scenario.run(settings)
    others = tmp_path / "others"
    others.mkdir()
    numbers(others / "train.json", 40, 7)
    numbers(others / "dev.json", 20, 8)
    with pytest.raises(st.SideTuningError, match="a run of another data; choose"):
        scenario.run(replace(settings, data=str(others)))
    moved = shutil.copytree(data, tmp_path / "moved")
    assert scenario.run(replace(settings, data=str(moved))).test_questions == 5

    (tmp_path / "text.txt").write_text("old river made in 1844 by tower")
    ask = answer.Settings(str(tmp_path / "run"), "what ?", context=str(tmp_path / "text.txt"))
    assert answer.answer(ask).best
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *reversed(WORDS), *NUMBERS]
    for vocabulary, message in ((words, "has another tokenizer"), ([*words, "extra"], "belongs to another network")):
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
        transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(mine)
        with pytest.raises(st.SideTuningError, match=message):
            answer.answer(ask)


def test_a_run_goes_on_where_it_stopped(data, encoder, tmp_path, monkeypatch):
    from sidetuning_bench.language import squad as scenario

    def settings(out):
        return scenario.Settings(
            data=str(data), base=f"hf:{encoder}", out=str(tmp_path / out), length=48, stride=8, width=16, epochs=1, layers=1,
            questions=120, test_questions=30, cache=str(tmp_path / "cache"), progress=False, save_every=0,
        )  # fmt: skip

    scenario.run(settings("whole"))
    loss, calls = scenario.span_loss, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(scenario, "span_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        scenario.run(settings("stopped"))
    monkeypatch.setattr(scenario, "span_loss", loss)
    result = scenario.run(settings("stopped"))
    assert result.steps == 8 and result.memory_mb is None  # the peak of the first part is not known
    for name in ("predictions.json", "null_odds.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_ladder_reads_layers_spread_up_to_the_last(encoder):
    from sidetuning_bench.language import squad as scenario

    for rungs, layers in ((1, [2]), (2, [0, 2]), (3, [0, 1, 2])):
        given = scenario.Settings(base=f"hf:{encoder}", method="ladder", rungs=rungs)
        assert scenario.taps_of(given) == ["embeddings", *(f"encoder.layer.{i}" for i in layers)]


def test_a_checkpoint_in_half_precision_serves(encoder, tmp_path):
    net = transformers.AutoModel.from_pretrained(encoder).to(torch.bfloat16)
    net.save_pretrained(tmp_path / "half")
    half = st.load_base(f"hf:{tmp_path / 'half'}", taps=["embeddings"])
    model = st.SideTuner(half)
    model.add_task("qa", side="slim", head="span", side_options={"width": 16})
    texts = Lines(8)
    assert model(texts.batch([0, 1]), "qa").dtype == torch.float32
    cached = cache_tokens(half, texts, torch.arange(8), tmp_path / "cache", progress=False)
    assert torch.isfinite(cached.__getitems__([3])[1].out).all()


def test_a_distilled_side_starts_near_the_base(data, encoder, tmp_path):
    from sidetuning_bench.language import squad as scenario

    settings = scenario.Settings(
        data=str(data), base=f"hf:{encoder}", out=str(tmp_path / "run"), length=48, stride=8, width=32, epochs=0.1, lr=1e-6,
        test_questions=3, side="slim", init="distilled", distill_epochs=8, cache=str(tmp_path / "cache"), progress=False,
    )  # fmt: skip
    assert scenario.run(settings).seconds > 0
    base = st.load_base(settings.base, taps=scenario.taps_of(settings))
    (tmp_path / "run" / "side.safetensors").unlink()  # what was learned is all in the task
    method = load_method(tmp_path / "run" / "tasks", base)
    texts = Lines(vocabulary=40).batch([0, 1, 2])
    features, real = base(texts), texts["attention_mask"] > 0
    fresh = st.SideTuner(base)
    fresh.add_task("a", side="slim", side_options={"width": 32, "layers": 4}, head="identity")
    trained = method.model["squad"].side_output(texts, features)
    built = fresh["a"].side_output(texts, features)
    near, far = ((out - features.out)[real].square().mean().item() for out in (trained, built))
    assert near < 0.5 * far and near < features.out[real].var()


@pytest.mark.parametrize("method", ["sidetune", "slim", "top", "ladder", "features", "finetune", "scratch", "lora"])
def test_every_method_reads(data, encoder, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    from sidetuning_bench.language import answer
    from sidetuning_bench.language import squad as scenario

    settings = scenario.Settings(
        data=str(data), base=f"hf:{encoder}", method="sidetune" if method in ("slim", "top") else method, out=str(tmp_path / "run"), length=48,
        stride=8, width=16, epochs=0.2, questions=120, test_questions=12, cache=str(tmp_path / "cache"), progress=False,
        side=method if method in ("slim", "top") else "match", layers=1,
    )  # fmt: skip
    result = scenario.run(settings)
    assert result.questions == 120 and result.test_questions == 12 and 0 <= result.scores["f1"] <= 100
    assert result.added > 0 and result.steps == round(0.2 * 120 / 16)
    assert (result.alpha is not None) == (method in ("sidetune", "slim", "top", "ladder"))
    best = json.loads((tmp_path / "run" / "nbest_predictions.json").read_text())
    first = {k: v[0]["text"] for k, v in best.items()}
    assert (
        first == json.loads((tmp_path / "run" / "predictions.json").read_text()) and max(map(len, best.values())) == 5
    )
    (tmp_path / "text.txt").write_text("old river made in 1844 by tower")
    asked = answer.Settings(str(tmp_path / "run"), "what is ?", str(tmp_path / "text.txt"), best=3, threshold=-1e9)
    found = answer.answer(asked)
    assert len(found.best) == 3 and found.none and found.best[0].score >= found.best[1].score
    sizes = {"features": 66, "finetune": result.shared + 66}
    assert result.added == sizes.get(method, result.added)
