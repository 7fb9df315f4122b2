"""The errors of the library. Each message says what was given, what was expected and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

# Of a message, in characters: those of other libraries may hold a whole file.
LONGEST = 1200


class SideTuningError(Exception):
    """Anything a user can mend; the command line prints its message alone and exits with 1."""

    def __str__(self) -> str:
        """The message in one line, which what others say within it must not break."""
        text = re.sub(r"\s*[\x00-\x1f\x7f]+\s*", " ", super().__str__()).strip()
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class UnknownNameError(SideTuningError, ValueError):
    """A registered part, a task, a tap or a base that does not exist; the message lists near names."""


class ShapeError(SideTuningError, ValueError):
    """Tensors or parts that do not fit each other."""


class TaskError(SideTuningError, ValueError):
    """A task that cannot be added, removed, trained or used as asked."""


class ArtifactError(SideTuningError, ValueError):
    """A saved task that is missing, damaged, of an unknown format or of another base."""


class CacheError(SideTuningError, ValueError):
    """A feature cache that cannot be written or read."""


class DataError(SideTuningError, ValueError):
    """A data set that is missing, incomplete or damaged."""


class TrainingError(SideTuningError, RuntimeError):
    """Training that cannot go on: a loss that is not finite, or a resume file of another run."""


class DataWarning(UserWarning):
    """Data that were left out or mended: which, and how many."""


@contextlib.contextmanager
def told(sentence: str) -> Iterator[None]:
    """Turn what somebody else's code raises into a ShapeError: `sentence`, with what happened in place of "{}"."""
    try:
        yield
    except (SideTuningError, ImportError):
        raise
    except Exception as error:
        raise ShapeError(sentence.replace("{}", str(error).partition("\n")[0])) from error
