"""Current values: out of counters, from Prometheus, and from Ray's endpoints without one."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from lib.errors import WatchError
from lib.watch import metrics
from lib.watch.counts import Reading, Sample, VersionCounts, between, matching
from lib.watch.prometheus import (
    PROMETHEUS_VARIABLE,
    Prometheus,
    RayEndpoints,
    parse,
    ray_targets,
    read,
    source,
)

REQUESTS, BUCKET = metrics.REQUESTS.exported, metrics.LATENCY_BUCKET.exported
EXPOSED = f"""# HELP {REQUESTS} Requests answered.
# TYPE {REQUESTS} counter
{REQUESTS}{{model="m",version="2",caller="a {{b}}",status="200",WorkerId="w1"}} 10.0
{REQUESTS}{{model="m",version="2",caller="open",status="503",WorkerId="w1"}} 2.0
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{{NodeAddress="127.0.0.2"}} 2.0
"""


def sample(name: str, value: float, **labels: str) -> Sample:
    return Sample(name, {"model": "m", "version": "2", "WorkerId": "w1", **labels}, value)


def reading(*samples: Sample, source: str = "here") -> Reading:
    return Reading(source=source, time_s=0.0, samples=samples)


def test_what_a_version_did_is_what_its_counters_grew_by() -> None:
    before = reading(
        sample(REQUESTS, 100, status="200"),
        sample(REQUESTS, 3, status="500"),
        sample(BUCKET, 50, le="0.1"),
        sample(BUCKET, 100, le="+Inf"),
        sample(REQUESTS, 9, status="404", version=""),
    )
    after = reading(
        sample(REQUESTS, 190, status="200"),
        sample(REQUESTS, 8, status="500"),
        sample(REQUESTS, 5, status="422"),
        sample(BUCKET, 110, le="0.1"),
        sample(BUCKET, 200, le="+Inf"),
        sample(REQUESTS, 20, status="404", version=""),
        sample(metrics.LATENCY_SUM.exported, 7.5),
        sample(metrics.SHADOWED.exported, 4, version="3", result="agreed"),
        sample(metrics.SHADOWED.exported, 1, version="3", result="failed"),
    )
    counts = between(before, after)
    assert set(counts) == {("m", "2"), ("m", "3")}
    two = counts["m", "2"]
    assert (two.requests, two.errors, two.latency_sum_s) == (100, 5, 7.5)
    assert two.buckets == {0.1: 60, math.inf: 100}
    assert counts["m", "3"].shadow == {"agreed": 4, "failed": 1}
    assert counts["m", "3"].requests == 0


def test_gateways_that_come_go_and_start_again_are_counted_right() -> None:
    before = reading(
        sample(REQUESTS, 1000, status="200"), sample(REQUESTS, 70, status="200", WorkerId="gone")
    )
    after = reading(
        sample(REQUESTS, 30, status="200"), sample(REQUESTS, 5, status="200", WorkerId="new")
    )
    assert between(before, after)["m", "2"].requests == 35


def test_readings_of_two_sources_are_not_compared() -> None:
    with pytest.raises(ValueError, match="two sources"):
        between(reading(source="Prometheus"), reading(source="Ray"))


def test_a_quantile_is_the_one_that_prometheus_gives() -> None:
    counts = VersionCounts()
    # 10 of 100 within 10 ms, 80 more within 100 ms, the rest within a second.
    counts.buckets.update({0.01: 10, 0.1: 90, 1.0: 100, math.inf: 100})
    assert counts.quantile_s(0.5) == pytest.approx(0.01 + 0.09 * 40 / 80)
    assert counts.quantile_s(0.05) == pytest.approx(0.005)
    assert counts.quantile_s(0.99) == pytest.approx(0.1 + 0.9 * 9 / 10)
    counts.buckets[math.inf] = 150
    assert counts.quantile_s(0.99) == 1.0
    assert math.isnan(VersionCounts().quantile_s(0.99))


def test_only_what_is_asked_for_is_read() -> None:
    samples = parse(EXPOSED, frozenset({REQUESTS}), instance="node:1")
    assert [s.value for s in matching(samples, REQUESTS, status="503")] == [2.0]
    assert [s.labels["caller"] for s in samples] == ["a {b}", "open"]
    assert {s.labels["instance"] for s in samples} == {"node:1"}


class World:
    """Ray's dashboard, a node's metrics and a Prometheus, in one fake server."""

    def __init__(self) -> None:
        self.url = ""
        self.targets: Any = []
        self.results: dict[str, Any] = {}
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, str]:
        parts = urlsplit(path)
        self.asked.append(parts.path)
        if parts.path == "/api/prometheus/sd":
            return 200, json.dumps(self.targets)
        if parts.path == "/metrics":
            return 200, EXPOSED
        expr = parse_qs(parts.query).get("query", [""])[0]
        result = next((r for part, r in self.results.items() if part in expr), None)
        if result is None:
            return 400, json.dumps({"status": "error", "error": "parse error"})
        data = {"resultType": "vector", "result": result}
        return 200, json.dumps({"status": "success", "data": data})


@pytest.fixture
def world() -> Iterator[World]:
    made = World()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = made.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    made.targets = [{"labels": {"job": "ray"}, "targets": [made.url.removeprefix("http://")]}]
    yield made
    server.shutdown()
    server.server_close()


def series(value: float, **labels: str) -> dict[str, Any]:
    return {"metric": labels, "value": [1.0, str(value)]}


def test_without_a_prometheus_ray_is_read(world: World) -> None:
    for env in ({}, {PROMETHEUS_VARIABLE: "http://127.0.0.1:9"}, {PROMETHEUS_VARIABLE: world.url}):
        # The last one answers, but does not read Ray's metrics.
        found = read(source(world.url, env), clock=lambda: 5.0)
        assert found.source == "Ray's metrics endpoints"
        assert sum(s.value for s in matching(found.samples, REQUESTS)) == 12


def test_a_prometheus_that_reads_ray_is_asked(world: World) -> None:
    world.results = {
        "max_over_time": [series(1, instance="node")],
        "== 0": [],
        REQUESTS: [series(7, __name__=REQUESTS, model="m", version="2", status="200")],
    }
    found = read(source("http://127.0.0.1:9", {PROMETHEUS_VARIABLE: world.url}))
    assert found.source == f"Prometheus at {world.url}"
    assert [(s.name, s.labels["version"], s.value) for s in found.samples] == [(REQUESTS, "2", 7)]


def test_a_prometheus_that_misses_a_node_does_not_look_like_no_requests(world: World) -> None:
    world.results = {
        "max_over_time": [series(1)],
        "== 0": [series(0, instance="10.0.0.7:8085")],
        REQUESTS: [],
    }
    chosen = source("http://127.0.0.1:9", {PROMETHEUS_VARIABLE: world.url})
    with pytest.raises(WatchError, match=r"can't read Ray's metrics at 10\.0\.0\.7:8085"):
        read(chosen)


def test_a_node_that_does_not_answer_does_not_look_like_no_requests(world: World) -> None:
    world.targets[0]["targets"].append("127.0.0.1:9")
    with pytest.raises(WatchError, match=r"http://127\.0\.0\.1:9/metrics can't be read"):
        read(RayEndpoints(lambda: ray_targets(world.url)))


@pytest.mark.parametrize("targets", [{"error": "not a list"}, [{"labels": {}}], "x", []])
def test_a_dashboard_that_lists_no_metrics_is_told(world: World, targets: Any) -> None:
    world.targets = targets
    with pytest.raises(WatchError, match="metrics"):
        ray_targets(world.url)


def test_what_prometheus_refuses_is_told(world: World) -> None:
    with pytest.raises(WatchError, match="refuses: parse error"):
        Prometheus(world.url).query("rate(")
    with pytest.raises(WatchError, match=f"does not answer.*{PROMETHEUS_VARIABLE}"):
        Prometheus("http://127.0.0.1:9").query("up")
