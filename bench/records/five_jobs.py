"""The same five jobs in sidetuning, in PEFT with timm, and in plain torch: lines, answers that moved, accuracy.

Train on one's own photographs; add a second task; answer for both; save, share and load; compare with LoRA. The three
scripts lie in `jobs/`; all use the packaged ResNet-44, whose batch norms are what the comparison is about. The
photographs are two times ten classes of CIFAR-100, in folders.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinds import write_photographs
from record import Record, public, read_all, recorded, write
from sidetuning_bench import icifar
from sidetuning_bench.options import Count

JOBS = Path(__file__).parent / "jobs"
# Shown name -> script and arguments.
WAYS = {
    "sidetuning": ("ours.py", ()),
    "PEFT, batch norms training": ("peft_timm.py", ()),
    "PEFT, batch norms in evaluation mode": ("peft_timm.py", ("eval",)),
    "plain torch, a copy a task": ("plain_torch.py", ()),
}


@dataclass(frozen=True)
class Settings:
    """Five jobs done in four ways."""

    data: str = icifar.Settings.data
    """A folder with CIFAR-100, or a data set on the Hub."""
    images: int = 25
    """Images of each class for training; for the test there are twice as many."""
    seeds: Count = 3
    """Seeds."""


def lines_of(script: Path) -> int:
    """Lines of code: without blank ones, comments, the docstring, and what only the measurement wants."""
    text = script.read_text()
    docstring = ast.parse(text).body[0].end_lineno or 0
    lines = (line.strip() for line in text.splitlines()[docstring:])
    return sum(bool(line) and not line.startswith("#") and not line.endswith("# measurement") for line in lines)


def make_folders(folder: Path, given: Settings) -> list[Path]:
    """Two folders of photographs by split and class."""
    counts = {"train": given.images, "test": 2 * given.images}
    places = {"one": range(10), "two": range(10, 20)}
    return [write_photographs(folder / name, given.data, classes, counts) for name, classes in places.items()]


def run(given: Settings) -> None:
    """Do the jobs of each seed that has no result."""
    with tempfile.TemporaryDirectory() as temporary:
        folders: list[Path] = []
        for seed in range(given.seeds):
            if recorded(f"five-jobs-{seed}", public(given), ("seeds",)):
                continue
            folders = folders or make_folders(Path(temporary), given)
            ways: dict[str, Any] = {}
            for number, (name, (script, more)) in enumerate(WAYS.items()):
                out = Path(temporary) / f"{seed}-{number}"
                out.mkdir()
                command = [sys.executable, str(JOBS / script), *map(str, (*folders, out, seed)), *more]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                ways[name] = {"lines": lines_of(JOBS / script), **json.loads(done.stdout.splitlines()[-1])}
            write(f"five-jobs-{seed}", {"seed": seed, "images": given.images, "ways": ways}, given)


def table(given: Settings) -> str:
    """Lines, and the means over the seeds; of what moved, the most."""
    found = [result["ways"] for result in read_all("five-jobs-?.json")]
    lines = [
        "| | lines | first task, % | second task, % | first task at the end, % | its answers moved by "
        "| … after loading by | first task with LoRA in the same script, % |",
        "| --- |" + " ---: |" * 7,
    ]
    for name in WAYS:
        rows = [one[name] for one in found]
        cells = [f"{rows[0]['lines']}"]
        for key in ("first", "second", "first_at_the_end"):
            cells.append(f"{100 * sum(row[key] for row in rows) / len(rows):.1f}")
        cells += [f"{max(row[key] for row in rows):.2g}" for key in ("moved", "moved_by_loading")]
        cells.append(f"{100 * sum(row['lora'] for row in rows) / len(rows):.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


FIVE_JOBS = Record(Settings(), run, table)
