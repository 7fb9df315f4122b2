"""`sidetuning bench answer RUN --context FILE "question"`: the answer of a trained reader, its score and its place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sidetuning.errors import DataError, SideTuningError
from sidetuning.files import decode_text, read_bytes
from sidetuning.loading import load_base
from sidetuning.terminal import say
from sidetuning_bench.language import squad
from sidetuning_bench.language.questions import Prediction, Question, make_windows, n_best
from sidetuning_bench.language.tokenizer import load_tokenizer, tokenizer_fingerprint
from sidetuning_bench.methods import load_method
from sidetuning_bench.options import Count, check
from sidetuning_bench.report_runs import content_of


@dataclass(frozen=True)
class Settings:
    """Ask a run of squad about a text."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""
    question: Annotated[str, tyro.conf.Positional]
    """The question."""
    context: str
    """A text file."""
    best: Count = 1
    """Number of answers, best first."""
    threshold: float | None = None
    """There is no answer where its score exceeds that of the best span by more than this; by default as in the run."""


@dataclass(frozen=True)
class Answers:
    """What a text says to a question.

    Attributes:
        best: the best spans, best first.
        threshold: largest `null_odds` of an answer.
        problems: what was met in text and question, with its count.
    """

    best: list[Prediction]
    threshold: float
    problems: dict[str, int]

    @property
    def none(self) -> bool:
        """Whether there is no answer."""
        return not self.best[0].text or self.best[0].null_odds > self.threshold


def answer(settings: Settings) -> Answers:
    """The best answers that the text gives.

    Raises:
        SideTuningError: no run of squad, one with another tokenizer, no text, or no question.
    """
    check(settings)
    content = content_of(settings.run, ("squad",), squad.settings_of)
    given = content["settings"]
    try:
        text = decode_text(read_bytes(settings.context))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{settings.context} cannot be read as text ({error}); give a text file") from error
    if not text.strip() or not settings.question.strip():
        raise DataError("the text or the question is empty; give both")
    base = load_base(given.base, taps=squad.taps_of(given))
    method, tokenizer = load_method(Path(settings.run) / "tasks", base), load_tokenizer(base)
    found = tokenizer_fingerprint(tokenizer)
    if content.get("fingerprints", {}).get("tokenizer", found) != found:
        raise SideTuningError(
            f"{given.base} has another tokenizer than {settings.run} was trained with; put the old one back"
        )
    asked = [Question("0", settings.question, text, ())]
    windows = make_windows(asked, tokenizer, given.length, given.stride)
    (best,) = n_best(asked, windows, squad.scores_of(method, windows), settings.best)
    # A run without unanswerable questions is scored with an answer to each.
    own = float("inf") if given.answerable else given.threshold
    return Answers(best, own if settings.threshold is None else settings.threshold, windows.problems)


def main(settings: Settings) -> None:
    """Print the answer."""
    found = answer(settings)
    for problem in found.problems:
        say(f"note: {problem}", error=True)
    for k, span in enumerate(found.best):
        guess = f"; the best guess would be: {span.text}" if span.text else ""
        say(f"no answer (score {span.null:.2f}){guess}" if k == 0 and found.none else span.text)
        say(f"score {span.score:.2f}, {-span.null_odds:.2f} above no answer; characters {span.start} to {span.end}")
