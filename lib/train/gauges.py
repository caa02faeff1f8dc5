"""A sweep as Prometheus sees it while it runs."""

from __future__ import annotations

from collections import Counter

from lib.train.experiment import Objective
from lib.train.journal import Event
from lib.train.progress import ASKED, ENDED, FAILED, REPORTED, Progress
from lib.watch.gauges import Gauges
from lib.watch.metrics import SWEEP_BEST, SWEEP_IMAGES_PER_S, SWEEP_TRIALS, Metric

_SPEED = "images_per_s"


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

    def noted(self, event: Event) -> None:
        """Report what an event has changed; to be a listener of the sweep's progress."""
        kind = event["event"]
        if kind == REPORTED:
            self._speeds[event["trial"]] = event["metrics"].get(_SPEED, 0.0)
        elif kind == ENDED:
            self._speeds.pop(event["trial"], None)
        elif kind != ASKED:
            return
        trials = self._progress.trials.values()
        states = Counter(
            "running" if t.ended is None else "failed" if t.ended == FAILED else "done"
            for t in trials
        )
        values: dict[tuple[Metric, tuple[str, ...]], float] = {
            (SWEEP_TRIALS, (self._sweep, state)): float(states[state])
            for state in ("running", "done", "failed")
        }
        values[SWEEP_IMAGES_PER_S, (self._sweep,)] = sum(self._speeds.values())
        best = self._progress.best
        if best is not None:
            metric = self._objective.metric
            values[SWEEP_BEST, (self._sweep, metric)] = best.best[metric]
        self._gauges.update(values)
