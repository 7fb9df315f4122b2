"""A side for pairs of texts, such as a question and a paragraph: it compares their tokens, which its base may never have learned to do."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input, entry
from sidetuning.errors import ShapeError
from sidetuning.sides import Side
from sidetuning.sides.fit import FitTokens
from sidetuning.sides.tokens import Dilated
from sidetuning.sides.transformer import encoder_layer

FAR = -1e4  # a score that softmax turns to 0, in half precision too


class Match(Side):
    """Every token with the first text's tokens: is the same word there, how much does it weigh, what is there that means the same?

    The features are those of Chen et al. (2017, "Reading Wikipedia to answer open-domain questions", section 3.2) on the base's taps,
    with which a reader of convolutions and encoder layers then starts. An encoder that was trained on single texts keeps the two apart,
    and few thousand examples do not teach a small network from random weights to compare them.

    The first text ends before the first separator, which is the token that every input ends with; where there is no second text, a text is
    compared with itself.

    Args:
        base: a text encoder; all its taps are read, and should have its embeddings and some of its layers.
        width: of the tokens; a multiple of `heads`.
        layers: encoder layers at the end.
        convolutions: before them, each looking twice as far as the one before.
        heads: attention heads per layer.
        dropout: of the projected taps and after each convolution.

    Shape: taps (b, t, c), a mask (b, t) and ids (b, t) -> as the base's output. What stands at padding never matters.
    """

    def __init__(
        self, base: Base, width: int = 96, layers: int = 2, convolutions: int = 2, heads: int = 4, dropout: float = 0.2
    ) -> None:  # fmt: skip
        super().__init__()
        shapes = list(base.tap_shapes.values())
        if not shapes or any(len(shape) != 2 for shape in shapes) or base.kind == "map":
            raise ShapeError(
                "the match side compares tokens: name taps that are sequences, such as "
                "load_base('hf:…', taps=['embeddings', 'encoder.layer.4'])"
            )
        if width % heads:
            raise ShapeError(f"the match side's width {width} is not a multiple of its {heads} heads")
        self.taps = tuple(base.tap_shapes)
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(shape[-1], width), nn.LayerNorm(width)) for shape in shapes)
        self.compare = nn.Linear(width, width)
        nn.init.eye_(self.compare.weight)  # alike is what the base calls alike, to begin with
        nn.init.zeros_(self.compare.bias)
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.weigh = nn.Linear(width, 2)  # of the first text's tokens: as a word that recurs, and in its summary
        self.mix = nn.Linear(4 * width + 3, width)
        self.convolutions = nn.ModuleList(Dilated(width, 2**i) for i in range(convolutions))
        self.pool = nn.Linear(width, width)
        self.layers = nn.ModuleList(encoder_layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.fit = FitTokens(base, width)

    def forward(self, inputs: Input, features: Features) -> Tensor:
        ids, mask = entry(inputs, "input_ids"), entry(inputs, "attention_mask")
        if ids is None:
            raise ShapeError("this side reads token ids: its base must be a text encoder, called with input_ids")
        mask = torch.ones_like(ids) if mask is None else mask
        first, second = two_texts(ids, mask)
        read = (down(features.taps[name]) for name, down in zip(self.taps, self.down, strict=True))
        x = self.dropout(reduce(torch.add, read))  # (b, t, width)

        # The first text alone, (b, q, …): it is short, and all comparisons are with it.
        place = first.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(first.sum(1).max()))]
        asked = first.gather(1, place).unsqueeze(1).to(x.dtype)  # (b, 1, q): what is one of its tokens
        words = x.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (b, q, width)
        hidden = (1 - asked) * FAR
        recurs, summary = self.weigh(words.tanh()).transpose(1, 2).split(1, 1)  # (b, 1, q) each
        weight = recurs.sigmoid() * asked
        same = (ids.unsqueeze(2) == ids.gather(1, place).unsqueeze(1)).to(x.dtype)  # (b, t, q)
        alike = F.normalize(self.compare(x), dim=-1) @ F.normalize(self.compare(words), dim=-1).transpose(1, 2)
        found = [same * asked, same * weight, alike.clamp(min=0) * weight]
        aligned = ((alike * self.sharpness + hidden).softmax(-1) * asked) @ words
        question = ((summary + hidden).softmax(-1) * asked) @ words  # (b, 1, width)
        x = self.mix(torch.cat([x, aligned, x * aligned, x * question, *(f.amax(-1, keepdim=True) for f in found)], -1))

        for convolution in self.convolutions:
            x = self.dropout(convolution(x, mask))
        # The most that the second text has is told to the first token, which stands for there being no answer.
        most = x.masked_fill(~second.unsqueeze(-1), FAR).amax(1, keepdim=True).clamp(min=-100)
        x = torch.cat([x[:, :1] + self.pool(most), x[:, 1:]], 1)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        return self.fit(self.norm(x), mask)


def two_texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are the first text's and which the second's, without the special ones at start and end. (b, t) each."""
    real = mask != 0
    place = real.long().cumsum(1)  # from 1
    last = place.argmax(1, keepdim=True)
    ends = (ids == ids.gather(1, last)) & real
    first = real & (ends.long().cumsum(1) == 0) & (place > 1)
    return first, real & ~first & ~ends & (place > 1)
