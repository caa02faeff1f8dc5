"""The MLflow run of a model that came from elsewhere: it stands where a trial's run would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from lib import provenance
from lib.config import Settings
from lib.data.manifest import Manifest
from lib.errors import RefusedError
from lib.registry.external import External, Understood
from lib.registry.publish import REFUSED_TAG
from lib.registry.server import ensure_experiment
from lib.registry.trials import ACCURACY, Trial

_KIND = "external"
_TAG_LETTERS = 5000


def ensure_run(
    client: MlflowClient, settings: Settings, manifest: Manifest, model: External
) -> Run:
    """Return the run of this model on this data set, made now if there is none."""
    experiment_id = ensure_experiment(client, f"rayline/{settings.model}")
    key = {
        "rayline.kind": _KIND,
        "rayline.origin_sha256": model.sha256,
        "rayline.data_digest": manifest.digest,
    }
    query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in key.items())
    runs = client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"])
    if runs:
        return runs[0]
    owner = _owner(client, model)
    tags = {**key, "rayline.origin_uri": model.uri}
    if owner:
        tags |= {"rayline.owner": owner, "mlflow.user": owner}
    return client.create_run(experiment_id, run_name=f"external-{model.sha256[:8]}", tags=tags)


@contextmanager
def closed_run(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Close the run when the block ends; a refusal's reason becomes a tag of it."""
    try:
        yield
    except RefusedError as error:
        client.set_tag(run_id, REFUSED_TAG, str(error)[:_TAG_LETTERS])
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def as_trial(run: Run, understood: Understood) -> Trial:
    """Return what the registry knows of a trial; there is no checkpoint and no commit."""
    return Trial(
        run_id=run.info.run_id,
        sweep_run_id="",
        experiment_id=run.info.experiment_id,
        data_digest=run.data.tags["rayline.data_digest"],
        objective=ACCURACY,
        metrics={"val_accuracy": understood.val_accuracy},
        checkpoint_uri="",
        git_commit=None,
        git_dirty=False,
        owner=owner_of(run),
        created_ms=run.info.start_time,
    )


def owner_of(run: Run) -> str | None:
    """Return who trained the model, as it was recorded."""
    owner: str | None = run.data.tags.get("rayline.owner")
    return owner


def _owner(client: MlflowClient, model: External) -> str | None:
    """Return the user of the run that logged the model, else who registers it."""
    run_id = model.description.run_id
    if run_id:
        try:
            user: str | None = client.get_run(run_id).data.tags.get("mlflow.user")
        except MlflowException as error:
            # A folder may come from another server.
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            user = None
        if user:
            return user
    return provenance.current().owner
