"""Finds the sweep that a killed job left, so that the job, run again, goes on with it."""

from __future__ import annotations

import json

from lib.cli import progress
from lib.config import Settings
from lib.errors import RegistryError, SearchError
from lib.storage import Storage
from lib.train.experiment import Experiment
from lib.train.result import SweepResult
from lib.train.search import resume_sweep, sweep_spec
from lib.train.work import Work

_CLOSED = b'"event": "closed"'


def resume_same_sweep(
    settings: Settings, storage: Storage, experiment: Experiment, work: Work
) -> SweepResult | None:
    """Return the result of the newest sweep of the same work and code; None if there is none.

    It is finished first. One that left no result, or that MLflow does not have any more, does not
    count. Raises SearchError if another process runs it.
    """
    for sweep_run_id in same_sweeps(storage, json.loads(json.dumps(sweep_spec(experiment, work)))):
        try:
            return resume_sweep(settings, storage, sweep_run_id)
        except RegistryError as error:
            progress("tune", f"sweep {sweep_run_id} can't be resumed: {error}")
        except SearchError:
            if not _is_closed(storage, sweep_run_id):
                raise
    return None


def same_sweeps(storage: Storage, spec: object) -> list[str]:
    """Return the sweeps of this spec, the newest first."""
    found = []
    for folder in storage.folders("sweeps"):
        path = f"{folder}/sweep.json"
        (info,) = storage.infos([path])
        if info.is_file and storage.read_json(path) == spec:
            found.append((info.mtime, folder.removeprefix("sweeps/")))
    return [name for _, name in sorted(found, reverse=True)]


def _is_closed(storage: Storage, sweep_run_id: str) -> bool:
    """Whether the sweep came to its end; on object stores the last event says so as well."""
    path = f"sweeps/{sweep_run_id}/journal"
    if storage.exists(f"{path}.jsonl"):
        return _CLOSED in storage.read(f"{path}.jsonl")
    return any(_CLOSED in storage.read(name) for name in storage.list(path))
