"""Ray, for those who outgrow one machine: the server in several replicas, and candidates spread over a cluster.

    serve.run(application("/shared/my-model", replicas=4))
    st.sweep(base, cached, candidates, validation=held, out="/shared/sweep", workers=RayWorkers())

Ray is neither started nor stopped here. It reports nobody's use where RAY_USAGE_STATS_ENABLED is not set before.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sidetuning.artifacts import CONFIG
from sidetuning.engines import ENGINES
from sidetuning.errors import ArtifactError, SideTuningError, TaskError, UnknownNameError
from sidetuning.folder import task_folders
from sidetuning.launch import call
from sidetuning.registry import unknown

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
try:
    import ray
    from fastapi import FastAPI
    from fastapi.responses import Response
    from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
    from ray import cloudpickle, serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import FIFOMixin, RequestRouter

    from sidetuning.serving.app import Limits, Service
    from sidetuning.serving.served import Served
except ImportError as error:
    raise ImportError("Ray is not installed: pip install 'sidetuning[ray]'") from error


@dataclass(frozen=True)
class RayWorkers:
    """Calls of a function, spread over the cluster that this process is connected to; give it as workers=.

    Workers run in this process's working directory, where their machine has it, and find files by the same names. Where
    a machine or a process dies, its calls are made again.

    Attributes:
        num_cpus, num_gpus: cores and GPUs that a call takes; as many threads as cores compute in it.
        retries: how often a call is made again.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    retries: int = 3

    def __call__(self, function: Callable[..., Any], calls: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        """Give the name and the result of each call as it ends; the first failure is raised when all have ended."""
        if not ray.is_initialized():
            raise SideTuningError("Ray is not connected; call ray.init(), or ray.init(address='auto') in a cluster")
        packed = {name: _packed(given, f"'{name}'") for name, given in calls.items()}
        shared, failure = ray.put(_packed(function, "what all workers read")), None
        send = ray.remote(call).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.retries, scheduling_strategy="SPREAD"
        )
        waiting = {send.remote(str(Path.cwd()), shared, given): name for name, given in packed.items()}
        try:
            while waiting:
                (ended, *_), _ = ray.wait(list(waiting))
                name = waiting.pop(ended)
                try:
                    result = ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    failure = failure or error.cause
                except ray.exceptions.RayError as error:
                    why = str(error).strip().splitlines()[0]
                    failure = failure or SideTuningError(
                        f"'{name}' ended its worker, and that of each retry ({why}); what has ended is not lost"
                    )
                else:
                    yield name, result
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
        if failure is not None:
            raise failure


def _packed(thing: Any, name: str) -> Any:
    try:
        return cloudpickle.dumps(thing)
    except Exception as error:
        raise TaskError(f"{name} cannot be sent to workers ({error}); give no open file, lock or session") from error


def application(
    model: str | Path,
    *,
    replicas: int | str = 1,
    limits: Limits | None = None,
    token: str | None = None,
    watch: float = 1.0,
    engine: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The application of `sidetuning serve`, for `ray.serve.run`.

    Each replica opens the model folder, takes over tasks that come and go there, and batches the requests that it gets.

    Args:
        model: a model folder, or the folder of one task; all machines see it by the same name.
        replicas: their number; "auto" lets Ray Serve change it with the load.
        limits, token, watch: as of `sidetuning.serving.app.Service`, for each replica.
        engine: what runs the base, as of `with_engine`; by default what the folder says.
        options: further options of Ray Serve's deployments, such as ray_actor_options and autoscaling_config.

    Raises:
        ArtifactError: a folder that holds no task.
        UnknownNameError, TaskError: no such engine, or options that Ray Serve does not take.
    """
    folder, limits = Path(model).absolute(), limits or Limits()
    if not (folder / CONFIG).exists() and not task_folders(folder):
        raise ArtifactError(f"{folder} holds no saved task; give a model folder, or the folder of a task")
    if engine not in (None, "auto", *ENGINES):
        raise UnknownNameError(unknown("engine", str(engine), [*ENGINES, "auto"], verb="known"))
    # The batcher takes many requests: Ray's own five at a time would leave batches small.
    given: dict[str, Any] = {"name": "sidetuning", "num_replicas": replicas, "max_ongoing_requests": limits.max_waiting}
    given |= {"max_queued_requests": limits.max_waiting, "graceful_shutdown_timeout_s": limits.timeout + 1}
    given |= {"request_router_config": RequestRouterConfig(request_router_class=LessBusy), **(options or {})}
    try:
        deployment = serve.deployment(serve.ingress()(Replica)).options(**given)
    except (TypeError, ValueError) as error:
        raise TaskError(f"Ray Serve takes no such replicas= or options= ({error})") from error
    return deployment.bind(folder, limits, token, watch, engine)


class Replica:
    """What Ray Serve makes of each replica; the arguments are those of `application`."""

    def __init__(self, folder: Path, limits: Limits, token: str | None, watch: float, engine: str | None) -> None:
        self.service = _Together(Served(folder, engine=engine), limits, token=token, watch=watch)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.service.app

    def check_health(self) -> None:
        """Ray asks again and again, and replaces a replica that raises."""
        if not self.service.batcher.alive:
            raise RuntimeError("the thread that runs the base has ended")

    def families(self) -> list[Metric]:
        """The numbers of this replica, by the label `replica`."""
        found, tag = list(self.service.numbers.registry.collect()), serve.get_replica_context().replica_tag
        for metric in found:
            metric.samples = [s._replace(labels={**s.labels, "replica": tag}) for s in metric.samples]
        return found


class _Together(Service):
    """A server beside others; whichever is asked for its numbers tells those of all."""

    async def metrics(self) -> Response:
        """Numbers of all replicas in Prometheus' text format."""
        context, merged = serve.get_replica_context(), dict[str, Metric]()
        told = serve.get_deployment_handle(context.deployment, context.app_name).broadcast("families")
        for families in await told.results_async(timeout_s=self.limits.timeout, return_exceptions=True):
            # A replica that has just died tells nothing.
            for metric in families if isinstance(families, list) else ():
                if merged.setdefault(metric.name, metric) is not metric:
                    merged[metric.name].samples += metric.samples
        found: Any = SimpleNamespace(collect=merged.values)
        return Response(generate_latest(found), headers={"content-type": CONTENT_TYPE_LATEST})


class LessBusy(FIFOMixin, RequestRouter):  # type: ignore[misc]
    """Draws two of all replicas for a request. Ray's own prefers one machine, and leaves the others idle."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Two of the replicas; Ray takes the one with fewer requests."""
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
