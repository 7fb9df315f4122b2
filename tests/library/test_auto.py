"""A task learned from data alone: taps are chosen, features kept once, candidates tried, the best one kept."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import sidetuning as st
from conftest import conv_base, mlp_base, network
from data_parts import stages_base, write_digits, write_texts
from sidetuning import encoding
from sidetuning.automatic import auto
from sidetuning.data import TaskData, load
from sidetuning.encoding import encode
from sidetuning.scoring import score
from sidetuning.tapping import spread, with_chosen_taps
from text_parts import tagged, write_rows


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), (0, 1, 7), 30)


def test_taps_are_the_last_stages_or_blocks_spread_evenly(text_base: st.Base) -> None:
    assert list(with_chosen_taps(stages_base()).tap_shapes) == ["one", "two"]
    packaged = with_chosen_taps(st.load_base("resnet44-cifar10"))
    assert list(packaged.tap_shapes) == ["layer1", "layer2", "layer3"]
    assert list(with_chosen_taps(text_base).tap_shapes) == ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]
    assert list(with_chosen_taps(conv_base(("2",))).tap_shapes) == ["2"]
    assert not with_chosen_taps(mlp_base()).tap_shapes
    assert spread([str(k) for k in range(12)]) == ["2", "5", "8", "11"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_timm_tells_the_stages_of_its_models(name: str) -> None:
    pytest.importorskip("timm")
    tapped = with_chosen_taps(st.load_base(f"timm:{name}", pretrained=False))
    assert len(tapped.tap_shapes) == (4 if "vit" in name else 3)


def test_features_are_the_bases_and_bad_images_are_left_out(digits: Path, tmp_path: Path) -> None:
    base, rows = stages_base(), load(digits, split=False).splits["train"].take(range(0, 90, 10))
    (tmp_path / "broken.png").write_bytes(b"no image")
    sources, targets = [*rows.sources, tmp_path / "broken.png"], torch.cat([rows.targets, rows.targets[:1]])
    broken = st.data.Rows(sources, targets, [*rows.places, "broken.png"])
    for _ in range(2):
        encoded = encode(base, broken, tmp_path / "cache", progress=False)
        assert encoded.kept == list(range(9)) and "broken.png: " in encoded.unreadable[0]
    ((x, features, y),) = encoded.loader()
    assert base.transform is not None
    assert torch.equal(x, base.transform.batch(rows.sources)) and torch.equal(y, rows.targets)
    assert torch.allclose(features.out, base(x).out, atol=1e-3)


def test_rows_of_rare_classes_are_repeated(digits: Path, tmp_path: Path) -> None:
    rows = load(digits, split=False).splits["train"].take([*range(20), *range(60, 65)])
    encoded = encode(stages_base(), rows, tmp_path, progress=False)
    targets = torch.cat([y for _, _, y in encoded.loader(balance=True)])
    assert torch.bincount(targets).tolist() == [20, 0, 20]
    assert len(torch.cat([y for _, _, y in encoded.loader()])) == 25


def test_mirror_images_are_a_second_view(digits: Path, tmp_path: Path) -> None:
    rows = load(digits, split=False).splits["train"].take(range(8))
    cached = encode(stages_base(), rows, tmp_path, mirror=True, progress=False).cached
    views = []
    for cached.view in (0, 1):
        views.append(cached[0][0])
    assert torch.equal(views[0].flip(-1), views[1])


def test_texts_are_encoded_token_by_token(text_base: st.Base, tmp_path: Path) -> None:
    data = load(write_texts(tmp_path / "a.jsonl", 12), split=False)
    x, features, y = next(iter(encode(text_base, data.splits["train"], tmp_path, progress=False).loader()))
    assert torch.allclose(features.out, text_base(x).out * x["attention_mask"].unsqueeze(-1), atol=1e-2)
    assert torch.equal(y, data.splits["train"].targets)


def learned(digits: Path, cache: Path, **options: Any) -> tuple[st.SideTuner, st.AutoResult, list[str]]:
    model, said = st.SideTuner(stages_base()), list[str]()
    result = auto(model, "digits", digits, cache=cache, budget=3, say=said.append, progress=False, **options)
    return model, result, said


@pytest.mark.slow
def test_a_task_is_learned_without_options(digits: Path, tmp_path: Path) -> None:
    first: list[float] = []

    def see(model: st.SideTuner) -> None:
        first.append(model.predict(next(digits.rglob("*.png")), top=1)["digits"][0].value)

    model, result, said = learned(digits, tmp_path, first=see)
    assert model.tasks == ["digits"] and model["digits"].labels == ["digit-0", "digit-1", "digit-7"] and len(first) == 1
    names = [attempt.name for attempt in result.attempts]
    assert (
        names[0] == "linear head, closed form"
        and names[1] == "random head, closed form"
        and len(names) == 5
        and result.chosen in names
    )
    assert result.chosen == min(result.attempts, key=lambda attempt: attempt.loss).name
    assert result.scores["validation"]["accuracy"] > 0.7
    assert all(any(name in text for text in said) for name in names)
    # The same call again takes up what is there, and ends with the same weights.
    again, other, _ = learned(digits, tmp_path)
    assert other.chosen == result.chosen and other.scores == result.scores
    assert all(torch.equal(a, b) for a, b in zip(again["digits"].parameters(), model["digits"].parameters()))


def test_a_linear_head_alone_takes_no_time(digits: Path, tmp_path: Path) -> None:
    model, result, _ = learned(digits, tmp_path, side="none")
    assert [attempt.name for attempt in result.attempts] == ["linear head, closed form"]
    assert model["digits"].side is None and not model.base.tap_shapes


def test_other_tasks_do_not_change(digits: Path, tmp_path: Path) -> None:
    model = st.SideTuner(stages_base())
    model.add_task("old", side="fcn4", head=2, seed=0)
    x = torch.rand(2, 3, 32, 32)
    before: Tensor = model(x, "old").detach()
    auto(model, "digits", digits, cache=tmp_path, budget=1, progress=False)
    assert torch.equal(model(x, "old"), before) and model.tasks == ["old", "digits"]


def test_texts_are_learned(text_base: st.Base, tmp_path: Path) -> None:
    model = st.SideTuner(text_base)
    data = load(write_texts(tmp_path / "a.jsonl", 120))
    result = auto(model, "about", data, cache=tmp_path, budget=2, progress=False)
    assert result.scores["test"]["accuracy"] > 0.7
    assert model.predict("the old tower was red in the big river", top=1)["about"][0].label == "colour"


def test_features_that_take_too_much_room_are_of_fewer_taps(
    digits: Path, text_base: st.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = stages_base()
    tapped, rows = with_chosen_taps(base), load(digits, split=False).splits["train"]
    whole = encoding.bytes_of(tapped, rows)
    monkeypatch.setattr(encoding, "MOST_BYTES", whole - 1)
    assert list(encoding.affordable(tapped, base, rows).tap_shapes) == ["two"]
    monkeypatch.setattr(encoding, "MOST_BYTES", 0)
    assert not encoding.affordable(tapped, base, rows).tap_shapes


def test_what_cannot_be_learned_is_said(digits: Path, text_base: st.Base, tmp_path: Path) -> None:
    with pytest.raises(st.DataError, match="the data are images and this base reads texts"):
        auto(st.SideTuner(text_base), "digits", digits, cache=tmp_path)
    with pytest.raises(st.DataError, match="reads neither images nor texts"):
        auto(st.SideTuner(mlp_base()), "digits", digits, cache=tmp_path)
    with pytest.raises(st.TaskError, match="budget must be a positive number"):
        auto(st.SideTuner(stages_base()), "digits", digits, cache=tmp_path, budget=0)
    with pytest.raises(st.TaskError, match=r"the side 'fusoin' cannot be tried: .* did you mean 'fusion'"):
        learned(digits, tmp_path, side="fusoin")
    model = st.SideTuner(stages_base())
    with pytest.raises(st.TaskError, match="cannot be tried"):
        auto(model, "digits", digits, cache=tmp_path, side="fusoin", progress=False)
    assert not len(model)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return load(write_rows(tmp_path_factory.mktemp("words") / "a.jsonl", tagged(60)))


def test_words_have_their_classes_at_their_first_tokens_live_and_cached(
    text_base: st.Base, tmp_path: Path, words: TaskData
) -> None:
    rows, model = words.splits["train"], st.SideTuner(text_base)
    model.add_task("ner", side="mlp", head="tokens", head_options={"outputs": len(words.names)}, labels=words.names)
    order: Any = range(len(rows))
    live: DataLoader[Any] = DataLoader(order, batch_size=7, collate_fn=partial(rows.batch, text_base))
    cached = encode(text_base, rows, tmp_path, progress=False).loader(batch_size=5)
    counted = sum(int((y != -100).sum()) for _, y in live)
    assert counted == sum(map(len, rows.sources)) == sum(int((y != -100).sum()) for _, _, y in cached)
    scores = [st.evaluate(model, "ner", loader) for loader in (live, cached)]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3) and scores[0]["samples"] == len(rows)
    st.solve(model, "ner", live, progress=False)
    other = copy.deepcopy(model)
    assert st.solve(other, "ner", cached, progress=False).rows == counted
    assert st.evaluate(model, "ner", cached) == pytest.approx(st.evaluate(other, "ner", live), abs=2e-2)
    st.fit(model, "ner", live, steps=2, progress=False)


def test_words_that_are_cut_off_or_have_no_token_do_not_count_and_are_told(text_base: st.Base, tmp_path: Path) -> None:
    rows = [{"tokens": ["old", "\x00", "is"], "ner_tags": ["B", "O", "O"]}, {"tokens": ["\x01"], "ner_tags": ["O"]}] * 3
    rows.append({"tokens": ["red"] * 100, "ner_tags": ["O"] * 100})
    data = load(write_rows(tmp_path / "a.jsonl", rows), split=False)
    encoded = encode(text_base, data.splits["train"], tmp_path, progress=False)
    assert encoded.unreadable == ["44 words after the 64 tokens of a text that are read, or without a token"]
    assert [int((y != -100).sum()) for _, _, y in encoded.loader(batch_size=1)] == [2, 0, 2, 0, 2, 0, 62]
    with pytest.raises(st.TaskError, match="leave --balance out"):
        encoded.loader(balance=True)
    model = st.SideTuner(text_base)
    model.add_task("t", side=None, merge="base-only", head="tokens", head_options={"outputs": 2}, labels=data.names)
    model["t"].transform = data.splits["train"].transform(text_base)
    scored = score(model, "t", data.splits["train"], progress=False)
    assert len(scored.rows) == 68 and "44 words of which the base sees no token" in scored.unreadable[0]


def test_texts_without_a_token_are_left_out_and_told(tmp_path: Path) -> None:
    """A decoder's tokenizer adds no token of its own."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    bare = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "the": 2, "tower": 3}, unk_token="<unk>"))
    bare.normalizer = normalizers.Replace("\0", "")  # type: ignore[assignment]
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>").save_pretrained(tmp_path)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=4, **shape)).save_pretrained(tmp_path)
    base = st.load_base(f"hf:{tmp_path}")
    rows = [{"tokens": ["the"], "tags": ["A"]}, {"tokens": ["\0"], "tags": ["A"]}, {"tokens": ["tower"], "tags": ["B"]}]
    data = load(write_rows(tmp_path / "a.jsonl", rows), split=False)
    encoded = encode(base, data.splits["train"], tmp_path, progress=False)
    assert encoded.unreadable == ["1 without a token, such as row 2 of train"] and len(encoded.rows) == 2
    model = st.SideTuner(base)
    model.add_task("t", side=None, merge="base-only", head="tokens", head_options={"outputs": 2}, labels=data.names)
    st.solve(model, "t", encoded.loader(batch_size=1), progress=False)
    model["t"].transform = data.splits["train"].transform(base)
    assert [word.answers for word in model.predict([["tower", "\0"]], top=1)["t"][0]][1] == []
    with pytest.raises(st.DataError, match="makes no token of the texts"):
        model.predict([["\0"]])
    # Alone, or beside others.
    model.add_task("whole", side=None, merge="base-only", head=2)
    for texts in (["\0"], ["\0", "the tower"]):
        with pytest.raises(st.DataError, match="makes no token of"):
            model.predict(texts, ["whole"])


def test_words_are_learned_and_answered(text_base: st.Base, tmp_path: Path, words: TaskData) -> None:
    model = st.SideTuner(text_base)
    model.add_task("mood", side=None, merge="base-only", head=2, labels=["bad", "good"])
    result = auto(model, "ner", words, cache=tmp_path, side="none", progress=False)
    assert result.measure == "entity f1" and result.scores["validation"]["entity f1"] > 0.5
    model.save(tmp_path / "model")
    loaded = st.load(tmp_path / "model", base=text_base)
    asked = ["what is the old tower?", ["the", "old", "tower", "\x00"], "1822"]
    first, second, third = loaded.predict(asked, ["ner"], top=2)["ner"]
    assert [word for word, _ in first] == ["what", "is", "the", "old", "tower", "?"]
    assert [len(answers) for _, answers in second] == [2, 2, 2, 0] and isinstance(third[0], st.Word)
    # As the model itself says it, alone and in a batch.
    x, known = model["ner"].transform.aligned([asked[1]])  # type: ignore[union-attr]
    probabilities = model(x, "ner").detach()[0, known[0][1][1] or 0].softmax(0)
    assert second[1].answers[0].label == words.names[int(probabilities.argmax())] == "B-LOC"
    assert second[1].answers[0].value == pytest.approx(float(probabilities.max()), abs=1e-5)
    alone = loaded.predict(tuple(asked[1]), ["ner"], top=2)["ner"]
    assert [[a.label for a in word.answers] for word in alone] == [[a.label for a in word.answers] for word in second]
    both = loaded.predict("the old tower")
    assert [word for word, _ in both["ner"]] == ["the", "old", "tower"] and both["mood"][0].label in ("bad", "good")
    for mixed in (("the", "old"), [["the", "old"]], ("the", "old", "tower")):
        with pytest.raises(st.DataError, match="'ner' reads words and 'mood' whole texts: ask them one by one"):
            loaded.predict(mixed)


def test_what_was_learned_on_another_base_is_not_taken_up(digits: Path, tmp_path: Path) -> None:
    data = load(digits)
    for seed in (0, 1, 0):
        base = stages_base()
        with torch.no_grad():
            next(network(base).parameters()).mul_(1 + seed)
        how: dict[str, Any] = {"side": "fcn4", "budget": 0.5, "progress": False}
        shared = auto(st.SideTuner(base), "digits", data, cache=tmp_path / "shared", **how)
        assert shared.scores["validation"]["loss"] == min(attempt.loss for attempt in shared.attempts)
    folders = [folder for folder in (tmp_path / "shared").iterdir() if folder.name.startswith("digits-")]
    assert len(folders) == 2


def test_data_that_were_not_split_are_split(digits: Path, tmp_path: Path) -> None:
    result = auto(
        st.SideTuner(stages_base()), "digits", load(digits, split=False), cache=tmp_path, side="none", progress=False
    )
    assert result.rows["validation"] > 0


def test_texts_have_no_mirror_images(text_base: st.Base, tmp_path: Path) -> None:
    data = load(write_texts(tmp_path / "a.jsonl", 20))
    with pytest.raises(st.DataError, match="texts have no mirror images"):
        auto(st.SideTuner(text_base), "t", data, cache=tmp_path, mirror=True, progress=False)


def test_many_broken_images_are_noted_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_digits(tmp_path / "digits", (0, 1), 60)
    for file in sorted(root.rglob("*.png"))[::2]:
        file.write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    data = load(root, split=False)
    encoded = encode(stages_base(), data.splits["train"], tmp_path / "cache", progress=False)
    assert encoded.kept == list(range(1, 120, 2)) and len(encoded.unreadable) == 60
    (notes,) = (tmp_path / "cache").glob("unreadable*.json")
    assert len(json.loads(notes.read_text())) == 60 and not (tmp_path / "unreadable.json").exists()
