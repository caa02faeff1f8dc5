"""The trials of a sweep as MLflow keeps them, ranked by validation."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException

from lib.config import Settings
from lib.errors import RegistryError
from lib.registry.server import connect, ensure_experiment, explained

CHECKPOINT_PATH = "checkpoint/model.pt"
_PAGE = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A finished trial with a checkpoint that can become a version."""

    run_id: str
    sweep_run_id: str
    experiment_id: str
    val_accuracy: float
    """Of its best epoch, as the search measured it."""
    checkpoint_uri: str
    git_commit: str | None
    git_dirty: bool
    owner: str | None


def sweep_data_digest(settings: Settings, sweep_run_id: str) -> str:
    """Return the digest of the data set that a sweep was trained on."""
    client = connect(settings)
    with explained(settings, f"looking up sweep {sweep_run_id}"):
        return _digest(_sweep_run(client, sweep_run_id))


def ranked_trials(client: MlflowClient, sweep_run_id: str, data_digest: str) -> list[Trial]:
    """Return a sweep's finished trials, best validation accuracy first.

    Raises RegistryError if there is no such sweep, it has no finished trial, or it was trained
    on other data than `data_digest`.
    """
    sweep = _sweep_run(client, sweep_run_id)
    if _digest(sweep) != data_digest:
        raise RegistryError(
            f"sweep {sweep_run_id} was trained on data set {_digest(sweep)}, not {data_digest}; "
            "register it with its own data set"
        )
    runs = [
        run
        for run in _children(client, sweep)
        if run.info.status == "FINISHED" and "val_accuracy" in run.data.metrics
    ]
    if not runs:
        raise RegistryError(
            f"sweep {sweep_run_id} has no finished trial; look at its runs in MLflow, then run "
            "jobs.tune again"
        )
    # Equal accuracies are common on small splits: the earlier trial wins, always the same one.
    runs.sort(
        key=lambda run: (-run.data.metrics["val_accuracy"], run.info.start_time, run.info.run_id)
    )
    return [_trial(run, sweep) for run in runs]


def finished_runs(client: MlflowClient, model: str) -> list[Run]:
    """Return all finished trials of all sweeps of a model."""
    experiment = client.get_experiment_by_name(f"rayline/{model}")
    if experiment is None:
        return []
    query = "tags.`rayline.kind` = 'trial' and attributes.status = 'FINISHED'"
    runs = _all_pages(client, experiment.experiment_id, query)
    return [run for run in runs if "val_accuracy" in run.data.metrics]


def child_runs(client: MlflowClient, sweep_run_id: str) -> list[Run]:
    """Return the runs of all trials of a sweep, whatever became of them."""
    return _children(client, _sweep_run(client, sweep_run_id))


def _trial(run: Run, sweep: Run) -> Trial:
    tags = {**sweep.data.tags, **run.data.tags}
    return Trial(
        run_id=run.info.run_id,
        sweep_run_id=sweep.info.run_id,
        experiment_id=run.info.experiment_id,
        val_accuracy=run.data.metrics["val_accuracy"],
        checkpoint_uri=f"{run.info.artifact_uri}/{CHECKPOINT_PATH}",
        git_commit=tags.get("rayline.git_commit") or tags.get("mlflow.source.git.commit"),
        git_dirty=tags.get("rayline.git_dirty", "false").lower() == "true",
        owner=tags.get("rayline.owner"),
    )


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
