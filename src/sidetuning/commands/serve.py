"""`sidetuning serve MODEL`: answers over HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from sidetuning.terminal import say

if TYPE_CHECKING:
    from sidetuning.serving.app import Limits

# Where the token is read from: arguments can be seen by everybody on a machine.
TOKEN = "SIDETUNING_TOKEN"
# Of every limit: clocks take no more seconds.
MOST = 1e9


@dataclass(frozen=True)
class Settings:
    """Serve predictions for images or texts over HTTP; all clients and all tasks share passes of the base.

    Changes to the model folder are loaded while the server runs. If the environment variable SIDETUNING_TOKEN is set,
    clients must send it (Authorization: Bearer TOKEN).
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder, or the folder of one task; with --base-only the name of a base, such as hf:NAME."""
    base_only: bool = False
    """Serve embeddings of texts, as OpenAI's /v1/embeddings, for models whose base is this server."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines ask."""
    port: Annotated[int, tyro.conf.arg(metavar="NUMBER")] = 8000
    """Port to listen at; 0 takes a free one."""
    max_batch: Annotated[int, tyro.conf.arg(metavar="INPUTS")] = 32
    """Inputs that share a base pass, at most."""
    wait: Annotated[float, tyro.conf.arg(metavar="MILLISECONDS")] = 0.0
    """Time that a batch waits for more inputs before it runs."""
    max_waiting: Annotated[int, tyro.conf.arg(metavar="INPUTS")] = 1024
    """Inputs that may wait; others are refused (503)."""
    max_body: Annotated[float, tyro.conf.arg(metavar="MEGABYTES")] = 16.0
    """Size of a request, at most (413)."""
    max_pixels: Annotated[float, tyro.conf.arg(metavar="MILLIONS")] = 16.8
    """Width times height of an image, at most (422)."""
    max_inputs: Annotated[int, tyro.conf.arg(metavar="INPUTS")] = 32
    """Inputs of a request, at most (422)."""
    engine: Annotated[str | None, tyro.conf.arg(metavar="ENGINE")] = None
    """What runs the base: torch, folded, compile, onnxruntime, openvino, or auto, which measures them; by default what
    the model folder says."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 30.0
    """Time until a request is given up (504)."""
    watch: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 1.0
    """Time between two checks of the model folder; 0 turns them off."""
    quiet: bool = False
    """Log only warnings and errors."""


def main(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C; requests under way are answered."""
    try:
        import uvicorn

        from sidetuning.serving.app import Service
        from sidetuning.serving.embeddings import EmbeddingService
    except ImportError as error:
        raise ImportError("serving needs more packages: pip install 'sidetuning[serve]'") from error
    from sidetuning.engines import with_engine
    from sidetuning.loading import load_base
    from sidetuning.serving.served import Served, placed

    limits = limits_of(settings)
    token = os.environ.get(TOKEN) or None
    service: Service | EmbeddingService
    name, engine, quiet = settings.model, settings.engine, settings.quiet
    if settings.base_only:
        base = with_engine(placed(load_base(name), engine), engine or "torch")
        service = EmbeddingService(base, name, limits, token=token, quiet=quiet)
    else:
        service = Service(Served(name, engine=engine), limits, token=token, watch=settings.watch, quiet=quiet)
    if token is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        service.log.warning(f"other machines can ask without a token; set {TOKEN} to let only some")
    config = uvicorn.Config(
        service.app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.timeout) + 1,
    )
    logging.getLogger("uvicorn.error").handlers = service.log.handlers
    listener = listening(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    service.log.info("listening", extra={"fields": {"address": address}})
    if not quiet:
        what = "Embeddings" if settings.base_only else "A page to try it"
        say(f"{what}: {address} (Ctrl-C stops the server)", error=True)
    # uvicorn stops gracefully, then sends itself the signal that it got: stopping as asked is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    if not settings.quiet:
        say("Stopped.", error=True)


def limits_of(settings: Settings) -> Limits:
    """What one request may cost.

    Raises:
        TaskError: a number that cannot be meant, or one that embeddings do not read.
    """
    from sidetuning.errors import TaskError
    from sidetuning.serving.app import Limits

    least: dict[str, float] = {"max_batch": 1, "max_waiting": 1, "max_inputs": 1, "wait": 0, "watch": 0}
    least |= {"max_body": 1e-6, "max_pixels": 1e-6, "timeout": 1e-3}
    for name, lowest in least.items():
        # Not the other way round, so that NaN is refused too.
        if not lowest <= getattr(settings, name) <= MOST:
            raise TaskError(f"--{name.replace('_', '-')} is from {lowest:g} to {MOST:g}, not {getattr(settings, name)}")
    for name in ("max_pixels", "watch") if settings.base_only else ():
        if getattr(settings, name) != getattr(Settings, name):
            raise TaskError(f"--base-only does not read --{name.replace('_', '-')}; leave it out")
    return Limits(
        max_batch=settings.max_batch,
        wait=settings.wait / 1000,
        max_waiting=settings.max_waiting,
        max_body=int(settings.max_body * 1e6),
        max_pixels=int(settings.max_pixels * 1e6),
        max_inputs=settings.max_inputs,
        timeout=settings.timeout,
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the address is none of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not 0 <= port < 2**16:
        raise OSError(f"--port is from 0 to 65535, not {port}")
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port} ({error}); choose another --host or --port") from error
