"""Lines for tests: on ports that are free, beside whatever else runs on the machine."""

from __future__ import annotations

import fcntl
import os
import random
import tempfile
from pathlib import Path

import psutil

from lib.line import ports
from lib.line.ports import OFFSET_VARIABLE, PORTS, variable

OBJECT_STORE_BYTES = 300 * 2**20
_RESERVED = Path(tempfile.gettempdir(), f"rayline-test-ports-{os.getuid()}")
"""Process and port, a line each: a line that is about to start has not bound its ports yet."""
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
    """Return an offset at which every port of a line is free, and no other test run's.

    The offsets of two workers lie 1,000 apart, as far as a line's ranges of ports reach.
    """
    # Below 2,700 the replicas' ports stay under those that the system gives to clients.
    first = 1701 if os.environ.get("PYTEST_XDIST_WORKER", "gw0").endswith("1") else 101
    with _RESERVED.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = [(int(pid), int(port)) for pid, port in map(str.split, file)]
        rows = [(pid, port) for pid, port in rows if psutil.pid_exists(pid)]
        others = {port for pid, port in rows if pid != os.getpid()}
        offset = ports.free_offset(
            offset
            for offset in random.SystemRandom().sample(range(first, first + 600), 200)
            if not others & _ports(offset)
        )
        if offset is None:
            raise RuntimeError("no free ports for a line of the tests")
        rows += [(os.getpid(), port) for port in _ports(offset)]
        file.truncate(0)
        file.writelines(f"{pid} {port}\n" for pid, port in rows)
    return offset


def _ports(offset: int) -> set[int]:
    return set(ports.read_ports({OFFSET_VARIABLE: str(offset)}, {}).values())
