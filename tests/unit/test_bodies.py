"""Bodies that come slowly, in parts, never, or all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.serving.router import Router
from lib.storage import Storage
from serve_apps.asgi import App
from serve_apps.bodies import Bodies
from serve_apps.endpoints import Endpoints, routes
from tests.unit.serving_parts import make_replicas, publish, request

RAW = {"content-type": "application/octet-stream"}
IMAGE = bytes(24)


def run(
    tmp_path: Path, scenario: Callable[[App], Awaitable[None]], bodies: Bodies, **options: Any
) -> None:
    async def main() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100})
        router = Router(storage, make_replicas)
        await router.refresh()
        app = App(
            routes(Endpoints(router, storage)), title="t", description="d", bodies=bodies, **options
        )
        await scenario(app)

    asyncio.run(main())


class Upload:
    """A request whose body comes in parts, when the test says so; its answer."""

    def __init__(self, app: App, **headers: str) -> None:
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[Any] = []
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        raw.append((b"content-type", b"application/octet-stream"))
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": raw}
        self.task = asyncio.ensure_future(app(scope, self.parts.get, self._send))

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    async def part(self, body: bytes, *, is_last: bool = False) -> None:
        """Send a part, and let the server read it."""
        await self.parts.put({"type": "http.request", "body": body, "more_body": not is_last})
        for _ in range(5):
            await asyncio.sleep(0)

    async def status(self) -> int:
        """Wait for the answer."""
        await asyncio.wait_for(self.task, 30)
        return int(self.sent[0]["status"])


def test_requests_are_answered_while_more_uploads_wait_than_may_be_in_flight(
    tmp_path: Path,
) -> None:
    async def scenario(app: App) -> None:
        slow = [Upload(app) for _ in range(300)]
        for upload in slow:
            await upload.part(bytes(1))
        assert app.in_flight == 0
        for _ in range(20):
            assert (await request(app, "POST", "/predict", IMAGE, RAW)).status == 200
        for upload in slow:
            await upload.part(bytes(23), is_last=True)
        assert {await upload.status() for upload in slow} <= {200, 503}
        assert (app.in_flight, app._bodies.held_bytes) == (0, 0)

    run(tmp_path, scenario, Bodies(), max_in_flight=4)


@pytest.mark.parametrize("is_dripping", [True, False])
def test_a_body_that_does_not_end_is_a_408(tmp_path: Path, is_dripping: bool) -> None:
    async def scenario(app: App) -> None:
        upload = Upload(app)
        while is_dripping and not upload.task.done():
            await upload.part(bytes(1))
            await asyncio.sleep(0.02)
        assert await upload.status() == 408
        headers = dict(upload.sent[0]["headers"])
        assert headers[b"connection"] == b"close"
        assert app._bodies.held_bytes == 0
        assert (await request(app, "POST", "/predict", IMAGE, RAW)).status == 200

    limits = {"deadline_s": 0.3, "stall_s": 60.0} if is_dripping else {"stall_s": 0.1}
    run(tmp_path, scenario, Bodies(**limits))


def test_a_client_that_leaves_is_counted_as_such_and_not_as_the_version_s_error(
    tmp_path: Path,
) -> None:
    async def scenario(app: App) -> None:
        for parts in ((), (bytes(9),)):
            upload = Upload(app)
            for part in parts:
                await upload.part(part)
            await upload.parts.put({"type": "http.disconnect"})
            await asyncio.wait_for(upload.task, 30)
            assert upload.sent == []
        assert app.record.requests == {("", "", "anyone", 499): 2}
        assert app._bodies.held_bytes == 0

    run(tmp_path, scenario, Bodies())


def test_beyond_the_bound_on_bytes_only_large_bodies_are_refused(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        # What a client only claims to send is not counted.
        claims = [Upload(app, content_length=str(2**20)) for _ in range(9)]
        first, second = Upload(app), Upload(app)
        await first.part(bytes(600))
        await second.part(bytes(600))
        assert await second.status() == 503
        assert dict(second.sent[0]["headers"])[b"retry-after"] == b"1"
        assert (await request(app, "POST", "/predict", IMAGE, RAW)).status == 200
        await first.part(bytes(1), is_last=True)
        assert await first.status() == 422
        assert app._bodies.held_bytes == 0
        for upload in claims:
            upload.task.cancel()

    run(tmp_path, scenario, Bodies(max_held_bytes=1000))


def test_the_time_of_an_upload_is_not_the_version_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("serve_apps.asgi.time", SimpleNamespace(perf_counter=lambda: now_s))

    async def scenario(app: App) -> None:
        nonlocal now_s
        upload = Upload(app)
        await upload.part(bytes(20))
        now_s += 9
        await upload.part(bytes(4), is_last=True)
        assert await upload.status() == 200
        _, total = app.record.latency["shapes", "1"]
        assert total[0] == 0

    run(tmp_path, scenario, Bodies())
