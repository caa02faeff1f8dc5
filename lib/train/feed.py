"""From a sweep's journal to its record in MLflow: every event that MLflow is to know of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from lib.registry.tracking import Ending, SweepRecord
from lib.storage import Storage
from lib.train.journal import Event
from lib.train.progress import (
    ASKED,
    CHANGED,
    ENDED,
    FAILED,
    RECORDED,
    REPORTED,
    RUN,
    Progress,
    TrialState,
)
from lib.train.trainable import Desk


class Feed:
    """Passes events on to the record, and what the record has done back to the journal."""

    def __init__(self, progress: Progress, desk: Desk, artifacts: Mapping[str, str]) -> None:
        self._progress = progress
        self._desk = desk
        self._artifacts = artifacts
        self._record: SweepRecord | None = None

    def start(self, record: SweepRecord, past: Iterable[Event]) -> None:
        """Pass on what an earlier driver did not get recorded, then all that happens."""
        self._record = record
        for event in past:
            trial = self._progress.trials.get(event.get("trial", -1))
            if trial is not None and not trial.recorded:
                self.pass_on(event)
        self._progress.listeners.append(self.pass_on)

    def noted(self, trial: int, run_id: str | None) -> None:
        """Take note of a run that was opened, or of a trial that is all recorded."""
        if run_id is not None:
            self._progress.add(RUN, trial=trial, run_id=run_id)
        else:
            self._progress.add(RECORDED, trial=trial)

    def pass_on(self, event: Event) -> None:
        """Record one event."""
        record, kind = self._record, event["event"]
        assert record is not None
        if kind == ASKED:
            record.started(event["trial"], event["params"])
        elif kind == CHANGED:
            record.changed(event["trial"], event["epoch"], event["params"])
        elif kind == REPORTED:
            record.reported(event["trial"], event["epoch"], event["metrics"], event["time_ms"])
        elif kind == ENDED:
            trial = self._progress.trials[event["trial"]]
            record.ended(trial.number, self._ending(trial, event))

    def _ending(self, trial: TrialState, event: Event) -> Ending:
        status = "FAILED" if event["how"] == FAILED else "FINISHED" if trial.best else "KILLED"
        return Ending(
            status=status,
            why=event["why"],
            metrics=trial.best,
            best_epoch=trial.best_epoch,
            epoch=trial.epoch,
            time_ms=event["time_ms"],
            files={path: partial(self.kept, trial, name) for name, path in self._artifacts.items()},
        )

    def kept(self, trial: TrialState, name: str) -> bytes | None:
        """Return a file that a trial keeps; None if there is none, or no more."""
        storage: Storage = self._desk.storage
        # The best epoch may have been that of an earlier attempt.
        for attempt in reversed(trial.attempts):
            path = self._desk.file(attempt, name)
            if storage.exists(path):
                return storage.read(path)
        return None
