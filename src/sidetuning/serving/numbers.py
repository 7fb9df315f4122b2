"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sidetuning.serving.served import Reply

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Numbers:
    """Counters of one server, in a registry of their own.

    Args:
        waiting: how many inputs wait.
        tasks: how many tasks are served.

    Attributes:
        registry: what `/metrics` shows.
    """

    def __init__(self, waiting: Callable[[], int], tasks: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("sidetuning_requests", "Requests.", ["path", "status"], registry=registry)
        self.latency = Histogram(
            "sidetuning_request_seconds", "Duration of requests.", ["path"], buckets=SECONDS, registry=registry
        )
        self.asked = Counter("sidetuning_inputs", "Inputs that were answered, by task.", ["task"], registry=registry)
        self.rows = Histogram(
            "sidetuning_batch_rows",
            "Inputs that shared a base pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.base = Histogram("sidetuning_base_seconds", "Duration of base passes.", buckets=SECONDS, registry=registry)
        self.changes = Counter("sidetuning_changes", "Changes of the folder.", ["result"], registry=registry)
        Gauge("sidetuning_waiting", "Inputs that wait.", registry=registry).set_function(waiting)
        Gauge("sidetuning_tasks", "Tasks that are served.", registry=registry).set_function(tasks)

    def request(self, notes: dict[str, Any], paths: Sequence[str]) -> None:
        """Count a request; paths that do not exist are one, lest anybody fill the memory."""
        path = notes["path"] if notes["path"] in paths else "other"
        self.requests.labels(path, str(notes["status"])).inc()
        self.latency.labels(path).observe(notes["seconds"])

    def batch(self, replies: Sequence[Reply]) -> None:
        """Count the base passes and the answers of a batch."""
        # Replies of one pass have its duration in common.
        for rows, seconds in {(reply.rows, reply.base_seconds) for reply in replies}:
            self.rows.observe(rows)
            self.base.observe(seconds)
        for reply in replies:
            for task in reply.answers:
                self.asked.labels(task).inc()
