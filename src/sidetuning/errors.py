"""The errors of the library. Each message says what was given, what was expected and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class SideTuningError(Exception):
    """Anything a user can mend; the command line prints its message alone and exits with 1."""


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


@contextlib.contextmanager
def told(sentence: str) -> Iterator[None]:
    """Turn what somebody else's code raises into a ShapeError: `sentence`, with what happened in place of "{}"."""
    try:
        yield
    except SideTuningError:
        raise
    except Exception as error:
        raise ShapeError(sentence.replace("{}", str(error).partition("\n")[0])) from error
