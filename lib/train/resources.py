"""What a trial may take of a cluster that others use too."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray

from lib.cli import progress as say
from lib.config import Settings
from lib.errors import SearchError
from lib.selector import matches, read_selector

if TYPE_CHECKING:
    from ray.tune import PlacementGroupFactory

_SETTLE_S = 2.0
_KINDS = ("CPU", "GPU")
Room = Callable[[], Mapping[str, float] | None]
"""Returns what all sweeps together have to share, None if there is no other sweep."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResources:
    """The share of one trial, and how many run side by side."""

    cpus: float
    gpus: float
    num_parallel: int
    num_threads: int = 1
    """Of one trial. Small nets gain nothing from more, and one makes results repeatable."""
    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels of the nodes that trials run on; empty: any node."""
    grows: bool = False
    """Whether an autoscaler adds nodes for trials that wait, each with CPUs for its GPUs."""
    free: Mapping[str, float] = field(default_factory=dict)
    """What was found free for trials."""
    most: Mapping[str, float] = field(default_factory=dict)
    """What trials may take of the cluster at most."""

    def request(self) -> dict[str, float] | PlacementGroupFactory:
        """Return the request as Tune takes it."""
        # Tune refuses a request of nothing; one byte is next to nothing.
        bundle = {"CPU": self.cpus} if self.cpus else {"CPU": 0.0, "memory": 1.0}
        if self.gpus:
            bundle = {"CPU": self.cpus, "GPU": self.gpus}
        if not self.selector:
            return bundle
        # Imported late: with Tune comes all of its start.
        from ray.tune import PlacementGroupFactory

        return PlacementGroupFactory([bundle], bundle_label_selector=[dict(self.selector)])

    def size(self) -> dict[str, float]:
        """Return what a trial takes that is scarce."""
        return {"GPU": self.gpus} if self.grows else {"CPU": self.cpus, "GPU": self.gpus}

    def describe(self) -> str:
        """Return one line for people."""
        gpu = f" and {self.gpus:g} GPU" if self.gpus else ""
        note = ", what others in the cluster leave free" if self.cpus < 1 else ""
        trials = "1 trial" if self.num_parallel == 1 else f"{self.num_parallel} trials"
        nodes = ", ".join(f"{key}={value}" for key, value in self.selector.items())
        where = f", on nodes with {nodes}" if nodes else ""
        return f"{trials} at a time, each on {self.cpus:g} CPU{gpu}{note}{where}"


def trial_resources(
    gpus_per_trial: float,
    settings: Settings | None = None,
    room: Room | None = None,
    *,
    num_trials: int | None = None,
) -> TrialResources:
    """Share what is free now among trials, so that a sweep starts at once beside serving.

    Beside other sweeps it is what they all have to share, `room`, as if this one were alone.

    Where the settings name nodes for trials, those alone count, and with `trial_gpus` also those
    that an autoscaler starts once trials wait for them. A trial takes more of a GPU than
    `gpus_per_trial` where there are more of them than `num_trials`, those at a time, can use.
    GPUs that others hold at the start are waited for.
    """
    selector = _trial_selector(settings)
    if settings and settings.trial_gpus and gpus_per_trial:
        per_trial = gpu_share(gpus_per_trial, settings.trial_gpus, num_trials)
        return grown(settings.trial_gpus, per_trial, selector)
    free, most = free_for_trials(settings, settle=True)
    lent = room() if room is not None else None
    shared = {**free, **(lent or {})}
    free_gpus = shared["GPU"]
    if gpus_per_trial and free_gpus < gpus_per_trial and most["GPU"]:
        free_gpus = most["GPU"]
        say("tune", f"all of {free_gpus:g} GPUs are in use: trials wait for them")
    shares = share(
        free_cpus=shared["CPU"],
        free_gpus=free_gpus,
        num_nodes=max(1, len(_nodes(selector))),
        gpus_per_trial=gpus_per_trial,
        # Beside sweeps whose trials hold parts, a whole GPU might never come free.
        num_trials=num_trials if lent is None else None,
    )
    return replace(shares, selector=selector, free=free, most=most)


def gpu_share(gpus_per_trial: float, num_gpus: float, num_trials: int | None) -> float:
    """Return a trial's part of a GPU so that trials are spread over all of them.

    Ray packs parts of a GPU: eight trials of a quarter would share two GPUs of eight.
    """
    # Where others hold parts, no GPU may be whole.
    if num_trials is None or num_gpus < 1 or num_gpus % 1:
        return gpus_per_trial
    per_gpu = math.ceil(num_trials / num_gpus)
    return max(gpus_per_trial, math.floor(100 / per_gpu) / 100)


def grown(
    num_gpus: int, gpus_per_trial: float, selector: Mapping[str, str] | None = None
) -> TrialResources:
    """Return shares of the GPUs that there will be: trials that wait make an autoscaler add nodes.

    A GPU node is taken to have a CPU for each trial that shares its GPUs.
    """
    # Per GPU, since no trial spans two: three of 0.3 on each, not six on two and one across.
    per_gpu = math.floor(1 / gpus_per_trial + 1e-6)
    num_parallel = num_gpus * per_gpu if per_gpu else math.floor(num_gpus / gpus_per_trial + 1e-6)
    return TrialResources(
        cpus=1.0,
        gpus=gpus_per_trial,
        num_parallel=max(1, num_parallel),
        selector=dict(selector or {}),
        grows=True,
        free={"GPU": float(num_gpus)},
        most={"GPU": float(num_gpus)},
    )


def asked_resources(
    cpus: float | None,
    gpus: float | None,
    settings: Settings | None = None,
    room: Room | None = None,
) -> TrialResources:
    """Return what every trial asks for, whatever is free; with neither, a share of that.

    Raises SearchError if no node has as much.
    """
    if cpus is None and gpus is None:
        return trial_resources(0.0, settings, room)
    selector = _trial_selector(settings)
    nodes = [dict(node["Resources"]) for node in _nodes(selector)]
    free, most = free_for_trials(settings, settle=True)
    found = granted(cpus=cpus, gpus=gpus or 0.0, nodes=nodes, free=_shared(room, free))
    return replace(found, selector=selector, free=free, most=most)


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


def free_for_trials(
    settings: Settings | None, *, settle: bool = False
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is free for trials now, and what they may take at most of the cluster.

    With `settle`, once it has stopped growing.
    """
    nodes = _nodes(_trial_selector(settings))
    most = {kind: sum(node["Resources"].get(kind, 0.0) for node in nodes) for kind in _KINDS}
    if settings is not None:
        most["CPU"] = max(0.0, most["CPU"] - settings.serve_cpus)
    now = _settled_resources() if settle else ray.available_resources()
    free = {kind: min(now.get(kind, 0.0), most[kind]) for kind in _KINDS}
    if settings is not None and settings.trial_gpus:
        # Those that are not there yet come for trials that wait.
        free["GPU"] = most["GPU"] = float(settings.trial_gpus)
    return free, most


def _shared(room: Room | None, free: Mapping[str, float]) -> Mapping[str, float]:
    return {**free, **((room() if room is not None else None) or {})}


def _trial_selector(settings: Settings | None) -> dict[str, str]:
    labels = settings.trial_labels if settings else ""
    return dict(read_selector("RAYLINE_TRIAL_LABELS", labels))


def _nodes(selector: Mapping[str, str]) -> list[Mapping[str, Any]]:
    return [
        node for node in ray.nodes() if node["Alive"] and matches(selector, node.get("Labels", {}))
    ]


def _settled_resources() -> Mapping[str, float]:
    """Return what is free once it has stopped growing.

    Ray takes back a worker's CPU some moments after its last task: right after an ingest half of
    a machine looks taken, and the whole sweep would run on the other half.
    """
    total = ray.cluster_resources()
    free: Mapping[str, float] = {}
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        now = ray.available_resources()
        if not free or any(now.get(kind, 0.0) > free.get(kind, 0.0) for kind in _KINDS):
            free, deadline = now, time.monotonic() + _SETTLE_S
        if all(free.get(kind, 0.0) >= total.get(kind, 0.0) for kind in _KINDS):
            break
        time.sleep(0.1)
    return free


def share(
    *,
    free_cpus: float,
    free_gpus: float,
    num_nodes: int,
    gpus_per_trial: float,
    num_trials: int | None = None,
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
        at_a_time = num_trials and min(num_trials, max(1, num_parallel))
        gpus = gpu_share(gpus_per_trial, free_gpus, at_a_time)
        by_gpu = max(1, math.floor(free_gpus / gpus + 1e-6))
        return TrialResources(cpus=cpus, gpus=gpus, num_parallel=min(by_gpu, max(1, num_parallel)))
    return TrialResources(cpus=cpus, gpus=0.0, num_parallel=max(1, num_parallel))
