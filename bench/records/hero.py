"""Draws the picture of the README from a run of the demo: `python bench/records/hero.py runs/demo docs/hero.jpg`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Tasks whose pictures say most, in the order of learning, and which of the frames of the strips is shown of each.
TASKS = {"normal": ("surface normals", 1), "depth_euclidean": ("depth", 3), "segment_semantic": ("classes", 2)}
COLUMNS = ("input", "truth", "side-tuned,\nwhen learned", "after 5 tasks", "fine-tuned,\nwhen learned", "after 5 tasks")


def frame(file: Path, number: int) -> NDArray[np.uint8]:
    """One of the square pictures that a strip has side by side."""
    with Image.open(file) as strip:
        pixels = np.asarray(strip.convert("RGB"))
    side = pixels.shape[0]
    return pixels[:, number * side : (number + 1) * side]


def main(demo: Path, out: Path) -> None:
    """Write the picture."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(TASKS), len(COLUMNS), figsize=(9.6, 5.1), dpi=130)
    for row, (task, (name, number)) in zip(grid, TASKS.items(), strict=True):
        side, tuned = (demo / method / "gallery" for method in ("sidetune", "finetune"))
        files = [side / "input.png", side / f"{task}.truth.png"]
        files += [folder / f"{task}.{moment}.png" for folder in (side, tuned) for moment in ("learned", "end")]
        for axes, file in zip(row, files, strict=True):
            axes.imshow(frame(file, number))
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(name, fontsize=11)
    for axes, title in zip(grid[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=11, color="#d55e00" if title == COLUMNS[-2] else "black")
    grid[0][-1].set_title(COLUMNS[-1], fontsize=11, color="#d55e00")
    figure.subplots_adjust(0.035, 0.01, 0.995, 0.9, wspace=0.04, hspace=0.04)
    figure.savefig(out, pil_kwargs={"quality": 88, "optimize": True})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
