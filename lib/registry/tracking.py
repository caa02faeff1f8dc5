"""How a sweep is recorded in MLflow: one parent run, one child run a trial.

After the parent run's start everything is written by a background thread, so that the search never
waits for the server. What the server did not take is in the sweep's journal, and is sent again
when it answers, or by the sweep that is resumed. Sending twice changes nothing: a point has the
time stamp of its event, and a trial's run is looked up before it is created.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from lib.cli import progress
from lib.config import Settings
from lib.errors import RegistryError
from lib.registry.server import connect
from lib.registry.sweep_runs import SweepRun, as_params, connect_quietly
from lib.registry.trials import BEST_PREFIX

_BATCH = 500
"""Metrics in one request; MLflow takes at most 1,000."""
_AWAY_S = 10.0
"""At the end of a sweep: how long a server that does not answer is waited for."""
_STALL_S = 120.0
"""At the end of a sweep: how long a server that answers may take for one trial."""
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_PERMANENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")


@dataclass(kw_only=True, slots=True)
class Ending:
    """How a trial ended, for its run."""

    status: str
    """MLflow's: FINISHED, FAILED or KILLED."""
    why: str
    metrics: Mapping[str, float]
    """Of its best epoch; recorded with a prefix, so that the curves stay as they were."""
    best_epoch: int
    epoch: int
    time_ms: int
    files: Mapping[str, Callable[[], bytes | None]]
    """Path among the run's artifacts → what reads the file; None if there is none."""


@dataclass(kw_only=True, slots=True)
class _Unsent:
    name: str = ""
    params: list[Param] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    tags: list[RunTag] = field(default_factory=list)
    ending: Ending | None = None

    def add(self, newer: _Unsent) -> None:
        """Take in what came meanwhile."""
        self.name = self.name or newer.name
        self.params += newer.params
        self.metrics += newer.metrics
        self.tags += newer.tags
        self.ending = newer.ending or self.ending


class SweepRecord:
    """Writes the runs of one sweep. Its methods return at once; `close` waits for what is unsent.

    Args:
        settings: Where MLflow is.
        sweep: The parent run.
        run_ids: Trials whose run is known already.
        noted: Called from the writer's thread with (trial, run id) when a run is there, and with
            (trial, None) when all of an ended trial is in MLflow.
        look_up: Whether an earlier driver may have opened runs that are not in `run_ids`.
    """

    def __init__(
        self,
        settings: Settings,
        sweep: SweepRun,
        *,
        run_ids: Mapping[int, str],
        noted: Callable[[int, str | None], None],
        look_up: bool = False,
    ) -> None:
        self._settings = settings
        self._sweep = sweep
        self._run_ids = dict(run_ids)
        self._noted = noted
        self._look_up = look_up
        self._client: MlflowClient = connect_quietly(settings)
        # MLflow's own retries hold a call for minutes, and may open a run twice. The record has
        # its own.
        self._retries = os.environ.get(_RETRIES)
        os.environ[_RETRIES] = "0"
        self._changed = threading.Condition()
        self._unsent: dict[int, _Unsent] = {}
        self._errors: list[str] = []
        self._busy = self._closing = False
        self._away_since_s: float | None = None
        self._last_success_s = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def started(self, trial: int, params: Mapping[str, Any]) -> None:
        """Open a trial's run."""
        self._put(trial, _Unsent(name=f"trial-{trial + 1}", params=as_params(params)))

    def changed(self, trial: int, epoch: int, params: Mapping[str, Any]) -> None:
        """Record that a trial goes on with other parameters; MLflow's can't change."""
        tag = RunTag(f"rayline.params_after_epoch_{epoch}", json.dumps(dict(params)))
        self._put(trial, _Unsent(tags=[tag]))

    def reported(self, trial: int, epoch: int, metrics: Mapping[str, float], time_ms: int) -> None:
        """Record an epoch."""
        points = [Metric(name, value, time_ms, epoch) for name, value in metrics.items()]
        self._put(trial, _Unsent(metrics=points))

    def ended(self, trial: int, ending: Ending) -> None:
        """Close a trial's run."""
        self._put(trial, _Unsent(ending=ending))

    def close(
        self, metrics: Mapping[str, float], *, failed: bool, files: Mapping[str, str]
    ) -> None:
        """Write what is left and close the sweep's run. `check` tells whether all was written.

        `files` are texts for the sweep's run, by their path among its artifacts.
        """
        self._drain()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self._unsent and self._away_since_s is None:
            try:
                self._finish(metrics, failed=failed, files=files)
            # Whatever it is, the loss is said here and by `check`.
            except Exception as error:
                self._fail(error)
        os.environ.pop(_RETRIES, None)
        if self._retries is not None:
            os.environ[_RETRIES] = self._retries

    def _finish(
        self, metrics: Mapping[str, float], *, failed: bool, files: Mapping[str, str]
    ) -> None:
        run_id, now_ms = self._sweep.run_id, int(time.time() * 1000)
        for path, text in files.items():
            self._client.log_text(run_id, text, path)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now_ms, 0) for name, value in metrics.items()],
            tags=[RunTag("rayline.record_complete", str(not self._errors).lower())],
        )
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def attach(self, files: Mapping[str, bytes]) -> None:
        """Add to the sweep's run, also after its end, what it is whole without.

        `files` are by their path among the run's artifacts. What MLflow does not take is said.
        """
        try:
            self._client = connect(self._settings)
            for path, content in files.items():
                self._upload(self._sweep.run_id, path, content)
        # Whatever it is, nothing that counts is lost.
        except Exception as error:
            progress("tracking", f"WARNING: MLflow did not take {', '.join(files)}: {_told(error)}")

    def check(self) -> None:
        """Raise RegistryError if anything was not written."""
        where = f"the record of sweep {self._sweep.run_id} at {self._settings.mlflow_uri}"
        if self._unsent or self._away_since_s is not None:
            raise RegistryError(
                f"{where} is incomplete: MLflow does not answer, and {len(self._unsent)} trials "
                "are not all in it; nothing is lost: start MLflow, then run "
                f"jobs.tune --resume {self._sweep.run_id}, which sends the rest"
            )
        if self._errors:
            raise RegistryError(
                f"{where} is incomplete: {self._errors[0]} ({len(self._errors)} writes failed); "
                "look at the MLflow server, then run jobs.tune again"
            )

    def _put(self, trial: int, newer: _Unsent) -> None:
        with self._changed:
            self._unsent.setdefault(trial, _Unsent()).add(newer)
            self._changed.notify_all()

    def _drain(self) -> None:
        """Wait until all is sent, or there is no hope for it now."""
        self._last_success_s = time.monotonic()
        while True:
            with self._changed:
                if not self._unsent and not self._busy:
                    return
                self._changed.wait(0.2)
                now_s = time.monotonic()
                away_s = now_s - self._away_since_s if self._away_since_s else 0.0
                if away_s > _AWAY_S or now_s - self._last_success_s > _STALL_S:
                    return

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._unsent:
                    if self._closing:
                        return
                    self._changed.wait()
                if self._closing and self._away_since_s is not None:
                    return
                trial = next(iter(self._unsent))
                unsent = self._unsent.pop(trial)
                self._busy = True
            sent = self._attempt(trial, unsent)
            with self._changed:
                self._busy = False
                if not sent:
                    newer = self._unsent.pop(trial, _Unsent())
                    unsent.add(newer)
                    self._unsent = {trial: unsent, **self._unsent}
                    # No other trial would fare better. It ends early when the sweep does.
                    self._changed.wait_for(lambda: self._closing, timeout=1.0)
                self._changed.notify_all()

    def _attempt(self, trial: int, unsent: _Unsent) -> bool:
        """Send; return False if it is to be tried again."""
        try:
            if self._away_since_s is not None:
                self._client = connect(self._settings)
            self._send(trial, unsent)
        # Whatever it is, the search goes on, and the loss is said here and by `check`.
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code in _PERMANENT:
                self._fail(error)
                return True
            # The server may have opened a run and died before it said so.
            self._look_up = True
            if self._away_since_s is None:
                self._away_since_s = time.monotonic()
                progress("tracking", f"WARNING: MLflow did not take a record, kept: {_told(error)}")
            return False
        if self._away_since_s is not None:
            progress("tracking", "MLflow answers again")
        self._away_since_s, self._last_success_s = None, time.monotonic()
        return True

    def _send(self, trial: int, unsent: _Unsent) -> None:
        run_id = self._run_ids.get(trial) or self._open(trial, unsent)
        ending = unsent.ending
        metrics, tags = list(unsent.metrics), list(unsent.tags)
        if ending is not None:
            metrics += [
                Metric(f"{BEST_PREFIX}{name}", value, ending.time_ms, ending.best_epoch)
                for name, value in {**ending.metrics, "epoch": float(ending.best_epoch)}.items()
                if ending.metrics
            ]
            tags.append(RunTag("rayline.ended", ending.why[:500]))
            tags.append(RunTag("rayline.epochs_trained", str(ending.epoch)))
            tags.append(RunTag("rayline.best_epoch", str(ending.best_epoch)))
        for start in range(0, max(1, len(metrics)), _BATCH):
            first = start == 0
            self._client.log_batch(
                run_id,
                metrics=metrics[start : start + _BATCH],
                params=unsent.params if first else [],
                tags=tags if first else [],
            )
        if ending is not None:
            for path, read in ending.files.items():
                self._upload(run_id, path, read())
            self._client.set_terminated(run_id, ending.status, end_time=ending.time_ms)
            self._noted(trial, None)

    def _open(self, trial: int, unsent: _Unsent) -> str:
        found = self._find(trial) if self._look_up else None
        if found is None:
            tags = {
                **self._sweep.tags,
                "rayline.kind": "trial",
                "rayline.trial": str(trial),
                "mlflow.parentRunId": self._sweep.run_id,
            }
            run = self._client.create_run(
                self._sweep.experiment_id, run_name=unsent.name, tags=tags
            )
            found = run.info.run_id
        if self._sweep.inputs:
            self._client.log_inputs(found, list(self._sweep.inputs))
        self._run_ids[trial] = found
        self._noted(trial, found)
        return found

    def _find(self, trial: int) -> str | None:
        """Return the run that was opened for a trial before its id could be noted."""
        runs = self._client.search_runs(
            [self._sweep.experiment_id],
            filter_string=f"tags.`mlflow.parentRunId` = '{self._sweep.run_id}' "
            f"and tags.`rayline.trial` = '{trial}'",
        )
        return runs[0].info.run_id if runs else None

    def _upload(self, run_id: str, path: str, content: bytes | None) -> None:
        if content is None:
            return
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="rayline-") as place:
            file = Path(place) / name
            file.write_bytes(content)
            self._client.log_artifact(run_id, str(file), folder or None)

    def _fail(self, error: Exception) -> None:
        message = _told(error)
        if message not in self._errors:
            progress("tracking", f"WARNING: MLflow did not take a record: {message}")
        self._errors.append(message)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
