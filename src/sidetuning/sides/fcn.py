"""The paper's fully convolutional sides FCN3, FCN4, FCN5 and FCN8 (original code, `student_models.py`).

Layer names follow the original code, so its weights load as they are. The last layer is as wide as the base's output
(64 at most, then a 1x1 projection follows), and its map is pooled, resized or flattened to the base's shape.
"""

from __future__ import annotations

from torch import Tensor, nn

from sidetuning.base import Base
from sidetuning.errors import ShapeError
from sidetuning.inputs import image_of
from sidetuning.sides.fit import FitMap


def layer(
    inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, norm: bool = True, relu: bool = True
) -> nn.Sequential:
    """Convolution without bias, group norm with 2 groups, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    groups = 2 if outputs % 2 == 0 else 1
    return nn.Sequential(conv, *([nn.GroupNorm(groups, outputs)] if norm else []), *([nn.ReLU()] if relu else []))


def even(channels: float) -> int:
    """The nearest even number, and at least 2, which the group norms of a layer can halve.

    Raises:
        ShapeError: a width that gives no layer, or one of more than 16,384 channels.
    """
    if not 0 < channels <= 2**14:
        raise ShapeError(f"a layer of {channels:g} channels cannot be built; give a width above 0, such as 1")
    return max(2, round(channels / 2) * 2)


class FCN(nn.Module):
    """A side of convolutions on images. Shape: (b, c, H, W) -> the base's output shape."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        image = image_of(base.example)
        shape = None if image is None else image.shape
        if shape is None or len(shape) != 4:
            given = "a mapping without images" if shape is None else f"inputs {tuple(shape)}"
            raise ShapeError(
                f"an FCN side takes images (b, c, h, w), and this base takes {given}; use mlp or transformer"
            )
        self.channels = int(shape[1])
        self.code = min(base.width, 64)
        self.fit = FitMap(base, self.code)

    def body(self, x: Tensor) -> Tensor:
        """Images to the map (b, code, h, w)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fit(self.body(x))


class FCN3(FCN):
    """Three layers, stride 16."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.conv1 = layer(self.channels, 64, 8, stride=4, padding=1)
        self.conv2 = layer(64, 256, 3, stride=2, padding=2)
        self.conv3 = layer(256, self.code, 3, stride=2, norm=False)

    def body(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class FCN4(FCN):
    """Four layers, stride 4, for small images: the side of iCIFAR (25,904 parameters).

    Args:
        base: the base.
        width: fraction of the paper's channels.
    """

    def __init__(self, base: Base, width: float = 1.0) -> None:
        super().__init__(base)
        thin, wide = (even(width * c) for c in (16, 32))
        self.conv1 = layer(self.channels, thin, 3, padding=1)
        self.conv2 = layer(thin, thin, 3, stride=2)
        self.conv3 = layer(thin, wide, 3, stride=2)
        # The original has no conv4.
        self.conv5 = layer(wide, self.code, 3, norm=False)

    def body(self, x: Tensor) -> Tensor:
        return self.conv5(self.conv3(self.conv2(self.conv1(x))))


class FCN5(FCN):
    """Five layers and a skip, stride 16: the side of Taskonomy (921,376 parameters at 8 channels).

    Args:
        base: the base.
        width: fraction of the paper's channels; a quarter has about a sixteenth of the parameters.
        signed: leave out the paper's last two ReLUs, for a base whose code has both signs: a sum of ReLUs has one.
    """

    def __init__(self, base: Base, width: float = 1.0, signed: bool = False) -> None:
        super().__init__(base)
        thin, wide = (even(width * c) for c in (64, 256))
        self.conv1 = layer(self.channels, thin, 8, stride=4, padding=2)
        self.conv2 = layer(thin, wide, 3, stride=2, padding=1)
        self.conv3 = layer(wide, wide, 3, stride=2, padding=1)
        self.conv4 = layer(wide, thin, 3, padding=1)
        self.conv5 = layer(thin, self.code, 3, padding=1, relu=not signed)
        self.skip = layer(wide, self.code, 3, stride=2, padding=1, relu=not signed)

    def body(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return self.conv5(self.conv4(self.conv3(x))) + self.skip(x)


class FCN8(FCN):
    """Eight layers and three skips, stride 16: the larger side (3,361,440 parameters at 8 channels)."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.conv1 = layer(self.channels, 64, 8, stride=4, padding=2)
        self.conv2 = layer(64, 128, 3, stride=2, padding=1)
        self.conv3 = layer(128, 256, 3, stride=2, padding=1)
        self.conv4 = layer(256, 256, 3, padding=1)
        self.conv5 = layer(256, 256, 3, padding=1)
        self.conv6 = layer(256, 256, 3, padding=1)
        self.conv7 = layer(256, 128, 3, padding=1)
        self.conv8 = layer(128, self.code, 3, padding=1)
        self.skip1 = layer(128, 256, 3, stride=2, padding=1)
        self.skip2 = layer(256, 256, 3, padding=1)
        self.skip3 = layer(256, self.code, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        x = self.conv4(self.conv3(x)) + self.skip1(x)
        x = self.conv6(self.conv5(x)) + self.skip2(x)
        return self.conv8(self.conv7(x)) + self.skip3(x)
