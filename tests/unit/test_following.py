"""How a gateway follows the policy: what it can't open, what drains, when it is ready."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray import serve

from lib.serving import policy
from lib.serving.bundle import Card
from lib.serving.router import Images, Probabilities, Replicas, Router
from lib.serving.traffic import Policy
from lib.storage import Storage
from serve_apps import logs
from serve_apps.gateway import Gateway
from tests.unit.serving_parts import app_over, by_brightness, make_replicas, publish, request

RAW = {"content-type": "application/octet-stream"}
IMAGE = bytes([1] + [0] * 23)


def test_a_model_whose_bundle_is_missing_takes_no_other_model_down(tmp_path: Path) -> None:
    opened: list[int] = []
    closed: list[int] = []

    async def counted(card: Card, bundle: str, placement: str) -> Replicas:
        opened.append(card.version)
        made = await make_replicas(card, bundle, placement)
        return replace(made, close=lambda: closed.append(card.version))

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 50, 2: 50})
        moved = tmp_path / "moved"
        (missing,) = (tmp_path / "models" / "shapes").glob("2-*")
        missing.rename(moved)
        router = Router(storage, counted)
        assert await router.refresh()
        app = app_over(router, storage)
        for n in range(20):
            headers = {**RAW, "X-Routing-Key": f"user-{n}"}
            assert (await request(app, "POST", "/predict", IMAGE, headers)).status == 200
        assert (await request(app, "GET", "/v2/models/shapes/versions/2/ready")).status == 503
        index = (await request(app, "POST", "/v2/repository/index")).json
        assert [(entry["version"], entry["state"]) for entry in index] == [
            ("1", "READY"),
            ("2", "UNAVAILABLE"),
        ]
        body = json.dumps({"request_id": "abc", "label": 1}).encode()
        as_json = {"content-type": "application/json"}
        assert (await request(app, "POST", "/feedback", body, as_json)).status == 200
        moved.rename(missing)
        async with asyncio.timeout(20):
            while not router.table.is_ready("shapes", "2"):
                # The same policy, so nothing to acknowledge.
                assert not await router.refresh()
        assert opened == [1, 2]
        publish(storage, {1: 100})
        assert await router.refresh()
        await router.drained()
        assert closed == [2]

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [0, 1])
def test_a_version_without_a_replica_is_up_and_not_ready(tmp_path: Path, number: int) -> None:
    async def second_at(card: Card, bundle: str, placement: str) -> Replicas:
        made = await make_replicas(card, bundle, placement)
        return replace(made, num_ready=lambda: number if card.version == 2 else 1)

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 0, 2: 100})
        router = Router(storage, second_at)
        await router.refresh()
        app = app_over(router, storage)

        async def is_ready(path: str) -> bool:
            return (await request(app, "GET", path)).status == 200

        # Version 1 answers, but only requests that name it.
        assert await is_ready("/v2/models/shapes/versions/1/ready")
        for path in ("/v2/models/shapes/versions/2/ready", "/v2/models/shapes/ready"):
            assert await is_ready(path) == bool(number)
        assert await is_ready("/v2/health/ready") == bool(number)
        # A request is what brings a version back from zero.
        assert (await request(app, "POST", "/predict", IMAGE, RAW)).status == 200
        assert (await request(app, "GET", "/v2/models/shapes/versions/3/ready")).status == 404
        index = (await request(app, "POST", "/v2/repository/index")).json
        states = {entry["version"]: entry["state"] for entry in index}
        assert states == {"1": "READY", "2": "READY" if number else "UNAVAILABLE"}

    asyncio.run(scenario())


def test_gateways_follow_while_something_drains_and_acknowledge_what_has_drained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="gateway-1"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(logs, "start_for_replica", lambda: None)

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        hangs = asyncio.Event()

        async def second_hangs(card: Card, bundle: str, placement: str) -> Replicas:
            async def predict(images_NHWC: Images) -> Probabilities:
                if card.version == 2:
                    await hangs.wait()
                return by_brightness(images_NHWC)

            return Replicas(predict)

        # Without Serve's wrapper around the class.
        gateway = object.__new__(Gateway)
        super(Gateway, gateway).__init__(str(tmp_path))
        # Nothing is deployed, so there is nothing to wait for.
        await gateway.check_health()
        router = gateway._router
        router._make_replicas = second_hangs
        publish(storage, {1: 50, 2: 50})
        looks = 0

        def looked(storage: Storage) -> Policy | None:
            nonlocal looks
            looks += 1
            return policy.current(storage)

        monkeypatch.setattr("serve_apps.gateway.current", looked)
        healthy = asyncio.create_task(gateway.check_health())
        async with asyncio.timeout(20):
            while looks < 2:
                await asyncio.sleep(0.01)
        assert not healthy.done()
        following = asyncio.create_task(gateway._follow_policy())

        async def follows(generation: int) -> None:
            async with asyncio.timeout(20):
                while not router.has_table or router.table.policy.generation < generation:
                    await asyncio.sleep(0.01)

        async def acknowledges(generation: int) -> None:
            async with asyncio.timeout(20):
                while policy.acknowledged(storage, "gateway-1") < generation:
                    await asyncio.sleep(0.01)

        await follows(1)
        await acknowledges(1)
        await healthy
        image = np.zeros((1, 4, 6, 1), np.uint8)
        late = asyncio.create_task(router.answer(router.table.pick(None, "2", ""), image))
        await asyncio.sleep(0)
        publish(storage, {1: 100})
        await follows(2)
        publish(storage, {1: 100, 3: 0})
        await follows(3)
        assert policy.acknowledged(storage, "gateway-1") == 1
        hangs.set()
        assert (await late).shape == (1, 3)
        await acknowledges(3)
        following.cancel()

    asyncio.run(scenario())
