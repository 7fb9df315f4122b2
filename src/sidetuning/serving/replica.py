"""One of several servers of a model folder, on Ray Serve; its `/metrics` are those of all."""

from __future__ import annotations

import random
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from ray import serve
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from sidetuning.serving.app import Limits, Service
from sidetuning.serving.served import Served


class Replica:
    """What Ray Serve makes of each replica; the arguments are those of `sidetuning.integrations.ray.application`."""

    def __init__(
        self, folder: Path, limits: Limits, *, token: str | None, watch: float, engine: str | None, quiet: bool
    ) -> None:
        self.service = _Together(Served(folder, engine=engine), limits, token=token, watch=watch, quiet=quiet)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.service.app

    def check_health(self) -> None:
        """Tell Ray, which asks again and again, whether questions are answered; it replaces a replica that is ill."""
        if not self.service.batcher.alive:
            raise RuntimeError("the thread that runs the base has ended")

    def families(self) -> list[Metric]:
        """The numbers of this replica, by the label `replica`."""
        found = list(self.service.numbers.registry.collect())
        tag = serve.get_replica_context().replica_tag
        for metric in found:
            metric.samples = [s._replace(labels={**s.labels, "replica": tag}) for s in metric.samples]
        return found


class LessBusy(FIFOMixin, RequestRouter):
    """Sends a request to the less busy one of two replicas, drawn from all.

    Ray's own prefers replicas of the machine on which a request comes in, and leaves the others idle.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Two of the replicas; Ray takes the one with fewer requests."""
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]


class _Together(Service):
    """A server beside others; whichever is asked for its numbers tells those of all."""

    async def metrics(self) -> Response:
        """Numbers of all replicas in Prometheus' text format."""
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        told = handle.broadcast("families")
        found = await told.results_async(timeout_s=self.limits.timeout, return_exceptions=True)
        families = _Families()
        # A replica that has just died tells nothing.
        for metric in (metric for each in found if isinstance(each, list) for metric in each):
            families.add(metric)
        return Response(generate_latest(families), headers={"content-type": CONTENT_TYPE_LATEST})


class _Families(dict[str, Metric]):
    """Numbers of several replicas, those of one name together."""

    def add(self, metric: Metric) -> None:
        """Add the numbers of one replica."""
        if metric.name in self:
            self[metric.name].samples += metric.samples
        else:
            self[metric.name] = metric

    def collect(self) -> list[Metric]:
        """What `generate_latest` asks for."""
        return list(self.values())
