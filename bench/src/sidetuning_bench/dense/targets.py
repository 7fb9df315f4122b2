"""What a network learns of a domain's files: targets, their units, and pictures of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sidetuning.errors import ShapeError
from sidetuning_bench.domains import DEPTHS, METRE, SIGNED, UNBLENDABLE, Domain, tensor_domain


def target(domain: str, raw: Tensor) -> Tensor:
    """What a network is trained to return, in the ranges of the original code.

    8-bit v -> v / 127.5 - 1; 16-bit v -> 2 v / 65535 - 1; ids -> int64; masks -> 0 or 1; scores -> themselves where
    they are probabilities already (not negative, sum 1), else their softmax.

    Shape: (…, c, h, w), (…, h, w) or (…, n), as from `read` -> the same, float32.
    """
    d = tensor_domain(domain)
    if d.bits == 32:
        scores = raw.float()
        given = (scores >= 0).all(-1, keepdim=True) & ((scores.sum(-1, keepdim=True) - 1).abs() < 1e-2)
        return torch.where(given, scores, scores.softmax(-1))
    if raw.is_floating_point():
        raise ShapeError(f"target('{d.name}', …) takes the whole numbers that read() gives, not {raw.dtype}")
    if d.name == "segment_semantic":
        return raw.long()
    if d.name == "mask_valid":
        return (raw != 0).float()
    return 2 * raw.float() / (2**d.bits - 1) - 1


def units(domain: str, target: Tensor) -> Tensor:
    """A target, or a prediction of it, in the domain's own units: what metrics are computed on.

    Depths are in metres, normals unit vectors, curvatures in -2 … 2 (255, which `encode` never gives, is 2.016), other
    maps in 0 … 1; ids, masks and probabilities stay. Predictions outside the range of targets are not clipped.

    Shape: (…, c, h, w), (…, h, w) or (…, n) -> the same.
    """
    d = tensor_domain(domain)
    if d.name in DEPTHS:
        return (target + 1) * (65535 / 2 / METRE)
    if d.name in SIGNED:
        # The file's value less 127, over 127.
        centred = (127.5 * target + 0.5) / 127 * SIGNED[d.name]
        return F.normalize(centred, dim=-3) if d.name == "normal" else centred
    return target if d.bits == 32 or d.channels == 0 else (target + 1) / 2


def resize(raw: Tensor, d: Domain, size: int) -> Tensor:
    """(c, h, w) or (h, w) -> (c, size, size) or (size, size), the same type."""
    if raw.shape[-2:] == (size, size):
        return raw
    if d.name in UNBLENDABLE:
        rows, columns = (((torch.arange(size) + 0.5) * n / size).long() for n in raw.shape[-2:])
        return raw[..., rows[:, None], columns]
    return F.interpolate(raw[None].float(), size=(size, size), mode="area")[0].round().to(raw.dtype)
