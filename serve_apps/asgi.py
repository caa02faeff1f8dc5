"""The gateway's ASGI application: admits requests, calls their handlers, answers errors as JSON.

Predictions are routed and read here, by hand: a framework's router and request object would cost
more than the whole answer does. Starlette routes everything else.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import BaseModel
from starlette import routing
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.serving.bundle import Card
from lib.serving.feedback import PROBE_ID, REQUEST_ID, new_request_id
from lib.serving.keys import ANYONE, INTERNAL
from lib.serving.payload import PayloadError, decoded
from lib.serving.record import Record
from lib.serving.router import RETRY_AFTER_S
from lib.serving.tracing import HEADER, Trace, Tracing
from lib.watch.recorder import Recorder
from serve_apps import logs, openapi, pages
from serve_apps.bodies import Bodies, ClientGone
from serve_apps.browsers import BrowserRules

Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")
FAST_LANE = "rayline.fast_lane"
"""In the scope of a request that Serve's own wrapper did not see."""
UNKNOWN = "unknown"
"""Caller of a request without a valid key."""
CLIENT_GONE = 499
"""Counted as the status of a request whose client left before it had sent all; nginx's number."""
_REQUEST_ID = "rayline.request_id"
_IS_COUNTED = "rayline.is_counted"
_MIN_GZIP_BYTES = 1024


@dataclass(slots=True)
class Call:
    """One request, taken apart."""

    params: Mapping[str, str]
    headers: Mapping[bytes, bytes]
    body: bytes
    request_id: str
    """X-Request-Id, or a new one; that of the body, where a protocol has one there."""
    caller: str
    """Name of the API key, `anyone` where none is asked for."""
    card: Card | None = None
    """Of the version that answers, once it is chosen."""
    images: npt.NDArray[np.uint8] | None = None
    """What it is asked about, once that is known to be right."""
    probabilities: npt.NDArray[np.float32] | None = None
    """What it answered."""
    trace: Trace | None = None

    def header(self, name: bytes) -> str | None:
        """Return a header's value, None if it is absent or empty."""
        value = self.headers.get(name)
        return value.decode("latin-1") if value else None


class Asked(Protocol):
    """What of a request is counted and logged, whichever way it came."""

    request_id: str
    card: Card | None
    images: npt.NDArray[np.uint8] | None
    probabilities: npt.NDArray[np.float32] | None
    trace: Trace | None


@dataclass(slots=True)
class Reply:
    """One response."""

    body: bytes
    status: int = 200
    headers: list[Header] = field(default_factory=lambda: [JSON])


Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """A path, what handles it, and what the OpenAPI document says of it."""

    method: str
    path: str
    handler: Handler
    summary: str
    response: type[BaseModel] | None = None
    content_type: str = "application/json"
    """Of the answer."""
    request: Mapping[str, Any] | None = None
    """Content type → schema of the body."""
    is_body_required: bool = True
    errors: tuple[int, ...] = ()
    tag: str = "console"
    """Heading under which the OpenAPI document lists it."""
    scope: str | None = None
    """What an API key must allow; None: answered without one, and however much is in flight."""
    is_hot: bool = False
    """Whether it is routed by hand: only for what is asked thousands of times a second."""
    headers: tuple[str, ...] = ()
    """Request headers that it reads, beside X-Request-Id."""


def json_reply(content: Any, status: int = 200) -> Reply:
    """Return a JSON response."""
    return Reply(orjson.dumps(content), status)


Authenticate = Callable[[Mapping[bytes, bytes]], str]
"""The name of the caller by the request's headers; raises PayloadError 401."""


def request_id_of(given: str | None) -> str:
    """Return a client's id for its request, or a new one if it gave none or an unusable one."""
    return given if given and REQUEST_ID.fullmatch(given) else new_request_id()


def own_request_id(request_id: str, caller: str) -> str:
    """Return a request's id, or a new one for that of the line's own requests if it is no such.

    Requests of that id are not logged, which only the line itself may ask for.
    """
    is_taken = request_id == PROBE_ID and caller not in (INTERNAL, ANYONE)
    return new_request_id() if is_taken else request_id


def anyone(headers: Mapping[bytes, bytes]) -> str:
    """Let everybody in."""
    return ANYONE


class App:
    """An ASGI application over a table of routes."""

    def __init__(
        self,
        routes: list[Route],
        *,
        title: str,
        description: str,
        authenticate: Authenticate = anyone,
        max_in_flight: int = 128,
        recorder: Recorder | None = None,
        browsers: BrowserRules | None = None,
        bodies: Bodies | None = None,
        access_share: float = 0.0,
        tracing: Tracing | None = None,
    ) -> None:
        document = openapi.document(routes, title=title, description=description)
        self._document = orjson.dumps(document)
        described = Route(
            method="GET", path="/openapi.json", handler=self._openapi, summary="OpenAPI."
        )
        self._hot_paths: dict[str, Route] = {}
        self._hot_patterns: list[tuple[re.Pattern[str], Route]] = []
        for route in routes:
            if route.is_hot and "{" not in route.path:
                self._hot_paths |= {route.path: route, f"{route.path}/": route}
            elif route.is_hot:
                pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route.path)
                self._hot_patterns.append((re.compile(f"{pattern}/?"), route))
        self._others: ASGIApp = Starlette(
            routes=[
                *(
                    routing.Route(route.path, _Endpoint(self, route), methods=[route.method])
                    for route in [*routes, described]
                ),
                *pages.routes(),
            ],
            middleware=[
                Middleware(
                    GZipMiddleware,
                    minimum_size=_MIN_GZIP_BYTES,
                    compresslevel=6,
                    # A file comes in parts of 64 KiB; one of them takes milliseconds.
                    thread_minimum_size=2**15,
                )
            ],
            exception_handlers={HTTPException: self._refuse, Exception: self._refuse},
        )
        self._browsers = browsers or BrowserRules()
        self._bodies = bodies or Bodies()
        self._routed = self._browsers.with_cors(self._route)
        self._authenticate = authenticate
        self._max_in_flight = max_in_flight
        self.in_flight = 0
        """Requests whose body is complete and whose answer is not."""
        self.record = Record()
        self.recorder = recorder
        self.access_share = access_share
        self.tracing = tracing or Tracing()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            await self._routed(scope, receive, send)
        elif scope["type"] == "websocket":
            # Before it is accepted, so the answer is a plain 403.
            await send({"type": "websocket.close", "code": 1000, "reason": "there is none here"})

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if scope["method"] == "POST":
            if (route := self._hot_paths.get(path)) is not None:
                await self.answer(route, {}, scope, receive, send)
                return
            for pattern, route in self._hot_patterns:
                if match := pattern.fullmatch(path):
                    await self.answer(route, match.groupdict(), scope, receive, send)
                    return
        await self._route_others(path, scope, receive, send)

    async def _route_others(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Starlette route a request; name and count what did not go through `answer`."""
        request_id = request_id_of(
            dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        )
        path = path if path == "/" else path.removesuffix("/")
        scope = {**scope, "path": path, "root_path": "", _REQUEST_ID: request_id}

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and _IS_COUNTED not in scope:
                self.record.add(UNKNOWN, message["status"], None, 0.0)
                if self.access_share:
                    what = (request_id, scope["method"], path, message["status"])
                    self.log_access(None, *what, UNKNOWN, 0.0)
                if FAST_LANE in scope:
                    name = (b"x-request-id", request_id.encode())
                    message["headers"] = [*message["headers"], name]
            await send(message)

        await self._others(scope, receive, counted)

    async def _refuse(self, request: Request, error: Exception) -> Response:
        """Answer what no route takes."""
        path, request_id = request.url.path, request.scope[_REQUEST_ID]
        status, headers = 500, {}
        message = "the server failed on this request; its log has the cause under request_id"
        if isinstance(error, HTTPException):
            status, message = error.status_code, f"there is no {path}; see /docs"
        if status == 405:
            allowed = str((error.headers or {})["Allow"]).split(", ")  # type: ignore[attr-defined]
            headers["Allow"] = ", ".join(sorted({*allowed, "OPTIONS"}))
            message = f"{path} takes {', '.join(sorted(allowed))}, not {request.method}"
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        if status >= 500:
            logs.failed(request_id, status, error)
        content = orjson.dumps({"error": message, "request_id": request_id})
        return Response(content, status, headers, media_type="application/json")

    async def answer(
        self, route: Route, params: Mapping[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer a request with the handler of its route."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given_id = headers.get(b"x-request-id")
        request_id = request_id_of(given_id.decode("latin-1")) if given_id else new_request_id()
        start_s, held_bytes = time.perf_counter(), 0
        caller, call, trace = UNKNOWN, None, None
        if self.tracing.is_on or HEADER in headers:
            trace = self.tracing.begin(headers, f"{route.method} {route.path}")
        try:
            if route.scope is not None:
                self._browsers.check(scope["method"], headers)
                caller = self._authenticate(headers)
                request_id = own_request_id(request_id, caller)
                self._check_room(1)
            body: bytes = b""
            if route.method == "POST":
                body, held_bytes = await self._bodies.read(headers, receive)
                # The upload is the client's time.
                start_s = time.perf_counter()
                if trace:
                    trace.mark("receive")
            self.in_flight += 1
            try:
                if route.scope is not None:
                    self._check_room(0)
                if body and (encoding := headers.get(b"content-encoding")):
                    # In a thread: a few bytes can hold all that the limit allows.
                    body = await asyncio.to_thread(decoded, body, encoding)
                    self._bodies.hold(len(body))
                    held_bytes += len(body)
                call = Call(params, headers, body, request_id, caller, trace=trace)
                reply = await route.handler(call)
            finally:
                self.in_flight -= 1
        except PayloadError as error:
            request_id = call.request_id if call else request_id
            reply = _error_reply(error, headers, request_id)
            if error.status >= 500:
                logs.failed(request_id, error.status, error)
        except ClientGone:
            self.count(None, caller, CLIENT_GONE, 0.0)
            if trace:
                self.end_trace(trace, None, request_id, CLIENT_GONE)
            return
        except Exception as error:
            request_id = call.request_id if call else request_id
            logs.failed(request_id, 500, error)
            message = "the server failed on this request; its log has the cause under request_id"
            reply = json_reply({"error": message, "request_id": request_id}, 500)
        finally:
            self._bodies.release(held_bytes)
        seconds = time.perf_counter() - start_s
        self.count(call, caller, reply.status, seconds)
        scope[_IS_COUNTED] = True
        if self.access_share:
            what = (scope["method"], scope["path"])
            self.log_access(
                call, call.request_id if call else request_id, *what, reply.status, caller, seconds
            )
        reply.headers.append((b"content-length", b"%d" % len(reply.body)))
        if trace:
            reply.headers.append((HEADER, trace.header))
            self.end_trace(trace, call, call.request_id if call else request_id, reply.status)
        if FAST_LANE in scope:
            # Elsewhere Serve adds it.
            request_id = call.request_id if call else request_id
            reply.headers.append((b"x-request-id", request_id.encode("latin-1")))
        await send(
            {"type": "http.response.start", "status": reply.status, "headers": reply.headers}
        )
        await send(
            {
                "type": "http.response.body",
                # The length of a HEAD's answer is that of the GET's.
                "body": b"" if scope["method"] == "HEAD" else reply.body,
            }
        )

    def admit(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the caller's name; raise PayloadError 401, or 503 if too much is in flight."""
        caller = self._authenticate(headers)
        self._check_room(0)
        return caller

    def _check_room(self, num_more: int) -> None:
        if self.in_flight + num_more > self._max_in_flight:
            raise PayloadError(503, f"{self._max_in_flight} requests are in flight here; try again")

    def count(self, asked: Asked | None, caller: str, status: int, seconds: float) -> None:
        """Count an answer, and log it if a version was asked for it."""
        if asked is None or asked.card is None:
            self.record.add(caller, status, None, seconds)
            return
        num_images = 0 if asked.images is None else len(asked.images)
        self.record.add(caller, status, asked.card, seconds, num_images)
        if asked.images is None or self.recorder is None or asked.request_id == PROBE_ID:
            return
        self.recorder.add(
            asked.card,
            asked.images,
            asked.probabilities if status == 200 else None,
            request_id=asked.request_id,
            caller=caller,
            latency_s=seconds,
            status=status,
            trace_id=asked.trace.trace_id if asked.trace else None,
        )

    def end_trace(self, trace: Trace, asked: Asked | None, request_id: str, status: int) -> None:
        """Send the spans of a request that is answered, if there are any."""
        card = asked.card if asked else None
        self.tracing.finish(
            trace,
            status,
            request_id=request_id,
            model=card.name if card else None,
            version=card.version if card else None,
        )

    def log_access(
        self,
        asked: Asked | None,
        request_id: str,
        method: str,
        path: str,
        status: int,
        caller: str,
        seconds: float,
    ) -> None:
        """Log a request, or not, by its share; callers look first whether `access_share` is 0."""
        card = asked.card if asked else None
        logs.access(
            self.access_share,
            request_id=request_id,
            method=method,
            path=path,
            status=status,
            caller=caller,
            ms=round(seconds * 1000, 3),
            model=card.name if card else None,
            version=card.version if card else None,
            trace_id=asked.trace.trace_id if asked and asked.trace else None,
        )

    async def _openapi(self, call: Call) -> Reply:
        return Reply(self._document)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """Starlette's side of a route that is not routed by hand."""

    app: App
    route: Route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app.answer(self.route, scope["path_params"], scope, receive, send)


def _error_reply(error: PayloadError, headers: Mapping[bytes, bytes], request_id: str) -> Reply:
    reply = json_reply({"error": error.message, "request_id": request_id}, error.status)
    if error.status == 503:
        reply.headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    elif error.status == 401:
        reply.headers.append((b"www-authenticate", b"Bearer"))
    elif error.status == 408:
        # The rest of the body may still come; nobody reads it.
        reply.headers.append((b"connection", b"close"))
    elif error.status == 415 and b"content-encoding" in headers:
        reply.headers.append((b"accept-encoding", b"gzip, deflate"))
    return reply
