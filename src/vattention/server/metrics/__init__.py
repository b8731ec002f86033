"""`GET /metrics`: what the engine and the server do, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vattention.async_llm import AsyncLLM
from vattention.engine.snapshot import Snapshot
from vattention.errors import VAttentionError
from vattention.server.metrics.families import PREFIX, families
from vattention.server.metrics.requests import CountRequests

__all__ = ["add_metrics"]


def add_metrics(app: FastAPI, llm: AsyncLLM, *, model_name: str) -> None:
    """Serve `/metrics`, and count the requests to `app`. To be called once, after the other middlewares are there.

    Every scrape is one snapshot of the engine, so that its numbers belong together; it waits for the forward pass under
    way. When the engine has stopped, what is not the engine's is still served.

    Args:
        model_name: the label that all metrics of the engine have.
    """
    registry = CollectorRegistry()  # an application's own: there may be several in a process
    ProcessCollector(registry=registry)
    engine = _Engine(model_name)
    registry.register(engine)
    app.add_middleware(CountRequests, routes=app, registry=registry)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Prometheus' text format, or OpenMetrics where that is asked for."""
        try:
            engine.snapshot = await llm.snapshot()
        except VAttentionError:
            engine.snapshot = None
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type, "cache-control": "no-store"})


class _Engine(Collector):
    """The engine as it was at the last snapshot."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.snapshot: Snapshot | None = None

    def describe(self) -> list[Metric]:
        """Nothing: there is no snapshot yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of the snapshot."""
        up = GaugeMetricFamily(PREFIX + "engine_up", "Whether the engine takes requests.", labels=["model_name"])
        up.add_metric([self._model_name], self.snapshot is not None)
        yield up
        if self.snapshot is not None:
            yield from families(self.snapshot, self._model_name)
