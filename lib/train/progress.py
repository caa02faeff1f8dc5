"""The state of a sweep, made from its journal: which trials there are and how each stands."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.train.experiment import (
    MAXIMIZE,
    MINIMIZE,
    NUM_PARAMETERS,
    Experiment,
    Objective,
    rank_key,
)
from lib.train.journal import Event, Journal

FINISHED, STOPPED, FAILED, CUT = "finished", "stopped", "failed", "cut"
"""How a trial ends: trained to its end, stopped early, failed, cut off with the whole sweep."""
ASKED, STARTED, REPORTED, CHANGED, ENDED = "asked", "started", "reported", "changed", "ended"
RUN, RECORDED, SESSION, CLOSED = "run", "recorded", "session", "closed"
REOPENED = "reopened"


@dataclass(kw_only=True, slots=True)
class TrialState:
    """One trial, however many processes and drivers it took."""

    number: int
    params: dict[str, Any]
    sampled: Mapping[str, Any]
    """What the sampler remembers of having drawn it."""
    attempts: list[str] = field(default_factory=list)
    """Tune's ids of it; more than one if a driver died under it."""
    rungs: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    """Reports that schedulers compared: epoch, the time it counted as, metrics."""
    num_reports: int = 0
    epoch: int = 0
    """Of the last report."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Epoch of every report, and the objective that training changes."""
    best: dict[str, float] = field(default_factory=dict)
    """All metrics of the report with the best objective, or of the last one if that counts."""
    best_epoch: int = 0
    ended: str | None = None
    why: str = ""
    run_id: str | None = None
    recorded: bool = False
    """Whether all of it is in MLflow."""


class Progress:
    """All trials of a sweep. Every change is an event in the journal first."""

    def __init__(self, journal: Journal, experiment: Experiment) -> None:
        self.trials: dict[int, TrialState] = {}
        self.closed = False
        self.listeners: list[Callable[[Event], None]] = []
        """Told of every new event."""
        self._journal = journal
        self._objective = experiment.objective
        self._objectives = experiment.objectives
        self._by_attempt: dict[str, TrialState] = {}
        self.best: TrialState | None = None
        """The trial that ended with the best objective so far."""
        self.num_failed = 0
        self._lock = threading.Lock()
        self._sessions: list[tuple[int, int]] = []
        for event in journal.events:
            self._apply(event)

    @property
    def spent_s(self) -> float:
        """Seconds that drivers have worked on the sweep, up to the last event."""
        return sum(end - start for start, end in self._sessions) / 1000

    def add(self, kind: str, *, durable: bool = False, **content: Any) -> None:
        """Note an event."""
        event = {"event": kind, "time_ms": int(time.time() * 1000), **content}
        with self._lock:  # The writer to MLflow notes what it has written.
            self._journal.append(event, durable=durable)
            self._apply(event)
        for listener in self.listeners:
            listener(event)

    def of_attempt(self, attempt: str) -> TrialState | None:
        """Return the trial that Tune knows by this id."""
        return self._by_attempt.get(attempt)

    def interrupted(self) -> list[TrialState]:
        """Return the trials that have begun and not ended."""
        return [trial for trial in self.trials.values() if trial.ended is None]

    def ranked(self) -> list[TrialState]:
        """Return the trials that left a result, the best one first, the earlier one if equal."""
        found = [
            trial
            for trial in self.trials.values()
            if trial.best and trial.ended in (FINISHED, STOPPED, CUT)
        ]
        return sorted(found, key=lambda t: (rank_key(self._objectives, t.best), t.number))

    def _apply(self, event: Event) -> None:
        kind = event["event"]
        if kind == SESSION:
            self._sessions.append((event["time_ms"], event["time_ms"]))
            return
        if kind not in (RUN, RECORDED):  # The search does not wait for these.
            self._sessions[-1] = (self._sessions[-1][0], event["time_ms"])
        if kind in (CLOSED, REOPENED):
            self.closed = kind == CLOSED
            return
        number = event["trial"]
        if kind == ASKED:
            self.trials[number] = TrialState(
                number=number, params=event["params"], sampled=event["sampled"]
            )
            return
        trial = self.trials[number]
        if kind == STARTED:
            trial.attempts.append(event["attempt"])
            self._by_attempt[event["attempt"]] = trial
        elif kind == REPORTED:
            self._report(trial, event)
        elif kind == CHANGED:
            trial.params = event["params"]
        elif kind == ENDED:
            trial.ended, trial.why = event["how"], event["why"]
            self.num_failed += trial.ended == FAILED
            if trial.best and trial.ended != FAILED:
                key, best = rank_key(self._objectives, trial.best), self.best
                if best is None or key < rank_key(self._objectives, best.best):
                    self.best = trial
        elif kind == RUN:
            trial.run_id = event["run_id"]
        elif kind == RECORDED:
            trial.recorded = True

    def _report(self, trial: TrialState, event: Event) -> None:
        trial.epoch, trial.num_reports = event["epoch"], event["report"]
        if event["rung"] is not None:
            trial.rungs.append((trial.epoch, event["rung"], event["metrics"]))
        objective, metrics = self._objective, event["metrics"]
        trial.curve.append((trial.epoch, metrics[objective.metric]))
        key = rank_key((objective,), metrics)
        if not trial.best or objective.by_last or key < rank_key((objective,), trial.best):
            trial.best, trial.best_epoch = metrics, trial.epoch


def reached(objective: Objective, metrics: Mapping[str, float]) -> bool:
    """Whether a trial with these metrics has come to the target, where there is one."""
    if objective.target is None:
        return False
    value = metrics.get(objective.metric, math.nan)
    return value >= objective.target if objective.goal == MAXIMIZE else value <= objective.target


def traded_off(experiment: Experiment, trials: Sequence[TrialState]) -> tuple[Objective, ...]:
    """Return what a front is drawn of: the objectives, with one alone the size of the net too."""
    objectives = experiment.objectives
    if len(objectives) > 1 or not all(NUM_PARAMETERS in trial.best for trial in trials):
        return objectives
    return (*objectives, Objective(metric=NUM_PARAMETERS, goal=MINIMIZE, constant=True))


def pareto_front(objectives: Sequence[Objective], trials: Sequence[TrialState]) -> list[TrialState]:
    """Return the trials that no other trial beats in one objective without losing in another."""
    signs = [1 if objective.goal == MAXIMIZE else -1 for objective in objectives]
    points_NO = np.array(
        [
            [
                sign * trial.best[objective.metric]
                for sign, objective in zip(signs, objectives, strict=True)
            ]
            for trial in trials
        ]
    )
    return [
        trial
        for trial, mine in zip(trials, points_NO, strict=True)
        if not ((points_NO >= mine).all(axis=1) & (points_NO > mine).any(axis=1)).any()
    ]
