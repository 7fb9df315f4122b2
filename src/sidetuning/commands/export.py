"""`sidetuning export MODEL --out FOLDER`: graphs that run without this library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from sidetuning.terminal import say, size_text


@dataclass(frozen=True)
class Settings:
    """Write a model as graphs: the base once, each task a small one that reads the base's outputs.

    Each graph is compared with torch after it is written. `model.json` beside them tells names, preprocessing, labels.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, or the folder of one task."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write; an earlier export there is replaced."""
    format: Literal["onnx", "torch"] = "onnx"
    """Kind of the graphs: ONNX, or programs of torch.export."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ()
    """Names of the tasks to export, all by default."""
    single: bool = False
    """Write one graph with the base and all tasks."""
    quiet: bool = False
    """Print nothing but errors."""


def main(settings: Settings) -> None:
    """Export, and print what was written."""
    from sidetuning import export, load

    chosen = settings.task or None
    done = export(load(settings.model), settings.out, format=settings.format, tasks=chosen, single=settings.single)
    if not settings.quiet:
        for file in done.files:
            say(f"{done.path / file}: {size_text((done.path / file).stat().st_size)}")
        say(f"Outputs differ from torch by at most {done.difference:.1e} of their size.")
