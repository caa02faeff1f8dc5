"""The gateway's ASGI side: routes, body limits, errors as JSON, the OpenAPI document.

A framework's router, request object and validation would cost more than the whole answer does, so
requests are taken apart here; FastAPI only writes the OpenAPI document, from the same table.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import FastAPI
from pydantic import BaseModel

from lib.config import MAX_BODY_BYTES
from lib.serving.bundle import Card
from lib.serving.feedback import PROBE_ID, REQUEST_ID, new_request_id
from lib.serving.keys import ANYONE
from lib.serving.payload import PayloadError, decoded
from lib.serving.record import Record
from lib.serving.router import RETRY_AFTER_S
from lib.watch.recorder import Recorder
from serve_apps import schemas

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")
FAST_LANE = "rayline.fast_lane"
"""In the scope of a request that Serve's own wrapper did not see."""
UNKNOWN = "unknown"
"""Caller of a request without a valid key."""

_log = logging.getLogger(__name__)


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

    def header(self, name: bytes) -> str | None:
        """Return a header's value, None if it is not there."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


class Asked(Protocol):
    """What of a request is counted and logged, whichever way it came."""

    request_id: str
    card: Card | None
    images: npt.NDArray[np.uint8] | None
    probabilities: npt.NDArray[np.float32] | None


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
    request: Mapping[str, Any] | None = None
    """Content type → schema of the body."""
    errors: tuple[int, ...] = ()
    is_open: bool = False
    """Whether it is answered without an API key, and however much is in flight."""
    is_page: bool = False
    """Whether it is for people's browsers, so not part of the OpenAPI document."""


def json_reply(content: Any, status: int = 200) -> Reply:
    """Return a JSON response."""
    return Reply(orjson.dumps(content), status)


Authenticate = Callable[[Mapping[bytes, bytes]], str]
"""The name of the caller by the request's headers; raises PayloadError 401."""


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
    ) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        document = Route(
            method="GET",
            path="/openapi.json",
            handler=self._openapi,
            summary="OpenAPI.",
            is_open=True,
        )
        for route in [*routes, document]:
            if "{" not in route.path:
                self._exact.setdefault(route.path, {})[route.method] = route
                continue
            pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route.path))
            known = next((methods for other, methods in self._patterns if other == pattern), None)
            if known is None:
                self._patterns.append((pattern, {route.method: route}))
            else:
                known[route.method] = route
        self._title, self._description = title, description
        self._document: bytes | None = None
        self._routes = routes
        self._authenticate = authenticate
        self._max_in_flight = max_in_flight
        self.in_flight = 0
        self.record = Record()
        self.recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "websocket":
            # Before it is accepted, so the answer is a plain 403.
            await send({"type": "websocket.close", "code": 1000, "reason": "there is none here"})
            return
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given_id = headers.get(b"x-request-id")
        request_id = new_request_id() if not given_id else given_id.decode("latin-1")
        start_s = time.perf_counter()
        self.in_flight += 1
        caller, call = UNKNOWN, None
        try:
            if given_id and not REQUEST_ID.fullmatch(request_id):
                raise PayloadError(400, "X-Request-Id: at most 128 letters, digits, `.`, `_`, `-`")
            route, params = self._match(scope["method"], scope["path"])
            if not route.is_open:
                caller = self.admit(headers)
            body = await _read(headers, receive) if scope["method"] == "POST" else b""
            if body and (encoding := headers.get(b"content-encoding")):
                # In a thread: a few bytes can hold all that the limit allows.
                body = await asyncio.to_thread(decoded, body, encoding)
            call = Call(params, headers, body, request_id, caller)
            reply = await route.handler(call)
        except PayloadError as error:
            request_id = call.request_id if call else request_id
            reply = json_reply({"error": error.message, "request_id": request_id}, error.status)
            if error.status == 503:
                reply.headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
            elif error.status == 401:
                reply.headers.append((b"www-authenticate", b"Bearer"))
            elif error.status == 405:
                reply.headers.append((b"allow", ", ".join(self._methods(scope["path"])).encode()))
            elif error.status == 415 and b"content-encoding" in headers:
                reply.headers.append((b"accept-encoding", b"gzip, deflate"))
        except Exception:
            request_id = call.request_id if call else request_id
            _log.exception("request %s failed", request_id)
            message = "the server failed on this request; its log has the cause under request_id"
            reply = json_reply({"error": message, "request_id": request_id}, 500)
        finally:
            self.in_flight -= 1
        self.count(call, caller, reply.status, time.perf_counter() - start_s)
        if reply.status != 304:
            reply.headers.append((b"content-length", b"%d" % len(reply.body)))
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
        if self.in_flight > self._max_in_flight:
            raise PayloadError(503, f"{self._max_in_flight} requests are in flight here; try again")
        return caller

    def count(self, asked: Asked | None, caller: str, status: int, seconds: float) -> None:
        """Count an answer, and log it if a version was asked for it."""
        if asked is None or asked.card is None:
            self.record.add(caller, status, None, seconds)
            return
        self.record.add(caller, status, asked.card, seconds)
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
        )

    def _match(self, method: str, path: str) -> tuple[Route, Mapping[str, str]]:
        methods, params = self._find(path)
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            raise PayloadError(405, f"{path} takes {', '.join(self._methods(path))}, not {method}")
        return route, params

    def _find(self, path: str) -> tuple[Mapping[str, Route], Mapping[str, str]]:
        methods = self._exact.get(path)
        if methods is not None:
            return methods, {}
        for pattern, candidates in self._patterns:
            if match := pattern.fullmatch(path):
                return candidates, match.groupdict()
        raise PayloadError(404, f"there is no {path}; see /docs")

    def _methods(self, path: str) -> list[str]:
        methods, _ = self._find(path)
        return sorted({*methods, *(["HEAD"] if "GET" in methods else [])})

    async def _openapi(self, call: Call) -> Reply:
        if self._document is None:
            self._document = orjson.dumps(self._describe())
        return Reply(self._document)

    def _describe(self) -> dict[str, Any]:
        document = FastAPI(title=self._title, description=self._description)
        for route in (route for route in self._routes if not route.is_page):
            extra = (
                {"requestBody": {"required": True, "content": dict(route.request)}}
                if route.request
                else None
            )
            document.add_api_route(
                route.path,
                _endpoint(route),
                methods=[route.method],
                summary=route.summary,
                operation_id=f"{route.method} {route.path}",
                response_model=route.response,
                responses={status: {"model": schemas.Error} for status in route.errors},
                openapi_extra=extra,
            )
        return document.openapi()


def _endpoint(route: Route) -> Callable[..., None]:
    """Return a function whose signature shows FastAPI the path parameters of a route."""
    names = re.findall(r"\{(\w+)\}", route.path)
    namespace: dict[str, Any] = {}
    exec(f"def endpoint({', '.join(f'{name}: str' for name in names)}): ...", namespace)
    endpoint: Callable[..., None] = namespace["endpoint"]
    return endpoint


async def _read(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """Read a body, at most MAX_BODY_BYTES of it; raise PayloadError 413 before reading more."""
    too_large = PayloadError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise too_large
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        return body
    chunks, size = [body], len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise PayloadError(400, "the connection ended before the body did")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_BODY_BYTES:
            raise too_large
    return b"".join(chunks)
