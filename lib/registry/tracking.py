"""How a sweep is recorded in MLflow: one parent run, one child run a trial.

After the parent run's start everything is written by a background thread, in order, so that the
search never waits for the server.
"""

from __future__ import annotations

import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

from lib import provenance
from lib.cli import progress
from lib.config import Preset, Settings
from lib.data.manifest import Manifest, manifest_path
from lib.errors import RegistryError
from lib.registry.server import connect, explained
from lib.registry.trials import CHECKPOINT_PATH
from lib.storage import Storage

PACKAGES = ("ray", "torch", "torchvision", "mlflow", "optuna", "numpy", "pyarrow")
"""Packages whose version can change what a trial learns; recorded on every run."""
METRICS = ("train_loss", "val_loss", "val_accuracy", "lr", "images_per_s")
"""Recorded at every epoch of a trial."""
_FLUSH_TIMEOUT_S = 120


def start_sweep(
    settings: Settings,
    storage: Storage,
    manifest: Manifest,
    preset: Preset,
    facts: Mapping[str, Any],
) -> SweepRecord:
    """Open the parent run of a sweep in the experiment `rayline/<model name>`.

    `facts` are further parameters worth recording, such as the sampler and the resources of a
    trial. Raises RegistryError if MLflow can't be reached.
    """
    # The end of every trial's run would print two lines.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    client = connect(settings)
    name = f"rayline/{settings.model}"
    tags = _common_tags(manifest, preset)
    with explained(settings, "starting the record of a sweep"):
        found = client.get_experiment_by_name(name)
        experiment_id = found.experiment_id if found else client.create_experiment(name)
        run = client.create_run(
            experiment_id,
            run_name=f"sweep-{preset.name}-{time.strftime('%Y%m%d-%H%M%S')}",
            tags={**tags, "rayline.kind": "sweep"},
        )
        run_id = run.info.run_id
        params = _params({**asdict(preset), **facts})
        client.log_batch(run_id, params=params)
        client.log_inputs(run_id, [_dataset_input(storage, manifest)])
        diff = provenance.current().diff
        if diff:
            client.log_text(run_id, diff, "provenance/uncommitted.patch")
    return SweepRecord(settings, experiment_id, run_id, tags)


class SweepRecord:
    """The runs of one sweep. Its methods return at once; `close` waits for what is unwritten.

    An error of MLflow is said at once and never stops a trial; `check` raises if any happened.
    Can be pickled: a restored sweep goes on writing to the same runs.
    """

    def __init__(
        self, settings: Settings, experiment_id: str, sweep_run_id: str, tags: Mapping[str, str]
    ) -> None:
        self.sweep_run_id = sweep_run_id
        self.run_ids: dict[str, str] = {}
        """Trial → run."""
        self.params: dict[str, dict[str, Any]] = {}
        """Trial → its parameters."""
        self.best: dict[str, tuple[float, int]] = {}
        """Trial → highest validation accuracy, of which there is a checkpoint, and its epoch."""
        self._ended: set[str] = set()
        self._settings = settings
        self._experiment_id = experiment_id
        self._tags = dict(tags)
        self._start_thread()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        state = dict(self.__dict__)
        for name in ("_client", "_queue", "_errors", "_thread"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with a thread of this process."""
        self.__dict__.update(state)
        self._start_thread()

    def trial_started(self, trial: str, name: str, params: Mapping[str, Any]) -> None:
        """Open a trial's run; a trial that was restored keeps the run it has."""
        self.params[trial] = dict(params)

        def write() -> None:
            if trial in self.run_ids:
                return
            tags = {
                **self._tags,
                "rayline.kind": "trial",
                "rayline.trial": trial,
                "mlflow.parentRunId": self.sweep_run_id,
            }
            run = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
            self.run_ids[trial] = run.info.run_id
            self._client.log_batch(run.info.run_id, params=_params(params))

        self._queue.put(write)

    def trial_reported(self, trial: str, epoch: int, metrics: Mapping[str, float]) -> None:
        """Record an epoch, in one request."""
        values = {name: float(metrics[name]) for name in METRICS if name in metrics}
        timestamp_ms = _now_ms()

        def write() -> None:
            self._log(trial, values, epoch, timestamp_ms)

        self._queue.put(write)

    def trial_improved(self, trial: str, epoch: int, val_accuracy: float, model: bytes) -> None:
        """Keep the model file of a trial's best epoch so far, in place of the one before."""
        self.best[trial] = (val_accuracy, epoch)
        folder, _, name = CHECKPOINT_PATH.rpartition("/")

        def write() -> None:
            with tempfile.TemporaryDirectory(prefix="rayline-") as place:
                file = Path(place) / name
                file.write_bytes(model)
                self._client.log_artifact(self.run_ids[trial], str(file), folder)

        self._queue.put(write)

    def trial_ended(self, trial: str, epoch: int, why: str, *, failed: bool = False) -> None:
        """Close a trial's run: FINISHED if it left a model, KILLED if it came to none."""
        if trial in self._ended:
            return
        self._ended.add(trial)
        best = self.best.get(trial)
        status = "FAILED" if failed else "KILLED" if best is None else "FINISHED"
        timestamp_ms = _now_ms()

        def write() -> None:
            if best is not None:
                # MLflow shows a metric's last value: let that be the best epoch's, which the
                # checkpoint is of.
                values = {"val_accuracy": best[0], "epoch": float(best[1])}
                self._log(trial, values, epoch, timestamp_ms)
            self._client.set_tag(self.run_ids[trial], "rayline.ended", why[:500])
            self._client.set_terminated(self.run_ids[trial], status)

        self._queue.put(write)

    def flush(self) -> None:
        """Wait until all that was recorded so far is written, or the deadline has passed."""
        written = threading.Event()
        self._queue.put(written.set)
        if not written.wait(_FLUSH_TIMEOUT_S):
            self._errors.append(f"MLflow took more than {_FLUSH_TIMEOUT_S} s to write the rest")

    def close(self, metrics: Mapping[str, float], *, failed: bool) -> None:
        """Write what is left and close the sweep's run. `check` tells whether all was written."""
        timestamp_ms = _now_ms()
        # Where the sweep itself failed, no trial was told that it is over.
        for trial in self.params.keys() - self._ended:
            self.trial_ended(trial, 0, "the sweep ended without it")

        def write() -> None:
            values = [Metric(name, value, timestamp_ms, 0) for name, value in metrics.items()]
            tags = [RunTag("rayline.record_complete", str(not self._errors).lower())]
            self._client.log_batch(self.sweep_run_id, metrics=values, tags=tags)
            self._client.set_terminated(self.sweep_run_id, "FAILED" if failed else "FINISHED")

        self._queue.put(write)
        self.flush()
        self._queue.put(None)

    def check(self) -> None:
        """Raise RegistryError if any write failed since the start."""
        if self._errors:
            raise RegistryError(
                f"the record of sweep {self.sweep_run_id} at {self._settings.mlflow_uri} is "
                f"incomplete: {self._errors[0]} ({len(self._errors)} writes failed); look at the "
                "MLflow server, then run jobs.tune again"
            )

    def _start_thread(self) -> None:
        self._client: MlflowClient = connect(self._settings)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (write := self._queue.get()) is not None:
            try:
                write()
            # Whatever it is, the search goes on, and the loss is said here and by `check`.
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                if message not in self._errors:
                    progress("tracking", f"WARNING: MLflow did not take a record: {message}")
                self._errors.append(message)

    def _log(self, trial: str, values: Mapping[str, float], epoch: int, timestamp_ms: int) -> None:
        metrics = [Metric(name, value, timestamp_ms, epoch) for name, value in values.items()]
        self._client.log_batch(self.run_ids[trial], metrics=metrics)


def _common_tags(manifest: Manifest, preset: Preset) -> dict[str, str]:
    code = provenance.current()
    tags = {
        "rayline.data_digest": manifest.digest,
        "rayline.preset": preset.name,
        "rayline.seed": str(preset.seed),
        "rayline.git_commit": code.commit,
        "rayline.git_dirty": str(code.dirty).lower(),
        "rayline.git_diff_sha256": code.diff_sha256,
        "rayline.owner": code.owner,
        "mlflow.source.git.commit": code.commit,
        "mlflow.user": code.owner,
        **{f"rayline.package.{name}": version(name) for name in PACKAGES},
    }
    return {name: value for name, value in tags.items() if value}


def _dataset_input(storage: Storage, manifest: Manifest) -> DatasetInput:
    scheme, separator, _ = storage.uri.partition("://")
    dataset = Dataset(
        name=manifest.source.rstrip("/").rsplit("/", 1)[-1],
        digest=manifest.digest,
        source_type=scheme if separator else "local",
        source=json.dumps({"uri": f"{storage.uri}/{manifest_path(manifest.digest)}"}),
        profile=json.dumps(
            {
                "shape": manifest.shape,
                "class_names": manifest.class_names,
                "rows": {split: manifest.rows(split) for split in manifest.counts},
            }
        ),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _params(values: Mapping[str, Any]) -> list[Param]:
    return [Param(name, str(value)) for name, value in values.items()]


def _now_ms() -> int:
    return int(time.time() * 1000)
