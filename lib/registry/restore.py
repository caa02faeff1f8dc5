"""A backup into an empty line: the same list of versions, models that load and can be deployed.

MLflow gives runs new ids. Everything that names a run is written with the new one: version tags,
cards, bundle paths, the policy; the old id stays as a tag of run and version. Interrupted, a
restore of the same backup goes on.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from lib.cli import progress
from lib.config import Settings
from lib.errors import RegistryError
from lib.registry.backup import CODE_RECORD, RECORDS, read_backup
from lib.registry.inspection import ORIGINAL_RUN_TAG
from lib.registry.models import CREATED_TAG, ensure_bundle, survey
from lib.registry.server import connect, ensure_experiment, explained
from lib.serving import policy
from lib.serving.bundle import CARD_FILE, bundle_path
from lib.serving.traffic import Policy
from lib.storage import Storage

BACKUP_TAG = "rayline.backup"
"""On what a restore made: the backup's id."""
_WHOLE_TAG = "rayline.restored"
"""On a run that was restored with all that belongs to it."""
_RUN_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_PARAMS, _METRICS = 100, 1000
"""What MLflow takes in one request."""


def restore(settings: Settings, storage: Storage, folder: Path) -> dict[str, Any]:
    """Restore a backup; raise RegistryError, before any change, where it would overwrite."""
    folder = folder.expanduser().resolve()
    index, registry = read_backup(folder)
    client = connect(settings)
    work = _Restore(
        settings=settings, storage=storage, client=client, folder=folder, backup=index["id"]
    )
    with explained(settings, f"restoring {folder}"):
        for name in registry["models"]:
            work.refuse_other_model(name)
        work.refuse_other_traffic(registry)
        work.copy_storage()
        work.runs(registry["runs"])
        for name, model in registry["models"].items():
            work.model(name, model)
        work.steps()
        work.records()
    served = work.traffic(registry)
    return {
        "models": {
            name: [version["version"] for version in model["versions"]]
            for name, model in registry["models"].items()
        },
        "runs": len(work.run_ids),
        "generation": served.generation if served else None,
        "next": "python -m jobs.deploy brings up what the policy says" if served else None,
    }


@dataclass(kw_only=True, slots=True)
class _Restore:
    settings: Settings
    storage: Storage
    client: MlflowClient
    folder: Path
    backup: str
    run_ids: dict[str, str] = field(default_factory=dict)
    """Old run → new run."""

    def refuse_other_model(self, name: str) -> None:
        """A model of that name may only be what a restore of this backup began."""
        try:
            found = self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return
        if found.tags.get(BACKUP_TAG) != self.backup:
            raise RegistryError(
                f"the registry has a model {name!r} already: a backup is restored into a line "
                "without it; point MLFLOW_TRACKING_URI and RAYLINE_STORAGE to an empty one"
            )

    def refuse_other_traffic(self, registry: Mapping[str, Any]) -> None:
        """A policy may only be there if a restore of this backup wrote it, as its last step."""
        begun = [name for name in registry["models"] if self._begun(name)]
        if self.storage.list("traffic") and len(begun) < len(registry["models"]):
            raise RegistryError(
                f"{self.storage.uri} has a traffic policy already: a backup is restored into an "
                "empty line; point RAYLINE_STORAGE to an empty place"
            )

    def copy_storage(self) -> None:
        """Write manifests, baselines, shards and keys where there are none."""
        for path, file in self._stored().items():
            is_later = path.startswith(("traffic/", "steps/")) or _names_runs(path)
            if not is_later and not self.storage.exists(path):
                self.storage.write(path, file.read_bytes())

    def steps(self) -> None:
        """Keep the outcomes of sweeps that are there again, so that nobody runs them again."""
        for path, file in self._stored().items():
            if not path.startswith("steps/"):
                continue
            step = json.loads(file.read_text())
            sweep = self.run_ids.get(step["result"].get("sweep_run_id"))
            if sweep:
                step["result"]["sweep_run_id"] = sweep
                self.storage.create_json(path, step)

    def records(self) -> None:
        """Write the records of rollouts, retrains and sweeps' code, with the new ids of runs."""

        def with_new_ids(text: str) -> str:
            return _RUN_ID.sub(lambda found: self._new(found[0]), text)

        for path, file in self._stored().items():
            if _names_runs(path) and not self.storage.exists(with_new_ids(path)):
                self.storage.write(with_new_ids(path), with_new_ids(file.read_text()).encode())

    def runs(self, runs: Mapping[str, Any]) -> None:
        """Record the runs again, sweeps before their trials."""
        for old, run in sorted(
            runs.items(), key=lambda item: "mlflow.parentRunId" in item[1]["tags"]
        ):
            experiment_id = ensure_experiment(self.client, run["experiment"])
            there = self.client.search_runs(
                [experiment_id],
                f"tags.`{BACKUP_TAG}` = '{self.backup}' and tags.`{ORIGINAL_RUN_TAG}` = '{old}'",
            )
            for found in there:
                if _WHOLE_TAG in found.data.tags:
                    self.run_ids[old] = found.info.run_id
                else:
                    self.client.delete_run(found.info.run_id)
            if old not in self.run_ids:
                self.run_ids[old] = self._record(old, run, experiment_id)

    def model(self, name: str, model: Mapping[str, Any]) -> None:
        """Register a model's versions under their numbers, then set its aliases."""
        if not self._begun(name):
            tags = {**model["tags"], BACKUP_TAG: self.backup}
            self.client.create_registered_model(name, tags, model["description"] or "")
        ours, _ = survey(self.settings, name)
        there = {version.version for version in ours}
        for number in there - {version["version"] for version in model["versions"]}:
            # An interrupted restore was just passing by the number of a deleted version.
            self.client.delete_model_version(name, str(number))
        for version in model["versions"]:
            if version["version"] not in there:
                self._version(name, version)
                progress("restore", f"{name} version {version['version']}")
        for alias, number in model["aliases"].items():
            self.client.set_registered_model_alias(name, alias, str(number))

    def traffic(self, registry: Mapping[str, Any]) -> Policy | None:
        """Publish what is served, then the policy with its history; return the newest."""
        files = sorted((self.folder / "storage" / "traffic").glob("*.json"))
        bundles = {
            name: {
                str(version["version"]): bundle_path(
                    name, version["version"], self._new(version["run_id"])
                )
                for version in model["versions"]
            }
            for name, model in registry["models"].items()
        }
        documents = [json.loads(file.read_text()) for file in files]
        for document in documents:
            for name, traffic in document["models"].items():
                for number in traffic["bundles"]:
                    path = bundles.get(name, {}).get(number)
                    traffic["bundles"][number] = path or traffic["bundles"][number]
        for name, traffic in documents[-1]["models"].items() if documents else ():
            for version in survey(self.settings, name)[0]:
                if str(version.version) in traffic["bundles"]:
                    ensure_bundle(self.settings, self.storage, version)
        for file, document in zip(files, documents, strict=True):
            path = f"traffic/{file.name}"
            written = self.storage.create_json(path, document)
            if not written and self.storage.read_json(path) != document:
                raise RegistryError(
                    f"{self.storage.uri}/{path} is of another policy; nothing is overwritten"
                )
        return policy.current(self.storage)

    def _stored(self) -> dict[str, Path]:
        base = self.folder / "storage"
        files = sorted(path for path in base.rglob("*") if path.is_file())
        return {file.relative_to(base).as_posix(): file for file in files}

    def _begun(self, name: str) -> bool:
        try:
            return self.client.get_registered_model(name).tags.get(BACKUP_TAG) == self.backup
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _new(self, run_id: str) -> str:
        # A version from elsewhere may name a sweep that there never was.
        return self.run_ids.get(run_id, run_id)

    def _record(self, old: str, run: Mapping[str, Any], experiment_id: str) -> str:
        tags = {**run["tags"], ORIGINAL_RUN_TAG: old, BACKUP_TAG: self.backup}
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = self._new(tags["mlflow.parentRunId"])
        created = self.client.create_run(
            experiment_id, run["start_time"], tags=tags, run_name=run["name"]
        )
        new = str(created.info.run_id)
        params = [Param(name, value) for name, value in run["params"].items()]
        for start in range(0, len(params), _PARAMS):
            self.client.log_batch(new, params=params[start : start + _PARAMS])
        self._log_metrics(new, [Metric(*point) for point in run["metrics"]])
        if run["inputs"]:
            self.client.log_inputs(new, [_dataset_input(found) for found in run["inputs"]])
        artifacts = self.folder / "runs" / old
        if artifacts.is_dir():
            self.client.log_artifacts(new, str(artifacts))
        self.client.set_terminated(new, run["status"], run["end_time"])
        self.client.set_tag(new, _WHOLE_TAG, "true")
        return new

    def _log_metrics(self, run_id: str, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), _METRICS):
            self.client.log_batch(run_id, metrics=metrics[start : start + _METRICS])

    def _version(self, name: str, version: Mapping[str, Any]) -> None:
        run_id = self._new(version["run_id"])
        model_id = self._log_model(name, version, run_id)
        tags = {
            **version["tags"],
            "rayline.trial_run_id": run_id,
            "rayline.sweep_run_id": self._new(version["tags"]["rayline.sweep_run_id"]),
            ORIGINAL_RUN_TAG: version["tags"].get(ORIGINAL_RUN_TAG, version["run_id"]),
            BACKUP_TAG: self.backup,
            CREATED_TAG: str(version["created_ms"]),
        }
        # MLflow counts numbers up and uses none twice: those of deleted versions are passed by.
        number = 0
        while number < version["version"]:
            if number:
                self.client.delete_model_version(name, str(number))
            created = self.client.create_model_version(
                name,
                source=f"models:/{model_id}",
                run_id=run_id,
                model_id=model_id,
                tags=tags,
                description=version["description"],
                await_creation_for=0,
            )
            number = int(created.version)
        if number != version["version"]:
            self.client.delete_model_version(name, str(number))
            raise RegistryError(
                f"version {version['version']} of {name!r} can't be restored: the next number of "
                f"MLflow is {number}; somebody else registers there"
            )

    def _log_model(self, name: str, version: Mapping[str, Any], run_id: str) -> str:
        content = version["logged_model"]
        experiment_id = self.client.get_run(run_id).info.experiment_id
        logged = self.client.create_logged_model(
            experiment_id,
            name=content["name"],
            source_run_id=run_id,
            model_type=content["type"],
            tags={k: v for k, v in content["tags"].items() if not k.startswith("mlflow.")},
            params=content["params"],
        )
        source = self.folder / "models" / name / str(version["version"])
        with tempfile.TemporaryDirectory(prefix="rayline-restore-") as place:
            model = Path(shutil.copytree(source, Path(place) / "model"))
            description = Model.load(str(model))
            description.run_id = run_id
            description.model_id = description.model_uuid = logged.model_id
            description.artifact_path = logged.artifact_location
            description.save(str(model / "MLmodel"))
            card = model / CARD_FILE
            if card.exists():
                fields = {**json.loads(card.read_text()), "run_id": run_id}
                card.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            self.client.log_model_artifacts(logged.model_id, str(model))
        self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        metrics = [
            Metric(
                key,
                value,
                timestamp,
                step,
                model_id=logged.model_id,
                dataset_name=dataset_name,
                dataset_digest=digest,
            )
            for key, value, timestamp, step, dataset_name, digest in content["metrics"]
        ]
        self._log_metrics(run_id, metrics)
        self.client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)


def _names_runs(path: str) -> bool:
    return path.startswith(tuple(f"{folder}/" for folder in RECORDS)) or bool(
        CODE_RECORD.fullmatch(path)
    )


def _dataset_input(content: Mapping[str, Any]) -> DatasetInput:
    tags = [InputTag(key, value) for key, value in content["tags"].items()]
    return DatasetInput(Dataset(**content["dataset"]), tags)
