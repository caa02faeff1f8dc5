"""What is lost with a node: counts of trials, runs and requests. In this order."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests

from lib.config import Settings
from lib.errors import ServingError
from lib.serving import policy
from lib.storage import Storage
from tests.cluster.clusters import HTTP_PORT, Cluster
from tests.cluster.conftest import ClusterLine, last_result
from tests.cluster.nets import Machine
from tests.cluster.servers import STORAGE
from tests.data_sources import mnist
from tests.e2e.clients import Counts, load, until
from tests.e2e.conftest import MODEL
from tests.integration.test_resume import trial_runs
from tests.sweeps import NUM_EPOCHS, NUM_TRIALS

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

NUM_CLIENTS = 8
PAUSE_S = 0.04
"""Of each client: nodes that come back share the cores with them."""
RETURN_S = 180
"""In which replicas must be back; an idle machine takes a tenth of it."""
SWEEP_S = 300


def image() -> bytes:
    return mnist("test")[0][0].tobytes()


def url_of(machine: Machine) -> str:
    return f"http://{machine.ip}:{HTTP_PORT}"


def answered(counts: Counts, number: int, what: str) -> None:
    """Wait for so many more answers."""
    goal = counts.answered + number
    until(lambda: counts.answered >= goal, deadline_s=120, what=f"{number} answers {what}")


def is_whole(line: ClusterLine, without: Machine | None = None) -> bool:
    """Whether all that should be served is, on nodes that are there."""
    try:
        replicas = line.replicas()
        running = set(line.statuses().values()) == {"RUNNING"}
    except (ServingError, LookupError):
        return False
    gateways = [row for row in replicas if row[:2] == ("gateway", "RUNNING")]
    there = all(without is None or ip != without.ip for _, _, ip in replicas)
    return running and there and len(gateways) >= 2


def test_a_worker_is_lost_under_load(line: ClusterLine) -> None:
    cluster = line.cluster
    lost, other = cluster.workers
    places = {ip for name, _, ip in line.replicas() if name == "gateway"}
    assert places == {lost.ip, other.ip}, "there is a gateway to lose, and one that stays"
    with load(url_of(other), image(), num_clients=NUM_CLIENTS, pause_s=PAUSE_S) as counts:
        answered(counts, 500, "before")
        assert lost.kill() > 0
        until(lambda: is_whole(line, lost), deadline_s=RETURN_S, what="return of the replicas")
        answered(counts, 500, "after")
    report("a worker lost under load", counts)
    # Each client has one request under way at a time, so no others were in flight there.
    assert len(counts.failures) <= NUM_CLIENTS, counts.failures
    cluster.start_worker(lost)
    cluster.await_all()
    with load(url_of(other), image(), num_clients=NUM_CLIENTS, pause_s=PAUSE_S) as counts:
        answered(counts, 200, "with the worker back")
    assert counts.failures == []


def test_a_worker_is_lost_in_the_middle_of_a_sweep(cluster: Cluster) -> None:
    folder = cluster.folder / "sweep"
    command = [sys.executable, "-m", "tests.cluster.sweep"]
    command += [STORAGE, cluster.servers.mlflow_url, str(folder)]
    address = {"RAY_ADDRESS": f"{cluster.head.ip}:6379"}
    driver = cluster.head.start(command, {**cluster.node_env(), **address}, "sweep")
    lost = cluster.workers[0]
    try:
        until(
            lambda: (
                driver.poll() is not None or all(is_at_work(m, folder) for m in cluster.workers)
            ),
            deadline_s=SWEEP_S,
            what="trials on both workers, past their first epoch",
        )
        assert driver.poll() is None, cluster.head.log("sweep").read_text()[-3000:]
        gone = set(lost.pids())
        lost.kill()
        before = epochs(folder)
        driver.wait(timeout=SWEEP_S)
    finally:
        ended = driver.poll()
        if ended is None:
            driver.kill()
            driver.wait()
        if not lost.pids():
            cluster.start_worker(lost)
            cluster.await_all()
    said = cluster.head.log("sweep").read_text()
    assert ended == 0, said[-3000:]
    result = last_result(said)
    assert result["num_failed"] == 0

    last = {x: (epoch, pid) for x, epoch, pid in before}
    cut = {x: epoch for x, (epoch, pid) in last.items() if pid in gone and epoch < NUM_EPOCHS}
    assert cut, "trials were under way there"
    after = epochs(folder)[len(before) :]
    assert not {pid for _, _, pid in after} & gone
    for x, epoch in cut.items():
        resumed = [now for again, now, _ in after if again == x]
        # From what it kept: the epoch after that, or once more the one that was not kept yet.
        assert resumed[0] in {epoch, epoch + 1}
        assert resumed[-1] == NUM_EPOCHS
    worked = len(before) + len(after)
    # Each process there had one epoch whose report may not have been taken yet.
    slots = len({pid for _, _, pid in before if pid in gone})
    assert worked <= NUM_TRIALS * NUM_EPOCHS + slots
    print(f"cut off: {len(cut)} trials, {worked - NUM_TRIALS * NUM_EPOCHS} epochs worked twice")
    assert_none_lost_or_twice(cluster, result["sweep_run_id"])


def epochs(folder: Path) -> list[list[Any]]:
    """Every epoch that was worked: parameter, epoch, process."""
    log = folder / "epochs.log"
    return [json.loads(row) for row in log.read_text().splitlines()] if log.exists() else []


def is_at_work(machine: Machine, folder: Path) -> bool:
    """Whether a trial that has something to go on from is under way on a machine."""
    pids = set(machine.pids())
    last = {pid: epoch for _, epoch, pid in epochs(folder) if pid in pids}
    return any(1 < epoch < NUM_EPOCHS for epoch in last.values())


def assert_none_lost_or_twice(cluster: Cluster, sweep_run_id: str) -> None:
    storage = Storage(STORAGE)
    events = [storage.read_json(path) for path in storage.list(f"sweeps/{sweep_run_id}/journal")]
    ends = Counter(event["trial"] for event in events if event["event"] == "ended")
    assert ends == {number: 1 for number in range(NUM_TRIALS)}
    settings = Settings(storage=STORAGE, mlflow_uri=cluster.servers.mlflow_url, model="tiny")
    runs = trial_runs(settings, sweep_run_id)
    numbers = Counter(int(run.data.tags["rayline.trial"]) for run in runs)
    assert numbers == {number: 1 for number in range(NUM_TRIALS)}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_head_is_lost_and_comes_back(line: ClusterLine) -> None:
    cluster = line.cluster
    until(lambda: is_whole(line), deadline_s=RETURN_S, what="all replicas")
    places = [ip for name, _, ip in line.replicas() if name == "gateway"]
    stays = next(worker for worker in cluster.workers if worker.ip in places)
    before = policy.current(Storage(STORAGE))
    assert before is not None
    bundles = before.models[MODEL].bundles
    with load(url_of(stays), image(), num_clients=NUM_CLIENTS, pause_s=PAUSE_S) as counts:
        answered(counts, 500, "before")
        cluster.head.kill()
        assert cluster.alive() == []
        answered(counts, 500, "without a head")
        cluster.start_head()
        cluster.await_all()
        until(lambda: is_whole(line), deadline_s=RETURN_S, what="the control plane's return")
        # Jobs, Serve's config, policy and registry: all that there is to control.
        shares = [f"{version}={10 * n}" for n, version in enumerate(bundles, start=1)]
        said = line.run("jobs.submit", "deploy", "--why", "a new head", "weights", *shares)
        answered(counts, 500, "after")
    report("the head lost", counts)
    assert counts.failures == []
    result = last_result(said)
    assert result["generation"] == before.generation + 1
    until(
        lambda: requests.get(f"{url_of(cluster.head)}/traffic", timeout=30).ok,
        deadline_s=RETURN_S,
        what="an answer of the new head's ingress",
    )


def report(what: str, counts: Counts) -> None:
    print(f"{what}: {counts.answered} answered, {len(counts.failures)} failed")
