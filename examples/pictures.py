"""Little pictures for the examples: a square or a disc, in one of three colours, on a grey ground."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ["square", "disc"]
COLOURS = ["red", "green", "blue"]


def draw(samples: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pictures.

    Args:
        samples: how many.
        seed: seed for shapes, colours, places and noise.

    Returns:
        Pictures (n, 3, 32, 32) in [0, 1], the numbers of their shapes (n,) and of their colours (n,).
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randint(len(SHAPES), (samples,), generator=generator)
    colours = torch.randint(len(COLOURS), (samples,), generator=generator)
    centres = torch.randint(10, 22, (samples, 2, 1, 1), generator=generator)
    # Distances to the centre: (n, 32, 32) each.
    across = (torch.arange(32) - centres[:, 0]).abs().expand(samples, 32, 32)
    down = (torch.arange(32)[:, None] - centres[:, 1]).abs().expand(samples, 32, 32)
    square = (across <= 7) & (down <= 7)
    disc = across.square() + down.square() <= 64
    inside = torch.where(shapes[:, None, None] == 0, square, disc)
    pictures = 0.5 + 0.1 * torch.randn(samples, 3, 32, 32, generator=generator)
    paint = 0.8 * torch.eye(3)[colours][:, :, None, None] + 0.1
    return torch.where(inside[:, None], paint, pictures).clamp(0, 1), shapes, colours
