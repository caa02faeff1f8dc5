"""A sweep as Prometheus sees it while it runs."""

from __future__ import annotations

from collections import Counter

from lib.train.experiment import Objective
from lib.train.journal import Event
from lib.train.progress import ASKED, ENDED, FAILED, REPORTED, Progress, TrialState
from lib.watch.gauges import Gauges
from lib.watch.metrics import SWEEP_BEST, SWEEP_IMAGES_PER_S, SWEEP_TRIALS, Metric

_SPEED = "images_per_s"
_RUNNING, _DONE, _FAILED = "running", "done", "failed"


class SweepGauges:
    """Reports a sweep's trials, best value and speed, at every event of its journal."""

    def __init__(
        self, gauges: Gauges, sweep: str, objective: Objective, progress: Progress
    ) -> None:
        self._gauges = gauges
        self._sweep = sweep
        self._objective = objective
        self._progress = progress
        self._speeds: dict[int, float] = {}
        """Of the trials that run, as they last reported it."""
        self._states = Counter(_state(trial) for trial in progress.trials.values())

    def noted(self, event: Event) -> None:
        """Report what an event has changed; to be a listener of the sweep's progress."""
        kind = event["event"]
        # Counted on, not anew: a long sweep has many events and many trials.
        if kind == ASKED:
            self._states[_RUNNING] += 1
        elif kind == REPORTED:
            self._speeds[event["trial"]] = event["metrics"].get(_SPEED, 0.0)
        elif kind == ENDED:
            self._speeds.pop(event["trial"], None)
            self._states[_RUNNING] -= 1
            self._states[_state(self._progress.trials[event["trial"]])] += 1
        else:
            return
        values: dict[tuple[Metric, tuple[str, ...]], float] = {
            (SWEEP_TRIALS, (self._sweep, state)): float(self._states[state])
            for state in (_RUNNING, _DONE, _FAILED)
        }
        values[SWEEP_IMAGES_PER_S, (self._sweep,)] = sum(self._speeds.values())
        best = self._progress.best
        if best is not None:
            metric = self._objective.metric
            values[SWEEP_BEST, (self._sweep, metric)] = best.best[metric]
        self._gauges.update(values)


def _state(trial: TrialState) -> str:
    if trial.ended is None:
        return _RUNNING
    return _FAILED if trial.ended == FAILED else _DONE
