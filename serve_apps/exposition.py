"""`GET /metrics`: what a gateway has answered, in the text format of Prometheus.

Ray's metrics have the same counters some seconds later, under names of its own, for all gateways
at once. Behind one address each scrape is answered by one of the gateways, so every series has the
label `gateway`, and none ever jumps back: sum rates over it, of windows of several scrapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lib.serving.record import Increment, Record
from lib.watch import metrics
from lib.watch.metrics import LATENCY_BUCKETS_S, le
from serve_apps.asgi import Call, Reply, Route

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
LATENCY = "rayline_request_latency_seconds"
IN_FLIGHT = "rayline_requests_in_flight"


class Exposition(Collector):
    """What one gateway has counted since it started.

    Args:
        gateway: Id of the replica, the value of the label.
        unreported: Gives the counts since the last call of `add`.
        in_flight: Gives the number of requests that are not answered yet.
    """

    def __init__(
        self, gateway: str, unreported: Callable[[], Record], in_flight: Callable[[], int]
    ) -> None:
        self._gateway = gateway
        self._unreported = unreported
        self._in_flight = in_flight
        self._record = Record()
        self._last_ms: dict[tuple[str, str], int] = {}
        self._others: dict[tuple[metrics.Metric, tuple[str, ...]], float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def add(self, record: Record, increments: Iterable[Increment] = ()) -> None:
        """Keep the counts of a record that is reported, and of what else is counted."""
        self._record.merge(record)
        self._last_ms |= dict.fromkeys(record.latency, int(time.time() * 1000))
        for metric, labels, value in increments:
            key = (metric, labels)
            self._others[key] = self._others.get(key, 0.0) + value

    def counts(self) -> tuple[Record, Mapping[tuple[str, str], int]]:
        """Return all counts, and when each version was last counted (ms since 1970).

        The time is that of the report which its last request was in.
        """
        unreported, total = self._unreported(), Record()
        total.merge(self._record)
        total.merge(unreported)
        now_ms = int(time.time() * 1000)
        return total, self._last_ms | dict.fromkeys(unreported.latency, now_ms)

    def render(self) -> bytes:
        """Return the text, of the type CONTENT_TYPE."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what is counted is not known before."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with its series."""
        total, _ = self.counts()
        requests = _counter(metrics.REQUESTS)
        for (model, version, caller, status), count in total.requests.items():
            requests.add_metric([self._gateway, model, version, caller, str(status)], count)
        yield requests
        latency = HistogramMetricFamily(
            LATENCY, metrics.LATENCY_BUCKET.description, labels=("gateway", "model", "version")
        )
        for key, (counts, seconds) in total.latency.items():
            bounds = map(le, LATENCY_BUCKETS_S)
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            latency.add_metric([self._gateway, *key], buckets, seconds[0])
        yield latency
        for metric in (metrics.SHADOWED, metrics.LOGGED):
            family = _counter(metric)
            for (other, labels), value in self._others.items():
                if other == metric:
                    family.add_metric([self._gateway, *labels], value)
            yield family
        in_flight = GaugeMetricFamily(
            IN_FLIGHT, "Requests that are not answered yet.", labels=("gateway",)
        )
        in_flight.add_metric([self._gateway], self._in_flight())
        yield in_flight


def route(exposition: Exposition) -> Route:
    """Return the route of `GET /metrics`."""

    async def answer(call: Call) -> Reply:
        return Reply(exposition.render(), headers=[(b"content-type", CONTENT_TYPE.encode())])

    return Route(
        method="GET",
        path="/metrics",
        handler=answer,
        summary="Counts of this gateway, for Prometheus.",
        scope="view",
        errors=(503,),
        content_type="text/plain",
    )


def _counter(metric: metrics.Metric) -> CounterMetricFamily:
    return CounterMetricFamily(metric.name, metric.description, labels=("gateway", *metric.labels))
