"""Frames of Doom: how well exact depth agrees with the engine's, how long rendering takes, and a picture of labels."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from record import Record, write
from sidetuning_bench import domains
from sidetuning_bench.dense.targets import target
from sidetuning_bench.dense.tasks import Regression, Segmentation
from sidetuning_bench.doom import frames as doom

FIRST = ("rgb", "depth_zbuffer", "depth_euclidean", "normal", "principal_curvature", "reshading", "edge_occlusion")
SHOWN = (*FIRST, "edge_texture", "keypoints2d", "keypoints3d", "segment_semantic", "segment_unsup25d")


@dataclass(frozen=True)
class Times:
    """Agreement of depths, and how long rendering and the demo take."""


@dataclass(frozen=True)
class Sheet:
    """A picture of every label of a few frames of test maps, for the documents."""

    out: str = "docs/doom.jpg"
    """The file of the picture."""
    size: int = 112
    """Width and height of a frame, in pixels."""


def agreement(per_map: int = 12, seed: int = 1) -> dict[str, float | int]:
    """Shares of pixels whose depth disagrees, over frames of the maps that nothing is trained on."""
    maps = (*doom.VAL, *doom.TEST)
    found = [f for m in maps for _, _, f in doom.frames(m, per_map, 128, seed, accept=lambda _: True)]
    shares = {
        "": np.array([frame.disagreement for frame in found]),
        "_after_gate": np.array([frame.disagreement for frame in found if doom.good(frame)]),
    }
    counts = {f"frames{name}": len(values) for name, values in shares.items()}
    return {**counts, **{f"median_disagreement{name}": float(np.median(v)) for name, v in shares.items()}}


def seconds(folder: Path, *words: str) -> float:
    """Wall time of a command of the bench."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "sidetuning_bench", *words]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


def run(given: Times) -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "seeds": [0, 1],
            "agreement": agreement(),
            "render_5000_frames_seconds": seconds(folder, "render-doom", "--frames", "5000", "--no-progress"),
            "demo_seconds": seconds(folder, "demo"),
            "quick_demo_seconds": seconds(folder, "demo", "--quick"),
        }
        disk = sum(f.stat().st_size for f in (folder / "runs/demo").rglob("*") if f.is_file())
    write("doom", {**result, "demo_megabytes": round(disk / 1e6)})


def picture(domain: str, values: np.ndarray) -> np.ndarray:
    """A label as the report shows it, (n, n, 3)."""
    raw = torch.from_numpy(domains.encode(domain, values).astype(np.int32))
    if domain == "segment_unsup25d":
        return raw.numpy().astype(np.uint8)
    if domain == "segment_semantic":
        return Segmentation(domain, len(doom.SEMANTIC), "").picture(raw[None].long())[0].movedim(0, -1).numpy()
    channels = domains.DOMAINS[domain].channels
    raw = raw[None] if raw.ndim == 2 else raw.movedim(-1, 0)[:channels]
    return Regression(domain, channels, "").picture(target(domain, raw[None]))[0].movedim(0, -1).numpy()


def draw(given: Sheet) -> None:
    """Two frames of each test map, a column per domain."""
    rows = []
    for name in doom.TEST:
        for _, _, frame in doom.frames(name, 2, given.size, seed=4):
            labels = frame.labels()
            rows.append(np.concatenate([picture(domain, labels[domain]) for domain in SHOWN], 1))
    head = Image.new("RGB", (given.size * len(SHOWN), 18), "white")
    text = ImageDraw.Draw(head)
    for i, domain in enumerate(SHOWN):
        text.text((i * given.size + 3, 3), domain.removeprefix("principal_"), "black")
    Image.fromarray(np.concatenate([np.asarray(head), *rows])).save(given.out, quality=88)


DOOM = Record(Times(), run)
CONTACT_SHEET = Record(Sheet(), draw)
