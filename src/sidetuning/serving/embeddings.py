"""A base of texts behind OpenAI's `/v1/embeddings`: `load_base("http://host:port/v1")` elsewhere takes it as a base."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field
from torch import Tensor

from sidetuning.base import Base
from sidetuning.errors import SideTuningError, TaskError, UnknownNameError
from sidetuning.heads import pooled
from sidetuning.predicting import read
from sidetuning.serving.app import Limits, refusal
from sidetuning.serving.batching import Batcher
from sidetuning.serving.guards import Guard, checked, logger
from sidetuning.serving.schema import Given
from sidetuning.transforms import TextTransform


class Question(Given):
    """Texts to embed."""

    model: Annotated[str, Field(description="Name of the base.")]
    input: Annotated[str | list[str], Field(description="A text, or several.", min_length=1)]
    encoding_format: Annotated[
        Literal["float", "base64"], Field(description="Numbers, or little-endian float32 in base64.")
    ] = "float"
    user: Annotated[str | None, Field(description="Is not read.")] = None


class EmbeddingService:
    """A base behind HTTP; `app` is the ASGI application.

    Texts of all clients share base passes; the embedding of a text is the mean over its tokens.

    Args:
        base: a base of texts.
        name: the model's name for clients.
        limits: what one request may cost.
        token: what clients must send; None lets everybody ask.
        quiet: log warnings and errors alone.

    Raises:
        TaskError: a base of images.
    """

    def __init__(
        self, base: Base, name: str, limits: Limits | None = None, *, token: str | None = None, quiet: bool = False
    ) -> None:
        transform = base.transform
        if not isinstance(transform, TextTransform):
            raise TaskError(f"{name} reads images, and embeddings are of texts; serve a model folder instead")
        self.base, self.transform, self.name, self.limits = base, transform, name, limits or Limits()
        self.log = logger(quiet)
        self.batcher: Batcher[str, Tensor] = Batcher(
            self._run, max_batch=self.limits.max_batch, max_waiting=self.limits.max_waiting, wait=self.limits.wait
        )
        self.app = FastAPI(title="sidetuning", version=version("sidetuning"), lifespan=self._lifespan, redoc_url=None)
        self.app.add_api_route("/v1/embeddings", self.embeddings, methods=["POST"], summary="Embed texts.")
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/healthz", self.healthz)
        for error in (SideTuningError, asyncio.TimeoutError, RequestValidationError):
            self.app.add_exception_handler(error, self._failed)
        self.app.add_middleware(Guard, token=checked(token), **self.limits.guarded(), done=self._done)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        # Those that wait are answered.
        await to_thread.run_sync(self.batcher.close)

    def _run(self, texts: Sequence[str]) -> Sequence[Tensor]:
        inputs = self.base.prepare(read(self.transform, list(texts))[0])
        with torch.no_grad():
            code = self.base.encode(inputs).out
        return list(pooled(code, self.base.kind, inputs).float().cpu())

    async def embeddings(self, question: Question, request: Request) -> dict[str, Any]:
        """The embeddings of texts, in their order."""
        texts = [question.input] if isinstance(question.input, str) else question.input
        if question.model != self.name:
            raise UnknownNameError(f"there is no model '{question.model}' here; the only one is '{self.name}'")
        if len(texts) > self.limits.max_inputs:
            raise TaskError(
                f"the request has {len(texts)} texts, and {self.limits.max_inputs} are allowed; send several"
            )
        request.state.notes |= {"inputs": len(texts)}
        rows = await asyncio.wait_for(self.batcher.results(texts), self.limits.timeout)
        told = _base64 if question.encoding_format == "base64" else Tensor.tolist
        data = [{"object": "embedding", "index": i, "embedding": told(row)} for i, row in enumerate(rows)]
        return {"object": "list", "model": self.name, "data": data}

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "sidetuning"}]}

    async def healthz(self) -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    async def _failed(self, request: Request, error: Exception) -> JSONResponse:
        """A sentence, in OpenAI's form."""
        status, text, headers = refusal(error, self.limits.timeout)
        return JSONResponse({"error": {"message": text, "type": "invalid_request_error"}}, status, headers)

    def _done(self, notes: dict[str, Any]) -> None:
        """Log a request that has ended."""
        self.log.log(40 if notes["status"] == 500 else 20, "request", extra={"fields": notes})


def _base64(row: Tensor) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
