"""A cache of features of texts: of real tokens alone, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from sidetuning.base import Base, Features
from sidetuning.cache.store import Put, Store, fields_of, folder_of
from sidetuning.errors import CacheError, ShapeError
from sidetuning.inputs import to_device
from sidetuning.problems import IGNORED

# Texts between two markers.
CHUNK = 512
# Transformers' name of the module before the layers: as a tap it is looked up by token ids where they tell it.
EMBEDDINGS = "embeddings"


class Texts(Protocol):
    """Texts as token ids: their lengths, a hash of all tokens, and batches of the base's input, padded."""

    def __len__(self) -> int: ...
    def lengths(self) -> NDArray[np.int64]: ...
    def fingerprint(self) -> str: ...
    def batch(self, rows: Sequence[int], /) -> dict[str, Tensor]: ...


class CachedTokens(Dataset[Any]):
    """Batches of `(inputs, features, labels)`, padded to the longest text of the batch; features of padding are 0.

    Attributes:
        texts, labels, folder: as given.
        taps: names of the stored taps.
        seconds: as of `Store`.
    """

    def __init__(self, base: Base, texts: Texts, labels: Tensor | Sequence[Tensor] | None, folder: Path) -> None:
        self.texts, self.labels, self.folder = texts, labels, folder
        self._starts = np.concatenate([[0], np.cumsum(texts.lengths())])
        self._store = store = Store.open(folder, int(self._starts[-1]))
        if store.samples != len(texts):
            raise CacheError(f"{folder} has {store.samples} texts, not {len(texts)}; delete {folder} and cache again")
        if isinstance(labels, Sequence) and [*map(len, labels)] != texts.lengths().tolist():
            raise ShapeError("labels of tokens are a tensor for each text, as long as it is; give one for each token")
        if labels is not None and len(labels) != len(texts):
            raise ShapeError(f"there are {len(labels)} labels for {len(texts)} texts; give one for each")
        self.seconds = store.seconds
        self.taps = [name[4:] for name in store.fields if name.startswith("tap.")]
        self._embeddings = looked_up(base)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], Features, Tensor]:
        inputs = self.texts.batch(rows)
        places = _places(inputs, self._starts[np.add(rows, 1)] - self._starts[rows])
        taps = {} if self._embeddings is None else {EMBEDDINGS: _embed(self._embeddings, inputs)}
        taps.update({name: self._read(f"tap.{name}", rows, places) for name in self.taps})
        return inputs, Features(self._read("out", rows, places), taps), self._labels(rows, inputs, places)

    def _labels(self, rows: Sequence[int], inputs: dict[str, Tensor], places: Tensor) -> Tensor:
        if not isinstance(self.labels, Sequence):
            return inputs["input_ids"] if self.labels is None else self.labels[list(rows)]
        out = torch.full(places.shape, IGNORED, dtype=self.labels[0].dtype)
        for k, row in enumerate(rows):
            out[k, places[k]] = self.labels[row]
        return out

    def _read(self, name: str, rows: Sequence[int], places: Tensor) -> Tensor:
        out = torch.zeros(*places.shape, *self._store.fields[name].shape)
        for k, row in enumerate(rows):
            tokens = np.arange(self._starts[row], self._starts[row + 1])
            out[k, places[k]] = torch.from_numpy(self._store.read(name, tokens)).float()
        return out


def _places(inputs: dict[str, Tensor], lengths: NDArray[np.int64]) -> Tensor:
    """Where the tokens of a batch are, (b, t) of booleans: padding may stand before them or after.

    Raises:
        ShapeError: texts of other lengths than they told.
    """
    places = inputs["attention_mask"] != 0
    if (found := places.sum(1).tolist()) != lengths.tolist():
        raise ShapeError(
            f"texts of {lengths.tolist()} tokens have a mask of {found}; let lengths() tell those of batch()"
        )
    return places


@torch.no_grad()
def _embed(layer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The embeddings of tokens, before the first layer, (b, t, c); 0 where there is padding."""
    device = next(layer.parameters()).device
    given = {name: inputs[name].to(device) for name in ("input_ids", "token_type_ids") if name in inputs}
    vectors: Tensor = layer(given["input_ids"]) if isinstance(layer, nn.Embedding) else layer(**given)
    return vectors.float().to(inputs["attention_mask"].device) * inputs["attention_mask"].unsqueeze(-1)


def looked_up(base: Base) -> nn.Module | None:
    """The module behind the tap "embeddings" where it needs token ids alone; None where it is stored as others are."""
    if EMBEDDINGS not in base.tap_shapes or isinstance(base.example, Tensor):
        return None
    net: Any = base.net
    layer: nn.Module = net.get_submodule(EMBEDDINGS)
    try:
        found = _embed(layer, dict(base.example))
    except Exception:
        # It reads more, such as the places of words on a page.
        return None
    tap = base.example_features.taps[EMBEDDINGS] * base.example["attention_mask"].unsqueeze(-1)
    return layer if found.shape == tap.shape and torch.allclose(found.to(tap.dtype), tap, atol=1e-4) else None


def cache_tokens(
    base: Base,
    texts: Texts,
    labels: Tensor | Sequence[Tensor] | None,
    path: str | Path,
    *,
    dtype: str = "float16",
    batch_size: int = 16,
    progress: bool = True,
) -> CachedTokens:
    """Run the base once over texts and keep its features; a finished cache of the same content is only opened.

    Args:
        base: a base whose output, and taps, are sequences. Its tap "embeddings" is looked up where token ids tell it,
            and not stored.
        texts: the texts.
        labels: labels of the texts, (n, …), or of their tokens, a tensor (tokens,) for each; not part of the cache.
            None: their own ids, for a task with the head "lm".
        path, dtype, batch_size, progress: as of `cache_features`, which see for errors too.

    Raises:
        ShapeError: outputs that are no sequences.
    """
    if base.kind != "sequence":
        raise ShapeError(
            f"cache_tokens keeps features of tokens, and this base returns a {base.kind}; use cache_features"
        )
    if base.like.dtype == torch.float64:
        raise ShapeError("cache_tokens keeps features in 32 bits at most, and this base is in 64; use base.float()")
    found = looked_up(base)
    taps = {name: shape for name, shape in base.tap_shapes.items() if name != EMBEDDINGS or found is None}
    if any(len(shape) != 2 for shape in taps.values()):
        raise ShapeError(f"cache_tokens keeps taps that are sequences, not {base.tap_shapes}")
    # Older versions kept padding for tokens where it came before them.
    form = f"tokens {dtype} after padding" if _pads_before(texts) else f"tokens {dtype}"
    content = [texts.fingerprint(), 1, "none", form]
    folder = folder_of(path, base, taps, content, content)
    if not (folder / "meta.json").exists():
        fields = {name: np.dtype((dtype, shape[1:])) for name, shape in fields_of(base.output_shape, taps).items()}
        store = Store(folder, fields, len(texts), int(texts.lengths().sum()))
        store.write(partial(_fill, base, texts, taps, batch_size), CHUNK, progress)
    return CachedTokens(base, texts, labels, folder)


def _pads_before(texts: Texts) -> bool:
    """Whether padding comes before texts: the shortest one beside the longest tells."""
    order = texts.lengths().argsort()
    mask = texts.batch([int(order[0]), int(order[-1])])["attention_mask"]
    return bool((mask[:, 0] == 0).any())


def _fill(
    base: Base, texts: Texts, taps: Iterable[str], size: int, view: int, samples: range, put: Put
) -> Iterator[int]:
    """Store some texts, those of similar lengths together."""
    lengths = texts.lengths()
    starts = np.cumsum(lengths) - lengths
    by_length = np.asarray(samples)[np.argsort(lengths[samples.start : samples.stop])]
    for rows in np.array_split(by_length, -(-len(samples) // size)):
        inputs = texts.batch(rows.tolist())
        features, places = base(to_device(inputs, base.device)), _places(inputs, lengths[rows]).to(base.device)
        for name, value in fields_of(features.out, {tap: features.taps[tap] for tap in taps}).items():
            for k, row in enumerate(rows):
                put(name, value[k, places[k]], int(starts[row]))
        yield len(rows)


def token_loader(data: Any, lengths: NDArray[np.int64], batch_size: int = 16) -> DataLoader[Any]:
    """Make a loader of `(inputs, features, labels)` batches, each read in one go, with texts of similar lengths.

    Args:
        data: what `cache_tokens` returned, or another data set that gives whole batches.
        lengths: tokens of each text.
        batch_size: texts per batch; a smaller batch comes last.
    """
    rows: Any = range(len(data))
    return DataLoader(rows, batch_sampler=ByLength(lengths, batch_size), collate_fn=data.__getitems__)


class ByLength(Sampler[list[int]]):
    """Batches of texts of similar lengths, and so with little padding; every pass mixes them otherwise."""

    def __init__(self, lengths: NDArray[np.int64], batch_size: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        size, batches = self.batch_size, []
        # Texts are sorted within random pools of 50 batches.
        for pool in torch.randperm(len(self.lengths)).split(50 * size):
            rows = pool.numpy()[np.argsort(self.lengths[pool.numpy()], kind="stable")]
            batches += [rows[i : i + size].tolist() for i in range(0, len(rows), size)]
        mixed = [batches[i] for i in torch.randperm(len(batches)).tolist()]
        # The smaller one last: accelerate, where it splits batches over processes, drops it on the way.
        yield from sorted(mixed, key=lambda batch: len(batch) < size)
