"""What pages of other sites may do, and which names the gateway answers to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lib.config import allowed_hosts, cors_origins
from lib.errors import ConfigError
from lib.serving.router import Router
from lib.storage import Storage
from serve_apps.asgi import App
from serve_apps.browsers import BrowserRules
from serve_apps.endpoints import Endpoints, routes
from tests.unit.serving_parts import make_replicas, publish, request

RAW = {"content-type": "application/octet-stream", "Host": "127.0.0.1:8000"}
IMAGE = bytes(24)
INFER = "/v2/models/shapes/infer"
OTHER, OURS = "https://evil.example", "https://app.example.com"


def run(tmp_path: Path, env: dict[str, str], scenario: Callable[[App], Awaitable[None]]) -> None:
    async def main() -> None:
        storage = Storage(str(tmp_path))
        publish(storage, {1: 100})
        router = Router(storage, make_replicas)
        await router.refresh()
        table = routes(Endpoints(router, storage))
        browsers = BrowserRules.from_env(env)
        await scenario(App(table, title="t", description="d", browsers=browsers))

    asyncio.run(main())


LOOPBACK = {"RAYLINE_HTTP_HOST": "127.0.0.1"}


@pytest.mark.parametrize(
    ("headers", "is_answered"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://proxy:80"}, True),
        ({"Origin": "http://127.0.0.1:8000"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": OTHER}, False),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:3000"}, False),
        ({"Origin": OTHER}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://line.example.com", "X-Forwarded-Host": "line.example.com"}, True),
    ],
)
def test_pages_of_other_sites_are_refused(
    tmp_path: Path, headers: dict[str, str], is_answered: bool
) -> None:
    async def scenario(app: App) -> None:
        for method, path in (
            ("POST", "/predict"),
            ("POST", INFER),
            ("POST", "/feedback"),
            ("GET", "/traffic"),
            ("GET", "/stats"),
            ("GET", "/samples/shapes"),
        ):
            body = IMAGE if method == "POST" else b""
            answer = await request(app, method, path, body, {**RAW, **headers})
            assert (answer.status != 403) == is_answered, (path, answer.body)
        assert (await request(app, "GET", "/v2/health/ready", b"", headers)).status == 200
        assert (await request(app, "GET", "/", b"", headers)).status == 200

    run(tmp_path, LOOPBACK, scenario)


def test_a_link_from_another_site_can_be_followed(tmp_path: Path) -> None:
    followed = {**RAW, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}

    async def scenario(app: App) -> None:
        assert (await request(app, "GET", "/traffic", b"", followed)).status == 200
        # A form that is sent is one too.
        assert (await request(app, "POST", "/predict", IMAGE, followed)).status == 403

    run(tmp_path, LOOPBACK, scenario)


def test_pages_of_allowed_origins_may_ask_and_read(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        page = {**RAW, "Sec-Fetch-Site": "cross-site", "Origin": OURS}
        for path, status in (("/predict", 200), (INFER, 400), ("/nothing", 404)):
            answer = await request(app, "POST", path, IMAGE, page)
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == OURS
            assert "X-Model-Version" in answer.headers["access-control-expose-headers"]
        other = await request(app, "POST", "/predict", IMAGE, {**page, "Origin": OTHER})
        assert other.status == 403
        assert "access-control-allow-origin" not in other.headers
        preflight = {
            "Origin": OURS,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type, x-api-key, x-model-version",
        }
        allowed = await request(app, "OPTIONS", "/predict", b"", preflight)
        assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, OURS)
        refused = await request(app, "OPTIONS", "/predict", b"", {**preflight, "Origin": OTHER})
        assert refused.status == 400

    run(tmp_path, {**LOOPBACK, "RAYLINE_CORS_ORIGINS": f"{OURS}, http://b.example"}, scenario)


def test_without_the_setting_no_origin_is_allowed(tmp_path: Path) -> None:
    async def scenario(app: App) -> None:
        preflight = {"Origin": OURS, "Access-Control-Request-Method": "POST"}
        answer = await request(app, "OPTIONS", "/predict", b"", preflight)
        assert (answer.status, answer.headers["allow"]) == (204, "OPTIONS, POST")
        assert not [name for name in answer.headers if name.startswith("access-control")]

    run(tmp_path, LOOPBACK, scenario)


@pytest.mark.parametrize(
    ("env", "host", "is_answered"),
    [
        (LOOPBACK, "localhost:8000", True),
        (LOOPBACK, "127.0.0.1:8000", True),
        (LOOPBACK, "10.1.2.3", True),
        (LOOPBACK, "[::1]:8000", True),
        (LOOPBACK, socket.gethostname(), True),
        (LOOPBACK, "rebound.evil.example:8000", False),
        (LOOPBACK, "127.0.0.1.evil.example", False),
        (LOOPBACK, "localhost@evil.example", False),
        (LOOPBACK, "[:::", False),
        ({**LOOPBACK, "RAYLINE_ALLOWED_HOSTS": "line.example.com"}, "line.example.com", True),
        ({**LOOPBACK, "RAYLINE_ALLOWED_HOSTS": "*.example.com"}, "LINE.example.com:80", True),
        ({**LOOPBACK, "RAYLINE_ALLOWED_HOSTS": "*.example.com"}, "example.com.evil", False),
        ({**LOOPBACK, "RAYLINE_SERVE_URL": "http://models:8000"}, "models:8000", True),
        # Open to others: any name may stand in front of it, unless some are given.
        ({"RAYLINE_HTTP_HOST": "0.0.0.0"}, "line.example.com", True),
        ({}, "line.example.com", True),
        ({"RAYLINE_HTTP_HOST": "0.0.0.0", "RAYLINE_ALLOWED_HOSTS": "a.b"}, "c.b", False),
    ],
)
def test_a_gateway_on_loopback_answers_to_this_machine_s_names(
    tmp_path: Path, env: dict[str, str], host: str, is_answered: bool
) -> None:
    async def scenario(app: App) -> None:
        for _ in range(2):
            for method, path in (("POST", "/predict"), ("GET", "/traffic")):
                body = IMAGE if method == "POST" else b""
                answer = await request(app, method, path, body, {**RAW, "Host": host})
                assert answer.status == (200 if is_answered else 403)
                assert is_answered or "RAYLINE_ALLOWED_HOSTS" in answer.json["error"]

    run(tmp_path, env, scenario)


@pytest.mark.parametrize(
    ("read", "env"),
    [
        (cors_origins, {"RAYLINE_CORS_ORIGINS": "app.example.com"}),
        (cors_origins, {"RAYLINE_CORS_ORIGINS": "https://app.example.com/"}),
        (allowed_hosts, {"RAYLINE_ALLOWED_HOSTS": "https://a.b"}),
        (allowed_hosts, {"RAYLINE_ALLOWED_HOSTS": "a.b:80"}),
    ],
)
def test_a_setting_that_can_match_nothing_is_refused(read: Any, env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(env))):
        read(env)
