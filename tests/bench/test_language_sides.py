"""Sides for texts: what they compute, what they need, and on which encoders they work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sidetuning as st
from conftest import side_output
from sidetuning.cache import cache_tokens
from sidetuning.errors import ShapeError
from sidetuning.integrations.transformers import from_model
from sidetuning_bench.language.questions import Question, make_windows
from sidetuning_bench.language.sides import two_texts
from sidetuning_bench.language.squad import span_loss
from text_parts import Lines

transformers = pytest.importorskip("transformers")

TAPS = ("embeddings", "encoder.layer.0", "encoder.layer.1")


@pytest.fixture(scope="module")
def tokenizer(encoder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(encoder)


@pytest.fixture(scope="module")
def base(encoder: Path) -> st.Base:
    return st.load_base(f"hf:{encoder}", taps=TAPS)


@pytest.mark.parametrize("side", ["slim", "convolutional", "ladder", "top", "match"])
def test_padding_and_companions_never_matter(base: st.Base, side: str) -> None:
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
        # Padding can never be chosen.
        assert (padded[n:] < -1e30).all()
        batch = texts.batch([4], pad=9)
        # Nor does what stands there.
        batch["input_ids"][0, n:] = 7
        assert torch.allclose(model(batch, "qa")[0][:n], alone, atol=1e-5)
        other = texts.batch([4])
        other["input_ids"][0, 1] += 1
        assert not torch.allclose(model(other, "qa")[0], alone, atol=1e-3)


def test_sides_for_texts_say_what_they_need(encoder: Path) -> None:
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
    # Nothing to copy from, and nothing left to copy.
    for model in (plain, highest):
        with pytest.raises(ShapeError, match=r"layers above the last tap.*'encoder\.layer\.1'"):
            model.add_task("qa", side="top", head="span")
    with pytest.raises(ShapeError, match="no text encoder"):
        st.SideTuner(st.load_base("resnet44-cifar10")).add_task("qa", side="top", head=3)


def test_the_match_side_compares_with_the_question() -> None:
    """Ids 2 … 3 question 3 … text 3, as encoders of pairs have them; padding is left or right."""
    ids = torch.tensor([[2, 5, 6, 3, 7, 5, 8, 3, 0, 0], [0, 2, 5, 3, 3, 9, 9, 9, 9, 3], [2, 5, 6, 7, 8, 9, 4, 3, 0, 0]])
    first, second = two_texts(ids, (ids > 0).long())
    assert first.int().tolist() == [[0, 1, 1] + [0] * 7, [0, 0, 1] + [0] * 7, [0] + [1] * 6 + [0] * 3]
    assert second.int().tolist() == [[0] * 4 + [1] * 3 + [0] * 3, [0] * 5 + [1] * 4 + [0], [0] * 10]


def test_the_match_side_finds_what_the_question_names(encoder: Path) -> None:
    """Which token of the text is also in the question: other words in the test than in training."""
    base = st.load_base(f"hf:{encoder}", taps=["embeddings", "encoder.layer.1"])
    model, generator = st.SideTuner(base), torch.Generator().manual_seed(0)

    def batch(low: int, high: int, n: int = 64) -> dict[str, Tensor]:
        text = torch.stack([low + torch.randperm(high - low, generator=generator)[:8] for _ in range(n)])
        place = torch.randint(8, (n,), generator=generator)
        asked, one = text[torch.arange(n), place, None], torch.ones(n, 1, dtype=torch.long)
        ids = torch.cat([2 * one, asked, 3 * one, text, 3 * one], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": place + 3}

    with st.seeded(0):
        model.add_task("qa", side="match", head="span", side_options={"width": 16})

    def loss(scores: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scores[..., 0], y)

    st.fit(model, "qa", [batch(5, 25) for _ in range(60)], steps=60, lr=1e-2, loss=loss, progress=False)
    test = batch(25, 40)
    labels = test.pop("labels")
    right = model(test, "qa")[..., 0].argmax(1) == labels
    # Chance is 0.12.
    assert right.float().mean() > 0.8


@pytest.mark.parametrize(
    ("kind", "layer", "options"),
    [
        ("DistilBert", "transformer.layer.1", {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48}),
        ("Roberta", "encoder.layer.1", {"pad_token_id": 1}),
        ("Electra", "encoder.layer.1", {"embedding_size": 16}),
        ("ModernBert", "layers.1", {"pad_token_id": 0}),
    ],
)
def test_other_encoders_serve_as_bases(
    kind: str, layer: str, options: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Those that know no segments are not given any."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    special = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **({} if kind == "DistilBert" else shape)}
    config = getattr(transformers, f"{kind}Config")(**sizes, **special, **options)
    with st.seeded(0):
        base = from_model(getattr(transformers, f"{kind}Model")(config), taps=["embeddings", layer])
    proxy = Plain(tokenizer)
    questions = [Question("a", "what ?", "it was made in 1822 .", ()), Question("b", "who ?", "it was big", ())]
    windows = make_windows(questions, proxy, length=40, stride=8)
    assert set(windows.batch([0, 1])) == {"input_ids", "attention_mask"}
    cached = cache_tokens(base, windows, torch.zeros(2, 2), tmp_path, dtype="float32", progress=False)
    inputs, features, _ = cached.__getitems__([0, 1])
    model, real = st.SideTuner(base), inputs["attention_mask"] > 0
    for side in ("slim", "ladder", "match", "top"):
        branch = model.add_task(side, side=side, head="identity")
        live = side_output(branch, inputs, base(inputs))
        assert torch.allclose(side_output(branch, inputs, features)[real], live[real], atol=1e-4)
    # The top, a copy.
    assert torch.allclose(live[real], features.out[real], atol=1e-4)


def test_two_tasks_of_texts_share_one_base_pass(base: st.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and topics from one model, and a task per sample in one batch; what was learned first stays bitwise."""
    texts = Lines()
    model = st.SideTuner(base)
    spans = torch.stack([torch.tensor([1, 2])] * 8)
    with st.seeded(0):
        model.add_task("qa", side="slim", head="span", side_options={"width": 16})
    batch = texts.batch(range(8))
    st.fit(model, "qa", [{**batch, "labels": spans}], steps=5, loss=span_loss, progress=False)
    before = model(batch, "qa")
    with st.seeded(1):
        model.add_task("topic", side="ladder", head=3, side_options={"width": 16})
    st.fit(model, "topic", [{**batch, "labels": torch.arange(8) % 3}], steps=5, progress=False)
    assert torch.equal(model(batch, "qa"), before)
    passes: list[int] = []
    monkeypatch.setattr(type(base), "encode", counted(type(base).encode, passes))
    both = model.forward_all(batch)
    assert len(passes) == 1 and both["qa"].shape[-1] == 2 and both["topic"].shape == (8, 3)
    tasks = ["qa", "topic"] * 4
    mixed = model(batch, tasks=tasks)
    assert len(passes) == 2
    for i, task in enumerate(tasks):
        assert torch.allclose(mixed[i], both[task][i], atol=1e-5)


def test_a_checkpoint_in_half_precision_serves(encoder: Path, tmp_path: Path) -> None:
    net = transformers.AutoModel.from_pretrained(encoder).to(torch.bfloat16)
    net.save_pretrained(tmp_path / "half")
    half = st.load_base(f"hf:{tmp_path / 'half'}", taps=["embeddings"])
    model = st.SideTuner(half)
    model.add_task("qa", side="slim", head="span", side_options={"width": 16})
    texts = Lines(8)
    assert model(texts.batch([0, 1]), "qa").dtype == torch.float32
    cached = cache_tokens(half, texts, torch.arange(8), tmp_path / "cache", progress=False)
    assert torch.isfinite(cached.__getitems__([3])[1].out).all()


class Plain:
    """A tokenizer whose network knows no segments."""

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *texts: str, **options: Any) -> Any:
        return self.tokenizer(*texts, **options)


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("side", ["slim", "convolutional", "match"])
def test_padding_before_a_text_changes_nothing(side: str) -> None:
    """An encoder whose tokens do not know their places, so that the padding moves the side alone."""
    table = torch.nn.Embedding(50, 16)
    net = torch.nn.ModuleDict({"embeddings": table})

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = net["embeddings"]

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embeddings(input_ids) * attention_mask.unsqueeze(-1)
            return x + x.sum(1, keepdim=True)  # type: ignore[no-any-return]

    ids = torch.randint(3, 50, (3, 7))
    mask = torch.ones_like(ids)
    base = st.Base(Mixed(), example={"input_ids": ids[:1], "attention_mask": mask[:1]}, taps=["embeddings"])
    model = st.SideTuner(base)
    model.add_task("t", side=side, head="span", side_options={"width": 16}, merge="side-only")
    padded = {"input_ids": F.pad(ids, (4, 0)), "attention_mask": F.pad(mask, (4, 0))}
    with torch.no_grad():
        expected = model({"input_ids": ids, "attention_mask": mask}, "t")
        assert torch.allclose(model(padded, "t")[:, 4:], expected, atol=1e-5)


@pytest.mark.parametrize("side", ["slim", "convolutional", "match"])
def test_sides_of_both_directions_are_refused_on_decoders(side: str, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    model = st.SideTuner(st.load_base(f"hf:{tmp_path}", taps=["wte", "h.0"]))
    with pytest.raises(ShapeError, match="reads texts in both directions, and the base only forwards"):
        model.add_task("t", side=side, head=2, side_options={"width": 16})
    model.add_task("t", side="ladder", head=2)
