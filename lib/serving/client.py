"""Serve's REST API and the gateway's HTTP, each with a deadline on every call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests

from lib.cli import progress
from lib.config import Settings
from lib.errors import AWAY, ServingError

CALL_TIMEOUT_S = 30
_TRIES, _AGAIN_S = 4, 3.0
_INGRESS_DIED = "ActorDiedError"
"""In Serve's answer; see `ServeClient.apply`."""


def auth_headers(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the header that Ray's token authentication asks for, empty if it is off."""
    env = os.environ if env is None else env
    token = env.get("RAY_AUTH_TOKEN", "")
    path = env.get("RAY_AUTH_TOKEN_PATH", "")
    if not token and path and Path(path).exists():
        token = Path(path).read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


class ServeClient:
    """Reads and replaces the config of Serve's applications."""

    def __init__(self, settings: Settings) -> None:
        self._url = f"{settings.serve_api or settings.ray_address}/api/serve/applications/"
        self._headers = auth_headers()

    def details(self) -> dict[str, Any]:
        """Return Serve's state: applications with status, deployments and replicas."""
        return dict(self._call("GET").json())

    def apply(self, config: Mapping[str, Any]) -> None:
        """Make this config the target state; applications that are not in it are removed.

        On a busy machine Serve gives up an ingress that is slow to start and makes another one; a
        call that waited for the first fails then, and is made again.
        """
        for tries_left in reversed(range(_TRIES)):
            try:
                self._call("PUT", json=config)
                return
            except ServingError as error:
                if not tries_left or _INGRESS_DIED not in str(error):
                    raise
                progress("deploy", "an ingress was slow to start and Serve gave it up; once more")
                time.sleep(_AGAIN_S)

    def _call(self, method: str, **options: Any) -> requests.Response:
        try:
            response = requests.request(
                method, self._url, headers=self._headers, timeout=CALL_TIMEOUT_S, **options
            )
        except requests.RequestException as error:
            raise ServingError(
                f"Ray does not answer at {self._url}: {error}; is the line up (`make up`)?",
                exit_code=AWAY,
            ) from error
        if not response.ok:
            raise ServingError(f"Serve refused: {response.status_code} {response.text[-2000:]}")
        return response


def live_applications(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each application's config as it was deployed, by name."""
    return {
        name: application["deployed_app_config"]
        for name, application in details.get("applications", {}).items()
        if application.get("deployed_app_config")
    }


def wait_until(condition: Callable[[], bool], *, deadline_s: float, what: str) -> None:
    """Ask until a condition holds; raise ServingError at the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise ServingError(f"{what} did not happen within {deadline_s:.0f} s")
        time.sleep(0.2)
