"""Delete a version with its files; nothing that serves or is about to serve can be deleted."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from lib.cli import progress
from lib.config import Settings
from lib.errors import RefusedError, ServingError
from lib.registry.leaderboard import parts_in
from lib.registry.models import (
    CHALLENGER,
    CHAMPION,
    READY_TAG,
    Version,
    logged_model_id,
    model_location,
    resolve,
)
from lib.registry.server import connect, explained
from lib.serving import plan, policy
from lib.serving.client import ServeClient, live_applications
from lib.storage import Storage
from lib.watch import retrain_record, rollout_state

GRACE_S = 3600.0
"""What is younger is left alone: a job may be about to refer to it."""


def delete(settings: Settings, storage: Storage, ref: str, *, remove: bool) -> dict[str, Any]:
    """Delete a version: its bundle, its files in MLflow, then its entry in the registry.

    Without `remove` it is only said what would go. The run of its trial stays, with its metrics and
    its checkpoint: it can be registered again. Interrupted, it can be run again. Raises
    RefusedError for a version that is up or coming up, in a rollout or a retrain that goes on, or
    champion or challenger.
    """
    version = resolve(settings, settings.model, ref)
    refuse_if_needed(settings, storage, version)
    client = connect(settings)
    bundle = storage.list(version.bundle)
    with explained(settings, f"deleting version {version.version}"):
        found = client.get_model_version(version.name, str(version.version))
        model_id = logged_model_id(found)
        location = _location(client, version)
        result = {
            "version": version.version,
            "run_id": version.run_id,
            "bundle": version.bundle if bundle else None,
            "files": location,
            "deleted": remove,
        }
        if not remove:
            progress(
                "models",
                f"{version.name} version {version.version} with its files would go; nothing was "
                "removed: --yes removes them",
            )
            return result
        # So that an interrupted delete leaves no version that looks whole.
        client.set_model_version_tag(version.name, str(version.version), READY_TAG, "false")
        try:
            # Somebody may have begun to deploy it.
            refuse_if_needed(settings, storage, version)
        except RefusedError:
            ready = found.tags.get(READY_TAG, "false")
            client.set_model_version_tag(version.name, str(version.version), READY_TAG, ready)
            raise
        storage.delete_folder(version.bundle)
        remove_model(client, settings, model_id, location)
        client.delete_model_version(version.name, str(version.version))
    progress("models", f"{version.name} version {version.version} is deleted")
    return result


def _location(client: MlflowClient, version: Version) -> str | None:
    try:
        return model_location(client, version.name, version.version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None  # A delete that was interrupted came that far.


def refuse_if_needed(settings: Settings, storage: Storage, version: Version) -> None:
    """Raise RefusedError if the policy, Serve, a rollout or an alias counts on a version."""
    served = policy.current(storage)
    traffic = served.models.get(version.name) if served else None
    reasons = [alias for alias in version.aliases if alias in (CHAMPION, CHALLENGER)]
    parts = parts_in(traffic, version.version, version.bundle)
    if traffic and parts and version.version == traffic.champion and CHAMPION not in reasons:
        reasons.append("champion in the traffic policy")
    reasons += [f"serving ({part})" for part in parts]
    if not parts and _is_live(settings, version):
        reasons.append("coming up in Serve (a deploy or promote of it is under way)")
    rollout = rollout_state.load(storage, version.name)
    if rollout and rollout.status not in rollout_state.FINAL:
        part = {rollout.candidate: "candidate", rollout.champion: "champion"}.get(version.version)
        if part:
            reasons.append(
                f"{part} of a rollout that is {rollout.status} (stage {rollout.stage}; "
                "`python -m jobs.rollout abort` ends it)"
            )
    for record in retrain_record.history(storage, version.name):
        made = record.step("register")
        is_running = record.state == retrain_record.RUNNING
        if is_running and made and made.result.get("run_id") == version.run_id:
            reasons.append(f"candidate of retrain {record.id}, which goes on")
    if reasons:
        raise RefusedError(
            f"version {version.version} of {version.name!r} is {', '.join(reasons)}: it is not "
            "deleted; give its place to another one with `python -m jobs.deploy promote N` or "
            "`weights`, or take the alias away in MLflow"
        )


def _is_live(settings: Settings, version: Version) -> bool:
    try:
        live = live_applications(ServeClient(settings).details())
    except ServingError:
        return False  # Nothing comes up while Serve does not answer.
    config = live.get(plan.version_application(version.name, version.version))
    return config is not None and plan.is_ours(settings, config)


def remove_model(
    client: MlflowClient, settings: Settings, model_id: str | None, location: str | None
) -> None:
    """Delete a logged model and its files; what is gone already is no error."""
    if location:
        remove_artifacts(settings, location)
    if model_id:
        try:
            client.delete_logged_model(model_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise


def remove_artifacts(settings: Settings, location: str) -> None:
    """Delete the files below an artifact URI."""
    repository = get_artifact_repository(location, tracking_uri=settings.mlflow_uri)
    if repository.list_artifacts():
        repository.delete_artifacts()


def artifact_bytes(settings: Settings, location: str) -> int:
    """Return how many bytes there are below an artifact URI."""
    repository = get_artifact_repository(location, tracking_uri=settings.mlflow_uri)
    total, folders = 0, [""]
    while folders:
        for found in repository.list_artifacts(folders.pop() or None):
            if found.is_dir:
                folders.append(found.path)
            else:
                total += found.file_size or 0
    return total
