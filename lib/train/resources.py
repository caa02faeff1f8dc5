"""What a trial may take of a cluster that others use too."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from lib.errors import SearchError

_SETTLE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResources:
    """The share of one trial, and how many run side by side."""

    cpus: float
    gpus: float
    num_parallel: int
    num_threads: int = 1
    """Of one trial. Small nets gain nothing from more, and one makes results repeatable."""

    def request(self) -> dict[str, float]:
        """Return the request as Tune takes it."""
        if self.gpus:
            return {"CPU": self.cpus, "GPU": self.gpus}
        # Tune refuses a request of nothing; one byte is next to nothing.
        return {"CPU": self.cpus} if self.cpus else {"CPU": 0.0, "memory": 1.0}

    def describe(self) -> str:
        """Return one line for people."""
        gpu = f" and {self.gpus:g} GPU" if self.gpus else ""
        note = ", what others in the cluster leave free" if self.cpus < 1 else ""
        trials = "1 trial" if self.num_parallel == 1 else f"{self.num_parallel} trials"
        return f"{trials} at a time, each on {self.cpus:g} CPU{gpu}{note}"


def trial_resources(gpus_per_trial: float) -> TrialResources:
    """Share what is free now among trials, so that a sweep starts at once beside serving."""
    free = _settled_resources()
    num_nodes = sum(1 for node in ray.nodes() if node["Alive"])
    has_gpus = ray.cluster_resources().get("GPU", 0.0) > 0
    return share(
        free_cpus=free.get("CPU", 0.0),
        free_gpus=free.get("GPU", 0.0) if has_gpus else 0.0,
        num_nodes=max(1, num_nodes),
        gpus_per_trial=gpus_per_trial,
    )


def asked_resources(cpus: float | None, gpus: float | None) -> TrialResources:
    """Return what every trial asks for, whatever is free; with neither, a share of that.

    Raises SearchError if no node has as much.
    """
    if cpus is None and gpus is None:
        return trial_resources(0.0)
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return granted(cpus=cpus, gpus=gpus or 0.0, nodes=nodes, free=_settled_resources())


def granted(
    *,
    cpus: float | None,
    gpus: float,
    nodes: Sequence[Mapping[str, float]],
    free: Mapping[str, float],
) -> TrialResources:
    """Return how many trials of this size there is room for now, at least one.

    Raises SearchError if none of the nodes could hold one.
    """
    asked = {"CPU": 1.0 if cpus is None else cpus, "GPU": gpus}
    if not any(all(node.get(kind, 0.0) >= asked[kind] for kind in asked) for node in nodes):
        raise SearchError(
            f"a trial asks for {asked['CPU']:g} CPU and {asked['GPU']:g} GPU, and no node of the "
            "cluster has as much; ask for less under `resources`"
        )
    rooms = [free.get(kind, 0.0) / asked[kind] for kind in asked if asked[kind]]
    num_parallel = math.floor(min(rooms) + 1e-6) if rooms else len(nodes)
    return TrialResources(cpus=asked["CPU"], gpus=gpus, num_parallel=max(1, num_parallel))


def _settled_resources() -> Mapping[str, float]:
    """Return what is free once it has stopped growing.

    Ray takes back a worker's CPU some moments after its last task: right after an ingest half of
    a machine looks taken, and the whole sweep would run on the other half.
    """
    total = ray.cluster_resources().get("CPU", 0.0)
    free: Mapping[str, float] = {}
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        now = ray.available_resources()
        if not free or now.get("CPU", 0.0) > free.get("CPU", 0.0):
            free, deadline = now, time.monotonic() + _SETTLE_S
        if free.get("CPU", 0.0) >= total:
            break
        time.sleep(0.1)
    return free


def share(
    *, free_cpus: float, free_gpus: float, num_nodes: int, gpus_per_trial: float
) -> TrialResources:
    """Return shares that fit on at least one node, however the free CPUs are spread.

    A trial gets one CPU where there are that many. Where replicas reserve fractions, 1.6 free
    CPUs make two trials of 0.8, not one: the cores are there, and replicas are seldom busy.
    """
    per_node = free_cpus / num_nodes
    slots = max(1, math.floor(per_node + 0.5))
    # Some node has at least the mean free, so a request of at most that can't wait for ever.
    cpus = math.floor(min(1.0, per_node / slots) * 100) / 100
    num_parallel = math.floor(free_cpus / cpus + 1e-6) if cpus else 1
    if free_gpus and gpus_per_trial:
        by_gpu = max(1, math.floor(free_gpus / gpus_per_trial + 1e-6))
        return TrialResources(
            cpus=cpus, gpus=gpus_per_trial, num_parallel=min(by_gpu, max(1, num_parallel))
        )
    return TrialResources(cpus=cpus, gpus=0.0, num_parallel=max(1, num_parallel))
