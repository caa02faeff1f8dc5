"""One bounded local Ray and one MLflow server for all integration tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lib.storage import Storage


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    # Unix socket paths are limited to 107 bytes: pytest's own temp dirs are too long for Ray.
    temp_dir = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=400 * 2**20,
        include_dashboard=False,
        _temp_dir=temp_dir,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
        logging_level="warning",
    )
    yield
    ray.shutdown()
    shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URI of a real server on SQLite, which serves its artifacts itself."""
    uri, server = start_mlflow(tmp_path_factory.mktemp("mlflow"), free_port())
    try:
        yield uri
    finally:
        # The workers are children of the server: the whole group goes.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_mlflow(folder: Path, port: int) -> tuple[str, subprocess.Popen[bytes]]:
    """Start a server in a process group of its own and wait until it answers."""
    folder.mkdir(exist_ok=True)
    uri = f"http://127.0.0.1:{port}"
    log = folder / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while not _answers(f"{uri}/health"):
        if server.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the MLflow server did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)
    return uri, server


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
