"""`sidetuning evaluate MODEL --task NAME DATA`: what a task's answers to other data are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sidetuning.errors import DataError, TaskError
from sidetuning.files import read_json
from sidetuning.terminal import say, say_json, say_table

if TYPE_CHECKING:
    from sidetuning.scoring import Scored


@dataclass(frozen=True)
class Settings:
    """Score a task on data whose answers are known."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder."""
    data: Annotated[str, tyro.conf.Positional]
    """Data in any form that train takes; the test split is scored if there is one, otherwise all rows."""
    task: str
    """Name of the task."""
    split: str | None = None
    """Split to score: train, validation or test."""
    image: str | None = None
    """Column of image files."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Column of texts, or of lists of words; given twice, the columns of pairs of texts."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Column of the answers."""
    report: bool = False
    """Write the numbers into the model folder's report.html."""
    json: bool = False
    """Print JSON."""
    quiet: bool = False
    """Print no notes and no progress bar."""


def evaluate(settings: Settings) -> tuple[Scored, list[str]]:
    """The scored rows, and what was left out."""
    from sidetuning.artifacts import CONFIG
    from sidetuning.commands.predict import averages_mirror_images
    from sidetuning.data import LOADED
    from sidetuning.data import load as load_data
    from sidetuning.folder import task_root
    from sidetuning.forgetting import COLUMNS
    from sidetuning.launch import on_device
    from sidetuning.loading import load
    from sidetuning.report import TRAINING, add_to_report
    from sidetuning.scoring import score

    alone = (Path(settings.model) / CONFIG).exists()
    if alone and settings.report:
        raise TaskError(f"the report is of a whole model, and {settings.model} holds one task; give the model folder")
    model = on_device(load(settings.model))
    branch = model[settings.task]
    problem = type(branch.problem).__name__.lower()
    if branch.labels is None and problem in ("classes", "labels", "tokens"):
        raise TaskError(
            f"task '{settings.task}' has no names of its {problem}, which tell what its outputs mean; add them in "
            f"Python, model['{settings.task}'].labels = […], and save it again"
        )
    columns: dict[str, Any] = {"image": settings.image, "text": settings.text, "label": settings.label}
    columns["problem"] = problem if problem in LOADED else None
    file = (Path(settings.model) if alone else task_root(settings.model) / settings.task) / "training.json"
    known = read_json(file, {**TRAINING, "columns?": COLUMNS}, "train the task again") if file.exists() else None
    usual = dict((known or {}).get("columns") or {})
    if problem in ("numbers", "labels"):
        # Columns of numbers and of labels are what the outputs are called.
        usual["label"] = usual.get("label") or branch.labels
    data = load_data(settings.data, **columns, names=branch.labels, split=False, usual=usual)
    split = settings.split or ("test" if "test" in data.splits else "train")
    if split not in data.splits or (settings.split is None and split == "train" and len(data.splits) > 1):
        raise DataError(f"{settings.data} has the splits {', '.join(data.splits)}; choose one with --split")
    mirror = averages_mirror_images(Path(settings.model))
    scored = score(model, settings.task, data.splits[split], mirror=mirror, progress=not settings.quiet)
    if settings.report:
        add_to_report(settings.model, model, settings.task, scored, called(settings, split, known), known)
    return scored, [*data.notes, *(f"left out: {told}" for told in scored.unreadable)]


def called(settings: Settings, split: str, training: Mapping[str, Any] | None) -> str:
    """What the rows are called in the report: other data than the task learned from have the name of their source."""
    learned = None if training is None else training.get("data")
    if learned is not None and Path(learned).resolve() == Path(settings.data).resolve():
        return split
    return " ".join(filter(None, (Path(settings.data).resolve().stem, settings.split)))


def main(settings: Settings) -> None:
    """Print the numbers, and a row per class."""
    scored, notes = evaluate(settings)
    for note in notes if not settings.quiet else ():
        say(note, error=True)
    scores = scored.scores()
    table = scored.table() if scored.problem != "numbers" else []
    if settings.json:
        say_json({"task": settings.task, "scores": scores, "classes": table, "notes": notes})
        return
    if "low" in scores:
        say(f"accuracy {scores['accuracy']:.1%}, 95 % interval {scores['low']:.1%} to {scores['high']:.1%}")
    say(", ".join(f"{name} {value:.4g}" for name, value in scores.items() if name not in ("low", "high")))
    if table:
        shares = ("precision", "recall", "f1")
        rows = [[row["name"], str(row["rows"]), *(f"{row[share]:.1%}" for share in shares)] for row in table]
        what = "label" if scored.problem == "labels" else "class"
        say_table([what, "words" if scored.texts else "rows", "precision", "recall", "F1"], rows)
