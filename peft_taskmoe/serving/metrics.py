"""What Prometheus reads: requests, the queue, batches and tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one server, in a registry of their own.

    Args:
        waiting: Gives the number of prompts that wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = here = CollectorRegistry()
        name = "peft_taskmoe"
        labels = ("route", "status")
        self._requests = Counter(f"{name}_requests", "Requests", labels, registry=here)
        self._latency = Histogram(
            f"{name}_request_seconds", "Their duration", ["route"], registry=here, buckets=_SECONDS
        )
        queue = Gauge(f"{name}_waiting_prompts", "Prompts in the queue", registry=here)
        queue.set_function(waiting)
        self._rows = Histogram(
            f"{name}_batch_prompts", "Prompts of a batch", registry=here, buckets=_PROMPTS
        )
        self._seconds = Histogram(
            f"{name}_batch_seconds", "Duration of a batch", registry=here, buckets=_SECONDS
        )
        self._tokens = Counter(f"{name}_tokens", "Tokens that were written", registry=here)

    def batch(self, prompts: int, seconds: float, tokens: int) -> None:
        """Count an answered batch."""
        self._rows.observe(prompts)
        self._seconds.observe(seconds)
        self._tokens.inc(tokens)

    def request(self, route: str, status: str, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(route, status).inc()
        self._latency.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The figures in Prometheus' text format."""
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware that counts requests; paths that are no route count as one."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), "none"  # the client left before an answer

        async def counted(message: Any) -> None:
            nonlocal status
            status = str(message.get("status", status))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            status = "500"  # what the server answers then
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.perf_counter() - start)
