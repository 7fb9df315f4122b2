"""Images of ten kinds, 32 pixels: photographs, digits, letters, a game, and what NumPy draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sidetuning_bench.cifar import ImageSet, load_images

SIZE = 32
Random = np.random.Generator
# A drawing of class 0, 1, 2 or 3: (32, 32) or (32, 32, 3), of values in [0, 1].
Draw = Callable[[Random, int], NDArray[np.float64]]
CLASSES = 4


def gratings(random: Random, label: int) -> NDArray[np.float64]:
    """Stripes in one of four directions."""
    angle, phase, period = np.pi * label / CLASSES, random.uniform(0, 6.28), random.uniform(4, 9)
    y, x = np.mgrid[:SIZE, :SIZE]
    return 0.5 + 0.5 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)


def noise(random: Random, label: int) -> NDArray[np.float64]:
    """Coloured noise of one of four spectra, 1/f^a."""
    f = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]) + 1 / SIZE
    planes = [np.fft.irfft2(np.fft.rfft2(random.normal(size=(SIZE, SIZE))) / f ** (0.5 * label)) for _ in range(3)]
    image = np.stack(planes, -1)
    return np.clip(0.5 + 0.2 * (image - image.mean()) / image.std(), 0, 1)


def mosaics(random: Random, label: int) -> NDArray[np.float64]:
    """Cells of the nearest of 4, 8, 16 or 32 points, each in one colour."""
    points, colours = random.uniform(0, SIZE, (4 << label, 2)), random.uniform(size=(4 << label, 3))
    places = np.moveaxis(np.mgrid[:SIZE, :SIZE], 0, -1)[:, :, None]
    nearest: NDArray[np.intp] = np.square(places - points).sum(-1).argmin(-1)
    return colours[nearest]


def boards(random: Random, label: int) -> NDArray[np.float64]:
    """Checkerboards of four sizes in two colours."""
    cell = 2 + 2 * label
    y, x = np.mgrid[:SIZE, :SIZE] + random.integers(0, 2 * cell, (2, 1, 1))
    return random.uniform(size=(2, 3))[(y // cell + x // cell) % 2]


def gradients(random: Random, label: int) -> NDArray[np.float64]:
    """Smooth blends of two colours in one of four directions."""
    angle = 2 * np.pi * label / CLASSES + random.uniform(-0.3, 0.3)
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    share = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1)[..., None]
    first, second = random.uniform(size=(2, 3))
    return share * first + (1 - share) * second


def shapes(random: Random, label: int) -> NDArray[np.float64]:
    """A disc, a square, a triangle or a line on a plain ground."""
    colours = [tuple(int(v) for v in random.integers(0, 256, 3)) for _ in range(2)]
    image = Image.new("RGB", (SIZE, SIZE), colours[0])
    pen, r = ImageDraw.Draw(image), int(random.integers(6, 12))
    x, y = (int(v) for v in random.integers(r, SIZE - r, 2))
    box = (x - r, y - r, x + r, y + r)
    if label == 0:
        pen.ellipse(box, fill=colours[1])
    elif label == 1:
        pen.rectangle(box, fill=colours[1])
    elif label == 2:
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colours[1])
    else:
        pen.line(box, fill=colours[1], width=3)
    return np.asarray(image) / 255


def letters(random: Random, label: int) -> NDArray[np.float64]:
    """Words of one of four lengths, dark on light."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in random.integers(200, 256, 3)))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default()
    for line in range(3):
        word = "".join(chr(int(c)) for c in random.integers(97, 123, 2 + label))
        pen.text((int(random.integers(0, 4)), 10 * line), word, fill=(20, 20, 40), font=font)
    return np.asarray(image) / 255


DRAWN: dict[str, Draw] = {
    "gratings": gratings,
    "noise": noise,
    "mosaics": mosaics,
    "boards": boards,
    "gradients": gradients,
    "shapes": shapes,
    "letters": letters,
}


def drawn(draw: Draw, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of one kind, uint8 (n, 3, 32, 32), and their classes."""
    random, images = np.random.default_rng(seed), []
    labels = np.arange(count) % CLASSES
    for label in labels:
        image = draw(random, int(label))
        image = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image
        images.append(np.clip(image + random.normal(0, 0.02, image.shape), 0, 1))
    values = torch.from_numpy(np.stack(images) * 255).round().byte()
    return values.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits, enlarged from 8 pixels; shuffled."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))[:count]
    images = torch.from_numpy(found.images[order]).float().unsqueeze(1) / 16
    large = torch.nn.functional.interpolate(images, (SIZE, SIZE), mode="bilinear")
    return (255 * large).round().byte().expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target[order])


def photographs(images: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """Images of the first ten classes of CIFAR-100."""
    rows = (images.labels < 10).nonzero().flatten().tolist()[:count]
    return torch.stack([images[i][0] for i in rows]), images.labels[rows]


def write_photographs(folder: Path, source: str, classes: Iterable[int], counts: Mapping[str, int]) -> Path:
    """Write photographs of classes of CIFAR-100 to a folder by split and class, so many of each; returns it."""
    for split, count in counts.items():
        images = load_images(source, split)
        for label in classes:
            place = folder / split / f"class-{label:02}"
            place.mkdir(parents=True)
            for row in (images.labels == label).nonzero().flatten().tolist()[:count]:
                Image.fromarray(images[row][0].permute(1, 2, 0).numpy()).save(place / f"{row}.png")
    return folder


def frames(folder: Path, count: int, part: int) -> tuple[Tensor, Tensor]:
    """Frames of Doom, reduced to 32 pixels, each class one map; the parts 0 and 1 have different maps."""
    maps = sorted(path for path in (folder / "rgb").iterdir() if path.is_dir())[part::2][:CLASSES]
    images, labels = [], []
    for label, one in enumerate(maps):
        for file in sorted(one.glob("*.png"))[: count // CLASSES]:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
            images.append(torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)
