"""The parent run of a sweep in MLflow: opened, or opened again."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Param

from lib import provenance
from lib.config import Settings
from lib.data.manifest import Manifest, manifest_path
from lib.registry.server import connect, ensure_experiment, explained
from lib.storage import Storage

PACKAGES = ("ray", "torch", "torchvision", "mlflow", "optuna", "numpy", "pyarrow")
"""Packages whose version can change what a trial learns; recorded on every run."""
NOTE_TAG = "mlflow.note.content"
"""What MLflow's UI shows as the description of a run, in Markdown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRun:
    """The parent run of a sweep, and what all of its trials' runs carry."""

    run_id: str
    experiment_id: str
    tags: Mapping[str, str]
    inputs: Sequence[DatasetInput] = ()


def start_sweep(
    settings: Settings,
    storage: Storage,
    *,
    name: str,
    manifest: Manifest | None,
    tags: Mapping[str, str],
    facts: Mapping[str, Any],
    experiment: Mapping[str, Any],
) -> SweepRun:
    """Open the parent run of a sweep in the experiment `rayline/<model name>`.

    `facts` become parameters of the sweep, `tags` are on its trials too, and `experiment`, all that
    was asked for, becomes an artifact. Raises RegistryError if MLflow can't be reached.
    """
    client = connect_quietly(settings)
    group = f"rayline/{settings.model}"
    common = {**_common_tags(manifest), **tags}
    inputs = _dataset_inputs(storage, manifest) if manifest else []
    with explained(settings, "starting the record of a sweep"):
        experiment_id = ensure_experiment(client, group)
        run = client.create_run(
            experiment_id,
            run_name=f"sweep-{name}-{time.strftime('%Y%m%d-%H%M%S')}",
            tags={**common, "rayline.kind": "sweep", NOTE_TAG: _about(name, facts)},
        )
        run_id = run.info.run_id
        client.log_batch(run_id, params=as_params(facts))
        client.log_text(run_id, json.dumps(experiment, indent=2), "experiment.json")
        if manifest is not None:
            client.log_inputs(run_id, inputs)
        code = provenance.current()
        if code.diff:
            client.log_text(run_id, code.diff, "provenance/uncommitted.patch")
        # Beside MLflow, which has no login: what `reproduce` takes a diff from there by.
        storage.write_json(code_path(run_id), {"diff_sha256": code.diff_sha256})
    return SweepRun(run_id=run_id, experiment_id=experiment_id, tags=common, inputs=inputs)


def code_path(sweep_run_id: str) -> str:
    """Return where the digest of a sweep's uncommitted changes is, relative to the storage root."""
    return f"sweeps/{sweep_run_id}/code.json"


def reopen_sweep(settings: Settings, sweep_run_id: str) -> SweepRun:
    """Return the run of a sweep that goes on; raise RegistryError if MLflow has none such."""
    client = connect_quietly(settings)
    with explained(settings, f"looking up sweep {sweep_run_id}"):
        run = client.get_run(sweep_run_id)
        ensure_experiment(client, client.get_experiment(run.info.experiment_id).name)
        client.update_run(sweep_run_id, status="RUNNING")
    # The runs that are still to be opened are of the code that runs now, and of it alone.
    of_sweep = ("rayline.kind", "rayline.record_complete")
    common = {
        name: value
        for name, value in run.data.tags.items()
        if name.startswith("rayline.")
        and not name.startswith("rayline.git_")
        and name not in of_sweep
    } | _common_tags(None)
    return SweepRun(
        run_id=sweep_run_id,
        experiment_id=run.info.experiment_id,
        tags=common,
        inputs=run.inputs.dataset_inputs if run.inputs else (),
    )


def connect_quietly(settings: Settings) -> MlflowClient:
    """Return a client that prints nothing at the end of a run."""
    # The end of every trial's run would print two lines.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    return connect(settings)


def _common_tags(manifest: Manifest | None) -> dict[str, str]:
    code = provenance.current()
    tags = {
        "rayline.data_digest": manifest.digest if manifest else None,
        "rayline.git_commit": code.commit,
        "rayline.git_dirty": str(code.dirty).lower(),
        "rayline.git_diff_sha256": code.diff_sha256,
        "rayline.owner": code.owner,
        "mlflow.source.git.commit": code.commit,
        "mlflow.source.name": _source_name(),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": code.owner,
        **{f"rayline.package.{name}": version(name) for name in PACKAGES},
    }
    return {name: value for name, value in tags.items() if value}


def _source_name() -> str:
    """Return what runs: a module by its name, a script by its file's."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else os.path.basename(sys.argv[0])


def _about(name: str, facts: Mapping[str, Any]) -> str:
    return (
        f"Search `{name}` for {facts.get('objectives', 'its objective')}, by "
        f"{facts.get('sampler', '?')} with {facts.get('scheduler', '?')}. Each child run is a "
        "trial: its curves by epoch, its best epoch as `best/…`, its net below `checkpoint`. "
        "`python -m jobs.models best --sweep RUN_ID --rank N` finds one, `--fetch DIR` makes it a "
        "version; `python -m jobs.register --sweep RUN_ID` registers the best."
    )


def _dataset_inputs(storage: Storage, manifest: Manifest) -> list[DatasetInput]:
    """Return the data set as it is trained on, and as trials are compared on."""
    # MLflow drops the second of two inputs with the same name and digest.
    return [
        _dataset_input(storage, manifest, "", "training"),
        _dataset_input(storage, manifest, "/val", "validation"),
    ]


def _dataset_input(storage: Storage, manifest: Manifest, suffix: str, context: str) -> DatasetInput:
    scheme, separator, _ = storage.uri.partition("://")
    dataset = Dataset(
        name=manifest.source.rstrip("/").rsplit("/", 1)[-1] + suffix,
        digest=manifest.digest,
        source_type=scheme if separator else "local",
        source=json.dumps({"uri": f"{storage.uri}/{manifest_path(manifest.digest)}"}),
        profile=json.dumps(
            {
                "shape": manifest.shape,
                "class_names": manifest.class_names,
                "rows": {split: manifest.rows(split) for split in manifest.counts},
            }
        ),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def as_params(values: Mapping[str, Any]) -> list[Param]:
    """Return values as MLflow's parameters."""
    return [Param(name, str(value)) for name, value in values.items()]
