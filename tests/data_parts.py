"""Small real pictures and texts that the tests of one's own data share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sidetuning as st


def write_digits(root: Path, digits: Sequence[int], count: int, first: int = 0) -> Path:
    """Handwritten digits that ship with scikit-learn, a folder of PNG files for each class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in digits:
        folder = root / f"digit-{digit}"
        folder.mkdir(parents=True)
        rows = np.flatnonzero(data.target == digit)[first : first + count]
        for row in rows:
            image = Image.fromarray((data.images[row] * 15).astype(np.uint8)).resize((32, 32))
            image.convert("RGB").save(folder / f"{row}.png")
    return root


def write_texts(path: Path, count: int) -> Path:
    """Sentences that are about a number, or a colour."""
    colours, rng = ("red", "green", "blue"), np.random.default_rng(0)
    rows = []
    for k in range(count):
        word = str(1800 + int(rng.integers(0, 60))) if k % 2 else colours[int(rng.integers(0, 3))]
        rows.append({"text": f"the old tower was {word} in the big river", "label": ("colour", "number")[k % 2]})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def stages_net() -> torch.nn.Sequential:
    """Three stages of convolutions and a pooled code: (b, 3, 32, 32) -> (b, 16)."""
    nn = torch.nn

    def stage(before: int, after: int) -> torch.nn.Sequential:
        first = nn.Conv2d(before, after, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(after, after, 3, padding=1), nn.Sigmoid())

    layers = {"one": stage(3, 8), "two": stage(8, 16), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def stages_base() -> st.Base:
    with st.seeded(1):
        return st.Base(stages_net(), example=torch.zeros(1, 3, 32, 32), mean=[0.5] * 3, std=[0.2] * 3)


# What docs/quickstart.md asks about, and its classes.
ASKED = ("photos/fox/10147.png", "vehicles/bus/1035.png")
CLASSES = {"photos": ("fox", "hamster", "mouse"), "vehicles": ("bus", "train", "tractor")}


def write_photographs(root: Path) -> None:
    """Digits in folders of the quickstart's names, with the files that it asks about."""
    folders = {**dict.fromkeys(CLASSES, (34, 0)), "holdout": (5, 40)}
    for folder, (count, first) in folders.items():
        names = CLASSES.get(folder, CLASSES["photos"])
        write_digits(root / folder, range(len(names)), count, first)
        for digit, name in enumerate(names):
            (root / folder / f"digit-{digit}").rename(root / folder / name)
    for path in ASKED:
        next((root / path).parent.glob("*.png")).rename(root / path)


def write_quickstart() -> None:
    """What the Python of docs/quickstart.md needs, in the working folder."""
    from sidetuning.cli import main

    write_photographs(Path())
    start = ["train", "photos", "--base", "resnet44-cifar10", "--task", "pets", "--out", "my-model"]
    main([*start, "--side", "none", "--quiet"])
