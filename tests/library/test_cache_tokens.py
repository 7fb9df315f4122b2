"""The cache of tokens: features of each text without padding, and batches of similar lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sidetuning as st
from sidetuning.cache import CachedTokens, cache_tokens, tokens
from sidetuning.cache.tokens import ByLength
from sidetuning.errors import CacheError, ShapeError
from text_parts import Lines

TAPS = ("embeddings", "first", "second")


class Embeddings(nn.Embedding):
    """Called by name, as transformers does."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


class Encoder(nn.Module):
    """Token ids and a mask -> (b, t, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings(50, 32)
        self.first, self.second = (
            nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        padding = attention_mask == 0
        x = self.first(self.embeddings(input_ids), src_key_padding_mask=padding)
        x = self.second(x, src_key_padding_mask=padding)
        return x.flip(-1)


@pytest.fixture(scope="module")
def base() -> st.Base:
    with st.seeded(0):
        return st.Base(Encoder(), example=Lines().batch([0]), taps=TAPS)


def test_cached_features_are_those_of_each_text_alone(
    base: st.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, labels = Lines(), torch.arange(40)
    cached = cache_tokens(base, texts, labels, tmp_path, dtype="float32", batch_size=7, progress=False)
    # Embeddings are looked up, not kept.
    assert cached.taps == list(TAPS[1:])
    inputs, features, y = cached.__getitems__([3, 17, 5])
    assert y.tolist() == [3, 17, 5] and list(features.taps) == list(TAPS)
    for k, row in enumerate((3, 17, 5)):
        n = len(texts.ids[row])
        alone = base(texts.batch([row]))
        assert torch.allclose(features.out[k, :n], alone.out[0], atol=1e-5)
        assert (features.out[k, n:] == 0).all() and inputs["attention_mask"][k].sum() == n
        for name in TAPS:
            assert torch.allclose(features.taps[name][k, :n], alone.taps[name][0], atol=1e-5), name
            assert (features.taps[name][k, n:] == 0).all()
    monkeypatch.setattr(st.Base, "encode", lambda *_: pytest.fail("the base ran again"))
    again = cache_tokens(base, texts, labels, tmp_path, dtype="float32", progress=False)
    assert torch.equal(again.__getitems__([3])[1].out, cached.__getitems__([3])[1].out)
    files = [cached.folder / "out", *cached.folder.glob("tap.*")]
    assert sum(file.stat().st_size for file in files) == texts.lengths().sum() * 3 * 32 * 4


class Left(Lines):
    """Texts with their padding before them."""

    def batch(self, rows: Sequence[int], pad: int = 0) -> dict[str, Tensor]:
        found = super().batch(rows, pad)
        order = found["attention_mask"].argsort(dim=1, stable=True)
        return {name: values.gather(1, order) for name, values in found.items()}


def test_padding_may_come_before_the_texts(base: st.Base, tmp_path: Path) -> None:
    rows = [3, 17, 5]
    for labels in (None, [torch.from_numpy(ids) for ids in Lines().ids]):
        cached = [
            cache_tokens(base, texts, labels, tmp_path, dtype="float32", batch_size=7, progress=False)
            for texts in (Lines(), Left())
        ]
        (_, after, y), (_, before, z) = (each.__getitems__(rows) for each in cached)
        for k, row in enumerate(rows):
            n = len(Lines().ids[row])
            assert torch.allclose(before.out[k, -n:], after.out[k, :n], atol=1e-5) and not before.out[k, :-n].any()
            assert torch.allclose(before.taps["second"][k, -n:], after.taps["second"][k, :n], atol=1e-5)
            assert torch.equal(z[k, -n:], y[k, :n])
    # An older cache of such texts held padding.
    assert cached[0].folder != cached[1].folder
    cached[1].texts.ids[3] = cached[1].texts.ids[3][:-1]  # type: ignore[attr-defined]
    with pytest.raises(ShapeError, match=r"let lengths\(\) tell"):
        cached[1].__getitems__(rows)


class Boxes(nn.Embedding):
    """Embeddings that read where words stand on a page."""

    def forward(self, input_ids: Tensor, bbox: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids) + bbox.sum(-1, keepdim=True)


class Before(nn.Embedding):
    """Embeddings that depend on the whole text, whatever they are called with."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).cumsum(1)


@pytest.mark.parametrize(("embeddings", "stored"), [(nn.Embedding, False), (Boxes, True), (Before, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_are_looked_up_where_token_ids_tell_them(
    embeddings: type[nn.Embedding], stored: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = embeddings(50, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            boxes = () if embeddings is not Boxes else (torch.ones(*input_ids.shape, 4, dtype=dtype),)
            out: Tensor = self.embeddings(input_ids, *boxes) * attention_mask.unsqueeze(-1).to(dtype)
            return out

    texts = Lines()
    base = st.Base(Net().to(dtype), example=texts.batch([0]), taps=["embeddings"])
    cached = cache_tokens(base, texts, torch.arange(40), tmp_path, dtype="float32", progress=False)
    assert cached.taps == (["embeddings"] if stored else [])
    inputs, features, _ = cached.__getitems__([3, 5])
    live = base(inputs).taps["embeddings"] * inputs["attention_mask"].unsqueeze(-1)
    assert features.taps["embeddings"].dtype == torch.float32
    assert torch.allclose(features.taps["embeddings"], live, atol=1e-5)


def test_a_killed_writer_of_tokens_resumes_and_half_precision_is_near(
    base: st.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CHUNK", 10)
    texts, labels = Lines(), torch.arange(40)
    encode, calls = st.Base.encode, 0

    def dies(self: st.Base, inputs: st.Input) -> st.Features:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(self, inputs)

    monkeypatch.setattr(st.Base, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        cache_tokens(base, texts, labels, tmp_path, batch_size=5, progress=False)
    with pytest.raises(CacheError, match="cache again"):
        CachedTokens(base, texts, labels, next(tmp_path.iterdir()))
    cached = cache_tokens(base, texts, labels, tmp_path, batch_size=5, progress=False)
    # The first chunk of two batches was whole.
    assert calls == 3 + 6
    seconds = [json.loads(file.read_text())["seconds"] for file in (cached.folder / "done").iterdir()]
    assert cached.seconds == pytest.approx(sum(seconds)) and cached.seconds > 0
    out = cached.__getitems__(range(40))[1].out
    assert torch.allclose(out[7, : len(texts.ids[7])], base(texts.batch([7])).out[0], atol=4e-3)
    with pytest.raises(CacheError, match="wrong size"):
        CachedTokens(base, Lines(39), labels, cached.folder)
    (cached.folder / "out").write_bytes(b"")
    with pytest.raises(CacheError, match="wrong size"):
        cache_tokens(base, texts, labels, tmp_path, progress=False)


def test_what_is_no_sequence_or_too_large_is_not_cached(
    base: st.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = st.Base(nn.Linear(2, 2), example=torch.zeros(1, 2))
    with pytest.raises(ShapeError, match="use cache_features"):
        cache_tokens(vectors, Lines(), torch.arange(40), tmp_path)
    encode = st.Base.encode

    def large(self: st.Base, inputs: st.Input) -> st.Features:
        features = encode(self, inputs)
        return features._replace(out=features.out * 1e6)

    monkeypatch.setattr(st.Base, "encode", large)
    with pytest.raises(CacheError, match="float16 cannot hold"):
        cache_tokens(base, Lines(4), torch.arange(4), tmp_path, progress=False)


def test_batches_of_similar_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 1003)
    sampler = ByLength(lengths, 16)
    with st.seeded(1):
        batches = list(sampler)
    assert sorted(i for b in batches for i in b) == list(range(1003)) and len(batches) == len(sampler) == 63
    assert [len(b) for b in batches] == [16] * 62 + [11]
    waste = sum(len(b) * lengths[b].max() for b in batches) / lengths.sum()
    # At random it is near 1.8.
    assert waste < 1.15
    with st.seeded(1):
        assert batches == list(ByLength(lengths, 16))
    with st.seeded(2):
        assert batches != list(sampler)
    assert [lengths[b].max() for b in batches] != sorted(lengths[b].max() for b in batches)
