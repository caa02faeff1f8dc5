"""Keeps tests away from a line that is up, and from the user's own Ray token."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests import programs

# Before any test imports Ray: it reads these once.
_HOME = tempfile.mkdtemp(prefix="rayline-test-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": os.path.join(_HOME, "auth_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "RAYLINE_STORAGE"):
    os.environ.pop(name, None)
with open(os.environ["RAY_AUTH_TOKEN_PATH"], "w") as token:
    token.write(os.urandom(32).hex())


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    # Compressed bytes hold the second of their making, and both workers must collect equal ids.
    return argname if isinstance(val, bytes | bytearray) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first, so that two workers end at the same time."""
    slowest_first = ("e2e", "cluster", "integration")
    items.sort(key=lambda item: [folder not in item.path.parts for folder in slowest_first])


class Files(LoadScopeScheduling):  # type: ignore[misc]
    """Gives workers whole files, whose tests share servers, and one worker all of the one line."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "the line" if file.startswith("tests/e2e/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    # Not --dist loadgroup: with pytest 9.2 the groups that xdist 3.8 sets have no effect.
    return Files(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the packages that tests were skipped for, in one line."""
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    packages = [p for p in programs.missing() if any(f"package {p}" in r for r in reasons)]
    if packages:
        terminalreporter.write_line(
            f"tests were skipped for want of these Debian packages: {' '.join(packages)} "
            f"(as root: apt-get install {' '.join(packages)})"
        )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables: making them takes seconds, copying them nothing."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow-tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file
