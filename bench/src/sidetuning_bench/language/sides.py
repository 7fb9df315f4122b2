"""Small sides for texts. They read the base's own token embeddings (a tap), and so need no table of their own."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base, Features, Input
from sidetuning.errors import ShapeError
from sidetuning.inputs import entry
from sidetuning.sides import Side
from sidetuning.sides.fit import FitTokens
from sidetuning.sides.generic import encoder_layer

# A score that softmax turns to 0, in half precision too.
FAR = -1e4


def refuse_decoder(base: Base) -> None:
    """Raise ShapeError for a base whose tokens see no later ones: sides of both directions would show them those."""
    if base.causal:
        raise ShapeError(
            "this side reads texts in both directions, and the base only forwards; use 'transformer' or 'ladder', "
            "which do as the base does"
        )


class TokenSide(Side):
    """A side that projects the first tap to a width, and ends with a projection to the base's shape.

    Shape: taps (b, t, c) and a mask (b, t) -> as the base's output. What stands at padding never matters.
    """

    def __init__(self, base: Base, width: int) -> None:
        super().__init__()
        refuse_decoder(base)
        sequences = [name for name, shape in base.tap_shapes.items() if len(shape) == 2]
        if not sequences or base.kind == "map":
            raise ShapeError(
                "this side reads token embeddings: name them as a tap, such as load_base('hf:…', taps=['embeddings'])"
            )
        self.taps = (sequences[0],)
        self.down = nn.Linear(base.tap_shapes[sequences[0]][-1], width)
        self.norm = nn.LayerNorm(width)
        self.fit = FitTokens(base, width)

    def body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(b, t, width) -> the same."""
        raise NotImplementedError

    def forward(self, inputs: Input, features: Features) -> Tensor:
        mask = entry(inputs, "attention_mask")
        return self.fit(self.norm(self.body(self.down(features.taps[self.taps[0]]), mask)), mask)


class Slim(TokenSide):
    """A slim transformer.

    Args:
        base: a base whose first tap is its embeddings.
        width: width of the tokens; a multiple of `heads`.
        layers: number of layers.
        heads: attention heads per layer.
    """

    def __init__(self, base: Base, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        if width % heads:
            raise ShapeError(f"the slim side's width {width} is not a multiple of its {heads} heads")
        super().__init__(base, width)
        self.layers = nn.ModuleList(encoder_layer(width, heads) for _ in range(layers))

    def body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        padding = None if mask is None else mask == 0
        return reduce(lambda x, layer: layer(x, src_key_padding_mask=padding), self.layers, x)


class Convolutional(TokenSide):
    """Residual convolutions over the tokens, each looking twice as far as the one before.

    Args:
        base: a base whose first tap is its embeddings.
        width: width of the tokens.
        layers: number of convolutions; with kernels of 5 tokens, 4 of them see 61 tokens.
        kernel: width of the kernels in tokens, odd.
    """

    def __init__(self, base: Base, width: int = 96, layers: int = 4, kernel: int = 5) -> None:
        super().__init__(base, width)
        if kernel % 2 == 0:
            raise ShapeError(f"a kernel of {kernel} tokens has no middle; make it odd")
        self.layers = nn.ModuleList(Dilated(width, 2**i, kernel) for i in range(layers))

    def body(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return reduce(lambda x, layer: layer(x, mask), self.layers, x)


class Dilated(nn.Module):
    """A residual convolution over tokens (b, t, width), `dilation` apart; padding counts as 0."""

    def __init__(self, width: int, dilation: int, kernel: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, kernel, padding=(kernel // 2) * dilation, dilation=dilation)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = F.gelu(self.norm(x))
        if mask is not None:
            h = h * mask.to(x.dtype).unsqueeze(-1)
        return x + self.conv(h.transpose(1, 2)).transpose(1, 2)


class Match(Side):
    """A side for pairs of texts, such as a question and a paragraph: it compares the tokens of both.

    Encoders that were trained on single texts never learned that, and some thousand examples do not teach it to a small
    network from random weights. So each token is given three things: whether the word is in the first text, how much it
    weighs there, and what there means the same (Chen et al. 2017, "Reading Wikipedia to answer open-domain questions",
    section 3.2). Convolutions and encoder layers read them.

    The first text ends before the first separator, the token that every input ends with. A single text is compared with
    itself.

    Args:
        base: a text encoder; all its taps are read, and should be its embeddings and some of its layers.
        width: width of the tokens; a multiple of `heads`.
        layers: number of encoder layers at the end.
        convolutions: number of convolutions before them, each looking twice as far as the one before.
        heads: attention heads per layer.
        dropout: dropout of the projected taps and after each convolution.

    Shape: taps (b, t, c), a mask (b, t) and ids (b, t) -> as the base's output. What stands at padding never matters.
    """

    def __init__(
        self, base: Base, width: int = 96, layers: int = 2, convolutions: int = 2, heads: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        refuse_decoder(base)
        shapes = list(base.tap_shapes.values())
        if not shapes or any(len(shape) != 2 for shape in shapes) or base.kind == "map":
            raise ShapeError("the match side compares tokens: its taps must be sequences, such as 'embeddings'")
        if width % heads:
            raise ShapeError(f"the match side's width {width} is not a multiple of its {heads} heads")
        self.taps = tuple(base.tap_shapes)
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(shape[-1], width), nn.LayerNorm(width)) for shape in shapes)
        self.compare = nn.Linear(width, width)
        # At first, similar means what the base calls similar.
        nn.init.eye_(self.compare.weight)
        nn.init.zeros_(self.compare.bias)
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        # Two weights of each token of the first text: as a word that recurs, and in the text's summary.
        self.weigh = nn.Linear(width, 2)
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
        # (b, t, width)
        x = self.compared(self.dropout(reduce(torch.add, read)), ids, first)
        for convolution in self.convolutions:
            x = self.dropout(convolution(x, mask))
        # The first token stands for there being no answer: it is given the maximum over the second text.
        most = x.masked_fill(~second.unsqueeze(-1), FAR).amax(1, keepdim=True).clamp(min=-100)
        # (b, t, 1)
        start = ((mask != 0) & ((mask != 0).long().cumsum(1) == 1)).unsqueeze(-1)
        x = torch.where(start, x + self.pool(most), x)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        return self.fit(self.norm(x), mask)

    def compared(self, x: Tensor, ids: Tensor, first: Tensor) -> Tensor:
        """Mix into each token (b, t, width) how it compares with the tokens of the first text, (b, t)."""
        # The first text alone is gathered, (b, q, …): it is short.
        place = first.int().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(first.sum(1).max()))]
        # (b, 1, q): 1 for its tokens.
        asked = first.gather(1, place).unsqueeze(1).to(x.dtype)
        words = x.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        hidden = (1 - asked) * FAR
        recurs, summary = self.weigh(words.tanh()).transpose(1, 2).split(1, 1)
        weight = recurs.sigmoid() * asked
        # (b, t, q): the same word, and a similar one.
        same = (ids.unsqueeze(2) == ids.gather(1, place).unsqueeze(1)).to(x.dtype)
        alike = F.normalize(self.compare(x), dim=-1) @ F.normalize(self.compare(words), dim=-1).transpose(1, 2)
        found = [same * asked, same * weight, alike.clamp(min=0) * weight]
        aligned = ((alike * self.sharpness + hidden).softmax(-1) * asked) @ words
        # (b, 1, width)
        question = ((summary + hidden).softmax(-1) * asked) @ words
        most = [values.amax(-1, keepdim=True) for values in found]
        mixed: Tensor = self.mix(torch.cat([x, aligned, x * aligned, x * question, *most], -1))
        return mixed


def two_texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are the first text's and which the second's, without special ones at start and end. (b, t) each."""
    real = mask != 0
    # Counted from 1.
    place = real.long().cumsum(1)
    last = place.argmax(1, keepdim=True)
    ends = (ids == ids.gather(1, last)) & real
    first = real & (ends.long().cumsum(1) == 0) & (place > 1)
    return first, real & ~first & ~ends & (place > 1)
