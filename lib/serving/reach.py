"""Where what is served listens, and where it is called: on one machine, and on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from lib.config import Settings, is_loopback
from lib.errors import ConfigError
from lib.serving.client import ServeClient


def serve_url(settings: Settings) -> str:
    """Return where the models answer; a cluster elsewhere is called at its dashboard's host."""
    if settings.serve_url:
        return settings.serve_url
    host = _dashboard_host(settings)
    if is_loopback(host):
        host = "127.0.0.1" if settings.http_host == "0.0.0.0" else settings.http_host
    return f"http://{host}:{settings.http_port}"


def as_started(settings: Settings, details: Mapping[str, Any]) -> Settings:
    """Return the settings with the host that Serve listens on, if it runs: it keeps that.

    Raises:
        ConfigError: No caller would get there.
    """
    host = (details.get("http_options") or {}).get("host") or settings.http_host
    settings = replace(settings, http_host=host)
    if _is_cut_off(settings):
        raise ConfigError(
            f"on each node of the cluster at {_dashboard(settings)} gateways listen on {host}, "
            "where no caller comes: set RAYLINE_HTTP_HOST=0.0.0.0, here or where its nodes are "
            "started (deploy/cluster.env), or RAYLINE_SERVE_URL to what answers in front of them; "
            "where Serve runs already, `serve shutdown` first"
        )
    return settings


def check_host(settings: Settings) -> None:
    """Raise the ConfigError of `as_started`, before the work that a deploy comes after."""
    if _is_cut_off(settings):
        as_started(settings, ServeClient(settings).details())


def _is_cut_off(settings: Settings) -> bool:
    is_elsewhere = not is_loopback(_dashboard_host(settings))
    return is_elsewhere and not settings.serve_url and is_loopback(settings.http_host)


def _dashboard(settings: Settings) -> str:
    return settings.serve_api or settings.ray_address


def _dashboard_host(settings: Settings) -> str:
    return urlsplit(_dashboard(settings)).hostname or ""
