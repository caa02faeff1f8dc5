"""What the log and /metrics of a gateway say about its requests."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.serving import keys
from lib.serving.bundle import Card
from lib.serving.client import wait_until
from lib.serving.router import Images, Probabilities, Replicas, Router
from lib.storage import Storage
from serve_apps.asgi import App
from serve_apps.logs import ProcessLog
from tests.unit.serving_parts import app_over, broken, gateway, make_replicas, publish, request

RAW = {"content-type": "application/octet-stream"}
IMAGE = bytes(24)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ProcessLog]:
    started = ProcessLog(tmp_path / "rayline", "gateway-abc").start()
    yield started
    started.close()


def lines(log: ProcessLog) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in log.path.read_text().splitlines()]
        if log.path.exists()
        else []
    )


def of_request(log: ProcessLog, request_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(log) if line.get("request_id") == request_id]


def test_the_cause_of_a_500_is_in_the_log_under_the_id_that_its_caller_got(
    tmp_path: Path, log: ProcessLog
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    publish(storage, {1: 1.0})

    async def scenario() -> None:
        app = await gateway(storage, make_replicas=broken)
        answer = await request(app, "POST", "/predict", IMAGE, RAW)
        assert answer.status == 500
        found = answer.json["request_id"]
        await asyncio.to_thread(
            wait_until, lambda: bool(of_request(log, found)), deadline_s=10, what="the line"
        )
        (line,) = of_request(log, found)
        assert line["error"] == "RuntimeError: the weights are on fire"
        assert "traceback" in line
        assert line["status"] == 500

    asyncio.run(scenario())


def test_an_answer_that_is_no_number_is_a_500_of_its_version_which_the_log_names(
    tmp_path: Path, log: ProcessLog
) -> None:
    async def not_a_number(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            return np.full((len(images_NHWC), 3), np.nan, np.float32)

        return Replicas(predict)

    storage = Storage(str(tmp_path / "storage"))
    publish(storage, {1: 1.0})

    async def scenario() -> None:
        app = await gateway(storage, make_replicas=not_a_number)
        answer = await request(app, "POST", "/predict", IMAGE, {**RAW, "x-request-id": "nan"})
        assert (answer.status, b"null" in answer.body) == (500, False)
        assert app.record.requests == {("shapes", "1", "anyone", 500): 1}

    asyncio.run(scenario())
    log.close()
    (line,) = of_request(log, "nan")
    assert line["error"] == (
        "ServingError: version 1 of shapes: the version answered NaN or infinity"
    )


def test_the_cause_of_a_503_is_in_the_log_and_a_client_s_error_is_not(
    tmp_path: Path, log: ProcessLog
) -> None:
    async def scenario() -> None:
        app = await gateway(Storage(str(tmp_path / "storage")))
        for path, name in (("/predict", "none-deployed"), ("/there-is-none", "lost")):
            await request(app, "POST", path, IMAGE, {**RAW, "x-request-id": name})

    asyncio.run(scenario())
    log.close()
    (line,) = of_request(log, "none-deployed")
    assert line["message"] == "request refused: no model is deployed yet; run jobs.deploy"
    assert (line["status"], line["level"]) == (503, "WARNING")
    assert not of_request(log, "lost")


def test_the_access_log_is_off_until_it_is_asked_for(tmp_path: Path, log: ProcessLog) -> None:
    storage = Storage(str(tmp_path / "storage"))
    publish(storage, {1: 1.0})

    async def scenario() -> None:
        router = Router(storage, make_replicas)
        await router.refresh()
        for app, name in (
            (app_over(router, storage), "unseen"),
            (app_over(router, storage, access_share=1.0), "seen"),
        ):
            given = {**RAW, "x-request-id": name}
            assert (await request(app, "POST", "/predict", IMAGE, given)).status == 200
            assert (await request(app, "GET", "/nowhere", b"", given)).status == 404

    asyncio.run(scenario())
    log.close()
    assert not of_request(log, "unseen")
    answered, missed = of_request(log, "seen")
    assert answered["ms"] > 0
    shown = {name: answered[name] for name in ("method", "path", "status", "caller")}
    assert shown == {"method": "POST", "path": "/predict", "status": 200, "caller": "anyone"}
    assert (answered["model"], answered["version"]) == ("shapes", 1)
    assert (missed["path"], missed["status"]) == ("/nowhere", 404)


def test_metrics_are_there_at_once_and_ask_for_a_key_where_keys_are(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    publish(storage, {1: 1.0})

    async def text(app: App, **headers: str) -> tuple[int, str]:
        answer = await request(app, "GET", "/metrics", b"", headers)
        assert answer.headers["content-type"].startswith(
            "text/plain; version=0.0.4" if answer.status == 200 else "application/json"
        )
        return answer.status, answer.body.decode()

    async def scenario() -> None:
        app = await gateway(storage)
        assert (await request(app, "POST", "/predict", IMAGE, RAW)).status == 200
        status, shown = await text(app)
        assert status == 200
        row = 'latency_seconds_count{gateway="replica",model="shapes",version="1"} 1.0'
        assert f"rayline_request_{row}" in shown
        key = keys.add_key(storage, "prometheus")
        locked = await gateway(storage)
        assert (await text(locked))[0] == 401
        assert (await text(locked, authorization=f"Bearer {key}"))[0] == 200

    asyncio.run(scenario())
    assert logging.getLogger("lib").handlers == []
