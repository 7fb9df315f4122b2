"""`sidetuning answer RUN --context FILE "question"`: the answer of a trained reader, with its score and where it stands."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sidetuning.errors import DataError, SideTuningError
from sidetuning.integrations.transformers import load_tokenizer, tokenizer_fingerprint
from sidetuning.loading import load_base
from sidetuning_bench.language import squad
from sidetuning_bench.language.questions import Prediction, Question, make_windows, n_best
from sidetuning_bench.methods import load_method
from sidetuning_bench.runs import at_least_one


@dataclass(frozen=True)
class Settings:
    """Ask a run of squad about a text."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""
    question: Annotated[str, tyro.conf.Positional]
    """The question."""
    context: str
    """A text file."""
    best: int = 1
    """Give so many answers, best first."""
    threshold: float | None = None
    """Where the score of there being no answer exceeds that of the best span by more than this, there is none; by default as in the run."""


@dataclass(frozen=True)
class Answers:
    """What a text says to a question.

    Attributes:
        best: the best spans, best first.
        threshold: on their `null_odds`.
        problems: what was met in text and question, and how often.
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
    s = settings
    at_least_one(s, "best")
    try:
        content = json.loads((Path(s.run) / "run.json").read_text())
        given = squad.Settings(**{**content["settings"], "progress": False})
        if content["scenario"] != "squad":
            raise KeyError(content["scenario"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SideTuningError(f"{s.run} holds no run of squad ({error}); give the folder that --out named") from error
    try:
        text = Path(s.context).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{s.context} cannot be read as text ({error}); give the path of a text file") from error
    if not text.strip() or not s.question.strip():
        raise DataError("the text or the question is empty; give both")
    base = load_base(given.base, taps=squad.taps_of(given))
    method, tokenizer = load_method(Path(s.run) / "tasks", base), load_tokenizer(base)
    if content.get("fingerprints", {}).get("tokenizer", found := tokenizer_fingerprint(tokenizer)) != found:
        raise SideTuningError(f"{given.base} has another tokenizer than {s.run} was trained with; put the old one back")
    asked = [Question("0", s.question, text, ())]
    windows = make_windows(asked, tokenizer, given.length, given.stride)
    (best,) = n_best(asked, windows, squad.scores_of(method, windows), s.best)
    return Answers(best, given.threshold if s.threshold is None else s.threshold, windows.problems)


def main(settings: Settings) -> None:
    """Print the answer."""
    found = answer(settings)
    for problem in found.problems:
        print(f"note: {problem}", file=sys.stderr)
    for k, p in enumerate(found.best):
        guess = f"; the best guess would be: {p.text}" if p.text else ""
        print(f"no answer (score {p.null:.2f}){guess}" if k == 0 and found.none else p.text)
        print(f"score {p.score:.2f}, {-p.null_odds:.2f} above no answer; characters {p.start} to {p.end}")
