"""What web pages of other sites may do with a gateway that their reader's browser can reach.

The same rules as `CrossOriginProtection` of Go's net/http, for reading routes too: a request that
another site's page causes is refused, unless RAYLINE_CORS_ORIGINS has that site. Programs that are
no browsers send neither Sec-Fetch-Site nor Origin and notice nothing.

The Host header is checked against DNS rebinding, by which a page's own name comes to mean
127.0.0.1. A gateway on loopback is reached by names of this machine alone; one that is open to
others may have any name in front of it, and is protected by API keys.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from lib.config import allowed_hosts, cors_origins, is_loopback
from lib.serving.payload import PayloadError

_OWN = (b"same-origin", b"none")
_READS = ("GET", "HEAD")
_REMEMBERED = 256


class BrowserRules:
    """Checks the headers by which browsers tell who causes a request."""

    def __init__(self, *, origins: Collection[str] = (), hosts: Collection[str] = ("*",)) -> None:
        """Set the rules.

        Args:
            origins: Of other sites that may ask, as `https://app.example.com`; `*`: all.
            hosts: Names by which the gateway is called, `*.example.com` with all below; `*`: any.
        """
        self._origins = frozenset(origin.encode() for origin in origins)
        self._hosts = frozenset(hosts)
        self._is_any_host = "*" in self._hosts
        self._known_hosts: set[bytes | None] = {None}

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> BrowserRules:
        """Read RAYLINE_CORS_ORIGINS, RAYLINE_ALLOWED_HOSTS and RAYLINE_HTTP_HOST."""
        hosts = allowed_hosts(env)
        if not hosts and not is_loopback(env.get("RAYLINE_HTTP_HOST", "")):
            return cls(origins=cors_origins(env))
        served_at = urlsplit(env.get("RAYLINE_SERVE_URL", "")).hostname
        own = {"localhost", "*.localhost", socket.gethostname().lower(), served_at or "localhost"}
        return cls(origins=cors_origins(env), hosts={*hosts, *own})

    def check(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise PayloadError 403 for a request that a page of another site causes."""
        host = headers.get(b"host")
        if not self._is_any_host and host not in self._known_hosts:
            self._check_host(host or b"")
        if b"sec-fetch-site" in headers or b"origin" in headers:
            self._check_site(method, headers)

    def with_cors(self, app: ASGIApp) -> ASGIApp:
        """Return the application with answers that let pages of the allowed origins read them."""
        if not self._origins:
            return app
        return CORSMiddleware(
            app,
            allow_origins=[origin.decode() for origin in self._origins],
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=(
                "Authorization",
                "Content-Encoding",
                "Inference-Header-Content-Length",
                "Traceparent",
                "X-API-Key",
                "X-Model-Version",
                "X-Request-Id",
                "X-Routing-Key",
            ),
            allow_private_network=True,
            expose_headers=(
                "Inference-Header-Content-Length",
                "Retry-After",
                "X-Model-Version",
                "X-Request-Id",
            ),
        )

    def _check_host(self, host: bytes) -> None:
        try:
            name = (urlsplit(f"//{host.decode('latin-1')}").hostname or "").rstrip(".")
        except ValueError:
            name = ""
        parents = {f"*.{name[at + 1 :]}" for at, letter in enumerate(name) if letter == "."}
        # An address is no name that another site could give a new meaning.
        if not (name in self._hosts or parents & self._hosts or _is_address(name)):
            raise PayloadError(
                403,
                f"the gateway is not known as {name[:100]!r}: call it by an address or as "
                "localhost, or start the line with this name in RAYLINE_ALLOWED_HOSTS",
            )
        if len(self._known_hosts) < _REMEMBERED:
            self._known_hosts.add(host)

    def _check_site(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        origin = headers.get(b"origin")
        if b"*" in self._origins or (origin is not None and origin in self._origins):
            return
        site = headers.get(b"sec-fetch-site")
        if site is None:
            # Of browsers on plain HTTP, which tell the origin alone. Only a page of this origin, or
            # a proxy, can set X-Forwarded-Host: for others a browser asks first.
            hosts = (headers.get(b"host"), headers.get(b"x-forwarded-host"))
            is_own = origin is None or origin.partition(b"://")[2] in hosts
        else:
            # Following a link to a page shows it to the reader, and to no site.
            follows = method in _READS and headers.get(b"sec-fetch-mode") == b"navigate"
            is_own = site in _OWN or follows
        if not is_own:
            raise PayloadError(
                403,
                "pages of other sites are not answered: start the line with their origin in "
                "RAYLINE_CORS_ORIGINS; a proxy must pass Host on, or say it in X-Forwarded-Host",
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
