"""The pages for people: the console under `/`, the API's documentation under `/docs`.

Plain files, the same for everybody and without secrets, so they are open; all that they show they
ask for themselves, with the key that their reader types in.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from lib.serving.payload import PayloadError
from serve_apps.asgi import Call, Header, Reply, Route

_CONSOLE = Path(__file__).parent / "console"
_KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# Of a package whose files alone are used; it is not imported.
_SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")
_SWAGGER_PACKAGE = "flask_swagger_ui"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: tuple[Header, ...] = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # Kept by browsers, and asked for again by its ETag each time.
    (b"cache-control", b"no-cache"),
)


def routes() -> list[Route]:
    """Return the paths of all files."""
    files = {"/": _CONSOLE / "index.html", "/docs": _CONSOLE / "docs.html"}
    files |= {
        f"/console/{path.name}": path
        for path in sorted(_CONSOLE.iterdir())
        if path.suffix in _KINDS and path.suffix != ".html"
    }
    table = [_route(path, _give(partial(Path, file))) for path, file in files.items()]
    return table + [_route(f"/docs/{name}", _give(partial(_swagger, name))) for name in _SWAGGER]


def _route(path: str, handler: Callable[[Call], Awaitable[Reply]]) -> Route:
    summary = "A file of the console."
    return Route(
        method="GET", path=path, handler=handler, summary=summary, is_open=True, is_page=True
    )


def _give(find: Callable[[], Path]) -> Callable[[Call], Awaitable[Reply]]:
    """Return a handler of one file, which is read when it is first asked for."""

    @cache
    def load() -> tuple[bytes, list[Header]]:
        path = find()
        body = path.read_bytes()
        tag = b'"%s"' % hashlib.sha256(body).hexdigest()[:32].encode()
        return body, [(b"content-type", _KINDS[path.suffix]), (b"etag", tag), *_HEADERS]

    async def handler(call: Call) -> Reply:
        body, headers = await asyncio.to_thread(load)
        tag = dict(headers)[b"etag"]
        # A proxy that compresses makes the tag a weak one: W/"…".
        known = call.headers.get(b"if-none-match", b"")
        if tag in known:
            return Reply(b"", 304, list(headers))
        return Reply(body, headers=list(headers))

    return handler


def _swagger(name: str) -> Path:
    spec = find_spec(_SWAGGER_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise PayloadError(404, f"the package {_SWAGGER_PACKAGE} is not installed here")
    return Path(folders[0]) / "dist" / name
