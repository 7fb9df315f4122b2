"""Ray, for those who outgrow one machine: the server in several replicas, and work that is spread over a cluster.

    serve.run(application("/shared/my-model", replicas=4))          # what `sidetuning serve` answers, on Ray Serve
    st.sweep(base, cached, candidates, validation=held, out="/shared/sweep", workers=RayWorkers())

Ray is started by whom it belongs to, `ray.init()` or `ray start`, and is never stopped here. Importing this module sets
RAY_USAGE_STATS_ENABLED=0 where it is not set: Ray then reports nobody's use.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidetuning.artifacts import CONFIG
from sidetuning.engines import ENGINES
from sidetuning.errors import ArtifactError, DataError, SideTuningError, TaskError, UnknownNameError
from sidetuning.folder import task_folders
from sidetuning.registry import unknown

if TYPE_CHECKING:
    from sidetuning.serving.app import Limits

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from ray import cloudpickle
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError("Ray is not installed: pip install 'sidetuning[ray]'") from error


@dataclass(frozen=True)
class RayWorkers:
    """Calls of a function, spread over the cluster that this process is connected to; give it as workers=.

    Workers run in this process's working directory, where their machine has it, and find files by the same names. Where
    a machine or a process dies, its calls are made again.

    Attributes:
        num_cpus: cores that a call takes; as many threads compute in it.
        num_gpus: GPUs that a call takes.
        retries: how often a call is made again.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    retries: int = 3

    def __call__(self, function: Callable[..., Any], calls: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        """Give the name and the result of each call as it ends; the first failure is raised when all have ended.

        Raises:
            SideTuningError: Ray is not connected, something cannot be sent, or a call's workers died again and again.
        """
        if not ray.is_initialized():
            raise SideTuningError(
                "Ray is not connected; call ray.init(), or ray.init(address='auto') on a cluster's node"
            )
        packed = {name: _packed(given, f"'{name}'") for name, given in calls.items()}
        shared, folder, failure = ray.put(_packed(function, "what all workers read")), str(Path.cwd()), None
        call = ray.remote(_call).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.retries, scheduling_strategy="SPREAD"
        )
        waiting = {call.remote(folder, shared, given): name for name, given in packed.items()}
        try:
            while waiting:
                (ended, *_), _ = ray.wait(list(waiting))
                name = waiting.pop(ended)
                try:
                    result = ray.get(ended)
                except RayTaskError as error:
                    failure = failure or error.cause
                except RayError as error:
                    why = str(error).strip().partition("\n")[0]
                    failure = failure or SideTuningError(
                        f"the worker of '{name}' died, and so did those of {self.retries} retries ({why}); what has "
                        "ended stays, and the same call goes on there"
                    )
                else:
                    yield name, result
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
        if failure is not None:
            raise failure


def _packed(thing: Any, name: str) -> bytes:
    try:
        packed: bytes = cloudpickle.dumps(thing)
    except Exception as error:
        raise TaskError(
            f"{name} cannot be sent to another process ({error}); give functions and modules that hold no open file, "
            "lock, session or generator"
        ) from error
    return packed


def _call(folder: str, function: bytes, given: bytes) -> Any:
    """Run a function in the process of a worker."""
    if Path(folder).is_dir():
        os.chdir(folder)
    here = socket.gethostname()
    try:
        run, arguments = cloudpickle.loads(function), cloudpickle.loads(given)
    except Exception as error:
        raise DataError(
            f"the worker on {here} cannot read what it was sent ({error}); install the same packages there, and send "
            "modules of your own by ray.init(runtime_env={'working_dir': '.'})"
        ) from error
    try:
        return run(*arguments)
    except FileNotFoundError as error:
        raise DataError(
            f"the worker on {here} does not find {error.filename}; keep what workers read and write in a folder that "
            "all machines see by the same name"
        ) from error


def application(
    model: str | Path,
    *,
    replicas: int | str = 1,
    limits: Limits | None = None,
    token: str | None = None,
    watch: float = 1.0,
    engine: str | None = None,
    quiet: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The application of `sidetuning serve`, for `ray.serve.run`.

    Each replica opens the model folder, takes over tasks that come and go there, and batches the requests that Ray
    sends it. `/metrics` tells the numbers of all replicas, by the label `replica`.

    Args:
        model: a model folder, or the folder of one task; all machines see it by the same name.
        replicas: their number; "auto" lets Ray Serve change it with the load.
        limits: what one request may cost, and how requests are batched.
        token: what clients must send; None lets everybody ask.
        watch: seconds between two looks at the model folder; 0 looks never.
        engine: what runs the base, as of `with_engine`; by default what the folder says.
        quiet: log warnings and errors alone.
        options: further options of Ray Serve's deployments, such as ray_actor_options and autoscaling_config.

    Raises:
        ArtifactError: a folder that holds no task.
        UnknownNameError: no such engine.
        TaskError: options that Ray Serve does not take.
    """
    try:
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from sidetuning.serving.app import Limits
        from sidetuning.serving.replica import LessBusy, Replica
    except ImportError as error:
        raise ImportError("serving on Ray needs more packages: pip install 'sidetuning[ray]'") from error
    folder = Path(model).absolute()
    if not (folder / CONFIG).exists() and not task_folders(folder):
        raise ArtifactError(f"{folder} holds no saved task; give a model folder, or the folder of a task")
    if engine not in (None, "auto", *ENGINES):
        raise UnknownNameError(unknown("engine", str(engine), [*ENGINES, "auto"], verb="known"))
    limits = limits or Limits()
    settings: dict[str, Any] = {
        "name": "sidetuning",
        "num_replicas": replicas,
        # The batcher takes them; Ray's own five would leave batches small.
        "max_ongoing_requests": limits.max_waiting,
        "max_queued_requests": limits.max_waiting,
        "request_router_config": RequestRouterConfig(request_router_class=LessBusy),
        "graceful_shutdown_timeout_s": limits.timeout + 1,
    }
    try:
        deployment = serve.deployment(serve.ingress()(Replica)).options(**{**settings, **(options or {})})
    except (TypeError, ValueError) as error:
        raise TaskError(f"Ray Serve takes no such replicas= or options= ({error})") from error
    return deployment.bind(folder, limits, token=token, watch=watch, engine=engine, quiet=quiet)
