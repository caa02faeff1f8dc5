"""The pages for people: the console under `/`, the API's documentation under `/docs`.

Plain files, the same for everybody and without secrets, so they are open; all that they show they
ask for themselves, with the key that their reader types in.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

_CONSOLE = Path(__file__).parent / "console"
# Only this package's files are used; it is not imported.
_SWAGGER_PACKAGE = "flask_swagger_ui"

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Kept by browsers, and asked for again by its ETag each time.
    "cache-control": "no-cache",
}

_log = logging.getLogger(__name__)


class Files(StaticFiles):
    """A folder of files, with the headers that keep pages to their own site."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        """Return the response for a file."""
        response = super().file_response(*args, **options)
        response.headers.update(_HEADERS)
        return response


def routes() -> list[BaseRoute]:
    """Return the paths of all files."""
    console = Files(directory=_CONSOLE)

    def page(path: str, file: str) -> Route:
        async def endpoint(request: Request) -> Response:
            return await console.get_response(file, request.scope)

        return Route(path, endpoint)

    table: list[BaseRoute] = [page("/", "index.html"), page("/docs", "docs.html")]
    table.append(Mount("/console", console))
    spec = find_spec(_SWAGGER_PACKAGE)
    if spec and spec.submodule_search_locations:
        swagger = Path(spec.submodule_search_locations[0]) / "dist"
        table.append(Mount("/docs", Files(directory=swagger)))
    else:
        _log.warning("/docs stays empty: the package %s is not installed", _SWAGGER_PACKAGE)
    return table
