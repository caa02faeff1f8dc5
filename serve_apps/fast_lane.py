"""The fast lane: the gateway answers before Serve's request wrapper, versions answer nobody.

In front of a replica's HTTP server Ray takes Starlette middlewares from a function that
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names; `lib.serving.plan` sets it for our applications.
Serve's own wrapper starts a context, two tasks, metrics and a log line for every request, which
takes several times longer than the answer itself. What it would do and is needed, the gateway does:
request ids, errors, bounds on what is in flight, and the measure that autoscaling goes by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import orjson
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from serve_apps.asgi import FAST_LANE, JSON

Answer = Callable[[Scope, Receive, Send], Awaitable[None]]

_REFUSAL = orjson.dumps({"error": "this is a replica, not an address; ask the gateway"})
# Health checks of HAProxy and Serve's own paths.
_OF_SERVE = "/-/"


@dataclass(slots=True)
class _Gateway:
    app: Answer
    loop: asyncio.AbstractEventLoop


_gateway: _Gateway | None = None


def register(app: Answer) -> None:
    """Make this process a gateway whose requests go to `app`; call it in the app's event loop."""
    global _gateway
    _gateway = _Gateway(app, asyncio.get_running_loop())


class FastLane:
    """Middleware in front of everything that a replica's HTTP server does."""

    def __init__(self, app: Answer, *, refuses: bool) -> None:
        self._app = app
        self._refuses = refuses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or leave the request to Serve."""
        if scope["type"] == "websocket":
            # Serve's own wrapper would fail on it; closed before it is accepted, it is a plain 403.
            await send({"type": "websocket.close", "code": 1000, "reason": "there is none here"})
        elif scope["type"] != "http" or scope["path"].startswith(_OF_SERVE):
            await self._app(scope, receive, send)
        elif self._refuses:
            length = (b"content-length", str(len(_REFUSAL)).encode())
            start = {"type": "http.response.start", "status": 403, "headers": [JSON, length]}
            await send(start)
            await send({"type": "http.response.body", "body": _REFUSAL})
        elif _gateway is not None and _gateway.loop is asyncio.get_running_loop():
            scope[FAST_LANE] = True
            await _gateway.app(scope, receive, send)
        else:
            # A cluster whose Serve keeps user code on a loop of its own: slower, but right.
            await self._app(scope, receive, send)


def gateway() -> list[Middleware]:
    """Return the middlewares of a gateway's replicas."""
    return [Middleware(FastLane, refuses=False)]


def version() -> list[Middleware]:
    """Return the middlewares of a version's replicas, which only handle calls may reach."""
    return [Middleware(FastLane, refuses=True)]
