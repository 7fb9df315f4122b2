"""Frames of Doom: how well exact depth agrees with the engine's, how long rendering and the demo take: `python benchmarks/doom.py`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common import record
from sidetuning_bench.doom import frames as doom


def agreement(per_map: int = 12, seed: int = 1) -> dict[str, float | int]:
    """Shares of pixels whose depth disagrees, over frames of the maps that nothing is trained on."""
    found = [
        f for m in (*doom.VAL, *doom.TEST) for _, _, f in doom.frames(m, per_map, 128, seed, accept=lambda _: True)
    ]
    every = np.array([f.disagreement for f in found])
    kept = np.array([f.disagreement for f in found if doom.good(f)])
    return {
        "frames": len(every), "median_disagreement": float(np.median(every)), "frames_after_gate": len(kept),
        "median_disagreement_after_gate": float(np.median(kept)),
    }  # fmt: skip


def seconds(folder: Path, *words: str) -> float:
    """Wall time of a command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sidetuning.cli", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - started, 1)


def main() -> None:
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
    record("doom", {**result, "demo_megabytes": round(disk / 1e6)})


if __name__ == "__main__":
    main()
