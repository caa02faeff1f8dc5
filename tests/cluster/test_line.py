"""`make up` on a cluster and servers that are there already: the same line, spread over them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest
import requests

from lib.line.listeners import Socket, name_of, unexpected
from lib.line.ports import PORTS
from lib.serving.client import ServeClient
from tests.cluster.clusters import HTTP_PORT
from tests.cluster.conftest import ClusterLine, last_result
from tests.cluster.nets import Machine
from tests.cluster.servers import STORAGE
from tests.data_sources import mnist
from tests.e2e.clients import RAW, until
from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

DEFAULT_PORTS = {name: port.default for name, port in PORTS.items()}


def predict(machine: Machine) -> requests.Response:
    image = mnist("test")[0][0].tobytes()
    url = f"http://{machine.ip}:{HTTP_PORT}/predict"
    return requests.post(url, image, headers=RAW, timeout=60)


def test_make_up_takes_what_it_is_given(line: ClusterLine) -> None:
    cluster = line.cluster
    assert "The line is up." in line.up_output
    assert "up: starting" not in line.up_output, "it starts nothing of its own"
    for place in (cluster.url, cluster.servers.mlflow_url, STORAGE):
        assert place in line.up_output
    home = Path(line.env["RAYLINE_HOME"])
    assert not (home / "storage").exists(), "nothing is kept on the user's machine"
    assert not (home / "mlflow.db").exists()


def test_the_work_is_on_the_workers(line: ClusterLine) -> None:
    cluster = line.cluster
    at = {row["node_id"]: row["node_ip"] for row in cluster.rows("nodes")}
    # One that was asked for and not needed any more was never on a node.
    trials = [
        row
        for row in cluster.rows("actors")
        if re.search("Trial|Trainable", row["class_name"]) and row["node_id"]
    ]
    workers = {worker.ip for worker in cluster.workers}
    assert {at[row["node_id"]] for row in trials} == workers
    gateways = {ip for name, state, ip in line.replicas() if name == "gateway"}
    assert gateways == workers, "one can be lost"
    assert {ip for _, _, ip in line.replicas()} <= workers


def test_every_node_answers(line: ClusterLine) -> None:
    nodes = (line.cluster.head, *line.cluster.workers)

    def proxies() -> dict[str, str]:
        found = ServeClient(line.settings()).details()["proxies"].values()
        return {proxy["node_ip"]: proxy["status"] for proxy in found}

    until(
        lambda: proxies() == {node.ip: "HEALTHY" for node in nodes},
        deadline_s=60,
        what="an ingress on every node",
    )
    for node in nodes:
        answer = predict(node)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["probabilities"]) == 10


def test_nothing_listens_that_the_table_does_not_name(line: ClusterLine) -> None:
    cluster = line.cluster
    for node in (cluster.head, *cluster.workers):
        seen = sockets(node)
        found = unexpected(seen, DEFAULT_PORTS, host="0.0.0.0", node_ip=node.ip)
        # That of a head is told to listen for others; it asks for the token, as below.
        assert [row for row in found if "(dashboard)" not in row] == []
        names = {name_of(socket.port, DEFAULT_PORTS) for socket in seen}
        assert names >= {"http", "agent"}
        assert ("dashboard" in names) == (node is cluster.head)
    jobs = f"{cluster.url}/api/jobs/"
    assert requests.get(jobs, timeout=30).status_code == 401
    assert requests.post(jobs, json={"entrypoint": "id"}, timeout=30).status_code == 401


def sockets(node: Machine) -> list[Socket]:
    """All that is listened on there; psutil would look at this process's own network."""
    found = []
    for row in node.run(["ss", "-H", "-ltnp"], os.environ).splitlines():
        address, _, port = row.split()[3].rpartition(":")
        holder = re.search(r"pid=(\d+)", row)
        try:
            command = " ".join(psutil.Process(int(holder[1])).cmdline())[:200] if holder else ""
        except psutil.Error:
            # It ended while we looked.
            continue
        address = address.strip("[]").partition("%")[0].replace("*", "::")
        found.append(Socket(address=address, port=int(port), process=command))
    return found


def test_a_second_make_up_repeats_nothing(line: ClusterLine) -> None:
    again = line.run("jobs.up", "--data", str(line.data), "--preset", "smoke", "--model", MODEL)
    assert "reused: data set, search" in again
    assert last_result(again)["registered"] == last_result(line.up_output)["registered"]
