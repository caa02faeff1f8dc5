"""What a trial may take of a cluster that others use too."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import ray

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
    if free_gpus:
        by_gpu = max(1, math.floor(free_gpus / gpus_per_trial + 1e-6))
        return TrialResources(
            cpus=cpus, gpus=gpus_per_trial, num_parallel=min(by_gpu, max(1, num_parallel))
        )
    return TrialResources(cpus=cpus, gpus=0.0, num_parallel=max(1, num_parallel))
