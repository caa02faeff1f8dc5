"""A cluster of three nodes and four servers, and a line that a user brought up on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lib.config import Settings
from lib.line.layout import PROJECT_ROOT, Line
from lib.serving.client import ServeClient
from tests import programs
from tests.cluster import nets, servers
from tests.cluster.clusters import Cluster, clean_env
from tests.e2e.conftest import MODEL, write_subset

NUM_NODES = 3
UP_S = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterLine:
    """A line on the cluster."""

    cluster: Cluster
    env: Mapping[str, str]
    """Of a user's shell."""
    data: Path
    up_output: str
    """What `make up` printed."""

    def run(self, *arguments: str) -> str:
        """Run `python -m ARGUMENTS` as a user; return what it printed."""
        return run_module(arguments, self.env)

    def settings(self) -> Settings:
        """Return what jobs know of the line."""
        return Settings.from_env({**self.env, "RAYLINE_MODEL": MODEL})

    def replicas(self) -> list[tuple[str, str, str]]:
        """Return application, state and address of each replica."""
        details = ServeClient(self.settings()).details()
        return [
            (name, replica["state"], replica["node_ip"])
            for name, application in details["applications"].items()
            for deployment in application["deployments"].values()
            for replica in deployment["replicas"]
        ]

    def statuses(self) -> dict[str, str]:
        """Return the status of each application."""
        details = ServeClient(self.settings()).details()
        return {name: app["status"] for name, app in details["applications"].items()}


def run_module(arguments: tuple[str, ...], env: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=PROJECT_ROOT,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=UP_S,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout[-8000:]}"
    return done.stdout


def last_result(output: str) -> dict[str, Any]:
    """Return the JSON object that a job printed last."""
    row = next(row for row in reversed(output.splitlines()) if row.startswith("{"))
    return dict(json.loads(row))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    for package in ("iproute2", "redis-server", "postgresql"):
        programs.require(package)
    if reason := nets.why_not():
        pytest.skip(f"several nodes on one machine: {reason}")
    # Not below /tmp: each node has its own.
    folder = Path(tempfile.mkdtemp(prefix="rayline-cluster-", dir="/var/tmp"))
    folder.chmod(0o755)
    token = folder / "auth_token"
    shutil.copy(os.environ["RAY_AUTH_TOKEN_PATH"], token)
    try:
        with nets.machines(folder, NUM_NODES) as (nodes, place):
            given = servers.start_servers(place, folder, clean_env())
            cluster = Cluster(nodes, given, folder, token)
            cluster.start_head()
            for worker in cluster.workers:
                cluster.start_worker(worker)
            cluster.await_all()
            given.await_mlflow()
            with pytest.MonkeyPatch.context() as patch:
                # These tests read the store too.
                for name, value in given.s3_env.items():
                    patch.setenv(name, value)
                yield cluster
    finally:
        if os.environ.get("RAYLINE_CLUSTER_KEEP") != "1":
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def line(cluster: Cluster) -> Iterator[ClusterLine]:
    env = cluster.user_env(cluster.folder / "home")
    state = Line.from_env(env)
    data = write_subset(cluster.folder / "subset")
    up: dict[str, Any] = {"--data": str(data), "--preset": "smoke", "--model": MODEL}
    arguments = ("jobs.up", *(word for pair in up.items() for word in pair))
    try:
        yield ClusterLine(
            cluster=cluster,
            env={**env, **state.client_env()},
            data=data,
            up_output=run_module(arguments, env),
        )
    finally:
        # Of a line that starts nothing, all that is outside its home.
        shutil.rmtree(state.private_dir, ignore_errors=True)
