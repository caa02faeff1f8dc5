"""Delete data sets and sweeps, unless something refers to them: that is named then."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from mlflow.entities import Run

from lib.cli import progress
from lib.config import Settings
from lib.data.catalog import catalog, own_shards, remove_set
from lib.data.manifest import Manifest
from lib.errors import RefusedError, RegistryError, SearchError, StorageError
from lib.registry.removal import GRACE_S, artifact_bytes, remove_artifacts
from lib.registry.server import connect, explained, pages
from lib.registry.trials import child_runs
from lib.storage import Storage
from lib.train.journal import Journal
from lib.train.progress import CLOSED, REOPENED
from lib.watch import retrain_record


def delete_set(
    settings: Settings, storage: Storage, manifest: Manifest, *, remove: bool
) -> dict[str, Any]:
    """Delete a data set and the shards that no other one lists.

    Without `remove` it is only said what would go. Raises RefusedError naming the versions, data
    sets, sweeps and retrains that refer to it.
    """
    digest = manifest.digest
    found = [
        *(f"version {version}" for version in versions_of(settings, {digest})),
        *(
            f"data set {entry.manifest.digest[:12]}, which extends it"
            for entry in catalog(storage)
            if entry.manifest.parent == digest
        ),
        *unfinished(storage, {digest}),
    ]
    if found:
        raise RefusedError(
            f"data set {digest[:12]} is not deleted; these refer to it: {'; '.join(found)}. Delete "
            "or end them first"
        )
    shards = own_shards(storage, manifest)
    result = {
        "digest": digest,
        "shards": len(shards),
        "shared_shards": len(set(manifest.shards)) - len(shards),
        "bytes": sum(shard.size_bytes for shard in shards),
        "deleted": remove,
    }
    if remove:
        remove_set(storage, manifest)
    return result


def versions_of(settings: Settings, digests: Collection[str]) -> list[str]:
    """Return the versions of all models that were trained on one of some data sets."""
    with explained(settings, "looking for versions that were trained on a data set"):
        versions = pages(connect(settings).search_model_versions)
    return [
        f"{version.version} of {version.name}"
        for version in versions
        if version.tags.get("rayline.data_digest") in digests
    ]


def unfinished(storage: Storage, digests: Collection[str]) -> list[str]:
    """Return the sweeps and retrains that have not ended and read one of some data sets."""
    found = []
    for folder in storage.folders("sweeps"):
        run_id, path = folder.rpartition("/")[2], f"{folder}/sweep.json"
        if not storage.exists(path):
            continue
        is_of = storage.read_json(path).get("work", {}).get("data_digest") in digests
        if is_of and (state := _state(storage, run_id)):
            found.append(f"sweep {run_id}, which {state}")
    for folder in storage.folders("retrains"):
        for record in retrain_record.history(storage, folder.rpartition("/")[2]):
            read = {record.champion.get("data_digest")}
            read |= {step.result.get("digest") for step in record.steps}
            if record.state == retrain_record.RUNNING and read & set(digests):
                found.append(f"retrain {record.id} of {record.model}, which has not ended")
    return found


def delete_sweep(
    settings: Settings, storage: Storage, sweep_run_id: str, *, remove: bool
) -> dict[str, Any]:
    """Delete a sweep: its runs and their files in MLflow, checkpoints included, and its state.

    Without `remove` it is only said what would go. Raises RefusedError if the sweep is running or
    a trial of it is a version. Interrupted, it can be run again.
    """
    client, folder = connect(settings), f"sweeps/{sweep_run_id}"
    files = storage.list(folder, recursive=True)
    if files and _state(storage, sweep_run_id) == "is running":
        raise RefusedError(f"sweep {sweep_run_id} is running; end its job first")
    with explained(settings, f"looking up sweep {sweep_run_id}"):
        runs = _runs(settings, sweep_run_id, is_there=bool(files))
        ids = {run.info.run_id for run in runs}
        versions = [
            f"{version.version} of {version.name}"
            for version in pages(client.search_model_versions)
            if version.run_id in ids or version.tags.get("rayline.trial_run_id") in ids
        ]
        if versions:
            raise RefusedError(
                f"sweep {sweep_run_id} is not deleted; versions were made of its trials: "
                f"{', '.join(versions)}. Delete them first with `python -m jobs.models delete`, or "
                "drop the other trials' checkpoints alone with `gc --keep-trials 0`"
            )
        size_bytes = sum(artifact_bytes(settings, str(run.info.artifact_uri)) for run in runs)
    steps = [
        path
        for path in storage.list("steps/tune")
        if storage.read_json(path).get("result", {}).get("sweep_run_id") == sweep_run_id
    ]
    result = {
        "sweep_run_id": sweep_run_id,
        "runs": len(runs),
        "bytes": size_bytes + sum(info.size or 0 for info in storage.infos(files)),
        "deleted": remove,
    }
    if not remove:
        progress("models", f"sweep {sweep_run_id} with {len(runs)} runs would go; nothing was "
                 "removed: --yes removes it")  # fmt: skip
        return result
    with explained(settings, f"deleting sweep {sweep_run_id}"):
        for path in steps:
            storage.delete(path)
        # The sweep's own run is the last: it leads to the others.
        for run in runs:
            remove_artifacts(settings, str(run.info.artifact_uri))
            client.delete_run(run.info.run_id)
    storage.delete_folder(folder)
    return result


def _runs(settings: Settings, sweep_run_id: str, *, is_there: bool) -> list[Run]:
    client = connect(settings)
    try:
        return [*child_runs(client, sweep_run_id), client.get_run(sweep_run_id)]
    except RegistryError:
        if not is_there:
            raise
        return []  # Deleted in MLflow: its state is left.


def _state(storage: Storage, sweep_run_id: str) -> str | None:
    """Return what a sweep that has not ended is doing; None if it has."""
    folder = f"sweeps/{sweep_run_id}"
    try:
        with Journal(storage, folder) as journal:
            ends = [e["event"] for e in journal.events if e["event"] in (CLOSED, REOPENED)]
    except SearchError:
        return "is running"
    except StorageError:
        return None  # Damaged: it can't go on.
    if ends and ends[-1] == CLOSED:
        return None
    # Object stores have no locks: the last write tells.
    if not storage.is_local:
        infos: Mapping[str, Any] = {i.path: i for i in storage.walk(folder, recursive=True)}
        newest_s = max((i.mtime.timestamp() for i in infos.values() if i.mtime), default=0.0)
        if time.time() - newest_s < GRACE_S:
            return "is running"
    return "was interrupted (resume it, or `python -m jobs.models delete-sweep` it)"
