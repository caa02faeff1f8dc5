"""Lines for tests: on ports that are free, beside whatever else runs on the machine."""

from __future__ import annotations

import os
import random
from pathlib import Path

from lib.line import ports
from lib.line.ports import OFFSET_VARIABLE, PORTS, variable

OBJECT_STORE_BYTES = 300 * 2**20
_GIVEN_BY_USER = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_DASHBOARD_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "MLFLOW_TRACKING_URI",
    "RAYLINE_STORAGE",
    "RAYLINE_SERVE_API",
    "RAYLINE_SERVE_URL",
    "RAYLINE_RAYSERVICE",
    "RAYLINE_TRIAL_LABELS",
    "RAYLINE_TRIAL_GPUS",
    "RAYLINE_SERVE_LABELS",
    "RAYLINE_SERVE_CPUS",
    "RAYLINE_OWNER_LIMITS",
    "RAYLINE_MODEL",
    "RAYLINE_HTTP_HOST",
    "RAYLINE_PROVENANCE",
    "RAYLINE_PROMETHEUS_URL",
    "GRAFANA_URL",
    "GRAFANA_TOKEN",
    "GRAFANA_PASSWORD",
    "PYTEST_ADDOPTS",
)


def line_env(home: Path) -> dict[str, str]:
    """Return an environment in which `python -m jobs.up` makes a small line of its own."""
    return clean_env() | {
        "RAYLINE_HOME": str(home),
        OFFSET_VARIABLE: str(free_offset()),
        "RAYLINE_NUM_CPUS": "2",
        "RAYLINE_NUM_GPUS": "0",
        "RAYLINE_OBJECT_STORE_BYTES": str(OBJECT_STORE_BYTES),
    }


def clean_env() -> dict[str, str]:
    """Return this environment without what was set for another line."""
    env = dict(os.environ)
    for name in (*_GIVEN_BY_USER, *(variable(port) for port in PORTS)):
        env.pop(name, None)
    return env


def free_offset() -> int:
    """Return an offset at which every port of a line is free."""
    # Below 2,700 the replicas' ports stay under those that the system gives to clients.
    offset = ports.free_offset(random.SystemRandom().sample(range(101, 1700), 200))
    if offset is None:
        raise RuntimeError("no free ports for a line of the tests")
    return offset
