"""From a file to what a base takes."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from sidetuning.errors import DataError


def decode_image(data: bytes) -> Tensor:
    """An encoded image to uint8 (3, h, w); raises DataError where it is damaged."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            # Cameras write how they were held.
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would cut these off at 255.
                upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            array = np.array(upright.convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError("the image cannot be decoded: its bytes are of no format that Pillow knows") from error
    except Exception as error:
        # Pillow's decoders raise whatever their formats make them.
        raise DataError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error
    return torch.from_numpy(array).permute(2, 0, 1)
