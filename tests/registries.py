"""A registry on SQLite without a server, whose versions are made without training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.models import Model

from lib.config import Settings
from lib.data.manifest import Manifest, Preprocess, manifest_path
from lib.registry.evaluate import Evaluation
from lib.registry.export import Exported
from lib.registry.models import READY_TAG, Facts, Version, ensure_bundle
from lib.registry.publish import Publisher
from lib.registry.trials import ACCURACY, Trial
from lib.serving import policy
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage

MODEL = "digits"
DIGEST = "5e1f" * 8
FACTS = Facts(
    trial_run_id="",
    sweep_run_id="",
    data_digest=DIGEST,
    git_commit=None,
    git_dirty=False,
    val_accuracy=0.9,
    test_accuracy=0.9,
    test_macro_accuracy=0.9,
    test_macro_f1=0.9,
    val_test_gap=0.0,
    per_class_accuracy={"a": 0.9, "b": 0.9},
    baseline_val_accuracy=0.5,
    onnx_max_difference=0.0,
    runtime="onnxruntime",
    device="cpu",
    images_per_s={"onnxruntime": {"1": 900.0}},
)


def manifest() -> Manifest:
    counts = {name: (100, 100) for name in ("train", "val", "test")}
    return Manifest(
        digest=DIGEST,
        source="made",
        source_digests={},
        height=4,
        width=4,
        channels=1,
        class_names=("a", "b"),
        counts=counts,
        split_digests={},
        pixel_mean=(0.5,),
        pixel_std=(0.25,),
        preprocess=Preprocess(mode="L", fill=(0,)),
        shards=(),
        seed=0,
    )


@dataclass
class Registry:
    """One storage root and one MLflow."""

    settings: Settings
    storage: Storage
    client: MlflowClient
    experiment: str
    patch: pytest.MonkeyPatch
    sweep: str = field(init=False)

    def __post_init__(self) -> None:
        self.storage.write_json(manifest_path(DIGEST), manifest().to_json())
        tags = {"rayline.kind": "sweep", "rayline.data_digest": DIGEST}
        self.sweep = self.client.create_run(self.experiment, tags=tags).info.run_id
        self.client.set_terminated(self.sweep)

        def measured(_: Publisher, trial: Trial, exported: Exported) -> tuple[Facts, Evaluation]:
            facts = replace(FACTS, trial_run_id=trial.run_id, sweep_run_id=trial.sweep_run_id)
            return facts, Evaluation(
                rows=200,
                accuracy=0.9,
                macro_accuracy=0.9,
                macro_f1=0.9,
                per_class_accuracy=dict(FACTS.per_class_accuracy),
                confusion=((90, 10), (10, 90)),
            )

        self.patch.setattr(Publisher, "_measure", measured)

    def trial(self, name: str = "trial") -> Trial:
        """A trial that finished."""
        tags = {
            "rayline.kind": "trial",
            "rayline.data_digest": DIGEST,
            "mlflow.parentRunId": self.sweep,
        }
        run = self.client.create_run(self.experiment, tags=tags, run_name=name)
        self.client.log_metric(run.info.run_id, "val_accuracy", 0.9)
        self.client.set_terminated(run.info.run_id)
        return Trial(
            run_id=run.info.run_id,
            sweep_run_id=self.sweep,
            experiment_id=self.experiment,
            data_digest=DIGEST,
            objective=ACCURACY,
            metrics={"val_accuracy": 0.9},
            created_ms=run.info.start_time,
            checkpoint_uri="",
            git_commit=None,
            git_dirty=False,
            owner=None,
        )

    def register(self, trial: Trial) -> Version:
        """Make the trial a version, as `register` does, and set no alias."""
        publisher = Publisher(
            settings=self.settings, storage=self.storage, manifest=manifest(), client=self.client
        )

        def save(folder: Path) -> Exported:
            exported = Exported(folder=folder / "model")
            exported.pt2_file.parent.mkdir(parents=True)
            Model(run_id=trial.run_id).save(str(exported.folder / "MLmodel"))
            exported.onnx_file.write_bytes(f"onnx of {trial.run_id}".encode())
            exported.pt2_file.write_bytes(f"pt2 of {trial.run_id}".encode())
            return exported

        made = publisher.ensure_version(trial, save)
        ensure_bundle(self.settings, self.storage, made)
        self.client.set_model_version_tag(MODEL, str(made.version), READY_TAG, "true")
        return replace(made, ready=True)

    def add(self) -> Version:
        """Return a new version."""
        return self.register(self.trial())

    def model_id(self, version: Version) -> str:
        """The logged model that a version was made of."""
        source = str(self.client.get_model_version(MODEL, str(version.version)).source)
        return source.removeprefix("models:/")

    def files_of(self, version: Version) -> Path:
        """The folder in which MLflow keeps a version's files."""
        model = self.client.get_logged_model(self.model_id(version))
        return Path(str(model.artifact_location))

    def serve(self, champion: Version, *others: Version) -> None:
        """Commit a policy in which a version has all of the traffic, and the others none."""
        traffic = ModelTraffic(
            weights={champion.version: 100.0, **{v.version: 0.0 for v in others}},
            bundles={v.version: v.bundle for v in (champion, *others)},
            champion=champion.version,
        )
        base = policy.current(self.storage)
        policy.commit(
            self.storage, base, {MODEL: traffic}, default_model=MODEL, who="me", why="test"
        )

    def add_models_of_others(self) -> None:
        """Register what a colleague has on the same server."""
        for name in ("Fraud Detector", "O'Neill", "both ' and \""):
            self.client.create_registered_model(name)
            self.client.create_model_version(name, "file:///elsewhere")


def make_registry(folder: Path, database: Path, patch: pytest.MonkeyPatch) -> Registry:
    """Return an empty registry below a folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(database, folder / "mlflow.db")
    uri = f"sqlite:///{folder}/mlflow.db"
    patch.setenv("MLFLOW_TRACKING_URI", uri)  # MLflow's SQL store asks this one for models.
    settings = Settings(
        storage=str(folder / "storage"),
        mlflow_uri=uri,
        model=MODEL,
        ray_address="http://127.0.0.1:1",
    )
    client = MlflowClient(uri, uri)
    name = f"rayline/{MODEL}"
    return Registry(
        settings=settings,
        storage=Storage(settings.storage),
        client=client,
        experiment=client.create_experiment(name, artifact_location=str(folder / "artifacts")),
        patch=patch,
    )
