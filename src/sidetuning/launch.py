"""Where work runs: in one process, in several that accelerate or torchrun has started, or in those of workers."""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from sidetuning.errors import DataError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

M = TypeVar("M", bound=nn.Module)
# Calls a function with the arguments of each name, in other processes, and gives (name, result) as each ends.
Workers = Callable[[Callable[..., Any], Mapping[str, tuple[Any, ...]]], Iterator[tuple[str, Any]]]


def call(folder: str, function: bytes, given: bytes) -> Any:
    """Run a pickled function in the process of a worker."""
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        return pickle.loads(function)(*pickle.loads(given))
    except (ImportError, FileNotFoundError) as error:
        raise DataError(
            f"the worker on {socket.gethostname()} lacks what this process has ({error}); keep files in a folder that "
            "all machines see by the same name, install the same packages, and send modules of your own by "
            "ray.init(runtime_env={'working_dir': '.'})"
        ) from error


def processes() -> PartialState:
    """The launched processes. What is asked first decides for all: on CPUs as `ACCELERATE_USE_CPU` says."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # A Mac's GPU has no double precision, which sums and scores are counted in.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available())
    if state.num_processes > 1:
        _leave_at_exit()
    return state


def on_device(model: M) -> M:
    """Move a model to the GPU that accelerate finds, if there is one; a base that an engine runs stays where it is."""
    device, engine = processes().device, getattr(getattr(model, "base", model), "engine", None)
    return model if device.type == "cpu" or getattr(engine, "run", None) is not None else model.to(device)


def default_accelerator() -> Accelerator:
    """An accelerator that splits each batch over the processes: the step is the same however many there are."""
    from accelerate import Accelerator, DataLoaderConfiguration

    processes()
    made = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if made.mixed_precision != os.environ.get("ACCELERATE_MIXED_PRECISION", "no"):
        # Another accelerator of this process asked for it, and they share their state.
        made.native_amp, made.scaler = False, None
    return made


@functools.cache
def _leave_at_exit() -> None:
    """Let Gloo's threads come to rest before the interpreter ends.

    The thread that ran the last collective still has to release its tensors, which needs the interpreter's lock. A
    thread that asks for the lock of an ending interpreter is killed, and its destructors abort the finished process.
    Nothing tells when it is done, so it gets a tenth of a second in which the lock is free.
    """
    from accelerate import PartialState

    def leave() -> None:
        PartialState().destroy_process_group()
        time.sleep(0.1)

    atexit.register(leave)
