"""Looks up all that there is to say about a version, in MLflow, under the storage root, in git."""

from __future__ import annotations

import time
from pathlib import Path

from lib.cli import progress
from lib.config import Settings
from lib.registry.inspection import describe
from lib.registry.leaderboard import leaderboard
from lib.registry.models import resolve
from lib.registry.record import evaluation_of, trials_of
from lib.storage import Storage
from lib.watch.dossier import (
    ATTESTED,
    Dossier,
    ReadLog,
    all_json,
    ci_text,
    json_at,
    logged_requests,
    manifests_of,
    means,
    policies_of,
    project_files,
    rollouts_of,
    samples_of,
)


def collect(
    settings: Settings, storage: Storage, ref: str, *, root: Path, read_log: ReadLog | None
) -> Dossier:
    """Look up all that there is about the version that a number or an alias names.

    `root` is the project's folder; without `read_log` the prediction log counts as empty.
    """
    version = resolve(settings, settings.model, ref)
    progress("report", f"{settings.model} version {version.version}")
    now_s = time.time()
    manifests, num_missing = manifests_of(storage, version.data_digest)
    watch = json_at(storage, f"watch/{settings.model}/state.json")
    board = leaderboard(settings, storage)
    trials, objective = trials_of(settings, version.sweep_run_id)
    return Dossier(
        model=settings.model,
        version=version.version,
        now_s=now_s,
        facts=describe(settings, storage, str(version.version)),
        evaluation=evaluation_of(settings, version),
        trials=trials,
        objective=objective,
        versions=sorted(
            (entry.to_json() for entry in board.entries if entry.version is not None),
            key=lambda row: row["version"],
        ),
        manifests=manifests,
        num_missing_shards=num_missing,
        policies=policies_of(storage, settings.model, version.version, version.bundle),
        watch=watch if means(watch, version.version, version.bundle) else {},
        rollouts=rollouts_of(storage, settings.model, version.version, version.bundle),
        retrains=all_json(storage, f"retrains/{settings.model}"),
        requests=logged_requests(
            storage, settings.model, version.version, version.bundle, now_s, read_log
        ),
        attested={
            Path(path).stem: storage.read_json(path)
            for path in storage.list(f"{ATTESTED}/{settings.model}")
        },
        files=project_files(root),
        ci=ci_text(root),
        samples=samples_of(storage, version.data_digest),
    )
