"""What every result file says about how it was made."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sidetuning.artifacts import write_json

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def record(name: str, content: dict[str, Any]) -> None:
    """Write `results/<name>.json`: the content, and command, machine, versions and date."""
    about = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("sidetuning", "torch", "numpy", "accelerate")}
        | {"python": platform.python_version()},
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    write_json(RESULTS / f"{name}.json", {**content, **about})
