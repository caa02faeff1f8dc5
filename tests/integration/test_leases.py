"""Sweeps of several owners on one Ray with two CPUs: each gets its share, and the dead give theirs
back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lib.leases.lender import LEASE_S, look
from lib.provenance import VARIABLE, Provenance
from lib.storage import Storage
from tests.sweeps import NUM_EPOCHS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
_DEADLINE_S = 240
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path, local_ray: None, mlflow_server: str) -> Iterator[Start]:
    """Yield what starts an owner's sweep; end those that are left."""
    drivers: list[subprocess.Popen[bytes]] = []

    def begin(owner: str, num_trials: int, **env: str) -> subprocess.Popen[bytes]:
        address = ray.get_runtime_context().gcs_address
        storage = str(tmp_path / owner)
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.sweeps", storage, mlflow_server, address, "random"],
            cwd=ROOT,
            env={
                **os.environ,
                VARIABLE: Provenance(commit="0" * 40, owner=owner).encode(),
                "TINY_TRIALS": str(num_trials),
                # So that one owner's sweep is not over before the other's driver has started.
                "TINY_EPOCH_S": "1.5",
                **env,
            },
            stdout=subprocess.DEVNULL,
        )
        drivers.append(driver)
        return driver

    yield begin
    for driver in drivers:
        driver.kill()
        driver.wait()
    # The next test begins with nobody on the cluster.
    wait_until(lambda: not leases())


def leases() -> dict[str, dict[str, Any]]:
    """Return the lease of every owner; here none has two sweeps."""
    seen = look()
    return {lease["owner"]: lease for lease in seen["leases"]} if seen else {}


def epochs(folder: Path) -> list[list[Any]]:
    """Every epoch that a sweep worked: parameter, epoch, process."""
    log = Path(Storage(str(folder)).path("epochs.log"))
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in log.read_text().splitlines()]
    return []


def wait_until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.1)


def test_two_owners_share_the_slots_and_the_later_one_gets_his_as_trials_end(
    start: Start, tmp_path: Path
) -> None:
    ann = start("ann", 24)
    wait_until(lambda: leases().get("ann", {}).get("running") == 2)
    bob = start("bob", 3)
    seen: list[Counter[str]] = []
    deadline_s = time.monotonic() + _DEADLINE_S
    while bob.poll() is None:
        assert time.monotonic() < deadline_s, "bob waits for ever"
        seen.append(Counter({owner: lease["running"] for owner, lease in leases().items()}))
        time.sleep(0.1)
    assert bob.returncode == 0
    assert ann.poll() is None, "bob did not have to wait for the end of ann's sweep"
    assert Counter(ann=1, bob=1) in seen
    assert max(sum(running.values()) for running in seen) <= 2
    assert ann.wait(timeout=_DEADLINE_S) == 0
    done = Counter(x for x, _, _ in epochs(tmp_path / "ann"))
    assert set(done.values()) == {NUM_EPOCHS}, "no trial was ended or begun again for another one"
    assert len(done) == 24
    wait_until(lambda: look() is None)


def test_no_owner_has_more_trials_running_than_his_limit(start: Start, tmp_path: Path) -> None:
    ann = start("ann", 3, RAYLINE_OWNER_LIMITS="ann=1,*=2")
    most = 0
    while ann.poll() is None:
        most = max(most, leases().get("ann", {}).get("running", 0))
        time.sleep(0.05)
    assert ann.returncode == 0
    assert most == 1
    assert len({pid for _, _, pid in epochs(tmp_path / "ann")}) == 1, "one process after the other"


def test_a_killed_drivers_slots_come_back(start: Start) -> None:
    ann = start("ann", 200)
    wait_until(lambda: leases().get("ann", {}).get("running") == 2)
    start("bob", 200)
    wait_until(lambda: leases().get("bob", {}).get("running") == 1)
    killed_s = time.monotonic()
    ann.kill()
    ann.wait()
    wait_until(lambda: leases().get("bob", {}).get("running") == 2)
    assert time.monotonic() - killed_s < LEASE_S + 60
    assert "ann" not in leases()
