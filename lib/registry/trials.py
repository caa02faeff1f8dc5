"""The trials of sweeps as MLflow keeps them, ranked by the objective of their sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException

from lib.cli import progress
from lib.config import Settings
from lib.errors import ConfigError, RegistryError
from lib.registry.server import connect, ensure_experiment, explained
from lib.train.experiment import MAXIMIZE, Objective, rank_key, varying

CHECKPOINT_PATH = "checkpoint/model.pt"
BEST_PREFIX = "best/"
"""Of a trial run's metrics: the values at the best epoch; without it, the curve by epoch."""
ACCURACY = Objective(metric="val_accuracy", goal=MAXIMIZE)
"""Ranks the trials of sweeps that recorded no objective."""
OBJECTIVES_TAG = "rayline.objectives"
"""On the runs of a sweep and of its trials: JSON, a list of the fields of `Objective`."""
_PAGE = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A finished trial with a checkpoint that can become a version."""

    run_id: str
    sweep_run_id: str
    experiment_id: str
    data_digest: str
    objective: Objective
    """Of its sweep: the first one that training changes."""
    metrics: Mapping[str, float]
    """Of its best epoch, as the search measured it; values that are no numbers are left out."""
    checkpoint_uri: str
    git_commit: str | None
    git_dirty: bool
    owner: str | None
    created_ms: int


def sweep_data_digest(settings: Settings, sweep_run_id: str) -> str:
    """Return the digest of the data set that a sweep was trained on."""
    client = connect(settings)
    with explained(settings, f"looking up sweep {sweep_run_id}"):
        return _digest(_sweep_run(client, sweep_run_id))


def ranked_trials(
    client: MlflowClient, sweep_run_id: str, data_digest: str | None = None
) -> list[Trial]:
    """Return a sweep's finished trials, best first by the sweep's objective.

    Raises RegistryError if there is no such sweep, it has no finished trial, its trials keep no
    model, or it was trained on other data than `data_digest`.
    """
    sweep = _sweep_run(client, sweep_run_id)
    if data_digest is not None and _digest(sweep) != data_digest:
        raise RegistryError(
            f"sweep {sweep_run_id} was trained on data set {_digest(sweep)}, not {data_digest}; "
            "register it with its own data set"
        )
    if _runs_commands(sweep):
        raise RegistryError(
            f"the trials of sweep {sweep_run_id} ran a command and left no model of Rayline's; "
            "log the model with MLflow, then `jobs.register --uri`"
        )
    objective = objective_of(sweep.data.tags)
    trials = [
        _trial(run, sweep) for run in _children(client, sweep) if run.info.status == "FINISHED"
    ]
    ranked = rank(trials, objective)
    if not ranked:
        raise RegistryError(
            f"sweep {sweep_run_id} has no finished trial with {objective.metric}; look at its runs "
            "in MLflow, then run jobs.tune again"
        )
    return ranked


def rank(trials: Iterable[Trial], objective: Objective) -> list[Trial]:
    """Return the trials that measured the objective, best first."""
    # Of equal ones the earlier trial wins, always the same one.
    return sorted(
        (trial for trial in trials if objective.metric in trial.metrics),
        key=lambda t: (rank_key((objective,), t.metrics), t.created_ms, t.run_id),
    )


def finished_trials(client: MlflowClient, model: str) -> list[Trial]:
    """Return all finished trials of all sweeps of a model that kept a model."""
    experiment = client.get_experiment_by_name(f"rayline/{model}")
    if experiment is None:
        return []
    query = "tags.`rayline.kind` = 'trial' and attributes.status = 'FINISHED'"
    runs = _all_pages(client, experiment.experiment_id, query)
    return [_trial(run) for run in runs if not _runs_commands(run)]


def child_runs(client: MlflowClient, sweep_run_id: str) -> list[Run]:
    """Return the runs of all trials of a sweep, whatever became of them."""
    return _children(client, _sweep_run(client, sweep_run_id))


def best_metrics(run: Run) -> dict[str, float]:
    """Return a trial's metrics at its best epoch; those that have none, at the last one.

    Older records have no names with the prefix: there the last values are the best epoch's.
    """
    metrics: dict[str, float] = run.data.metrics
    best = {
        name.removeprefix(BEST_PREFIX): value
        for name, value in metrics.items()
        if name.startswith(BEST_PREFIX)
    }
    curves = {name: v for name, v in metrics.items() if not name.startswith(BEST_PREFIX)}
    return {name: value for name, value in {**curves, **best}.items() if math.isfinite(value)}


def objective_of(tags: Mapping[str, str]) -> Objective:
    """Return the first objective of a sweep that training changes."""
    if OBJECTIVES_TAG not in tags:
        return ACCURACY
    try:
        return varying([Objective(**fields) for fields in json.loads(tags[OBJECTIVES_TAG])])
    except (ConfigError, ValueError, TypeError, StopIteration):
        progress("registry", f"ranked by val_accuracy: tag {OBJECTIVES_TAG} of a sweep is damaged")
        return ACCURACY


def _trial(run: Run, sweep: Run | None = None) -> Trial:
    tags = {**(sweep.data.tags if sweep else {}), **run.data.tags}
    return Trial(
        run_id=run.info.run_id,
        sweep_run_id=sweep.info.run_id if sweep else tags.get("mlflow.parentRunId", ""),
        experiment_id=run.info.experiment_id,
        data_digest=tags.get("rayline.data_digest", ""),
        objective=objective_of(tags),
        metrics=best_metrics(run),
        checkpoint_uri=f"{run.info.artifact_uri}/{CHECKPOINT_PATH}",
        git_commit=tags.get("rayline.git_commit") or tags.get("mlflow.source.git.commit"),
        git_dirty=tags.get("rayline.git_dirty", "false").lower() == "true",
        owner=tags.get("rayline.owner"),
        created_ms=run.info.start_time,
    )


def _runs_commands(run: Run) -> bool:
    return bool(run.data.tags.get("rayline.trainable") == "command")


def _sweep_run(client: MlflowClient, sweep_run_id: str) -> Run:
    try:
        run = client.get_run(sweep_run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        run = None
    if run is not None and run.info.lifecycle_stage == LifecycleStage.DELETED:
        # As all runs of an experiment that was deleted; they come back with it.
        ensure_experiment(client, client.get_experiment(run.info.experiment_id).name)
        run = client.get_run(sweep_run_id)
        if run.info.lifecycle_stage == LifecycleStage.DELETED:
            raise RegistryError(
                f"sweep {sweep_run_id} was deleted in MLflow; `mlflow runs restore --run-id "
                f"{sweep_run_id}` brings it back, and so its trials"
            )
    if run is None or run.data.tags.get("rayline.kind") != "sweep":
        raise RegistryError(
            f"there is no sweep {sweep_run_id!r} in MLflow; give the sweep_run_id that jobs.tune "
            "printed"
        )
    return run


def _digest(sweep: Run) -> str:
    return sweep.data.tags.get("rayline.data_digest", "")


def _children(client: MlflowClient, sweep: Run) -> list[Run]:
    query = f"tags.`mlflow.parentRunId` = '{sweep.info.run_id}'"
    return _all_pages(client, sweep.info.experiment_id, query)


def _all_pages(client: MlflowClient, experiment_id: str, query: str) -> list[Run]:
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string=query, max_results=_PAGE, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs
