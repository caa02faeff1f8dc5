"""The servers that a cluster is given: PostgreSQL, Redis, an S3 store and MLflow.

The store is moto's server, a stand-in that keeps objects in memory: it shows that the line needs a
network and S3's calls and no shared folder, not what it costs on a real one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import requests

from lib.line.parts import answers
from tests import programs
from tests.cluster.nets import Machine
from tests.e2e.clients import until

BUCKET = "rayline"
STORAGE = f"s3://{BUCKET}/line"
_START_S = 180.0
# PostgreSQL refuses to run as root.
_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")


@dataclass(frozen=True, kw_only=True, slots=True)
class Servers:
    """Where they are."""

    mlflow_url: str
    redis: str
    """Host and port."""
    s3_env: Mapping[str, str]
    """How the store is reached: for nodes, MLflow, users."""
    await_mlflow: Callable[[], None]
    """It takes longest to start; nodes can come up meanwhile."""


def start_servers(machine: Machine, folder: Path, env: Mapping[str, str]) -> Servers:
    """Start all four on a machine, and wait for those that others need to start."""
    endpoint = f"http://{machine.ip}:9000"
    s3_env = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "rayline",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    started = {
        "postgres": _start_postgres(machine, folder / "postgres", env),
        "redis": machine.start(
            [*_NOBODY, "redis-server", "--bind", machine.ip, "--port", "6379"]
            + ["--protected-mode", "no", "--save", "", "--dir", "/tmp"],
            env,
            "redis",
        ),
        "moto": machine.start(
            [sys.executable, "-m", "moto.server", "-H", machine.ip, "-p", "9000"], env, "moto"
        ),
    }

    def await_it(name: str, is_up: Callable[[], bool]) -> None:
        def settled() -> bool:
            assert started[name].poll() is None, machine.log(name).read_text()[-3000:]
            return is_up()

        until(settled, deadline_s=_START_S, every_s=0.2, what=f"an answer of {name}")

    database = f"rayline@{machine.ip}/postgres"
    await_it("postgres", lambda: _takes_queries(f"postgresql://{database}"))
    await_it("redis", lambda: _pongs(machine.ip, 6379))
    await_it("moto", lambda: answers(f"{endpoint}/moto-api/"))
    assert requests.put(f"{endpoint}/{BUCKET}", timeout=30).ok
    url = f"http://{machine.ip}:5000"
    started["mlflow"] = machine.start(
        [sys.executable, "-m", "mlflow", "server", "--host", machine.ip, "--port", "5000"]
        + ["--workers", "1", "--allowed-hosts", f"{machine.ip},{machine.ip}:*"]
        + ["--backend-store-uri", f"postgresql+psycopg2://{database}"]
        + ["--artifacts-destination", f"s3://{BUCKET}/artifacts"],
        {**env, **s3_env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        "mlflow",
    )
    return Servers(
        mlflow_url=url,
        redis=f"{machine.ip}:6379",
        s3_env=s3_env,
        await_mlflow=lambda: await_it("mlflow", lambda: answers(f"{url}/health")),
    )


def _postgres() -> Path:
    """Return PostgreSQL's folder of programs."""
    return Path(programs.require("postgresql")).parent


def _start_postgres(
    machine: Machine, data: Path, env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    data.mkdir()
    shutil.chown(data, "nobody", "nogroup")
    os.chmod(data, 0o700)
    # Whoever is on this network may come in: it ends with the tests.
    machine.run(
        [*_NOBODY, str(_postgres() / "initdb"), "-D", str(data), "-U", "rayline"]
        + ["--auth=trust", "-E", "UTF8", "--locale=C", "--no-sync"],
        env,
    )
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet trust\n")
    return machine.start(
        [*_NOBODY, str(_postgres() / "postgres"), "-D", str(data), "-h", machine.ip]
        + ["-k", "", "-c", "fsync=off"],
        env,
        "postgres",
    )


def _takes_queries(database: str) -> bool:
    try:
        psycopg2.connect(database, connect_timeout=5).close()
    except psycopg2.OperationalError:
        return False
    return True


def _pongs(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
