"""What requests and answers of the server look like; the OpenAPI page shows these texts."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sidetuning.errors import DataError


class Given(BaseModel):
    """What a client gives: fields that nobody reads are refused."""

    model_config = ConfigDict(extra="forbid")


class Source(Given):
    """One image, one text, one pair of texts, or the words of one text."""

    image: Annotated[str | None, Field(description="An image file in base64.")] = None
    text: Annotated[str | None, Field(description="A text.")] = None
    pair: Annotated[tuple[str, str] | None, Field(description="Two texts that belong together.")] = None
    words: Annotated[list[str] | None, Field(description="The words of a text, for tasks that label words.")] = None

    @model_validator(mode="after")
    def one(self) -> Source:
        """Check that it is one thing."""
        if sum(value is not None for value in (self.image, self.text, self.pair, self.words)) != 1:
            raise ValueError("an input has one of image, text, pair and words")
        return self

    def value(self) -> bytes | str | tuple[str, str] | list[str]:
        """What the model is given.

        Raises:
            DataError: an image that is not base64.
        """
        if self.image is None:
            return self.pair or self.text or self.words or ("" if self.words is None else [])
        try:
            # Of an address such as data:image/png;base64,… the part after the comma.
            return base64.b64decode(self.image.rpartition(",")[2], validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"the image is not base64 ({error}); encode the bytes of the file") from error


class Question(Given):
    """Inputs, and the tasks to ask about each."""

    inputs: Annotated[list[Source], Field(description="Images or texts.", min_length=1)]
    tasks: Annotated[list[str] | None, Field(description="Names of tasks; all by default.")] = None
    top: Annotated[
        int | None, Field(description="This many of the most probable classes or labels.", ge=1, le=10000)
    ] = None


class Label(BaseModel):
    """A class or label with its probability, or a number with its name; null where it is no finite number."""

    label: str
    value: float | None


class Word(BaseModel):
    """A word of a text with its classes; none where the base sees no token of it."""

    word: str
    answers: list[Label]


class Seconds(BaseModel):
    """Durations in seconds."""

    wait: Annotated[float, Field(description="From the request to the end of its batch, without the model's own time.")]
    base: Annotated[float, Field(description="The base pass, for all inputs of its batch.")]
    sides: Annotated[
        dict[str, float], Field(description="Side, merge and head of each task, for its inputs of the batch.")
    ]


class Reply(BaseModel):
    """The answers to each input, in order."""

    answers: Annotated[
        list[dict[str, list[Label] | list[Word] | dict[str, Any]]],
        Field(description="For each input, of each task: labels with values, or words with labels; of maps an array."),
    ]
    versions: Annotated[dict[str, str], Field(description="The first digits of the hash of each task's weights.")]
    rows: Annotated[int, Field(description="Inputs of all clients that shared the base pass.")]
    seconds: Seconds


class Task(BaseModel):
    """A task that is served."""

    task: str
    problem: Annotated[str, Field(description="What its targets mean: classes, labels, numbers, …")]
    labels: list[str] | None
    version: Annotated[str, Field(description="The first digits of the hash of its weights.")]
    reads: Annotated[str, Field(description="What it is asked with: image or text.")]


class State(BaseModel):
    """Whether the server answers, and what it serves."""

    ready: bool
    tasks: int
    waiting: Annotated[int, Field(description="Inputs that wait.")]
    error: Annotated[str | None, Field(description="Why the last change of the folder was not taken over.")] = None


class Failure(BaseModel):
    """Why a request was refused, in a sentence."""

    detail: str
