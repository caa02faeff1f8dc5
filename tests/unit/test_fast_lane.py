"""What a replica's HTTP server does before Serve sees a request, and how replicas are counted."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lib.storage import Storage
from serve_apps import fast_lane
from serve_apps.fast_lane import FastLane
from serve_apps.scaling import BUSY, CALLS, BusyMeter, by_busyness
from tests.unit.serving_parts import Response, gateway, publish, request

IMAGE = bytes(24)
RAW = {"content-type": "application/octet-stream"}


async def of_serve(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": b"of Serve"})


@pytest.fixture(autouse=True)
def _no_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_lane, "_gateway", None)


def test_a_gateway_answers_before_serve_and_leaves_health_checks_to_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100})
        lane: Any = FastLane(of_serve, refuses=False)
        assert (await request(lane, "POST", "/predict", IMAGE, RAW)).status == 299
        fast_lane.register(await gateway(storage))
        answer: Response = await request(lane, "POST", "/predict", IMAGE, RAW)
        assert answer.status == 200
        assert answer.headers["x-request-id"] == answer.json["request_id"]
        assert (await request(lane, "GET", "/-/healthz")).body == b"of Serve"

    asyncio.run(scenario())


def test_a_gateway_on_another_loop_is_left_to_serve(tmp_path: Path) -> None:
    async def register() -> None:
        fast_lane.register(of_serve)

    async def scenario() -> None:
        lane: Any = FastLane(of_serve, refuses=False)
        assert (await request(lane, "GET", "/traffic")).status == 299

    asyncio.run(register())
    asyncio.run(scenario())


def test_a_version_refuses_who_asks_it_directly() -> None:
    async def scenario() -> None:
        lane: Any = FastLane(of_serve, refuses=True)
        answer = await request(lane, "POST", "/predict", IMAGE, RAW)
        assert answer.status == 403
        assert "gateway" in answer.json["error"]
        assert (await request(lane, "GET", "/-/healthz")).status == 299

    asyncio.run(scenario())


@dataclass
class Context:
    """What of Serve's AutoscalingContext the policy reads."""

    target_num_replicas: int = 1
    total_num_requests: float = 0
    aggregated_metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def wanted(busy: list[float], *, calls: float = 1, requests: float = 0, target: int = 1) -> int:
    readings = {f"replica-{index}": share for index, share in enumerate(busy)}
    metrics = {BUSY: readings, CALLS: dict.fromkeys(readings, calls)}
    context = Context(target, requests, metrics if busy else {})
    decided, _ = by_busyness({"deployment": context})
    return decided["deployment"]


def test_replicas_follow_how_busy_they_are() -> None:
    assert wanted([0.95]) == 2
    assert wanted([0.9, 0.95]) == 3
    assert wanted([0.3, 0.2]) == 1
    assert wanted([0.69]) == 1


def test_a_deployment_goes_to_zero_only_when_nobody_calls_it() -> None:
    assert wanted([0.001], calls=0) == 0
    assert wanted([0.001], calls=1) == 1
    assert wanted([0.0], calls=0, requests=1) == 1


def test_what_was_not_measured_yet_stays_as_it_is() -> None:
    assert wanted([], target=3) == 3


def test_the_meter_tells_work_from_rest() -> None:
    meter = BusyMeter()
    sum(range(3_000_000))
    worked = meter.read()
    asyncio.run(asyncio.sleep(0.2))
    # A ratio: on a full machine the thread may get only a small part of a core.
    assert worked > 3 * meter.read()


def test_the_meter_counts_the_threads_of_a_pool_too() -> None:
    alone, both = BusyMeter(), BusyMeter()
    with ThreadPoolExecutor(1, initializer=both.add_thread) as pool:
        pool.submit(sum, range(3_000_000)).result()
        # Of the same stretch of time, in which this thread waited.
        assert both.read() > 3 * alone.read()


def test_a_version_that_waits_for_its_device_is_busy() -> None:
    meter = BusyMeter()
    with meter.taken():
        time.sleep(0.2)
    waited = meter.read()
    time.sleep(0.2)
    assert waited > 10 * meter.read()
