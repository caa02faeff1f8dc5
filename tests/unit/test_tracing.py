"""Trace context in and out, and the spans that a collector gets over OTLP."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from lib.serving.router import Router
from lib.serving.tracing import ENDPOINT_VARIABLES, Tracing
from lib.storage import Storage
from lib.watch.predictions import read
from tests.unit.serving_parts import app_over, broken, make_replicas, publish, request

RAW = {"content-type": "application/octet-stream"}
IMAGE = bytes(24)
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{SPAN}-01"


class Collector:
    """What a server of OTLP over HTTP is sent."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    def spans(self) -> dict[str, Any]:
        return {
            span.name: span
            for sent in self.requests
            for resource in sent.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            found.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(ENDPOINT_VARIABLES[0], f"http://127.0.0.1:{server.server_port}")
    yield found
    server.shutdown()
    server.server_close()


async def router_over(storage: Storage, make: Any = make_replicas) -> Router:
    publish(storage, {1: 1.0})
    router = Router(storage, make)
    await router.refresh()
    return router


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GIVEN, TRACE),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", TRACE),
        (f"00-{TRACE}-{SPAN}-01-too-much", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE[1:]}-{SPAN}-01", None),
        ("", None),
        ("00", None),
    ],
)
def test_only_a_well_formed_context_is_taken(given: str, expected: str | None) -> None:
    trace = Tracing().begin({b"traceparent": given.encode()}, "POST /predict")
    assert (trace.trace_id if trace else None) == expected


def test_a_callers_context_is_returned_and_kept_with_the_logged_rows(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    async def scenario() -> None:
        router = await router_over(storage)
        app = app_over(router, storage)
        for name, given in (("traced", GIVEN), ("plain", ""), ("odd", "nonsense")):
            headers = {**RAW, "x-request-id": name} | ({"traceparent": given} if given else {})
            answer = await request(app, "POST", "/predict", IMAGE, headers)
            assert answer.status == 200
            assert answer.headers.get("traceparent") == (GIVEN if name == "traced" else None)
        await router.recorder.flush()

    asyncio.run(scenario())
    rows = read(storage, "shapes", start_us=0, end_us=2**62, columns=["request_id", "trace_id"])
    found = dict(zip(*(rows[name].to_pylist() for name in rows.column_names), strict=True))
    assert found == {"traced": TRACE, "plain": None, "odd": None}


def test_a_collector_gets_the_request_and_its_phases_below_the_callers_span(
    tmp_path: Path, collector: Collector
) -> None:
    storage = Storage(str(tmp_path))
    returned: list[str] = []

    async def scenario() -> None:
        tracing = Tracing.from_env(os.environ, "abc")
        app = app_over(await router_over(storage), storage, tracing=tracing)
        headers = {**RAW, "traceparent": GIVEN, "x-request-id": "mine"}
        answer = await request(app, "POST", "/predict", IMAGE, headers)
        assert answer.status == 200
        returned.append(answer.headers["traceparent"])
        await asyncio.to_thread(tracing.close)

    asyncio.run(scenario())
    spans = collector.spans()
    whole = spans.pop("POST /predict")
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, SPAN)
    assert returned == [f"00-{TRACE}-{whole.span_id.hex()}-01"]
    attributes = {each.key: each.value for each in whole.attributes}
    assert attributes["rayline.request_id"].string_value == "mine"
    assert attributes["http.response.status_code"].int_value == 200
    assert (attributes["rayline.model"].string_value, attributes["rayline.version"].int_value) == (
        "shapes",
        1,
    )
    assert list(spans) == ["receive", "decode", "queue", "predict"]
    ends = [whole.start_time_unix_nano]
    for span in spans.values():
        assert span.parent_span_id == whole.span_id
        # Each begins where the one before ended, the first with the request.
        assert span.start_time_unix_nano >= ends[-1]
        assert span.end_time_unix_nano >= span.start_time_unix_nano
        ends.append(span.end_time_unix_nano)
    assert ends[-1] <= whole.end_time_unix_nano
    (resource,) = {
        each.value.string_value
        for sent in collector.requests
        for spans_of in sent.resource_spans
        for each in spans_of.resource.attributes
        if each.key == "service.name"
    }
    assert resource == "rayline-gateway"


def test_a_request_without_context_gets_a_new_trace_and_a_failure_is_marked(
    tmp_path: Path, collector: Collector
) -> None:
    storage = Storage(str(tmp_path))

    async def scenario() -> None:
        tracing = Tracing.from_env(os.environ, "abc")
        app = app_over(await router_over(storage, broken), storage, tracing=tracing)
        answer = await request(app, "POST", "/predict", IMAGE, RAW)
        assert answer.status == 500
        await asyncio.to_thread(tracing.close)
        (span,) = [span for name, span in collector.spans().items() if name == "POST /predict"]
        given = f"00-{span.trace_id.hex()}-{span.span_id.hex()}-"
        assert answer.headers["traceparent"].startswith(given)
        assert span.parent_span_id == b""
        assert span.status.code == 2  # STATUS_CODE_ERROR of OTLP

    asyncio.run(scenario())


def test_a_context_that_is_not_sampled_makes_no_spans(tmp_path: Path, collector: Collector) -> None:
    storage = Storage(str(tmp_path))

    async def scenario() -> None:
        tracing = Tracing.from_env(os.environ, "abc")
        app = app_over(await router_over(storage), storage, tracing=tracing)
        given = {**RAW, "traceparent": GIVEN[:-1] + "0"}
        answer = await request(app, "POST", "/predict", IMAGE, given)
        assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
        assert answer.headers["traceparent"].endswith("-00")
        await asyncio.to_thread(tracing.close)

    asyncio.run(scenario())
    assert collector.requests == []


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    script = """
import json, sys
from lib.serving.tracing import Tracing
tracing = Tracing.from_env({}, "abc")
tracing.begin({b"traceparent": b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}, "x")
print(json.dumps([name for name in sys.modules if name.startswith("opentelemetry")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
