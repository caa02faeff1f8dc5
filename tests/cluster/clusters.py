"""A Ray cluster of a head and workers with addresses of their own, as `ray start` makes one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests

from lib.line.layout import PRIVATE, PROJECT_ROOT
from lib.line.parts import answers
from lib.serving.client import auth_headers
from tests import lines
from tests.cluster.nets import Machine
from tests.cluster.servers import STORAGE, Servers
from tests.e2e.clients import until

NUM_CPUS = 2
"""Of a worker; the head does no work."""
_STORE_BYTES = 150 * 2**20
_START_S = 180.0
_STARTS = 3
"""Ray gives up a node whose raylet is not there after 30 s, which on a busy machine may be."""
HTTP_PORT = 8000


class Cluster:
    """The nodes, the servers that the cluster was given, and what a user of both needs."""

    def __init__(self, nodes: list[Machine], servers: Servers, folder: Path, token: Path) -> None:
        self.head, *self.workers = nodes
        self.servers = servers
        self.folder = folder
        self.url = f"http://{self.head.ip}:8265"
        self._auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def node_env(self) -> dict[str, str]:
        """Return the environment of every node: what deploy/cluster.env sets, and where S3 is."""
        return {
            **clean_env(),
            **_of_cluster_env(),
            **self._auth,
            **self.servers.s3_env,
            # What a head takes to come back; Ray's default is a minute.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }

    def user_env(self, home: Path) -> dict[str, str]:
        """Return the environment in which a user's `make up` takes this cluster."""
        return {
            **clean_env(),
            **self._auth,
            **self.servers.s3_env,
            "RAYLINE_HOME": str(home),
            "RAY_API_SERVER_ADDRESS": self.url,
            "MLFLOW_TRACKING_URI": self.servers.mlflow_url,
            "RAYLINE_STORAGE": STORAGE,
        }

    def start_head(self) -> None:
        """Start the head on a machine where nothing runs, and wait until its dashboard answers."""
        redis = {
            "RAY_REDIS_ADDRESS": self.servers.redis,
            "RAY_external_storage_namespace": "rayline-tests",
        }
        options = ["--head", "--port=6379", f"--dashboard-host={self.head.ip}", "--num-cpus=0"]
        self._start(self.head, options, {**self.node_env(), **redis})

    def start_worker(self, machine: Machine) -> None:
        """Start a worker on a machine where nothing runs, and wait until the head knows it."""
        options = [f"--address={self.head.ip}:6379", f"--num-cpus={NUM_CPUS}"]
        self._start(machine, options, self.node_env())

    def get(self, path: str) -> Any:
        """Return what the dashboard answers."""
        answer = requests.get(f"{self.url}{path}", headers=auth_headers(), timeout=30)
        answer.raise_for_status()
        return answer.json()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Return what Ray's state API lists: nodes or actors."""
        return list(self.get(f"/api/v0/{kind}?limit=1000")["data"]["result"]["result"])

    def alive(self) -> list[str]:
        """Return the addresses of the nodes that are alive, sorted; none if the head is away."""
        try:
            rows = self.rows("nodes")
        except requests.RequestException:
            return []
        return sorted(row["node_ip"] for row in rows if row["state"] == "ALIVE")

    def await_all(self) -> None:
        """Wait until each node is alive, once."""
        ips = sorted(machine.ip for machine in (self.head, *self.workers))
        until(lambda: self.alive() == ips, deadline_s=120, every_s=0.5, what=f"life of {ips}")

    def _start(self, machine: Machine, options: list[str], env: Mapping[str, str]) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block"]
        command += ["--disable-usage-stats", "--log-color=false"]
        command += [f"--node-ip-address={machine.ip}", f"--object-store-memory={_STORE_BYTES}"]
        for _ in range(_STARTS):
            assert machine.pids() == []
            machine.boot()
            process = machine.start([*command, *options], env, "ray")
            if self._is_alive(machine, process):
                return
            machine.kill()
        raise AssertionError(machine.log("ray").read_text()[-3000:])

    def _is_alive(self, machine: Machine, process: subprocess.Popen[bytes]) -> bool:
        """Wait until the head knows the node; False if it gave up first."""

        def is_there() -> bool:
            return answers(f"{self.url}/api/gcs_healthz") and machine.ip in self.alive()

        until(
            lambda: process.poll() is not None or is_there(),
            deadline_s=_START_S,
            every_s=0.5,
            what=f"start of {machine.ip}",
        )
        return process.poll() is None


def clean_env() -> dict[str, str]:
    """Return this environment without what was set for a line, or names a folder in /tmp."""
    env = {
        name: value
        for name, value in lines.clean_env().items()
        if name != "TMPDIR" and not name.startswith("RAYLINE_")
    }
    bin_folder = Path(sys.executable).parent
    return {**env, **PRIVATE, "PATH": f"{bin_folder}:{env.get('PATH', os.defpath)}"}


def _of_cluster_env() -> dict[str, str]:
    """Return how deploy/cluster.env sets up Ray and Serve, and where inference listens.

    RAYLINE_CLUSTER_HAPROXY=0 leaves Ray's settings out: then the cluster is one of its defaults.
    """
    text = (PROJECT_ROOT / "deploy" / "cluster.env").read_text()
    names = "RAYLINE_HTTP_HOST"
    if os.environ.get("RAYLINE_CLUSTER_HAPROXY") != "0":
        names += r"|RAY_(?:SERVE|health)_\w+"
    # Not what names the folder of a node's sockets: each machine here has a /tmp of its own.
    return dict(re.findall(rf'^export ({names})=([^\s"$]+)$', text, flags=re.M))
