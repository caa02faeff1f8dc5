"""Who may ask, how much is admitted, and copies of requests that reach no caller."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lib.errors import ServingError
from lib.serving import policy
from lib.serving.bundle import Card, write_bundle
from lib.serving.feedback import PROBE_ID
from lib.serving.keys import (
    INTERNAL,
    KEYS_FILE,
    add_key,
    authenticate,
    internal_headers,
    list_keys,
    name_of_caller,
    read_keys,
    remove_key,
)
from lib.serving.payload import PayloadError
from lib.serving.router import Images, Probabilities, Replicas, Router
from lib.serving.traffic import COLOCATED, ISOLATED, ModelTraffic
from lib.storage import Storage
from lib.watch.predictions import read
from lib.watch.segments import MAX_US
from serve_apps.asgi import App
from serve_apps.endpoints import Endpoints, routes
from tests.unit.serving_parts import (
    by_brightness,
    card,
    gateway,
    make_replicas,
    publish,
    request,
)

IMAGE = bytes(24)
RAW = {"content-type": "application/octet-stream"}


def test_without_keys_everybody_may_ask(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert read_keys(storage) is None
    assert authenticate(None, {}) == "anyone"
    assert internal_headers(storage) == {}
    assert name_of_caller(storage, None) is None


def test_a_key_is_known_by_its_name_in_either_header_until_it_is_removed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    day, night = add_key(storage, "day"), add_key(storage, "night")
    keys = read_keys(storage)
    assert authenticate(keys, {b"authorization": f"Bearer {day}".encode()}) == "day"
    assert authenticate(keys, {b"x-api-key": night.encode()}) == "night"
    assert name_of_caller(storage, night) == "night"
    for wrong in (
        {},
        {b"x-api-key": b""},
        {b"x-api-key": day[:-1].encode()},
        {b"authorization": f"Basic {day}".encode()},
    ):
        with pytest.raises(PayloadError) as caught:
            authenticate(keys, wrong)
        assert caught.value.status == 401
    assert set(list_keys(storage)) == {"day", "night"}
    remove_key(storage, "day")
    remove_key(storage, "night")
    # No key is left: nobody gets in, but for the line itself.
    with pytest.raises(PayloadError):
        authenticate(read_keys(storage), {b"x-api-key": day.encode()})
    own = internal_headers(storage)["X-API-Key"].encode()
    assert authenticate(read_keys(storage), {b"x-api-key": own}) == INTERNAL


def test_no_key_is_kept_and_bad_names_are_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    key = add_key(storage, "day")
    assert key not in (tmp_path / KEYS_FILE).read_text()
    for name in ("day", "a b", "", "anyone", INTERNAL):
        with pytest.raises(ServingError):
            add_key(storage, name)
    with pytest.raises(ServingError, match="there are: day"):
        remove_key(storage, "nigth")
    with pytest.raises(ServingError, match="RAYLINE_API_KEY"):
        name_of_caller(storage, "wrong")


def test_keys_that_are_added_at_once_all_work(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    names = [f"caller-{number}" for number in range(16)]
    with ThreadPoolExecutor(len(names)) as threads:
        keys = list(threads.map(lambda name: add_key(storage, name), names))
    assert sorted(list_keys(storage)) == sorted(names)
    assert [name_of_caller(storage, key) for key in keys] == names
    # One removed beside one added: neither change is lost.
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: remove_key(storage, name), names[:8]))
    assert sorted(list_keys(storage)) == sorted(names[8:])


def test_a_gateway_asks_for_keys_but_not_for_docs_and_health(tmp_path: Path) -> None:
    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100})
        key = add_key(storage, "day")
        app = await gateway(storage)
        for path in ("/docs", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready"):
            assert (await request(app, "GET", path)).status == 200
        refused = await request(app, "POST", "/predict", IMAGE, RAW)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert (await request(app, "GET", "/traffic")).status == 401
        pinned = {**RAW, "x-api-key": key, "x-model-version": "1"}
        assert (await request(app, "POST", "/predict", IMAGE, pinned)).status == 200
        assert app.record.requests["shapes", "1", "day", 200] == 1
        assert app.record.requests["", "", "unknown", 401] == 2

    asyncio.run(scenario())


def test_only_the_line_itself_can_ask_without_being_logged(tmp_path: Path) -> None:
    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100})
        key = add_key(storage, "day")
        app = await gateway(storage)
        probe = {**RAW, "X-Request-Id": PROBE_ID}
        own = {**probe, **internal_headers(storage)}
        assert (await request(app, "POST", "/predict", IMAGE, own)).json["request_id"] == PROBE_ID
        caller = {**probe, "X-API-Key": key}
        answer = await request(app, "POST", "/predict", IMAGE, caller)
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 4, 6, 1], "data": [0] * 24}
        body = json.dumps({"id": PROBE_ID, "inputs": [tensor]}).encode()
        refused = await request(app, "POST", "/v2/models/shapes/infer", body, {"X-API-Key": key})
        assert refused.status == 400
        assert app.recorder is not None
        await app.recorder.flush()
        log = read(storage, "shapes", start_us=0, end_us=MAX_US)
        assert log["request_id"].to_pylist() == [answer.json["request_id"]]
        assert answer.json["request_id"] != PROBE_ID

    asyncio.run(scenario())


def test_beyond_the_bound_requests_are_refused_at_once_and_the_others_answered(
    tmp_path: Path,
) -> None:
    gate = asyncio.Event()

    async def slow(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            await gate.wait()
            return by_brightness(images_NHWC)

        return Replicas(predict)

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100})
        router = Router(storage, slow)
        await router.refresh()
        app = App(routes(Endpoints(router, storage)), title="t", description="d", max_in_flight=3)
        admitted = [
            asyncio.ensure_future(request(app, "POST", "/predict", IMAGE, RAW)) for _ in range(3)
        ]
        await asyncio.sleep(0)
        refused = await asyncio.wait_for(request(app, "POST", "/predict", IMAGE, RAW), 1)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert (await request(app, "GET", "/v2/health/live")).status == 200
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*admitted)] == [200] * 3
        assert app.in_flight == 0

    asyncio.run(scenario())


def shadowed(storage: Storage, *, placement: str = ISOLATED, percent: float = 100) -> None:
    bundles = {number: write_bundle(storage, card(number), b"", b"") for number in (1, 2)}
    traffic = ModelTraffic(
        weights={1: 100}, bundles=bundles, champion=1, placement=placement, shadows={2: percent}
    )
    policy.commit(
        storage, None, {"shapes": traffic}, default_model="shapes", who="test", why="test"
    )


async def ask(router: Router, storage: Storage, count: int) -> None:
    app = App(routes(Endpoints(router, storage)), title="t", description="d")
    for number in range(count):
        answer = await request(app, "POST", "/predict", bytes([number % 256]) + bytes(23), RAW)
        assert (answer.status, answer.json["model_version"]) == (200, 1)


def test_a_shadow_gets_copies_that_are_compared_and_kept(tmp_path: Path) -> None:
    async def differing(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            # The shadow says class 0 to everything: right for one of three.
            return by_brightness(images_NHWC if card.version == 1 else np.zeros_like(images_NHWC))

        return Replicas(predict)

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        shadowed(storage)
        router = Router(storage, differing)
        await router.refresh()
        await ask(router, storage, 9)
        await router.table.versions["shapes", 2].batcher.wait_idle()
        await asyncio.sleep(0)
        count = router.shadows.counts()["shapes/2"]
        assert (count["compared"], count["agreed"], count["failed"]) == (9, 3, 0)
        await router.recorder.flush()
        rows = read(storage, "shapes", start_us=0, end_us=MAX_US).to_pylist()
        # Callers asked by an application that logs nothing, so these are the shadow's alone.
        assert [(row["version"], row["shadow"], row["predicted"]) for row in rows] == [
            (2, True, 0)
        ] * 9
        assert len({row["request_id"] for row in rows}) == 9
        assert {row["caller"] for row in rows} == {"anyone"}
        assert all(row["latency_ms"] > 0 and row["image"] is None for row in rows)

    asyncio.run(scenario())


@pytest.mark.parametrize("is_slow", [True, False])
def test_a_shadow_that_hangs_or_fails_reaches_no_caller(tmp_path: Path, is_slow: bool) -> None:
    async def bad_shadow(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            if card.version == 2 and is_slow:
                await asyncio.Event().wait()
            if card.version == 2:
                raise RuntimeError("broken")
            return by_brightness(images_NHWC)

        return Replicas(predict)

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        shadowed(storage)
        router = Router(storage, bad_shadow)
        await router.refresh()
        await asyncio.wait_for(ask(router, storage, 3000), 60)
        count = router.shadows.counts()["shapes/2"]
        assert count["compared"] == 0
        assert count["dropped" if is_slow else "failed"] > 0
        if not is_slow:
            await router.table.versions["shapes", 2].batcher.wait_idle()
            await asyncio.sleep(0)
        await router.recorder.flush()
        rows = read(storage, "shapes", start_us=0, end_us=MAX_US).to_pylist()
        assert len(rows) == (0 if is_slow else 3000)
        assert {(row["predicted"], row["status"]) for row in rows} <= {(-1, 500)}

    asyncio.run(scenario())


def test_a_shadow_that_leaves_gets_no_more_copies_and_what_waits_for_it_is_dropped(
    tmp_path: Path,
) -> None:
    gates = {1: asyncio.Event(), 2: asyncio.Event()}

    async def gated(card: Card, bundle: str, placement: str) -> Replicas:
        async def predict(images_NHWC: Images) -> Probabilities:
            await gates[card.version].wait()
            return by_brightness(images_NHWC)

        return Replicas(predict)

    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        shadowed(storage)
        router = Router(storage, gated)
        await router.refresh()
        gates[1].set()
        # One copy is in flight, the others wait for it.
        await ask(router, storage, 5)
        gates[1].clear()
        late = asyncio.create_task(ask(router, storage, 1))
        await asyncio.sleep(0.01)
        base = policy.current(storage)
        assert base
        alone = replace(
            base.models["shapes"], shadows={}, bundles={1: base.models["shapes"].bundles[1]}
        )
        policy.commit(
            storage, base, {"shapes": alone}, default_model="shapes", who="test", why="test"
        )
        assert await router.refresh()
        gates[1].set()
        await late
        gates[2].set()
        await asyncio.wait_for(router.drained(), 20)
        await asyncio.sleep(0)
        count = router.shadows.counts()["shapes/2"]
        assert count == {"compared": 1, "agreed": 1, "dropped": 4, "failed": 0}

    asyncio.run(scenario())


def test_a_shadow_gets_its_share_and_never_runs_inside_a_gateway(tmp_path: Path) -> None:
    async def scenario() -> None:
        storage = Storage(str(tmp_path))
        shadowed(storage, placement=COLOCATED, percent=25)
        router = Router(storage, make_replicas)
        await router.refresh()
        placements = {number: v.placement for (_, number), v in router.table.versions.items()}
        assert placements == {1: COLOCATED, 2: ISOLATED}
        await ask(router, storage, 2)
        for _ in range(4):
            await ask(router, storage, 250)
        await router.table.versions["shapes", 2].batcher.wait_idle()
        await asyncio.sleep(0)
        assert 180 < router.shadows.counts()["shapes/2"]["compared"] < 320

    asyncio.run(scenario())
