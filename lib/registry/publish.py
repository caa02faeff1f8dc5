"""From one trial to one version: exported, gated, measured on test, logged, registered."""

from __future__ import annotations

import json
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from lib.cli import progress
from lib.config import Settings
from lib.data.direct import read_some
from lib.data.loader import Split, read_splits
from lib.data.manifest import Manifest
from lib.data.stream import Batch, EpochStream, fits_in_memory
from lib.errors import RefusedError, RegistryError
from lib.registry import gaps
from lib.registry.baseline import Baseline, check_against, ensure_baseline
from lib.registry.claims import claimed
from lib.registry.evaluate import EVALUATION_BATCH, Evaluation, answer, evaluate
from lib.registry.export import Exported, check_equal, export, load_served
from lib.registry.model_card import model_card, registered_model_card
from lib.registry.models import MODEL_NAME_TAG, Facts, Version, survey, way_back
from lib.registry.removal import GRACE_S, remove_model
from lib.registry.runtime import Measured, measure_where_served
from lib.registry.server import download, pages
from lib.registry.sweep_runs import NOTE_TAG
from lib.registry.trials import CHECKPOINT_PATH, Trial
from lib.serving.bundle import CARD_FILE, Card, file_sha256
from lib.serving.predictor import OnnxPredictor
from lib.storage import Storage

EVALUATION_FILE = "evaluation.json"
"""Beside the model: the confusion matrix and all other numbers of the test split."""
REFUSED_TAG = "rayline.refused"
"""On a trial's run: why a gate refused to make it a version."""
_PROBE_IMAGES = 512
_SOME_ROWS = 2000
"""Of a split that does not fit in memory, for what needs examples and not all rows."""
_METRICS_PER_REQUEST = 500
_CLASS_METRICS = 100
"""Classes up to which each one's accuracy is a metric of the run."""
_TAG_LETTERS = 5000


@dataclass(kw_only=True, slots=True)
class Publisher:
    """One registration; reads the data set and the baseline when first needed, and once."""

    settings: Settings
    storage: Storage
    manifest: Manifest
    client: MlflowClient
    _splits: Mapping[str, Split] = field(default_factory=dict, init=False)
    _baseline: Baseline | None = field(default=None, init=False)
    _known: Sequence[Version] = field(default=(), init=False)
    """The model's versions as they were last listed."""

    def ensure_version(
        self, trial: Trial, save: Callable[[Path], Exported] | None = None
    ) -> Version:
        """Return the trial's version, made now if it has none.

        `save` writes the model of a run that is no trial and has no checkpoint.

        Raises RefusedError if a gate refuses the trial; the reason is then a tag of its run, and
        nothing else of it is left in MLflow.
        """
        with claimed(self.storage, self.settings.model, trial.run_id):
            known = self._versions_of(trial)
            if known:
                progress("register", f"trial {trial.run_id} is version {known[0].version} already")
                return known[0]
            self._remove_leftovers(trial)
            try:
                return self._make_version(trial, save)
            except RefusedError as error:
                self.client.set_tag(trial.run_id, REFUSED_TAG, str(error)[:_TAG_LETTERS])
                raise

    def _make_version(self, trial: Trial, save: Callable[[Path], Exported] | None) -> Version:
        with tempfile.TemporaryDirectory(prefix="rayline-register-") as folder:
            exported = save(Path(folder)) if save else self._export(trial, Path(folder))
            facts, evaluation = self._measure(trial, exported)
            facts = replace(
                facts,
                onnx_sha256=file_sha256(exported.onnx_file),
                pt2_sha256=None if exported.origin else file_sha256(exported.pt2_file),
            )
            self._check_gap(facts)
            self._write_descriptions(exported, facts, evaluation)
            model_id = self._log_model(trial, exported)
        self._log_metrics(trial, model_id, facts, evaluation)
        return self._create_version(trial, model_id, facts, evaluation)

    def _export(self, trial: Trial, folder: Path) -> Exported:
        start_s = time.monotonic()
        if not self.client.list_artifacts(trial.run_id, posixpath.dirname(CHECKPOINT_PATH)):
            raise RefusedError(
                f"trial {trial.run_id} has no checkpoint any more (`jobs.models gc` and MLflow "
                "delete them); choose a trial of another rank, or run its search again with "
                "jobs.tune"
            )
        checkpoint = download(self.settings, trial.checkpoint_uri, folder)
        example_NHWC = self.split("test").images_NHWC[:2].copy()
        served = load_served(checkpoint, self.manifest)
        exported = export(
            served, example_NHWC, folder / "model", trial.run_id, self.manifest.class_names
        )
        seconds = time.monotonic() - start_s
        progress("register", f"trial {trial.run_id}: exported in {seconds:.1f} s")
        return exported

    def _versions_of(self, trial: Trial) -> list[Version]:
        """Return the trial's versions; raise RegistryError if one of them can't be read."""
        self._known, foreign = survey(self.settings)
        found = [version for version in self._known if version.trial_run_id == trial.run_id]
        for other in foreign:
            if not found and other.trial_run_id == trial.run_id:
                raise RegistryError(f"trial {trial.run_id} can't be registered again: {other.why}")
        return found

    def split(self, name: str) -> Split:
        """Return the validation or the test split; of one that does not fit in memory some rows."""
        if not self._splits:
            progress("register", "reading the validation and test splits")
            held = [name for name in ("val", "test") if fits_in_memory(self.manifest, name)]
            self._splits = {
                **(read_splits(self.storage, self.manifest, held) if held else {}),
                **{name: self._some(name) for name in {"val", "test"} - set(held)},
            }
        return self._splits[name]

    def _some(self, name: str) -> Split:
        rows = self.manifest.rows(name)
        places = np.linspace(0, rows - 1, min(rows, _SOME_ROWS)).astype(np.int64)
        images_NHWC, labels_N = read_some(self.storage, self.manifest, name, places)
        return Split(images_NHWC=images_NHWC, labels_N=labels_N)

    def _batches(self, name: str) -> Iterator[Batch]:
        """Yield all of a split; one that does not fit in memory is read shard by shard."""
        if not fits_in_memory(self.manifest, name):
            yield from EpochStream(
                storage=self.storage,
                manifest=self.manifest,
                split=name,
                batch_size=EVALUATION_BATCH,
            ).epoch(0)
            return
        split = self.split(name)
        for start in range(0, len(split.labels_N), EVALUATION_BATCH):
            stop = start + EVALUATION_BATCH
            yield Batch(
                images_NHWC=split.images_NHWC[start:stop], labels_N=split.labels_N[start:stop]
            )

    def _measure(self, trial: Trial, exported: Exported) -> tuple[Facts, Evaluation]:
        names = self.manifest.class_names
        if self._baseline is None:
            self._baseline = ensure_baseline(self.storage, self.manifest)
        onnx = OnnxPredictor(exported.onnx_file)
        on_val = evaluate(*answer(onnx, self._batches("val")), names)
        check_against(self._baseline, on_val.accuracy, trial.run_id)
        origin = exported.origin
        if origin is None:
            labels_N, probabilities_NK, difference = check_equal(
                exported, self._batches("test"), trial.run_id
            )
        else:
            labels_N, probabilities_NK = answer(onnx, self._batches("test"))
            difference = origin.max_difference
        on_test = evaluate(labels_N, probabilities_NK, names)
        speed = measure_where_served(
            exported.onnx_file.read_bytes(),
            exported.pt2_file.read_bytes() if origin is None else None,
            self.split("test").images_NHWC[:_PROBE_IMAGES],
        )
        facts = Facts(
            trial_run_id=trial.run_id,
            sweep_run_id=trial.sweep_run_id,
            data_digest=self.manifest.digest,
            git_commit=trial.git_commit,
            git_dirty=trial.git_dirty,
            val_accuracy=on_val.accuracy,
            test_accuracy=on_test.accuracy,
            test_macro_accuracy=on_test.macro_accuracy,
            test_macro_f1=on_test.macro_f1,
            val_test_gap=on_val.accuracy - on_test.accuracy,
            per_class_accuracy=on_test.per_class_accuracy,
            baseline_val_accuracy=self._baseline.val_accuracy,
            onnx_max_difference=difference,
            runtime=speed.fastest,
            device=speed.device,
            images_per_s=speed.rounded(),
            owner=origin.owner if origin else trial.owner,
            framework=origin.framework if origin else "rayline",
            origin_uri=origin.uri if origin else None,
            origin_sha256=origin.sha256 if origin else None,
        )
        _report(facts, speed)
        return facts, on_test

    def _check_gap(self, facts: Facts) -> None:
        known = [v for v in self._known if v.data_digest == facts.data_digest]
        rows = {f"{split}_rows": self.manifest.rows(split) for split in ("val", "test")}
        verdict = gaps.judge(facts.scores, [version.scores for version in known], **rows)
        if verdict.holds:
            return
        said = f"trial {facts.trial_run_id}: {verdict.explain()}"
        if not known:
            progress("register", f"WARNING: {said}; as the first on this data it sets the measure")
            return
        verdicts = gaps.judge_all({v.version: v.scores for v in known}, **rows)
        raise RefusedError(
            f"{said}, so it is refused; {way_back(self.settings, self.storage, known, verdicts)}"
        )

    def _write_descriptions(self, exported: Exported, facts: Facts, on_test: Evaluation) -> None:
        manifest = self.manifest
        card = Card(
            name=self.settings.model,
            version=0,
            run_id=facts.trial_run_id,
            data_digest=manifest.digest,
            height=manifest.height,
            width=manifest.width,
            channels=manifest.channels,
            class_names=manifest.class_names,
            preprocess=manifest.preprocess,
            runtime=facts.runtime,
            git_commit=facts.git_commit,
            test_accuracy=facts.test_accuracy,
            onnx_sha256=facts.onnx_sha256,
            pt2_sha256=facts.pt2_sha256,
        ).to_json()
        # The registry gives the number afterwards: the bundle's card has it.
        del card["version"]
        _write_json(exported.folder / CARD_FILE, card)
        _write_json(exported.folder / EVALUATION_FILE, on_test.to_json(manifest.class_names))
        about = model_card(self.settings, facts, on_test, manifest, ".")
        (exported.folder / "README.md").write_text(about + "\n")

    def _log_model(self, trial: Trial, exported: Exported) -> str:
        # In steps, not by mlflow.pytorch.log_model: that would export once more, so what was
        # checked would not be what is stored; and it works through process-wide state.
        client = self.client
        run = client.get_run(trial.run_id)
        if REFUSED_TAG in run.data.tags:
            client.delete_tag(trial.run_id, REFUSED_TAG)
        logged = client.create_logged_model(
            trial.experiment_id,
            name="model",
            source_run_id=trial.run_id,
            model_type="classifier",
            tags={MODEL_NAME_TAG: self.settings.model},
            params=run.data.params,
        )
        description = Model.load(str(exported.folder))
        description.model_id = description.model_uuid = logged.model_id
        description.artifact_path = logged.artifact_location
        description.save(str(exported.folder / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(exported.folder))
        client.log_outputs(trial.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def _log_metrics(self, trial: Trial, model_id: str, facts: Facts, on_test: Evaluation) -> None:
        values = {
            "test_accuracy": facts.test_accuracy,
            "test_macro_accuracy": facts.test_macro_accuracy,
            "test_macro_f1": facts.test_macro_f1,
            "val_test_gap": facts.val_test_gap,
            "served_val_accuracy": facts.val_accuracy,
            "baseline_val_accuracy": facts.baseline_val_accuracy,
        }
        for name, rates in facts.images_per_s.items():
            values |= {f"images_per_s/{name}_batch_{size}": rate for size, rate in rates.items()}
        # By number: MLflow takes no metric names with all the letters that a class may have.
        # Of many classes there would be thousands on each run: EVALUATION_FILE has them all.
        few = len(self.manifest.class_names) <= _CLASS_METRICS
        for index, name in enumerate(self.manifest.class_names if few else ()):
            if name in on_test.per_class_accuracy:
                values[f"test_accuracy_class/{index}"] = on_test.per_class_accuracy[name]
        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(
                key,
                value,
                now_ms,
                0,
                model_id=model_id,
                dataset_name=dataset_name(self.manifest),
                dataset_digest=self.manifest.digest,
            )
            for key, value in values.items()
        ]
        for start in range(0, len(metrics), _METRICS_PER_REQUEST):
            self.client.log_batch(
                trial.run_id, metrics=metrics[start : start + _METRICS_PER_REQUEST]
            )
        self.client.log_dict(
            trial.run_id, on_test.to_json(self.manifest.class_names), EVALUATION_FILE
        )

    def _create_version(
        self, trial: Trial, model_id: str, facts: Facts, on_test: Evaluation
    ) -> Version:
        name = self.settings.model
        about = registered_model_card(self.settings, self.manifest)
        try:
            self.client.create_registered_model(name, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            if not self.client.get_registered_model(name).description:
                self.client.update_registered_model(name, about)
        source = f"models:/{model_id}"
        card = model_card(self.settings, facts, on_test, self.manifest, source)
        self.client.set_tag(trial.run_id, NOTE_TAG, card)
        created = self.client.create_model_version(
            name,
            source=source,
            description=card,
            run_id=trial.run_id,
            model_id=model_id,
            tags=facts.to_tags(),
            await_creation_for=0,
        )
        first = self._versions_of(trial)[0]
        if first.version != int(created.version):
            # Someone registered the same sweep in the same seconds: the earlier one stays.
            self.client.delete_model_version(name, created.version)
            self._remove(model_id)
        else:
            progress("register", f"trial {trial.run_id} is now {name} version {first.version}")
        return first

    def _remove_leftovers(self, trial: Trial) -> None:
        """Delete models that an interrupted registration logged but never registered.

        As in `gc`, young ones stay: another registration may be about to make them a version.
        """
        logged = pages(
            self.client.search_logged_models,
            experiment_ids=[trial.experiment_id],
            filter_string=f"source_run_id = '{trial.run_id}'",
        )
        taken = {other.model_id for other in survey(self.settings)[1]}
        for model in logged:
            is_old = time.time() - model.creation_timestamp / 1000 >= GRACE_S
            is_ours = model.tags.get(MODEL_NAME_TAG) == self.settings.model
            if is_old and is_ours and model.model_id not in taken:
                self._remove(model.model_id)

    def _remove(self, model_id: str) -> None:
        # With its files: deleted in MLflow alone, they are where no `gc` would find them.
        location = self.client.get_logged_model(model_id).artifact_location
        remove_model(self.client, self.settings, model_id, location)


def dataset_name(manifest: Manifest) -> str:
    """Return what MLflow calls the data set; with its digest, metrics can be ranked on it."""
    return manifest.source.rstrip("/").rsplit("/", 1)[-1]


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _report(facts: Facts, speed: Measured) -> None:
    progress(
        "register",
        f"trial {facts.trial_run_id}: accuracy {facts.val_accuracy:.4f} on validation, "
        f"{facts.test_accuracy:.4f} on test"
        + ("" if facts.origin_uri else "; torch and ONNX give the same labels"),
    )
    rates = "; ".join(
        f"{name} " + ", ".join(f"{rate:,.0f} at batch {size}" for size, rate in sizes.items())
        for name, sizes in speed.images_per_s.items()
    )
    progress("register", f"images/s on {speed.device}: {rates}; serving with {speed.fastest}")
