"""A backup of registry, traffic policy and data manifests in one local folder.

It is made through the APIs of MLflow and of storage, so it can be restored into servers of other
kinds at other places. Included are all models' versions with aliases, tags and files, the runs of
their trials and sweeps with all that was recorded, the policy with its history, manifests,
baselines, outcomes of sweeps, the records of rollouts and retrains, and the scorecard's attested
checks. The policy is that of the beginning: a promotion meanwhile is not in it.

Not included are trials that are no versions; versions that something else than Rayline made, whose
tags were changed or whose files are gone (the result names them); predictions and feedback
(`predictions/`), the monitor's memory (`watch/`), the state of sweeps (`sweeps/`: none can be
resumed), and, unless asked for, images and `keys.json`.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from lib.cli import progress
from lib.config import Settings
from lib.errors import FilesError, RegistryError
from lib.registry.models import (
    CHALLENGER,
    CHAMPION,
    PT2_PATH,
    Version,
    download_model,
    logged_model_id,
    survey,
)
from lib.registry.server import connect, download, explained, pages
from lib.serving.bundle import ONNX_FILE, bundle_path, file_sha256
from lib.serving.keys import KEYS_FILE
from lib.storage import Storage

FORMAT = 1
INDEX_FILE = "backup.json"
REGISTRY_FILE = "registry.json"
RECORDS = ("rollouts", "retrains", "scorecard")
"""Folders below the storage root whose files name runs; a restore writes them with the new ids."""
CODE_RECORD = re.compile(r"sweeps/[^/]+/code\.json")
"""Of each sweep, what was recorded of its code."""
_GENERATION = re.compile(r"traffic/\d{8}\.json")
_NOT_OURS = ("mlflow.log-model.history", "mlflow.runName")
"""Tags that MLflow itself writes when a run is made."""


def backup(
    settings: Settings,
    storage: Storage,
    folder: Path,
    *,
    with_data: bool = False,
    with_keys: bool = False,
) -> dict[str, Any]:
    """Write a backup into a new folder, whole or not at all; return what is in it."""
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RegistryError(f"{folder} is not empty: nothing is overwritten; name a new folder")
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        progress("backup", f"an interrupted backup in {partial} is begun again")
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    client = connect(settings)
    writer = _Writer(settings=settings, storage=storage, client=client, folder=partial)
    # Before the registry, whose reading takes minutes: then it has all that the policy names.
    generations = {
        path: storage.read(path) for path in storage.list("traffic") if _GENERATION.fullmatch(path)
    }
    with explained(settings, "reading the registry"):
        registry = writer.registry()
    copied = writer.write_traffic(generations, registry["models"])
    (partial / REGISTRY_FILE).write_text(json.dumps(registry, indent=1, sort_keys=True) + "\n")
    copied += writer.copy_storage(with_data=with_data, with_keys=with_keys)
    writer.note_changes(copied_generations=len(generations))
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    index = {
        "format": FORMAT,
        "id": uuid.uuid4().hex,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "with_data": with_data,
        "with_keys": with_keys,
        "sha256": {path.relative_to(partial).as_posix(): file_sha256(path) for path in files},
    }
    (partial / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    num_bytes = sum(path.stat().st_size for path in files)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return {
        "folder": str(folder),
        "id": index["id"],
        "models": {
            name: [version["version"] for version in model["versions"]]
            for name, model in registry["models"].items()
        },
        "runs": len(registry["runs"]),
        "storage_files": copied,
        "bytes": num_bytes,
        "with_data": with_data,
        "with_keys": with_keys,
        "left_out": writer.left_out,
        "notes": writer.notes,
    }


@dataclass(kw_only=True, slots=True)
class _Writer:
    settings: Settings
    storage: Storage
    client: MlflowClient
    folder: Path
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Versions of Rayline that are not in the backup, and why."""

    def registry(self) -> dict[str, Any]:
        """Return all models with their versions and runs; their files are in the folder then."""
        models: dict[str, Any] = {}
        run_ids: dict[str, None] = {}
        for model in pages(self.client.search_registered_models):
            known, foreign = survey(self.settings, model.name)
            if foreign and not known and not any(other.trial_run_id for other in foreign):
                self.notes.append(
                    f"left out: model {model.name!r}, whose {len(foreign)} versions are not "
                    "Rayline's"
                )
                continue
            for other in foreign:
                if other.trial_run_id:
                    self._leave_out(other.why)
                else:
                    self.notes.append(f"left out: {other.why}")
            written = [(version, self._version(version)) for version in known]
            known = [version for version, content in written if content]
            if not known:
                continue
            models[model.name] = {
                "description": model.description,
                "tags": dict(model.tags),
                "aliases": {a: v.version for v in known for a in v.aliases},
                "versions": [content for _, content in written if content],
            }
            for version in known:
                run_ids |= {version.sweep_run_id: None, version.trial_run_id: None}
        runs = {run_id: self._run(run_id) for run_id in run_ids if run_id}
        for model in models.values():
            for version in model["versions"]:
                # Points of a logged model are those of its run too; they are recorded once.
                points = {tuple(point[:4]) for point in version["logged_model"]["metrics"]}
                run = runs[version["run_id"]]
                run["metrics"] = [point for point in run["metrics"] if tuple(point) not in points]
        return {"models": models, "runs": runs}

    def copy_storage(self, *, with_data: bool, with_keys: bool) -> int:
        """Copy what is kept under the storage root; return how many files."""
        folders = ["data/sets", "baseline", "steps/tune", *RECORDS]
        folders += ["data/shards"] * with_data
        paths = [path for name in folders for path in self.storage.list(name, recursive=True)]
        sweeps = (f"{folder}/code.json" for folder in self.storage.folders("sweeps"))
        paths += [path for path in sweeps if self.storage.exists(path)]
        if with_keys and self.storage.exists(KEYS_FILE):
            paths.append(KEYS_FILE)
        for path in paths:
            self._write(path, self.storage.read_buffer(path))
        self.notes.append("predictions, the monitor's memory and the state of sweeps are not in it")
        if not with_data:
            self.notes.append("images are not in it (--with-data): ingest them again from source")
        if not with_keys and self.storage.exists(KEYS_FILE):
            self.notes.append(
                "API keys are not in it (--with-keys takes their hashes, and the line's own key)"
            )
        return len(paths)

    def write_traffic(self, generations: Mapping[str, bytes], models: dict[str, Any]) -> int:
        """Write the policy's history up to the newest generation that can serve; return its length.

        That is the newest whose versions are all in `models`; the aliases there are made to follow
        it.
        """
        paths = sorted(generations)
        while paths:
            document = json.loads(generations[paths[-1]])
            lacking = lacking_bundles(document, models)
            if not lacking:
                break
            self.notes.append(
                f"left out: {paths.pop()}, of whose versions {', '.join(lacking)} are not in it"
            )
        for path in paths:
            self._write(path, generations[path])
        if paths:
            for name, traffic in document["models"].items():
                aliases = models[name]["aliases"]
                aliases[CHAMPION] = traffic["champion"]
                if aliases.get(CHALLENGER) == traffic["champion"]:
                    del aliases[CHALLENGER]
        elif generations:
            self.notes.append("no traffic policy is in it: none could serve")
        return len(paths)

    def note_changes(self, copied_generations: int) -> None:
        """Note whether the policy was changed while the backup was made."""
        now = sum(1 for path in self.storage.list("traffic") if _GENERATION.fullmatch(path))
        if now > copied_generations:
            self.notes.append(
                f"the traffic policy was changed {now - copied_generations} times meanwhile: back "
                "up again to have what serves now"
            )

    def _write(self, path: str, content: Any) -> None:
        target = self.folder / "storage" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def _leave_out(self, why: str) -> None:
        self.left_out.append(why)
        progress("backup", f"WARNING: left out: {why}")

    def _version(self, version: Version) -> dict[str, Any] | None:
        """Return what is known of a version, its files copied; None if it has to be left out."""
        target = self.folder / "models" / version.name / str(version.version)
        target.parent.mkdir(parents=True, exist_ok=True)
        place = self.folder / "download"
        try:
            found = self.client.get_model_version(version.name, str(version.version))
            download_model(self.settings, version, place).rename(target)
        except FilesError as error:
            self._leave_out(str(error))
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._leave_out(f"version {version.version} of {version.name!r} was deleted meanwhile")
            return None
        finally:
            shutil.rmtree(place, ignore_errors=True)
        progress("backup", f"{version.name} version {version.version}")
        model_id = logged_model_id(found)
        logged = self.client.get_logged_model(model_id) if model_id else None
        return {
            "version": version.version,
            "description": found.description,
            "tags": dict(found.tags),
            "run_id": version.trial_run_id,
            "created_ms": version.created_ms,
            "logged_model": _logged_model(logged),
        }

    def _run(self, run_id: str) -> dict[str, Any]:
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.notes.append(f"run {run_id} is gone from MLflow: an empty one stands for it")
            return _lost_run(self.settings)
        self._artifacts(run)
        points = [
            point
            for name in sorted(run.data.metrics)
            for point in self.client.get_metric_history(run_id, name)
        ]
        return {
            "experiment": self.client.get_experiment(run.info.experiment_id).name,
            "name": run.info.run_name,
            "status": run.info.status,
            "start_time": run.info.start_time,
            "end_time": run.info.end_time,
            "tags": {k: v for k, v in run.data.tags.items() if k not in _NOT_OURS},
            "params": dict(run.data.params),
            "metrics": [[point.key, point.value, point.timestamp, point.step] for point in points],
            "inputs": [
                {"dataset": dict(found.dataset), "tags": {tag.key: tag.value for tag in found.tags}}
                for found in (run.inputs.dataset_inputs if run.inputs else ())
            ],
        }

    def _artifacts(self, run: Run) -> None:
        uri = run.info.artifact_uri
        repository = get_artifact_repository(uri, tracking_uri=self.settings.mlflow_uri)
        for found in repository.list_artifacts():
            target = self.folder / "runs" / run.info.run_id
            target.mkdir(parents=True, exist_ok=True)
            download(self.settings, f"{uri}/{found.path}", target)


def read_backup(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return a backup's index and registry; raise RegistryError if a file is not as written."""
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        raise RegistryError(f"{folder} is no backup: it has no {INDEX_FILE}")
    index = json.loads(index_file.read_text())
    if index.get("format") != FORMAT:
        raise RegistryError(f"the backup's format {index.get('format')!r} is not {FORMAT}")
    for path, digest in index["sha256"].items():
        file = folder / path
        if not file.is_file() or file_sha256(file) != digest:
            raise RegistryError(f"the backup is damaged: {file} is missing or was changed")
    registry = json.loads((folder / REGISTRY_FILE).read_text())
    for name, model in registry["models"].items():
        for version in model["versions"]:
            _check_digests(index["sha256"], name, version)
    generations = sorted((folder / "storage" / "traffic").glob("*.json"))
    if generations:
        newest = generations[-1]
        lacking = lacking_bundles(json.loads(newest.read_text()), registry["models"])
        if lacking:
            raise RegistryError(
                f"the backup can't serve: {newest} names {', '.join(lacking)}, which it does not "
                "have; restore another backup, or, to go back to the generation before, delete "
                f"that file and its line in {index_file}"
            )
    return index, registry


def lacking_bundles(policy_document: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """Return the bundles that a policy names and that are none of these models' versions."""
    there = {
        bundle_path(name, version["version"], version["run_id"])
        for name, model in models.items()
        for version in model["versions"]
    }
    named = (
        bundle
        for traffic in policy_document["models"].values()
        for bundle in traffic["bundles"].values()
    )
    return sorted(set(named) - there)


def _check_digests(files: Mapping[str, str], name: str, version: Mapping[str, Any]) -> None:
    """Raise RegistryError if a version's files were not those registered when they were saved."""
    for path, kind in ((ONNX_FILE, "onnx"), (PT2_PATH, "pt2")):
        wanted = version["tags"].get(f"rayline.{kind}_sha256", "null")
        file = f"models/{name}/{version['version']}/{path}"
        if wanted not in ("null", files.get(file)):
            raise RegistryError(
                f"the backup is damaged: {file} is not the file that was registered, whose SHA-256 "
                f"is {wanted}; restore another backup"
            )


def _lost_run(settings: Settings) -> dict[str, Any]:
    return {
        "experiment": f"rayline/{settings.model}",
        "name": "lost",
        "status": "FINISHED",
        "start_time": 0,
        "end_time": 0,
        "tags": {"rayline.lost": "true"},
        "params": {},
        "metrics": [],
        "inputs": [],
    }


def _logged_model(model: LoggedModel | None) -> dict[str, Any]:
    if model is None:
        return {"name": "model", "type": None, "tags": {}, "params": {}, "metrics": []}
    return {
        "name": model.name,
        "type": model.model_type,
        "tags": dict(model.tags),
        "params": dict(model.params),
        "metrics": [
            [m.key, m.value, m.timestamp, m.step, m.dataset_name, m.dataset_digest]
            for m in model.metrics or []
        ],
    }
