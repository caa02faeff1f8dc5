from __future__ import annotations

import pytest

from lib.train.resources import share


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
