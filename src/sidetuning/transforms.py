"""From a file to what a base takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sidetuning.errors import DataError
from sidetuning.images import open_image

# Tags of TIFF: bits of a sample, and what 0 means.
BITS, PHOTOMETRIC = 258, 262


def decode_image(source: bytes | Path) -> Tensor:
    """An image to uint8 (3, h, w).

    Args:
        source: the bytes of an image file, or its path.

    Raises:
        DataError: it is damaged, too large, of another format, or has values whose range no file tells.
        OSError: the path cannot be read.
    """
    from PIL import Image, ImageOps

    with open_image(source) as image:
        # Cameras write how they were held.
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] in "IF":
            upright = Image.fromarray(_eight_bits(np.asarray(upright), image))
        elif upright.mode in ("P", "PA"):
            # At once to RGB, Pillow would warn of transparency.
            upright = upright.convert("RGBA")
        array = np.array(upright.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def _eight_bits(values: NDArray[Any], image: Any) -> NDArray[np.uint8]:
    """Grey values of more than eight bits, which Pillow would cut off at 255, scaled to 0 … 255."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "F":
        # Not the other way round, so that NaN is refused too.
        if not ((values >= 0) & (values <= 1)).all():
            raise DataError("the image holds floats outside 0 … 1; scale them, or save it with 8 or 16 bits")
        return (values * 255).round().astype(np.uint8)
    if image.mode == "I" and tags:
        raise DataError("the image holds numbers whose range no file tells; save it with 8 or 16 bits a channel")
    scaled = values.astype(np.int64) * 255 // (2 ** tags.get(BITS, (16,))[0] - 1)
    # TIFF may count from white down.
    return (255 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled).astype(np.uint8)
