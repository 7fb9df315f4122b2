"""A picture of every label of a few frames from test maps, for the documents: `python benchmarks/contact_sheet.py docs/doom.jpg`."""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image, ImageDraw

from sidetuning_bench import domains
from sidetuning_bench.dense.targets import target
from sidetuning_bench.dense.tasks import Regression, Segmentation
from sidetuning_bench.doom import frames as doom

DOMAINS = (
    "rgb", "depth_zbuffer", "depth_euclidean", "normal", "principal_curvature", "reshading", "edge_occlusion", "edge_texture",
    "keypoints2d", "keypoints3d", "segment_semantic", "segment_unsup25d",
)  # fmt: skip


def picture(domain: str, values: np.ndarray) -> np.ndarray:
    """As the report shows it, (n, n, 3)."""
    raw = torch.from_numpy(domains.encode(domain, values).astype(np.int32))
    if domain == "segment_unsup25d":
        return raw.numpy().astype(np.uint8)
    if domain == "segment_semantic":
        return Segmentation(domain, len(doom.SEMANTIC), "").picture(raw[None].long())[0].movedim(0, -1).numpy()
    channels = domains.DOMAINS[domain].channels
    raw = raw[None] if raw.ndim == 2 else raw.movedim(-1, 0)[:channels]
    return Regression(domain, channels, "").picture(target(domain, raw[None]))[0].movedim(0, -1).numpy()


def main(path: str, size: int = 112) -> None:
    """Two frames of each test map, a column per domain."""
    rows = []
    for name in doom.TEST:
        for _, _, frame in doom.frames(name, 2, size, seed=4):
            labels = frame.labels()
            rows.append(np.concatenate([picture(d, labels[d]) for d in DOMAINS], 1))
    head = Image.new("RGB", (size * len(DOMAINS), 18), "white")
    draw = ImageDraw.Draw(head)
    for i, domain in enumerate(DOMAINS):
        draw.text((i * size + 3, 3), domain.removeprefix("principal_"), "black")
    Image.fromarray(np.concatenate([np.asarray(head), *rows])).save(path, quality=88)


if __name__ == "__main__":
    main(sys.argv[1])
