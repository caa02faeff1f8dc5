"""What a sweep reports while it runs, and how states are reported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lib.storage import Storage
from lib.train.experiment import DOUBLE, MAXIMIZE, Experiment, Named, Objective, Parameter
from lib.train.gauges import SweepGauges
from lib.train.journal import Journal
from lib.train.progress import ASKED, ENDED, FAILED, FINISHED, REPORTED, SESSION, Progress
from lib.watch import metrics, reported
from lib.watch.gauges import Gauges
from tests.e2e.clients import until

EXPERIMENT = Experiment(
    name="reported",
    objectives=(Objective(metric="score", goal=MAXIMIZE),),
    parameters=(Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0),),
    algorithm=Named("random"),
    num_trials=3,
)


class RayGauge:
    """What Ray does with a gauge: it keeps a value until it has exported it."""

    values: ClassVar[dict[tuple[str, ...], float]] = {}

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._labels = labels

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._name, *(tags[label] for label in self._labels)] = value


@pytest.fixture(autouse=True)
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    monkeypatch.setattr("ray.util.metrics.Gauge", RayGauge)
    RayGauge.values.clear()
    return RayGauge.values


@pytest.fixture
def progress(tmp_path: Path) -> Iterator[Progress]:
    with Journal(Storage(str(tmp_path)), "sweep") as journal:
        progress = Progress(journal, EXPERIMENT)
        progress.add(SESSION)
        yield progress


def report(progress: Progress, trial: int, score: float, images_per_s: float) -> None:
    found = {"score": score, "images_per_s": images_per_s}
    progress.add(REPORTED, trial=trial, report=1, epoch=1, rung=1, metrics=found)


def test_a_sweep_reports_its_trials_best_value_and_speed(
    progress: Progress, exported: dict[tuple[str, ...], float]
) -> None:
    with Gauges() as gauges:
        reporter = SweepGauges(gauges, "s1", EXPERIMENT.objective, progress)
        progress.listeners.append(reporter.noted)
        for number in range(3):
            progress.add(ASKED, trial=number, params={}, sampled={})
        assert exported[metrics.SWEEP_TRIALS.name, "s1", "running"] == 3
        assert (metrics.SWEEP_BEST.name, "s1", "score") not in exported
        report(progress, 0, 0.5, 1000)
        report(progress, 1, 0.7, 2500)
        assert exported[metrics.SWEEP_IMAGES_PER_S.name, "s1"] == 3500
        progress.add(ENDED, trial=1, how=FINISHED, why="")
        progress.add(ENDED, trial=2, how=FAILED, why="")
    assert {
        state: exported[metrics.SWEEP_TRIALS.name, "s1", state]
        for state in ("running", "done", "failed")
    } == {"running": 1, "done": 1, "failed": 1}
    assert exported[metrics.SWEEP_BEST.name, "s1", "score"] == 0.7
    assert exported[metrics.SWEEP_IMAGES_PER_S.name, "s1"] == 1000


def test_a_value_is_reported_again_until_it_is_replaced_or_closed(
    exported: dict[tuple[str, ...], float],
) -> None:
    old = (metrics.ROLLOUT_STATE.name, "digits", "4", "running")
    new = (metrics.ROLLOUT_STATE.name, "digits", "4", "paused")
    with Gauges(again_every_s=0.01) as gauges:
        gauges.set(metrics.ROLLOUT_STATE, 1.0, "digits", "4", "running")
        exported.clear()  # Ray exports what it has, and forgets it.
        until(lambda: old in exported, what="the same value again", deadline_s=10)
        gauges.update(
            {(metrics.ROLLOUT_STATE, ("digits", "4", "paused")): 1.0},
            instead_of=[metrics.ROLLOUT_STATE],
        )
        exported.clear()
        until(lambda: new in exported, what="the new value again", deadline_s=10)
        assert old not in exported
    assert gauges.is_closed


def test_what_is_no_gauge_or_lacks_a_label_is_refused() -> None:
    with Gauges() as gauges:
        with pytest.raises(ValueError, match="is a counter"):
            gauges.set(metrics.REQUESTS, 1.0, "digits", "4", "open", "200")
        with pytest.raises(ValueError, match="has the labels"):
            gauges.set(metrics.ACCURACY, 1.0, "digits")


def test_a_monitor_s_state_becomes_values_and_what_it_does_not_say_none() -> None:
    state: dict[str, Any] = {
        "model": "digits",
        "champion": 3,
        "class_names": ["zero", "one"],
        "versions": {
            "3": {
                "accuracy": 0.97,
                "low": 0.93,
                "high": 0.99,
                "labels": 120,
                "confidence": 0.9,
                "entropy": 0.2,
                "class_shares": [0.4, 0.6],
            },
            "4": {
                "accuracy": 0.0,
                "low": 0.0,
                "high": 1.0,
                "labels": 0,
                "confidence": math.nan,
                "entropy": None,
                "disagreement": 0.05,
            },
        },
        "test_accuracy": 0.99,
        "drift": {
            "alarm": True,
            "kinds": {"inputs": {"score": 0.3, "p_value": 1e-6}},
        },
    }
    values = reported.of_monitor(state)
    assert {metric for metric, _ in values} <= set(reported.MONITOR)
    named = {(metric.name.removeprefix("rayline_"), *labels): v for (metric, labels), v in
             values.items()}  # fmt: skip
    assert named == {
        ("drift_alarm", "digits"): 1,
        ("drift_score", "digits", "inputs"): 0.3,
        ("drift_p_value", "digits", "inputs"): 1e-6,
        ("accuracy", "digits", "3"): 0.97,
        ("accuracy_low", "digits", "3"): 0.93,
        ("accuracy_high", "digits", "3"): 0.99,
        ("accuracy_expected", "digits", "3"): 0.99,
        ("labelled_rows", "digits", "3"): 120,
        ("labelled_rows", "digits", "4"): 0,
        ("mean_confidence", "digits", "3"): 0.9,
        ("mean_entropy", "digits", "3"): 0.2,
        ("disagreement", "digits", "4"): 0.05,
        ("predicted_share", "digits", "zero"): 0.4,
        ("predicted_share", "digits", "one"): 0.6,
    }
    assert reported.of_monitor({"model": "digits", "paused": {"all": "storage is away"}}) == {}


def test_a_rollout_s_state_becomes_values() -> None:
    state = {
        "model": "digits",
        "candidate": 4,
        "status": "paused",
        "weight": 5.0,
        "gates": [
            {"name": "errors", "verdict": "pass", "samples": 210},
            {"name": "latency", "verdict": "wait", "samples": 210},
            {"name": "accuracy", "verdict": "breach", "samples": 30},
        ],
    }
    values = reported.of_rollout(state)
    assert {metric for metric, _ in values} == set(reported.ROLLOUT)
    assert values[metrics.ROLLOUT_STATE, ("digits", "4", "paused")] == 1
    assert values[metrics.ROLLOUT_WEIGHT, ("digits", "4")] == 5
    assert values[metrics.ROLLOUT_SAMPLES, ("digits", "4")] == 210
    assert [values[metrics.ROLLOUT_GATE, ("digits", "4", name)]
            for name in ("errors", "latency", "accuracy")] == [1, 0, -1]  # fmt: skip
