"""`sidetuning answer RUN --context FILE "question"`: the answer of a trained reader, with its score and where it stands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sidetuning.base import load_base
from sidetuning.data.squad import Prediction, Question, best_answers, make_windows
from sidetuning.errors import DataError, SideTuningError
from sidetuning.methods.method import load_method
from sidetuning.scenarios import squad


@dataclass(frozen=True)
class Settings:
    """Ask a run of squad about a text."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""
    question: Annotated[str, tyro.conf.Positional]
    """The question."""
    context: str
    """A text file."""


def answer(settings: Settings) -> Prediction:
    """The best answer that the text gives.

    Raises:
        SideTuningError: no run of squad, no text, or no question.
    """
    s = settings
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
    method = load_method(Path(s.run) / "tasks", load_base(given.base, taps=squad.taps_of(given)))
    asked = [Question("0", s.question, text, ())]
    windows = make_windows(asked, squad.load_tokenizer(given.base), given.length, given.stride)
    return best_answers(asked, windows, squad.scores_of(method, windows))[0]


def main(settings: Settings) -> None:
    """Print the answer."""
    found = answer(settings)
    if found.null_odds > 0:
        print(f"no answer (score {found.null:.2f}); the best guess would be: {found.text}")
    else:
        print(found.text)
    print(f"score {found.score:.2f}, {-found.null_odds:.2f} above no answer; characters {found.start} to {found.end}")
