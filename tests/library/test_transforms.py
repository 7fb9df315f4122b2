"""A base's own preprocessing: equal to that of timm and transformers, and recorded with a task."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sidetuning as st
from conftest import conv_base, map_base, mlp_base, network, sequence_base
from sidetuning.integrations.timm import transform_of
from sidetuning.integrations.transformers import image_transform, tokenizer_of
from sidetuning.transforms import ImageTransform, TextTransform, Transform, WordTransform, transform_from
from text_parts import SPECIAL, WORDS, write_encoder, write_tokenizer


def photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Smooth colours, on which filters differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


CONFIGS = {
    "center": {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic"},
    "whole": {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"},
    "oblong": {"input_size": (3, 24, 32), "crop_pct": 0.9, "interpolation": "bicubic"},
    "squash": {"input_size": (3, 32, 32), "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "bicubic"},
    "border": {"input_size": (3, 32, 32), "crop_pct": 1.0, "crop_mode": "border", "mean": (0.5, 0.4, 0.3)},
}


@pytest.mark.parametrize("size", [(90, 60), (61, 97), (20, 15), (32, 32)])
@pytest.mark.parametrize("name", CONFIGS)
def test_timm_configurations_give_timms_own_pixels(name: str, size: tuple[int, int]) -> None:
    data = pytest.importorskip("timm.data")
    config = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic", "crop_mode": "center"} | CONFIGS[name]
    expected = data.create_transform(**config, is_training=False, normalize=False)(photo(*size))
    assert torch.equal(transform_of(config)(photo(*size)), expected)


PROCESSORS: dict[str, dict[str, Any]] = {
    "crop": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    "squash": {"size": {"height": 32, "width": 32}},
}


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_image_processors_give_their_own_pixels(name: str, resample: int) -> None:
    transformers = pytest.importorskip("transformers")
    kind = {"crop": "CLIPImageProcessorPil", "squash": "ViTImageProcessorPil"}[name]
    processor = getattr(transformers, kind, None) or getattr(transformers, kind.removesuffix("Pil"))
    told = PROCESSORS[name] | {"do_resize": True, "do_rescale": False, "do_normalize": False, "resample": resample}
    expected = processor(**told)(photo(), return_tensors="np")["pixel_values"][0]
    found = replace(image_transform(told), size=(32, 32))(photo()).numpy()
    # A processor that computes without Pillow rounds otherwise.
    assert np.abs(found.astype(float) - expected).max() <= 1


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_one_image_is_the_same_in_every_form(tmp_path: Path) -> None:
    image, transform = photo(), conv_base().transform
    assert isinstance(transform, ImageTransform) and transform.size == (32, 32)
    image.save(tmp_path / "photo.png")
    pixels = np.array(image)
    expected = transform(image)
    assert expected.shape == (3, 32, 32) and expected.dtype == torch.uint8
    forms: list[Any] = [str(tmp_path / "photo.png"), tmp_path / "photo.png", encoded(image), pixels]
    forms.append(torch.from_numpy(pixels).permute(2, 0, 1))
    assert all(torch.equal(transform(form), expected) for form in forms)
    assert torch.equal(transform.batch(forms), expected.expand(5, 3, 32, 32))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (7, "not a int"),
        (np.zeros((4, 4, 3)), "float64"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"uint8 \(2, 3, 4, 4\)"),
        ("missing.png", "missing.png cannot be read"),
        (b"no image", "cannot be decoded"),
        (Image.new("RGB", (1, 60_000)), "far from a square"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, told: str) -> None:
    transform = ImageTransform((64, 64))
    with pytest.raises(st.DataError, match=told):
        transform(source)


def test_bases_have_the_transform_of_their_example() -> None:
    packaged = st.load_base("resnet44-cifar10")
    assert packaged.transform == ImageTransform((32, 32))
    larger = packaged.with_example(torch.zeros(1, 3, 48, 40, dtype=torch.uint8))
    assert larger.transform == ImageTransform((48, 40))
    assert mlp_base().transform is None and sequence_base().transform is None
    own = ImageTransform((8, 8), 0.9, "squash", "bicubic")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    base = st.Base(net, example=torch.zeros(1, 3, 16, 16), transform=own)
    assert base.transform == replace(own, size=(16, 16))


def test_timm_bases_have_that_of_their_configuration() -> None:
    pytest.importorskip("timm")
    base = st.load_base("timm:resnet18.a1_in1k", pretrained=False)
    assert base.transform == ImageTransform((224, 224), 0.95, "center", "bicubic", (124, 116, 104))


def test_texts_and_pairs_become_what_the_network_reads(text_base: st.Base) -> None:
    transform = text_base.transform
    assert isinstance(transform, TextTransform) and transform.max_length <= 512
    short, long = "one two", "one two three four five"
    batch = transform.batch([short, long])
    assert batch["attention_mask"].sum(1).tolist() == [len(transform(t)["input_ids"]) for t in (short, long)]
    assert torch.equal(batch["input_ids"][1], transform(long)["input_ids"])
    pair = transform((short, long))
    assert len(pair["input_ids"]) > len(transform(long)["input_ids"])
    assert text_base(batch).out.shape[:2] == batch["input_ids"].shape
    assert len(replace(transform, max_length=4)(long)["input_ids"]) == 4


@pytest.mark.parametrize("source", [7, ["a"], ("a", "b", "c")])
def test_what_is_no_text_is_refused(text_base: st.Base, source: Any) -> None:
    transform = text_base.transform
    assert transform is not None
    with pytest.raises(st.DataError, match="a text or a pair of texts"):
        transform(source)


def test_a_batch_of_nothing_is_refused(text_base: st.Base) -> None:
    for base in (text_base, conv_base()):
        assert base.transform is not None
        with pytest.raises(st.DataError, match="one source at least"):
            base.transform.batch([])


def test_texts_and_pairs_are_not_mixed(text_base: st.Base) -> None:
    assert text_base.transform is not None
    with pytest.raises(st.DataError, match="one by one"):
        text_base.transform.batch(["a", ("a", "b")])


def test_a_base_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    for file in tmp_path.glob("vocab*"):
        file.unlink()
    base = st.load_base(f"hf:{tmp_path}")
    assert base.transform is not None
    with pytest.raises(st.DataError, match="tokenizer"):
        base.transform("a")


def test_the_tokenizer_is_that_of_the_folder_as_it_was_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bert", "elsewhere"):
        (tmp_path / name).mkdir()
    write_encoder(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    first, unread = st.load_base("hf:bert"), st.load_base("hf:bert")
    # A relative name is read from where it was given.
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert first.transform is not None and unread.transform is not None
    before = first.transform("the tower")["input_ids"].tolist()
    write_tokenizer(tmp_path / "bert", [*SPECIAL, *WORDS[::-1]])
    again = st.load_base(f"hf:{tmp_path / 'bert'}").transform
    assert again is not None and again("the tower")["input_ids"].tolist() != before
    tokenizer_of.cache_clear()
    with pytest.raises(st.DataError, match="changed after the model was loaded; load it again"):
        unread.transform("the tower")


def test_a_tokenizer_pads_with_a_special_token_or_not_at_all(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_encoder(tmp_path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "tower": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    for file in [*tmp_path.glob("*token*"), *tmp_path.glob("vocab*")]:
        file.unlink()
    for special in ({"unk_token": "<unk>"}, {}):
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
        transform = st.load_base(f"hf:{tmp_path}").transform
        assert transform is not None
        if special:
            assert transform.batch(["the tower", "the"])["attention_mask"].tolist() == [[1, 1], [1, 0]]
        else:
            with pytest.raises(st.DataError, match="save it with a pad_token"):
                transform.batch(["the tower", "the"])


@pytest.mark.parametrize("make", [lambda: ImageTransform((24, 32), 0.9, "border", "bicubic", (1, 2, 3))])
def test_a_transform_is_read_as_it_was_written(make: Callable[[], Transform]) -> None:
    assert transform_from(make().to_json(), conv_base()) == make()


def test_a_transform_of_texts_takes_the_tokenizer_of_the_base(text_base: st.Base) -> None:
    transform = transform_from({"kind": "text", "max_length": 5}, text_base)
    assert len(transform("one two three four five six")["input_ids"]) == 5


GOOD = ImageTransform((32, 32)).to_json()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sound"},
        {"kind": "text", "max_length": 5},
        GOOD | {"size": [32]},
        GOOD | {"size": [32, 2**20]},
        GOOD | {"crop_pct": 0},
        GOOD | {"crop_mode": "left"},
        GOOD | {"interpolation": "mks2021"},
        GOOD | {"fill": [0, 0, 256]},
    ],
)
def test_damaged_records_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(st.ArtifactError, match="recorded transform"):
        transform_from(wrong, conv_base())


def trained(size: int, learn: Callable[..., Any] = st.fit) -> st.SideTuner:
    """A model whose task saw images of a size."""
    model = st.SideTuner(conv_base())
    model.add_task("pets", side="fcn4", head=2, seed=0, labels=["cat", "dog"])
    x = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    learn(model, "pets", [(x, torch.tensor([0, 1, 0, 1]))], progress=False)
    return model


@pytest.mark.parametrize("learn", [st.fit, st.solve])
@pytest.mark.parametrize("size", [32, 48])
def test_a_task_is_asked_at_the_size_that_it_was_trained_at(
    size: int, learn: Callable[..., Any], tmp_path: Path
) -> None:
    model = trained(size, learn)
    model.save(tmp_path)
    image = photo()
    expected: Tensor = model(ImageTransform((size, size))(image)[None], "pets").softmax(1)[0]
    for asked in (model, st.load(tmp_path, base=conv_base())):
        found = {answer.label: answer.value for answer in asked.predict(image)["pets"]}
        assert [found["cat"], found["dog"]] == expected.tolist()


def test_tasks_with_equal_preprocessing_share_a_pass_and_each_is_asked_at_its_size() -> None:
    model = trained(32)
    model.add_task("large", side="fcn4", head=2, seed=1)
    model["large"].transform = ImageTransform((48, 48), 0.9, "squash", "bicubic")
    model.add_task("age", side="fcn4", head=1, problem="numbers", labels=["years"], seed=2)
    sizes: list[tuple[int, ...]] = []
    hook = network(model.base).register_forward_pre_hook(lambda net, given: sizes.append(tuple(given[0].shape)))
    photos = [photo(seed=seed) for seed in range(3)]
    found = model.predict(photos, top=1)
    hook.remove()
    assert sizes == [(3, 3, 32, 32), (3, 3, 48, 48)]
    assert [len(found[task]) for task in model.tasks] == [3, 3, 3]
    x = torch.stack([ImageTransform((48, 48), 0.9, "squash", "bicubic")(p) for p in photos])
    values, classes = model(x, "large").softmax(1).max(1)
    assert [answers[0] for answers in found["large"]] == list(zip(map(str, classes.tolist()), values.tolist()))
    assert found["age"][0] == model.predict(photos[0], ["age"])["age"]
    assert found["age"][0][0].label == "years"


def test_answers_are_averaged_over_an_image_and_its_mirror_image() -> None:
    model = trained(32)
    x = ImageTransform((32, 32))(photo())[None]
    expected = (model(x, "pets").softmax(1) + model(x.flip(-1), "pets").softmax(1))[0] / 2
    found = dict(model.predict(photo(), mirror=True)["pets"])
    assert [found["cat"], found["dog"]] == pytest.approx(expected.tolist(), abs=1e-6)


def test_dense_tasks_answer_with_maps() -> None:
    model = st.SideTuner(map_base())
    model.add_task("parts", side="fcn4", head="pixels", head_options={"channels": 5}, problem="classes", seed=0)
    output = model(ImageTransform((32, 32))(photo())[None], "parts")
    assert torch.equal(model.predict(photo())["parts"], output[0].argmax(0))


def test_texts_are_asked_in_one_pass(text_base: st.Base) -> None:
    model = st.SideTuner(text_base)
    model.add_task("mood", side="transformer", head=2, labels=["good", "bad"], seed=0)
    texts = ["the river is big", "who made the old tower in 1801 ?"]
    together, alone = model.predict(texts)["mood"], [model.predict(text)["mood"] for text in texts]
    for a, b in zip(together, alone):
        assert [answer.label for answer in a] == [answer.label for answer in b]
        assert [answer.value for answer in a] == pytest.approx([answer.value for answer in b], abs=1e-5)


def test_what_cannot_be_asked_is_said() -> None:
    model = st.SideTuner(mlp_base())
    model.add_task("kind", side="mlp", head=2, seed=0)
    with pytest.raises(st.TaskError, match="asked with tensors"):
        model.predict("photo.png")
    with pytest.raises(st.TaskError, match="top must be 1 or more"):
        trained(32).predict(photo(), top=0)
    with pytest.raises(st.UnknownNameError, match="did you mean 'pets'"):
        trained(32).predict(photo(), ["pet"])


SPLIT = {
    "what is (the old) tower?": ["what", "is", "(", "the", "old", ")", "tower", "?"],
    "U.S.-based, isn't it...": ["U.S.-based", ",", "isn't", "it", ".", ".", "."],
    " C++ costs $5.50\n!": ["C++", "costs", "$5.50", "!"],
    "नमस्ते “мир” cafe\u0301 😀": ["नमस्ते", "“", "мир", "”", "cafe\u0301", "😀"],
}


@pytest.mark.parametrize("text", SPLIT)
def test_a_text_is_split_at_spaces_and_marks_at_the_ends_of_words(text: str, text_base: st.Base) -> None:
    assert word_transform(text_base).words(text) == SPLIT[text]


def word_transform(base: st.Base) -> WordTransform:
    own = base.transform
    assert isinstance(own, TextTransform)
    return WordTransform(own.max_length, own.names, own.tokenizer)


def test_words_are_known_by_their_first_tokens(text_base: st.Base) -> None:
    transform = word_transform(text_base)
    words = ["the", "old-tower", "\x00", " red ", "", "is"]
    x, (known, long) = transform.aligned([words, ["the"] * 100])
    # [CLS] the old - tower red is [SEP]
    assert known == [("the", 1), ("old-tower", 2), ("\x00", None), (" red ", 5), ("", None), ("is", 6)]
    tokens = text_base_tokens(text_base, x["input_ids"][0].tolist())
    assert tokens[:8] == ["[CLS]", "the", "old", "[UNK]", "tower", "red", "is", "[SEP]"]
    assert [place for _, place in long] == [*range(1, 63), *[None] * 38] and x["input_ids"].shape == (2, 64)
    assert transform.is_one(("the", "old")) and transform.is_one("the old") and not transform.is_one(["the old"])


def text_base_tokens(base: st.Base, ids: list[int]) -> list[str]:
    assert isinstance(base.transform, TextTransform)
    return base.transform.tokenizer().convert_ids_to_tokens(ids)  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefix", [False, True])
def test_a_tokenizer_of_bytes_sees_the_spaces_before_words(prefix: bool) -> None:
    """Words given one by one would run into each other: "old" and "tower" as "oldtower"."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)  # type: ignore[assignment]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=letters, special_tokens=["<pad>"], show_progress=False
    )
    bare.train_from_iterator(["the old tower is naïve"] * 9, trainer)
    # Its own side of padding is the left.
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", padding_side="left")
    transform = WordTransform(64, ("input_ids", "attention_mask"), lambda: fast)
    x, (known, one) = transform.aligned([["the", "old", "tower", "😀", "naïve"], ["is"]])
    tokens = fast.convert_ids_to_tokens(x["input_ids"][0])
    firsts = [tokens[place] for _, place in known if place is not None]
    assert firsts[1:3] == ["Ġold", "Ġtower"] and firsts[4].startswith("Ġna") and len(firsts) == 5
    assert one == [("is", 0)] and x["attention_mask"][1].tolist()[0] == 1


def test_words_that_nobody_can_tell_are_refused(text_base: st.Base) -> None:
    transform = word_transform(text_base)
    with pytest.raises(st.DataError, match="no spaces between its words; give the words, a list"):
        transform.batch(["我爱北京"])
    assert transform.batch([["我", "爱", "北京"]])["input_ids"].shape[0] == 1
    for wrong in ("", "  ", [], ["a", None], 3):
        with pytest.raises(st.DataError, match="reads a text with words, or a list of them"):
            transform.batch([wrong])  # type: ignore[list-item]
    assert transform.aligned([["\ud800", "the"]])[1] == [[("\ud800", 1), ("the", 2)]]
    slow = WordTransform(64, transform.names, lambda: object())
    with pytest.raises(st.DataError, match="does not tell words apart"):
        slow.batch(["the"])


def test_a_transform_of_words_is_recorded(text_base: st.Base) -> None:
    own, words = text_base.transform, word_transform(text_base)
    assert transform_from(words.to_json(), text_base) == words != own
    assert own is not None and transform_from(own.to_json(), text_base) == own
    with pytest.raises(st.ArtifactError, match="words"):
        transform_from({**words.to_json(), "words": "yes"}, text_base)


def test_pictures_without_pixels_or_a_whole_file_are_refused() -> None:
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    part = Image.open(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) // 2]))
    wrong = (np.zeros((0, 10, 3), np.uint8), Image.new("RGB", (0, 5)), "a\x00b.png", part, Image.new("La", (8, 8)))
    for source in wrong:
        with pytest.raises(st.DataError, match=r"cannot be read|has none; give another"):
            ImageTransform((8, 8))(source)
