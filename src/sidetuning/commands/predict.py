"""`sidetuning predict RUN IMAGE…`: every task's answer from one base pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from sidetuning.errors import DataError
from sidetuning.files import check_signed, read_json
from sidetuning.loading import load
from sidetuning.problems import Classes
from sidetuning.terminal import plain
from sidetuning.transforms import ImageTransform


@dataclass(frozen=True)
class Settings:
    """Ask every task of a run about some images; the base runs once for all of them."""

    run: Annotated[str, tyro.conf.Positional]
    """The folder of a run, or of one saved task."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files; resized to what the base takes."""


@dataclass(frozen=True)
class Answer:
    """What a task says of an image: its most probable class, or each of its labels or numbers.

    Attributes:
        value: the probability, or the number itself where the task's problem is "numbers".
    """

    image: str
    task: str
    label: str
    value: float


def predict(settings: Settings) -> list[Answer]:
    """The answers, image by image, task by task."""
    if not settings.images:
        raise DataError("name at least one image file")
    model = load(settings.run)
    if not isinstance(model.base.transform, ImageTransform):
        raise DataError(f"{settings.run} does not read images; see `sidetuning answer` for texts")
    found = model.predict(list(settings.images), mirror=averages_mirror_images(Path(settings.run)))
    if others := [task for task, each in found.items() if isinstance(each[0], Tensor)]:
        raise DataError(
            f"the task {others[0]} of {settings.run} gives no answer to a whole image; the run's report has pictures "
            "of dense tasks"
        )
    # Of classes one is right, of labels any number.
    most = {task: 1 if type(model[task].problem) is Classes else None for task in model.tasks}
    return [
        Answer(image, task, *answer)
        for i, image in enumerate(settings.images)
        for task in model.tasks
        for answer in found[task][i][: most[task]]
    ]


def averages_mirror_images(run: Path) -> bool:
    """Whether the run's own accuracy is that of answers averaged over an image and its mirror image."""
    # The folder is a run's, or that of a task within one.
    file = next((f for f in (run / "run.json", run.parent.parent / "run.json") if f.exists()), None)
    if file is None:
        return False
    mend = "give the folder of a whole run or of a task"
    content = read_json(file, {"settings": {"mirror?": bool}, "format_version?": int}, mend)
    check_signed(content, str(file), mend, needed=(content.get("format_version") or 0) > 1)
    return bool(content["settings"].get("mirror"))


def main(settings: Settings) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in ("image", "task", "answer", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    last = ""
    for answer in predict(settings):
        if last and answer.image != last:
            table.add_section()
        image = "" if answer.image == last else answer.image
        # Text, in which rich looks for no markup.
        table.add_row(*(Text(plain(cell)) for cell in (image, answer.task, answer.label, f"{answer.value:.2f}")))
        last = answer.image
    Console().print(table)
