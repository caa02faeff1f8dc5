"""All that is known of a version, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from lib import provenance
from lib.config import Settings
from lib.data.manifest import load_manifest
from lib.errors import DataError
from lib.registry.leaderboard import judged, version_entry
from lib.registry.models import Version, resolve, survey
from lib.registry.server import connect, explained
from lib.serving import policy
from lib.serving.bundle import CARD_FILE
from lib.storage import Storage

PACKAGE_TAG = "rayline.package."
ORIGINAL_RUN_TAG = "rayline.original_run_id"
"""On a restored run and version: the run's id where it was first recorded."""


def describe(settings: Settings, storage: Storage, ref: str) -> dict[str, Any]:
    """Return all that is known of the version that a number or an alias names, as JSON types.

    What is gone, such as a run or a manifest that was deleted, is null.
    """
    version = resolve(settings, settings.model, ref)
    known, _ = survey(settings)
    client = connect(settings)
    with explained(settings, f"reading the runs of version {version.version}"):
        run = _run(client, version.trial_run_id)
        sweep = _run(client, version.sweep_run_id)
    served = policy.current(storage)
    traffic = served.models.get(settings.model) if served else None
    verdict = judged(storage, known).get(version.version)
    tags = {**(sweep.data.tags if sweep else {}), **(run.data.tags if run else {})}
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "ready": version.ready,
        "created_ms": version.created_ms,
        "metrics": _metrics(version),
        "gap": {
            "value": version.val_test_gap,
            "usual": verdict.usual if verdict else None,
            "limit": verdict.limit if verdict else None,
            "holds": verdict.holds if verdict else None,
        },
        "runtime": {
            "serves": version.runtime,
            "device": version.device,
            "images_per_s": {name: dict(rates) for name, rates in version.images_per_s.items()},
        },
        "served": {
            "now": version_entry(version, verdict, traffic).served,
            "pins": sorted(k for k, v in traffic.pins.items() if v == version.version)
            if traffic
            else [],
            "bundle": version.bundle,
            "bundle_is_there": storage.exists(f"{version.bundle}/{CARD_FILE}"),
        },
        "data": _data(storage, version.data_digest),
        "code": {
            "commit": version.git_commit,
            "dirty": version.git_dirty,
            "diff_sha256": tags.get("rayline.git_diff_sha256"),
            "owner": tags.get("rayline.owner"),
        },
        "parameters": dict(run.data.params) if run else None,
        "sweep": dict(sweep.data.params) if sweep else None,
        "packages": {
            name.removeprefix(PACKAGE_TAG): value
            for name, value in sorted(tags.items())
            if name.startswith(PACKAGE_TAG)
        },
        "lineage": {
            "run_id": version.trial_run_id,
            "sweep_run_id": version.sweep_run_id,
            "original_run_id": tags.get(ORIGINAL_RUN_TAG),
            "url": f"{settings.mlflow_uri}/#/models/{version.name}/versions/{version.version}",
        },
    }


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs between two descriptions; what is equal is left out."""
    metrics = {
        name: {"a": left, "b": right, "change": _change(left, right)}
        for name, (left, right) in _pairs(a["metrics"], b["metrics"]).items()
    }
    data = {
        name: {"a": left, "b": right}
        for name, (left, right) in _pairs(_flat(a["data"]), _flat(b["data"])).items()
    }
    return {
        "a": a["version"],
        "b": b["version"],
        "parameters": _named(a["parameters"] or {}, b["parameters"] or {}),
        "sweep": _named(a["sweep"] or {}, b["sweep"] or {}),
        "metrics": metrics,
        "data": data,
        "code": _named(a["code"], b["code"]),
        "diffstat": _diffstat(a["code"], b["code"]),
        "packages": _named(a["packages"], b["packages"]),
    }


def _metrics(version: Version) -> dict[str, float]:
    rates = version.images_per_s.get(version.runtime, {})
    return {
        "val_accuracy": version.val_accuracy,
        "test_accuracy": version.test_accuracy,
        "test_macro_accuracy": version.test_macro_accuracy,
        "test_macro_f1": version.test_macro_f1,
        "val_test_gap": version.val_test_gap,
        "baseline_val_accuracy": version.baseline_val_accuracy,
        "onnx_max_difference": version.onnx_max_difference,
        **{f"images_per_s, batch {size}": rate for size, rate in rates.items()},
        **{f"test accuracy of {name}": v for name, v in version.per_class_accuracy.items()},
    }


def _data(storage: Storage, digest: str) -> dict[str, Any]:
    try:
        manifest = load_manifest(storage, digest)
    except DataError:
        return {"digest": digest, "source": None, "shape": None, "classes": None, "rows": None}
    return {
        "digest": digest,
        "source": manifest.source,
        "shape": list(manifest.shape),
        "classes": list(manifest.class_names),
        "rows": {split: manifest.rows(split) for split in manifest.counts},
    }


def _run(client: MlflowClient, run_id: str) -> Run | None:
    if not run_id:
        # Other people's models come from no sweep.
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    rows = {f"{split} rows": count for split, count in (data["rows"] or {}).items()}
    return {name: value for name, value in data.items() if name != "rows"} | rows


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _named(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"a": left, "b": right} for name, (left, right) in _pairs(a, b).items()}


def _change(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else right - left


def _diffstat(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Return git's summary of the changes, None where git knows not both commits."""
    if not a["commit"] or not b["commit"] or a["commit"] == b["commit"]:
        return None
    return provenance.diffstat(a["commit"], b["commit"])
