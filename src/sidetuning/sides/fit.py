"""Bring a side network's map or tokens to the shape of the base's output."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sidetuning.base import Base


class FitMap(nn.Module):
    """A map to a vector (mean), a map (resized) or a sequence (one token per place), projected where widths differ.

    Shape: (b, channels, h, w) -> (b, *base.output_shape).
    """

    def __init__(self, base: Base, channels: int) -> None:
        super().__init__()
        self.kind, self.shape = base.kind, base.output_shape
        same = channels == base.width
        if same:
            self.project: nn.Module = nn.Identity()
        else:
            self.project = nn.Conv2d(channels, base.width, 1) if base.kind == "map" else nn.Linear(channels, base.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "vector":
            x = x.mean((2, 3))
        elif self.kind == "map":
            x = resize(x, self.shape[1:])
        else:
            # (b, c, h*w)
            tokens = x.flatten(2)
            x = F.interpolate(tokens, self.shape[0], mode="linear") if tokens.shape[2] != self.shape[0] else tokens
            x = x.transpose(1, 2)
        return self.project(x)


class FitTokens(nn.Module):
    """Tokens to a vector (mean over unmasked tokens) or a sequence. Shape: (b, t, c) -> the base's output shape."""

    def __init__(self, base: Base, channels: int) -> None:
        super().__init__()
        self.kind = base.kind
        self.project = nn.Linear(channels, base.width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.kind == "vector":
            x = masked_mean(x, mask)
        return self.project(x)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of x (b, t, c) where mask (b, t) is not 0 -> (b, c)."""
    if mask is None:
        return x.mean(1)
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average down or interpolate up a map (b, c, h, w) to (b, c, *size)."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, (size[0], size[1]), mode="bilinear", align_corners=False)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm of any dimensions, with its running statistics for one value a channel, which has no variance."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)
