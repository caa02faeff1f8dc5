"""Puts Rayline's data source, folder and dashboards into a Grafana; the only module that calls one.

    GRAFANA_URL=https://grafana.example  GRAFANA_TOKEN=…      # of a service account, role Admin
    GRAFANA_URL=…  GRAFANA_USER=…  GRAFANA_PASSWORD=…         # or a login
    GRAFANA_PROMETHEUS_URL=http://prometheus:9090             # if Grafana reaches it otherwise

A second run changes nothing. What a person changed in Grafana stays until Rayline's own dashboard
changes; Grafana keeps the versions before. Ray's own folder is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import requests
from grafana_api.grafana_api import GrafanaClientError, GrafanaException, GrafanaServerError
from grafana_api.grafana_face import GrafanaFace

from lib.errors import ConfigError, WatchError
from lib.watch.dashboards import DASHBOARDS
from lib.watch.panels import (
    DATASOURCE_NAME,
    DATASOURCE_UID,
    FOLDER_TITLE,
    FOLDER_UID,
    Dashboard,
    digest_of,
    render,
)
from lib.watch.prometheus import PROMETHEUS_VARIABLE

CREATED, UPDATED, UNCHANGED = "created", "updated", "unchanged"
_TIMEOUT_S = 20.0
_RETRY_AFTER_S = (0.5, 1.0, 2.0)
"""A Grafana that is starting, or whose database is busy, answers 5xx for a moment."""
_CONFLICTS = (409, 412)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrafanaSettings:
    """Where Grafana is, and what it lets in."""

    url: str
    prometheus_url: str
    """Prometheus, as Grafana reaches it."""
    token: str | None = field(default=None, repr=False)
    login: tuple[str, str] | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> GrafanaSettings:
        """Read the variables; raise ConfigError naming the one that is missing or wrong."""
        url = env.get("GRAFANA_URL", "").rstrip("/")
        if not url:
            raise ConfigError("GRAFANA_URL is not set; give the address of the Grafana to fill")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ConfigError(
                "GRAFANA_URL is no address such as https://grafana.example:3000; tokens and "
                "passwords go into variables of their own"
            )
        prometheus_url = env.get("GRAFANA_PROMETHEUS_URL") or env.get(PROMETHEUS_VARIABLE)
        if not prometheus_url:
            raise ConfigError(
                "GRAFANA_PROMETHEUS_URL is not set; give the address at which Grafana reaches the "
                "Prometheus that reads Ray's metrics"
            )
        if env.get("GRAFANA_TOKEN"):
            return cls(url=url, prometheus_url=prometheus_url, token=env["GRAFANA_TOKEN"])
        if env.get("GRAFANA_USER") and env.get("GRAFANA_PASSWORD"):
            login = (env["GRAFANA_USER"], env["GRAFANA_PASSWORD"])
            return cls(url=url, prometheus_url=prometheus_url, login=login)
        raise ConfigError(
            "Grafana needs a login: set GRAFANA_TOKEN to the token of a service account, or "
            "GRAFANA_USER and GRAFANA_PASSWORD"
        )


def provision(
    settings: GrafanaSettings,
    *,
    dashboards: Sequence[Dashboard] = DASHBOARDS,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Bring Grafana to what the code says; return what was created, updated or left alone.

    Args:
        settings: Where Grafana is.
        dashboards: What is to be there; others in the folder are left alone.
        sleep: Waits before a call is tried again.

    Raises:
        WatchError: Grafana does not answer, or refuses; with what to do.
    """
    grafana = _Grafana(settings, sleep)
    return {
        "grafana": settings.url,
        "datasource": _twice(partial(_datasource, grafana, settings.prometheus_url)),
        "folder": _twice(partial(_folder, grafana)),
        "dashboards": {
            dashboard.uid: _twice(partial(_dashboard, grafana, dashboard))
            for dashboard in dashboards
        },
    }


class _Conflict(WatchError):
    """Someone else changed the same thing, or took its name."""


class _Missing(WatchError):
    """There is no such thing."""


class _Grafana:
    """The calls, with their failures told."""

    def __init__(self, settings: GrafanaSettings, sleep: Callable[[float], None]) -> None:
        parts = urlsplit(settings.url)
        prefix = parts.path.strip("/")
        self.url = settings.url
        self.face = GrafanaFace(
            auth=settings.token or settings.login,
            host=parts.hostname,
            port=parts.port,
            url_path_prefix=f"{prefix}/" if prefix else "",
            protocol=parts.scheme,
            timeout=_TIMEOUT_S,
        )
        # A redirected POST would become a GET, which changes nothing and reports success.
        self.face.api.s.max_redirects = 0
        self._sleep = sleep

    def find(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return what is there, or None."""
        try:
            return self.call(what, call, *arguments)
        except _Missing:
            return None

    def call(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call; a server's own error is tried again."""
        for pause_s in (*_RETRY_AFTER_S, None):
            try:
                return call(*arguments, **options)
            # TypeError: how grafana-api falls over a page of HTML with an error, as of a proxy.
            except (GrafanaServerError, TypeError) as error:
                if pause_s is None:
                    raise WatchError(
                        f"Grafana at {self.url} fails on {what}: {error}; look at its log and at "
                        "what is before it, then run this again; is GRAFANA_URL right?"
                    ) from error
                self._sleep(pause_s)
            except GrafanaClientError as error:
                raise self._refusal(what, error) from error
            except requests.JSONDecodeError as error:
                raise WatchError(
                    f"what answers at {self.url} is not Grafana's API ({what}); is GRAFANA_URL "
                    "right, with its path and https?"
                ) from error
            except requests.RequestException as error:
                raise WatchError(
                    f"Grafana does not answer at {self.url}: {error}; is GRAFANA_URL right?"
                ) from error
        raise AssertionError("the last try returns or raises")

    def _refusal(self, what: str, error: GrafanaException) -> WatchError:
        status, said = error.status_code, _said(error)
        if status == 404:
            return _Missing(
                f"Grafana at {self.url} knows no {what}: {said}; is GRAFANA_URL right, with its "
                "path?"
            )
        if status in _CONFLICTS:
            return _Conflict(
                f"Grafana refuses {what}: {said}; something of that name is there under another "
                "uid, or someone is changing it: rename or delete that, then run this again"
            )
        advice = {
            401: "it does not know this login: check GRAFANA_TOKEN, or GRAFANA_USER and "
            "GRAFANA_PASSWORD",
            403: "this login may not do that: give its service account the role Admin, or take "
            "what is there out of Grafana's provisioning files",
        }.get(status, "take it out of Grafana's provisioning files if it came from there")
        return WatchError(f"Grafana at {self.url} refuses {what} ({status} {said}): {advice}")


def _said(error: GrafanaException) -> str:
    response = error.response
    return str(response.get("message", response) if isinstance(response, dict) else response)[:300]


def _twice(ensure: Callable[[], str]) -> str:
    """Look again after a conflict: what someone else has done meanwhile may be what is wanted."""
    try:
        return ensure()
    except _Conflict:
        return ensure()


def _datasource(grafana: _Grafana, prometheus_url: str) -> str:
    wanted: dict[str, Any] = {
        "uid": DATASOURCE_UID,
        "name": DATASOURCE_NAME,
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus_url,
        "jsonData": {"httpMethod": "POST", "timeInterval": "10s"},
    }
    what = f"data source {DATASOURCE_NAME!r}"
    path = f"/datasources/uid/{DATASOURCE_UID}"
    found = grafana.find(what, grafana.face.api.GET, path)
    if found is None:
        grafana.call(what, grafana.face.datasource.create_datasource, wanted)
        return CREATED
    merged = {**found, **wanted, "jsonData": {**found.get("jsonData", {}), **wanted["jsonData"]}}
    if merged == found:
        return UNCHANGED
    grafana.call(what, grafana.face.api.PUT, path, json=merged)
    return UPDATED


def _folder(grafana: _Grafana) -> str:
    what = f"folder {FOLDER_TITLE!r}"
    if grafana.find(what, grafana.face.folder.get_folder, FOLDER_UID) is not None:
        return UNCHANGED
    grafana.call(what, grafana.face.folder.create_folder, FOLDER_TITLE, FOLDER_UID)
    return CREATED


def _dashboard(grafana: _Grafana, dashboard: Dashboard) -> str:
    what = f"dashboard {dashboard.title!r}"
    wanted = render(dashboard)
    found = grafana.find(what, grafana.face.dashboard.get_dashboard, dashboard.uid)
    there = found["dashboard"] if found else {}
    if digest_of(there) == digest_of(wanted):
        return UNCHANGED
    grafana.call(
        what,
        grafana.face.dashboard.update_dashboard,
        {
            # With the version that was read: a change by someone else since is not run over.
            "dashboard": {**wanted, "id": there.get("id"), "version": there.get("version", 0)},
            "folderUid": FOLDER_UID,
            "overwrite": False,
            "message": f"Rayline {digest_of(wanted)}",
        },
    )
    return UPDATED if found else CREATED
