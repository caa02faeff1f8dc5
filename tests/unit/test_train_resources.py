from __future__ import annotations

import pytest

from lib.errors import SearchError
from lib.train import resources
from lib.train.resources import granted, share, trial_resources


@pytest.mark.parametrize(
    ("free_cpus", "num_nodes", "cpus", "num_parallel"),
    [
        (2.0, 1, 1.0, 2),  # A machine of its own.
        (1.6, 1, 0.8, 2),  # Beside replicas that reserve fractions.
        (1.2, 1, 1.0, 1),
        (0.4, 1, 0.4, 1),
        (0.0, 1, 0.0, 1),  # Full: a request of nothing is granted all the same.
        (64.0, 1, 1.0, 64),
        (0.8, 2, 0.4, 2),  # Perhaps 0.4 on each: a request of 0.8 could wait for ever.
        (6.0, 2, 1.0, 6),
    ],
)
def test_trials_take_what_is_left(
    free_cpus: float, num_nodes: int, cpus: float, num_parallel: int
) -> None:
    shared = share(free_cpus=free_cpus, free_gpus=0.0, num_nodes=num_nodes, gpus_per_trial=0.25)
    assert (shared.cpus, shared.num_parallel) == (cpus, num_parallel)
    assert shared.cpus * shared.num_parallel <= free_cpus
    assert "GPU" not in shared.request()


def test_with_gpus_a_trial_takes_the_fraction_of_the_preset() -> None:
    shared = share(free_cpus=16.0, free_gpus=1.0, num_nodes=1, gpus_per_trial=0.25)
    assert shared.request() == {"CPU": 1.0, "GPU": 0.25}
    assert shared.num_parallel == 4


def test_cpus_can_be_scarcer_than_gpus() -> None:
    shared = share(free_cpus=2.0, free_gpus=8.0, num_nodes=1, gpus_per_trial=0.25)
    assert shared.num_parallel == 2


def test_the_line_for_people_says_when_others_reserve_cpus() -> None:
    shared = share(free_cpus=1.6, free_gpus=0.0, num_nodes=1, gpus_per_trial=0.25)
    assert shared.describe() == (
        "2 trials at a time, each on 0.8 CPU, what others in the cluster leave free"
    )


def test_gpus_that_no_trial_asks_for_are_left_alone() -> None:
    shared = share(free_cpus=4.0, free_gpus=2.0, num_nodes=1, gpus_per_trial=0.0)
    assert shared.request() == {"CPU": 1.0}
    assert shared.num_parallel == 4


NODES = ({"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("cpus", "gpus", "request_", "num_parallel"),
    [
        (0.5, 0.0, {"CPU": 0.5}, 12),
        (4.0, 0.0, {"CPU": 4.0}, 1),
        (None, 0.5, {"CPU": 1.0, "GPU": 0.5}, 2),
        (7.0, 0.0, {"CPU": 7.0}, 1),  # More than is free: it waits.
    ],
)
def test_a_trial_gets_what_it_asks_for(
    cpus: float | None, gpus: float, request_: dict[str, float], num_parallel: int
) -> None:
    got = granted(cpus=cpus, gpus=gpus, nodes=NODES, free={"CPU": 6.0, "GPU": 1.0})
    assert got.request() == request_
    assert got.num_parallel == num_parallel


@pytest.mark.parametrize(("cpus", "gpus"), [(9.0, 0.0), (1.0, 2.0)])
def test_more_than_any_node_has_is_refused(cpus: float, gpus: float) -> None:
    with pytest.raises(SearchError, match="no node of the cluster has as much"):
        granted(cpus=cpus, gpus=gpus, nodes=NODES, free={"CPU": 6.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("free_cpus", "free_gpus", "num_trials", "gpus", "num_parallel"),
    [
        (64.0, 8.0, 8, 1.0, 8),
        (64.0, 8.0, 3, 1.0, 8),  # No trial spans two.
        (64.0, 4.0, 8, 0.5, 8),
        (64.0, 3.0, 8, 0.33, 9),
        (64.0, 1.0, 32, 0.25, 4),
        (4.0, 8.0, 32, 1.0, 4),  # Four at a time, for want of CPUs.
        (64.0, 7.5, 8, 0.25, 30),  # Others hold parts.
        (64.0, 8.0, None, 0.25, 32),
    ],
)
def test_trials_are_spread_over_all_gpus(
    free_cpus: float, free_gpus: float, num_trials: int | None, gpus: float, num_parallel: int
) -> None:
    shared = share(
        free_cpus=free_cpus,
        free_gpus=free_gpus,
        num_nodes=1,
        gpus_per_trial=0.25,
        num_trials=num_trials,
    )
    assert (shared.gpus, shared.num_parallel) == (gpus, num_parallel)


@pytest.mark.parametrize(
    ("free_gpus", "lent", "gpus", "num_parallel"),
    [
        (8.0, None, 1.0, 8),
        (0.0, None, 1.0, 8),  # All are in use: trials wait for them.
        (8.0, {"GPU": 8.0}, 0.25, 16),  # Beside another sweep.
    ],
)
def test_gpus_that_are_busy_at_the_start_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    free_gpus: float,
    lent: dict[str, float] | None,
    gpus: float,
    num_parallel: int,
) -> None:
    """Ray's cluster is a stand-in: no GPU is here."""
    node = {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 8.0}}
    free = {"CPU": 16.0, "GPU": free_gpus}
    monkeypatch.setattr(resources.ray, "nodes", lambda: [node])
    monkeypatch.setattr(resources, "_settled_resources", lambda: free)
    found = trial_resources(0.25, None, lambda: lent, num_trials=8)
    assert (found.gpus, found.num_parallel) == (gpus, num_parallel)


def test_gpus_that_come_free_at_the_start_are_waited_for_as_cpus_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's answers and the clock are stand-ins."""
    answers = iter([{"CPU": 2.0}, {"CPU": 2.0, "GPU": 0.5}, {"CPU": 2.0, "GPU": 1.0}])
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(resources.ray, "available_resources", lambda: next(answers))
    monkeypatch.setattr(resources.time, "sleep", lambda _: None)
    assert resources._settled_resources()["GPU"] == 1.0
