"""Turn any input (images, token ids, sequences, vectors) into tokens, for the mlp and transformer sides."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sidetuning.base import Base
from sidetuning.errors import ShapeError


class Embed(nn.Module):
    """Tokens of one width, with positions.

    Images are cut into patches (about 8 x 8 of them), ids looked up in a small table as large as the base's
    vocabulary, sequences and vectors projected. Sinusoidal positions are added.

    Attributes:
        grid: (rows, columns) of the patches, or None where the input is no image.
    """

    def __init__(self, base: Base, width: int) -> None:
        super().__init__()
        example = base.example
        tensor = example.get("input_ids") if isinstance(example, Mapping) else example
        if not isinstance(tensor, Tensor):
            raise ShapeError("this side needs a tensor input, or a mapping with input_ids")
        self.grid: tuple[int, int] | None = None
        if not tensor.is_floating_point() and tensor.ndim == 2:
            self.layer: nn.Module = nn.Embedding(_vocabulary(base, tensor), width)
        elif tensor.ndim == 4:
            patch = max(1, min(tensor.shape[-2:]) // 8)
            self.layer = nn.Conv2d(tensor.shape[1], width, patch, stride=patch)
            self.grid = (tensor.shape[-2] // patch, tensor.shape[-1] // patch)
        else:
            self.layer = nn.Linear(tensor.shape[-1], width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t) ids, (b, c, h, w) images, (b, t, c) sequences or (b, c) vectors -> (b, t, width)."""
        tokens: Tensor = self.layer(x)
        if self.grid is not None:
            tokens = tokens.flatten(2).transpose(1, 2)
        elif tokens.ndim == 2:
            tokens = tokens.unsqueeze(1)
        return tokens + positions(tokens.shape[1], tokens.shape[2], tokens)


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Sinusoidal positions (length, width) of Vaswani et al. (2017), section 3.5."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000) / half))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].to(like.dtype)


def _vocabulary(base: Base, ids: Tensor) -> int:
    """The size of the base's first embedding table, positions aside: the largest one."""
    if isinstance(base.net, nn.Module):
        tables = [m.num_embeddings for m in base.net.modules() if isinstance(m, nn.Embedding)]
        if tables:
            return max(tables)
    return int(ids.max()) + 1
