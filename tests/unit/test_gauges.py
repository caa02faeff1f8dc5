"""What a sweep reports while it runs, and how states are reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.storage import Storage
from lib.train.gauges import SweepGauges
from lib.train.journal import Journal
from lib.train.progress import ASKED, ENDED, FAILED, FINISHED, REPORTED, SESSION, Progress
from lib.watch import metrics
from lib.watch.gauges import Gauges
from lib.watch.metrics import Metric
from tests.unit.test_search_parts import EXPERIMENT


class Noted(Gauges):
    """Keeps what Ray would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, ...], float] = {}

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        assert metric.is_gauge
        assert len(labels) == len(metric.labels)
        self.values[metric.name, *labels] = value


@pytest.fixture
def progress(tmp_path: Path) -> Iterator[Progress]:
    with Journal(Storage(str(tmp_path)), "sweep") as journal:
        progress = Progress(journal, EXPERIMENT)
        progress.add(SESSION)
        yield progress


def report(progress: Progress, trial: int, score: float, images_per_s: float) -> None:
    found = {"score": score, "images_per_s": images_per_s}
    progress.add(REPORTED, trial=trial, report=1, epoch=1, rung=1, metrics=found)


def test_a_sweep_reports_its_trials_best_value_and_speed(progress: Progress) -> None:
    gauges = Noted()
    reporter = SweepGauges(gauges, "s1", EXPERIMENT.objective, progress)
    progress.listeners.append(reporter.noted)
    for number in range(3):
        progress.add(ASKED, trial=number, params={}, sampled={})
    assert gauges.values[metrics.SWEEP_TRIALS.name, "s1", "running"] == 3
    assert (metrics.SWEEP_BEST.name, "s1", "score") not in gauges.values
    report(progress, 0, 0.5, 1000)
    report(progress, 1, 0.7, 2500)
    assert gauges.values[metrics.SWEEP_IMAGES_PER_S.name, "s1"] == 3500
    progress.add(ENDED, trial=1, how=FINISHED, why="")
    progress.add(ENDED, trial=2, how=FAILED, why="")
    assert {
        state: gauges.values[metrics.SWEEP_TRIALS.name, "s1", state]
        for state in ("running", "done", "failed")
    } == {"running": 1, "done": 1, "failed": 1}
    assert gauges.values[metrics.SWEEP_BEST.name, "s1", "score"] == 0.7
    assert gauges.values[metrics.SWEEP_IMAGES_PER_S.name, "s1"] == 1000


def test_of_several_states_one_is_on() -> None:
    gauges = Noted()
    for state in ("shadow", "canary", "paused"):
        gauges.set_state(metrics.ROLLOUT_STATE, state, "digits", "4")
    name = metrics.ROLLOUT_STATE.name
    assert {labels[-1]: on for labels, on in gauges.values.items() if labels[0] == name} == {
        "shadow": 0,
        "canary": 0,
        "paused": 1,
    }


def test_a_counter_is_not_set() -> None:
    with pytest.raises(ValueError, match="is a counter"):
        Gauges().set(metrics.REQUESTS, 1.0, "digits", "4", "open", "200")
