"""What stands before the application: who may ask, how large a body is, and a line of the log for each request."""

from __future__ import annotations

import hmac
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidetuning.errors import TaskError

# Anybody may ask these, with a token or without.
OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
Done = Callable[[dict[str, Any]], None]


def checked(token: str | None) -> str | None:
    """The token; TaskError where a header cannot hold it, so that nobody could send it."""
    if token is not None and not (token and token.isascii() and token.isprintable() and token == token.strip()):
        raise TaskError(
            "the token has letters that a header does not hold, or none; use printable ASCII without spaces"
        )
    return token


class Body:
    """What a client sends, counted while it comes.

    Attributes:
        too_large: more came than may come; the rest is not read.
    """

    def __init__(self, receive: Receive, left: int) -> None:
        self.receive, self.left, self.too_large = receive, left, False

    async def __call__(self) -> Message:
        """The next piece."""
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        if self.left < 0:
            self.too_large = True
            return {"type": "http.disconnect"}
        return message


class Guard:
    """Refuses requests without the token and bodies that are too large, and reports each request when it has ended.

    Args:
        app: the application.
        token: what clients send as "Authorization: Bearer …"; None lets everybody ask.
        max_body: bytes of a body at most; a body without a length is counted while it comes.
        max_requests: requests with bodies that are under way at a time.
        done: called after each request with what is logged.
    """

    def __init__(self, app: ASGIApp, token: str | None, max_body: int, max_requests: int, done: Done) -> None:
        self.app, self.token, self.max_body, self.max_requests, self.done = app, token, max_body, max_requests, done
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, number = time.perf_counter(), uuid.uuid4().hex[:12]
        # Without the prefix that a proxy before it has added.
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        # Routes add what they know, such as the tasks.
        notes: dict[str, Any] = {"request": number, "method": scope["method"], "path": path, "status": 500}
        scope.setdefault("state", {})["notes"] = notes
        body, posts = Body(receive, self.max_body), scope["method"] == "POST"
        self.under_way += posts

        async def answer(message: Message) -> None:
            # Whatever the application made of half a body is not sent.
            if not body.too_large:
                if message["type"] == "http.response.start":
                    notes["status"] = message["status"]
                    MutableHeaders(scope=message)["x-request-id"] = number
                await send(message)

        try:
            try:
                await self._guarded(scope, body, answer, path in OPEN)
            except ClientDisconnect:
                # What the application is told of a body that is too large.
                if not body.too_large:
                    raise
            if body.too_large:
                notes["status"] = 413
                await self._refuse(send, 413, self._large())
        finally:
            self.under_way -= posts
            self.done({**notes, "seconds": round(time.perf_counter() - start, 6)})

    async def _guarded(self, scope: Scope, body: Body, send: Send, everybody: bool) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if not (everybody or self.token is None or self._knows(headers.get("authorization", ""))):
            await self._refuse(send, 401, "send the server's token, Authorization: Bearer TOKEN")
        elif length.isdecimal() and int(length) > self.max_body:
            await self._refuse(send, 413, self._large())
        elif scope["method"] == "POST" and self.under_way > self.max_requests:
            await self._refuse(send, 503, f"{self.max_requests} requests are under way; ask again in a moment")
        else:
            await self.app(scope, body, send)

    def _knows(self, given: str) -> bool:
        kind, _, token = given.partition(" ")
        # Takes as long for every wrong token.
        return kind.lower() == "bearer" and hmac.compare_digest(token.encode(), (self.token or "").encode())

    def _large(self) -> str:
        return f"the body has more than {self.max_body} bytes; send fewer or smaller inputs"

    async def _refuse(self, send: Send, status: int, detail: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        # What is left of the body is not read.
        headers += [(b"www-authenticate", b"Bearer")] if status == 401 else [(b"connection", b"close")]
        headers += [(b"retry-after", b"1")] * (status == 503)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class JsonLines(logging.Formatter):
    """A line of JSON for each record, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        fields = record.__dict__.get("fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps({**line, **fields}, default=str)


def logger(quiet: bool) -> logging.Logger:
    """The server's log, lines of JSON on standard error; `quiet` leaves warnings and errors alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    log = logging.getLogger("sidetuning.serving")
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    return log
