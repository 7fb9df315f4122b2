"""`sidetuning predict MODEL SOURCE…`: every task's answer to images or texts, from one base pass."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sidetuning.errors import DataError
from sidetuning.files import check_signed, decode_text, read_json
from sidetuning.terminal import say_csv, say_json, say_table

if TYPE_CHECKING:
    from torch import Tensor

    from sidetuning.tuner import SideTuner

# Sources that are asked at a time, and the one that stands for standard input.
CHUNK, STDIN = 64, "-"


@dataclass(frozen=True)
class Settings:
    """Ask every task of a model about images or texts; the base runs once for all of them."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, the folder of a run, or of one saved task."""
    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, or folders of them; for models of language texts, or .txt files with one text per line; - reads
    standard input: one image, or one text per line. For tasks on words a text may be a list, '["Angela", "Merkel"]'."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Task to ask; repeat the option for several; all by default."""
    top: int | None = None
    """How many classes or labels to show; by default the first class and all labels."""
    json: bool = False
    """Print a line of JSON for each source."""
    csv: bool = False
    """Print CSV."""
    out: str | None = None
    """Folder for the pictures that dense tasks answer with."""
    quiet: bool = False
    """Show no progress bar."""


@dataclass(frozen=True)
class Answer:
    """What a task says of a source: its most probable class, or each of its labels or numbers.

    Attributes:
        value: the probability, or the number itself where the task's problem is "numbers"; None without an answer.
        word: the word of a text that it is about.
        number: whether the value is a number, and no probability.
    """

    image: str
    task: str
    label: str | None
    value: float | None
    word: str | None = None
    number: bool = False


def answered(settings: Settings) -> Iterator[list[Answer]]:
    """The answers to each source."""
    from torch import Tensor
    from tqdm import tqdm

    from sidetuning.launch import on_device
    from sidetuning.loading import load
    from sidetuning.predicting import Word, each_answered
    from sidetuning.problems import Classes, Numbers
    from sidetuning.transforms import ImageTransform, WordTransform

    model = on_device(load(settings.model))
    # Raises, with near names.
    branches = {task: model[task] for task in settings.task or model.tasks}
    images = isinstance(model.base.transform, ImageTransform)
    words = any(isinstance(branch.transform, WordTransform) for branch in branches.values())
    named = list(_images(settings.sources) if images else _texts(settings.sources, words))
    if not named:
        raise DataError(f"name at least one {'image file' if images else 'text'}")
    mirror = images and averages_mirror_images(Path(settings.model))
    # Of classes one is right, of labels any number.
    most = {task: settings.top or (1 if isinstance(b.problem, Classes) else None) for task, b in branches.items()}
    off, unread, written = settings.quiet or len(named) <= CHUNK, list[str](), set[str]()
    with tqdm(total=len(named), unit="image" if images else "text", disable=off, leave=False) as bar:
        for start in range(0, len(named), CHUNK):
            some = named[start : start + CHUNK]
            ask = partial(model.predict, tasks=list(branches), top=settings.top, mirror=mirror)
            for (name, _), found in zip(some, each_answered(ask, [source for _, source in some]), strict=True):
                if isinstance(found, DataError):
                    unread.append(str(found))
                    continue
                rows = []
                for task, answers in found.items():
                    if isinstance(answers, Tensor):
                        answers = [(_written(model, task, name, answers, settings, written), 1.0)]
                    for word, shown in answers if isinstance(answers[0], Word) else [(None, answers)]:
                        parts = shown[: most[task]] or [(None, None)]
                        number = isinstance(branches[task].problem, Numbers)
                        rows += [Answer(name, task, label, value, word, number) for label, value in parts]
                if settings.out is not None and not written:
                    raise DataError("no task that was asked answers with a picture; leave --out out")
                yield rows
            bar.update(len(some))
    if unread:
        more = f" ({len(unread)} of {len(named)} could not be read)" if len(named) > 1 else ""
        raise DataError(f"{unread[0]}{more}")


def _images(sources: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and sources of images; folders are searched."""
    from sidetuning.images import hidden, image_endings

    for source in sources:
        path = Path(source)
        if source == STDIN:
            yield "standard input", sys.stdin.buffer.read()
        elif path.is_dir():
            found = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in image_endings() and f.is_file()]
            found = [f for f in found if not any(map(hidden, f.relative_to(path).parts))]
            if not found:
                raise DataError(f"{source} holds no image file; give image files, or a folder of them")
            yield from ((str(file), file) for file in found)
        else:
            yield source, path


def _texts(sources: Sequence[str], words: bool) -> Iterator[tuple[str, Any]]:
    """Names and texts, or lists of `words` where tasks read them."""
    for source in sources:
        if source == STDIN:
            lines = _lines(sys.stdin.buffer.read(), "standard input")
        # Which Path refuses to ask of a text that is too long for a name.
        elif source.endswith(".txt") and os.path.isfile(source):  # noqa: PTH113
            lines = _lines(Path(source).read_bytes(), source)
        else:
            lines = [source]
        yield from ((line, _words(line) if words else line) for line in lines if line.strip())


def _lines(data: bytes, name: str) -> list[str]:
    """The lines of a text file; DataError where it is none."""
    try:
        return re.split(r"\r\n?|\n", decode_text(data))
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is no text in UTF-8 or UTF-16 ({error}); save it in UTF-8") from error


def _words(line: str) -> str | list[str]:
    """The words of a line that is a list of JSON; another line is a text."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(line), list):
            return found
    return line


def _written(model: SideTuner, task: str, source: str, answer: Tensor, settings: Settings, written: set[str]) -> str:
    """What is shown of a map or of tokens: the picture that was written, or the tokens' classes."""
    from sidetuning.pictures import file_stem, save_map

    if answer.ndim == 1:
        names = model[task].labels
        return " ".join(names[k] if names else str(k) for k in answer.tolist())
    if settings.out is None:
        raise DataError(f"the task {task} answers with a picture: give --out, a folder for it, or choose other tasks")
    name = stem = file_stem(f"{Path(source).stem}-{task}")
    # Files of several folders may have one name, and to some systems a and A are one.
    number = itertools.count(2)
    while name.casefold() in written:
        name = f"{stem}-{next(number)}"
    written.add(name.casefold())
    return str(save_map(answer, Path(settings.out), name))


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
    """Print a table, lines of JSON, or CSV."""
    if settings.json and settings.csv:
        raise DataError("choose --json or --csv, not both")
    if settings.json:
        for answers in answered(settings):
            tasks: dict[str, list[dict[str, Any]]] = {}
            for answer in answers:
                word = {} if answer.word is None else {"word": answer.word}
                tasks.setdefault(answer.task, []).append({**word, "label": answer.label, "value": answer.value})
            say_json({"source": answers[0].image, "tasks": tasks}, indent=None)
        return
    every = answered(settings)
    first = next(every)
    every, words = itertools.chain([first], every), ["word"] * any(answer.word is not None for answer in first)

    def cells(answer: Answer, form: str) -> list[str]:
        value = "" if answer.value is None else format(answer.value, ".6g" if form and answer.number else form)
        return [answer.image, answer.task, *[answer.word or ""][: len(words)], answer.label or "", value]

    columns = ["source", "task", *words, "answer", "value"]
    if settings.csv:
        say_csv(itertools.chain([columns], (cells(answer, "") for answers in every for answer in answers)))
        return
    rows: list[Sequence[str] | None] = []
    try:
        for answers in every:
            rows += [["" if k else answer.image, *cells(answer, ".2f")[1:]] for k, answer in enumerate(answers)]
            rows.append(None)
    finally:
        # Those of the others, where one could not be read.
        say_table(columns, rows, right=("value",))
