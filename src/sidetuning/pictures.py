"""Answers of dense tasks as pictures."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Steps of the golden ratio around the circle of hues, so that neighbouring classes differ.
GOLDEN = 0.618034


def file_stem(name: str) -> str:
    """A name without the letters that some file systems do not take."""
    return re.sub(r"[^\w.-]+", "-", name)


def save_map(answer: Tensor, folder: Path, name: str) -> Path:
    """Write a map as a PNG file, and its numbers as a NumPy file beside it.

    Args:
        answer: class numbers (h, w), or numbers (c, h, w), scaled from the lowest to the highest for the picture.
        folder: where to.
        name: of the file, without its ending.

    Returns:
        The path of the picture.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(name)
    values = answer.detach().cpu()
    np.save(folder / f"{stem}.npy", values.numpy())
    if values.ndim == 2:
        hues = (values * GOLDEN % 1 * 255).byte().numpy()
        full = np.full_like(hues, 200)
        image = Image.merge("HSV", [Image.fromarray(plane) for plane in (hues, full, full)]).convert("RGB")
    else:
        low, high = values.amin(), values.amax()
        scaled = ((values - low) / (high - low).clamp(min=1e-12) * 255).to(torch.uint8)
        planes = scaled if len(scaled) == 3 else scaled[:1].expand(3, -1, -1)
        image = Image.fromarray(planes.permute(1, 2, 0).contiguous().numpy())
    path = folder / f"{stem}.png"
    image.save(path)
    return path
