"""What MLflow holds of a version beside its tags: the trials it was chosen from, its evaluation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.config import Settings
from lib.errors import RegistryError
from lib.registry.models import Version
from lib.registry.publish import EVALUATION_FILE
from lib.registry.server import connect, download, explained
from lib.registry.trials import ACCURACY, best_metrics, child_runs, objective_of
from lib.train.experiment import Objective


def evaluation_of(settings: Settings, version: Version) -> Mapping[str, Any] | None:
    """Return the test split's confusion matrix and numbers; None if they are gone."""
    client = connect(settings)
    try:
        with explained(settings, f"finding the evaluation of version {version.version}"):
            uri = client.get_run(version.run_id).info.artifact_uri
        with tempfile.TemporaryDirectory(prefix="rayline-evaluation-") as folder:
            file = download(settings, f"{uri}/{EVALUATION_FILE}", Path(folder))
            return dict(json.loads(file.read_text()))
    except RegistryError:
        return None


def trials_of(settings: Settings, sweep_run_id: str) -> tuple[list[dict[str, Any]], Objective]:
    """Return a sweep's trials in the order in which they began, and what ranks them.

    There are none if the sweep is gone.
    """
    client = connect(settings)
    try:
        with explained(settings, f"listing the trials of sweep {sweep_run_id}"):
            runs = child_runs(client, sweep_run_id)
    except RegistryError:
        return [], ACCURACY
    objective = objective_of(runs[0].data.tags) if runs else ACCURACY
    runs.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    trials = [
        {
            "run_id": run.info.run_id,
            "status": run.info.status,
            "started_ms": run.info.start_time,
            "params": dict(run.data.params),
            "metrics": best_metrics(run),
        }
        for run in runs
    ]
    return trials, objective
