"""The server's application: questions in JSON or multipart, its state, its numbers and a page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from torch import Tensor

from sidetuning.errors import DataError, SideTuningError, TaskError, UnknownNameError
from sidetuning.images import open_image
from sidetuning.predicting import Answers, Word
from sidetuning.registry import unknown
from sidetuning.serving import schema, served
from sidetuning.serving.batching import Batcher, BusyError
from sidetuning.serving.guards import Guard, checked, logger
from sidetuning.serving.numbers import Numbers
from sidetuning.transforms import TextTransform

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and how requests are batched.

    Attributes:
        max_batch: inputs of a base pass.
        wait: seconds that a batch which is not full waits for more.
        max_waiting: inputs that may wait.
        max_body: bytes of a body.
        max_pixels: width times height of an image.
        max_inputs: inputs of a request.
        timeout: seconds until a request is given up.
    """

    max_batch: int = 32
    wait: float = 0.0
    max_waiting: int = 1024
    max_body: int = 16_000_000
    max_pixels: int = 2**24
    max_inputs: int = 32
    timeout: float = 30.0

    def guarded(self) -> dict[str, int]:
        """What a `Guard` looks at; as many requests may come as can run and wait."""
        return {"max_body": self.max_body, "max_requests": self.max_waiting + self.max_batch}


class Service:
    """A served model behind HTTP; `app` is the ASGI application.

    Args:
        model: what is served.
        limits: what one request may cost.
        token: what clients must send; None lets everybody ask.
        watch: seconds between two looks at the model folder; 0 looks never.
        quiet: log warnings and errors alone.
    """

    def __init__(
        self,
        model: served.Served,
        limits: Limits | None = None,
        *,
        token: str | None = None,
        watch: float = 1.0,
        quiet: bool = False,
    ) -> None:
        self.model, self.limits, self.seconds = model, limits or Limits(), watch
        self.log = logger(quiet)
        # Images that are decoded at a time: more would take memory, and no less time.
        self.decoders = CapacityLimiter(max(2, os.cpu_count() or 2))
        self.batcher: Batcher[served.Query, served.Reply] = Batcher(
            self._run, max_batch=self.limits.max_batch, max_waiting=self.limits.max_waiting, wait=self.limits.wait
        )
        self.numbers = Numbers(lambda: self.batcher.waiting, lambda: len(model.moment.branches))
        model.told = self._changed
        self.page, self.policy = page()
        self.app = self._application()
        self.paths = [str(getattr(route, "path", "")) for route in self.app.routes]
        self.app.add_middleware(Guard, token=checked(token), **self.limits.guarded(), done=self._done)

    def _application(self) -> FastAPI:
        app = FastAPI(
            title="sidetuning",
            version=version("sidetuning"),
            description="Ask tasks about images or texts; all tasks of all clients share one pass of the base.",
            lifespan=self._lifespan,
            redoc_url=None,
        )
        codes = (400, 401, 404, 413, 422, 503, 504)
        failures: Any = {code: {"model": schema.Failure} for code in codes}
        asked: dict[str, Any] = {"methods": ["POST"], "response_model": schema.Reply, "responses": failures}
        app.add_api_route("/predict", self.predict, summary="Ask about images or texts in JSON.", **asked)
        app.add_api_route("/predict/files", self.predict_files, summary="Ask about image files.", **asked)
        locked: Any = {401: {"model": schema.Failure}}
        app.add_api_route("/tasks", self.tasks, response_model=list[schema.Task], responses=locked)
        app.add_api_route("/healthz", self.healthz)
        stopping: Any = {503: {"model": schema.State}}
        app.add_api_route("/readyz", self.readyz, response_model=schema.State, responses=stopping)
        text: Any = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **locked}
        app.add_api_route("/metrics", self.metrics, response_class=Response, responses=text)
        app.add_api_route("/", self.index, response_class=HTMLResponse, include_in_schema=False)
        for error in (SideTuningError, asyncio.TimeoutError, RequestValidationError):
            app.add_exception_handler(error, self._failed)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        if self.seconds > 0:
            self.model.watch(self.seconds)
        self.log.info("serving", extra={"fields": {"tasks": list(self.model.moment.branches)}})
        yield
        self.model.close()
        # Those that wait are answered.
        await to_thread.run_sync(self.batcher.close)
        self.log.info("stopped")

    async def predict(self, question: schema.Question, request: Request) -> schema.Reply:
        """Ask tasks about images or texts."""
        self._check_names(request.query_params, ())
        self._check_count(len(question.inputs))
        sources = [source.value() for source in question.inputs]
        return await self._ask(sources, question.tasks, question.top, request)

    async def predict_files(
        self,
        request: Request,
        files: Annotated[list[UploadFile], File(description="Image files.")],
        tasks: Annotated[list[str] | None, Form(description="Names of tasks; all by default.")] = None,
        top: Annotated[int | None, Form(description="This many of the most probable.", ge=1, le=10000)] = None,
    ) -> schema.Reply:
        """Ask tasks about image files, as forms send them."""
        self._check_names(request.query_params, ())
        self._check_names(await request.form(), ("files", "tasks", "top"))
        self._check_count(len(files))
        return await self._ask([await file.read() for file in files], tasks or None, top, request)

    def _check_names(self, given: Iterable[str], read: Sequence[str]) -> None:
        if strange := [name for name in given if name not in read]:
            where = f"the form has {', '.join(read)}" if read else "the address has no parameters, the body has them"
            raise DataError(f"'{strange[0]:.40}' is not read; {where}")

    def _check_count(self, count: int) -> None:
        if count > self.limits.max_inputs:
            raise DataError(f"the request has {count} inputs, and {self.limits.max_inputs} are allowed; send several")

    async def _ask(
        self, sources: Sequence[Any], tasks: list[str] | None, top: int | None, request: Request
    ) -> schema.Reply:
        """Answer one request."""
        start = time.perf_counter()
        moment = self.model.moment
        wanted = list(dict.fromkeys(tasks)) if tasks is not None else moment.asked()
        for task in wanted:
            if task not in moment.branches:
                raise UnknownNameError(unknown("task", task, moment.branches, verb="served"))
        if not wanted:
            raise TaskError("name at least one task, or leave tasks out to ask all")
        request.state.notes |= {"inputs": len(sources), "tasks": len(wanted)}
        each = await asyncio.wait_for(self._replies(moment, sources, wanted, top), self.limits.timeout)
        replies = [reply for of_source in each for reply in of_source]
        base = sum({reply.base_seconds for reply in replies})
        sides = {task: seconds for reply in replies for task, seconds in reply.side_seconds.items()}
        wait = max(0.0, time.perf_counter() - start - base - sum(sides.values()))
        request.state.notes |= {"rows": max(reply.rows for reply in replies)}
        return schema.Reply(
            answers=[in_order(of_source, wanted) for of_source in each],
            versions={task: moment.versions[task] for task in wanted},
            rows=max(reply.rows for reply in replies),
            seconds=schema.Seconds(wait=wait, base=base, sides={task: sides[task] for task in wanted}),
        )

    async def _replies(
        self, moment: served.Moment, sources: Sequence[Any], tasks: list[str], top: int | None
    ) -> list[list[served.Reply]]:
        """What the batcher answers about each source."""
        queries = await to_thread.run_sync(self._prepared, moment, sources, tasks, top, limiter=self.decoders)
        found = iter(await self.batcher.results([query for of_source in queries for query in of_source]))
        return [[next(found) for _ in of_source] for of_source in queries]

    def _prepared(
        self, moment: served.Moment, sources: Sequence[Any], tasks: list[str], top: int | None
    ) -> list[list[served.Query]]:
        """The queries of a request; images are decoded here, after their sizes were looked at."""
        for source in sources:
            if isinstance(source, bytes):
                with open_image(source) as image:
                    pixels = image.width * image.height
                if pixels > self.limits.max_pixels:
                    raise DataError(f"the image has {pixels:,} pixels, and {self.limits.max_pixels:,} are allowed")
        return moment.queries(sources, tasks, top)

    def _run(self, queries: Sequence[served.Query]) -> list[served.Reply]:
        replies = served.reply(queries)
        self.numbers.batch(replies)
        return replies

    async def tasks(self) -> list[schema.Task]:
        """The tasks that are served now."""
        moment = self.model.moment
        found = []
        for name, branch in moment.branches.items():
            reads = "text" if isinstance(branch.transform or moment.base.transform, TextTransform) else "image"
            problem = branch.config.problem or type(branch.problem).__name__.lower()
            found.append(
                schema.Task(
                    task=name, problem=problem, labels=branch.labels, version=moment.versions[name], reads=reads
                )
            )
        return found

    async def healthz(self) -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    async def readyz(self) -> Any:
        """Whether questions are answered: the model is loaded, and the server does not stop."""
        error = None if self.model.error is None else str(self.model.error)
        ready = self.batcher.alive
        state = schema.State(
            ready=ready, tasks=len(self.model.moment.branches), waiting=self.batcher.waiting, error=error
        )
        return state if ready else JSONResponse(state.model_dump(), status_code=503)

    async def metrics(self) -> Response:
        """Numbers in Prometheus' text format."""
        return Response(generate_latest(self.numbers.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def index(self) -> HTMLResponse:
        """The page for people."""
        headers = {"content-security-policy": self.policy, "x-content-type-options": "nosniff"}
        return HTMLResponse(self.page, headers={**headers, "referrer-policy": "no-referrer"})

    async def _failed(self, request: Request, error: Exception) -> JSONResponse:
        """A sentence for every error that a client can mend."""
        status, detail, headers = refusal(error, self.limits.timeout)
        return JSONResponse({"detail": detail}, status, headers)

    def _changed(self, found: list[str] | Exception) -> None:
        """Log a change of the folder."""
        failed = isinstance(found, Exception)
        self.numbers.changes.labels("refused" if failed else "taken").inc()
        if failed:
            self.log.warning("the folder changed and is not taken over", extra={"fields": {"error": str(found)}})
        else:
            self.log.info("the folder changed", extra={"fields": {"tasks": found}})

    def _done(self, notes: dict[str, Any]) -> None:
        """Count and log a request that has ended."""
        self.numbers.request(notes, self.paths)
        self.log.log(40 if notes["status"] == 500 else 20, "request", extra={"fields": notes})


def refusal(error: Exception, timeout: float) -> tuple[int, str, dict[str, str] | None]:
    """Status, sentence and headers for an error that a client can mend; `timeout` is in seconds."""
    if isinstance(error, RequestValidationError):
        return 422, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]), None
    if isinstance(error, asyncio.TimeoutError):
        return 504, f"no answer within {timeout:g} seconds; ask again, with fewer inputs", None
    if isinstance(error, BusyError):
        return 503, str(error), {"retry-after": "1"}
    return 404 if isinstance(error, UnknownNameError) else 422, str(error), None


def in_order(replies: Sequence[served.Reply], tasks: Sequence[str]) -> dict[str, Any]:
    """The answers about one input, in the order in which the tasks were asked."""
    found = {task: answers for reply in replies for task, answers in reply.answers.items()}
    return {task: shown(found[task]) for task in tasks}


def shown(answers: Answers) -> list[schema.Label] | list[schema.Word] | dict[str, Any]:
    """An answer as JSON has it, with null for what is no finite number."""
    if isinstance(answers, Tensor):
        values = answers.tolist()
        return {"shape": list(answers.shape), "values": values if answers.isfinite().all() else _finite(values)}
    if any(isinstance(answer, Word) for answer in answers):
        return [schema.Word(word=word, answers=shown(inner)) for word, inner in answers]  # type: ignore[arg-type]
    labels: Any = answers
    return [schema.Label(label=label, value=value if abs(value) < float("inf") else None) for label, value in labels]


def _finite(values: Any) -> Any:
    return [_finite(each) for each in values] if isinstance(values, list) else values if isfinite(values) else None


def page() -> tuple[str, str]:
    """The page, and the policy that lets its own style and script run and nothing else."""
    text = PAGE.read_text(encoding="utf-8")

    def sha256(tag: str) -> str:
        inner = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = hashlib.sha256((inner[1] if inner else "").encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    rules = {"default-src": "'none'", "script-src": sha256("script"), "style-src": sha256("style")}
    rules |= {"connect-src": "'self'", "img-src": "blob:", "base-uri": "'none'", "form-action": "'none'"}
    return text, "; ".join(f"{name} {value}" for name, value in {**rules, "frame-ancestors": "'none'"}.items())
