"""Registration against a real MLflow server, with real nets on a small real part of MNIST."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import jobs.register
from lib.config import Settings
from lib.data import stream
from lib.data.ingest import ingest
from lib.data.loader import Split, read_splits
from lib.data.manifest import Manifest
from lib.data.stream import Batch
from lib.errors import RefusedError, RegistryError
from lib.registry import publish
from lib.registry.baseline import baseline_path
from lib.registry.export import Exported, check_equal, export, load_served
from lib.registry.fetch import fetch
from lib.registry.models import Version, ensure_bundle, resolve, versions
from lib.registry.registration import register
from lib.serving.bundle import ONNX_FILE, PT2_FILE, read_card
from lib.serving.predictor import OnnxPredictor, TorchPredictor, load_predictor
from lib.storage import Storage
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ModelConfig
from tests.data_sources import idx_files, write_files


@dataclass(frozen=True, kw_only=True)
class Line:
    """A data set with three checkpoints of very different quality."""

    storage: Storage
    manifest: Manifest
    test: Split
    best: Path
    second: Path
    untrained: Path


@pytest.fixture(scope="module")
def line(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("register")
    source = write_files(folder / "source", idx_files(3000, 1000))
    storage = Storage(str(folder / "storage"))
    manifest = ingest(storage, str(source))
    splits = read_splits(storage, manifest, ["train", "val", "test"])
    examples = {
        name: Examples(
            images_NHWC=torch.from_numpy(split.images_NHWC),
            labels_N=torch.from_numpy(split.labels_N),
        )
        for name, split in splits.items()
    }
    files = {}
    for name, epochs, width in (("best", 3, 12), ("second", 3, 8), ("untrained", 0, 8)):
        model_config = ModelConfig.from_manifest(manifest, stage_width=width, depth=1)
        train_config = TrainConfig(rungs=(max(1, epochs),), batch_size=64)
        trainer = Trainer(model_config, train_config, train=examples["train"], val=examples["val"])
        for _ in range(epochs):
            trainer.run_epoch()
        files[name] = folder / name / "model.pt"
        files[name].parent.mkdir()
        content = {
            "model": trainer.net.state_dict(),
            "model_config": asdict(model_config),
            "train_config": asdict(train_config),
            "epoch": epochs,
        }
        torch.save(content, files[name])
    return Line(storage=storage, manifest=manifest, test=splits["test"], **files)


@pytest.fixture
def settings(line: Line, mlflow_server: str) -> Settings:
    """Every test has a registered model of its own on the shared server."""
    return Settings(
        storage=line.storage.uri, mlflow_uri=mlflow_server, model=f"digits-{uuid.uuid4().hex[:8]}"
    )


@pytest.fixture
def client(settings: Settings) -> MlflowClient:
    return MlflowClient(settings.mlflow_uri)


def make_sweep(
    client: MlflowClient, line: Line, trials: Sequence[tuple[Path, float]], digest: str = ""
) -> tuple[str, list[str]]:
    """Write a sweep as jobs.tune does; return its run and its trials' runs."""
    experiment = client.create_experiment(f"sweep-{uuid.uuid4().hex}")
    tags = {
        "rayline.kind": "sweep",
        "rayline.data_digest": digest or line.manifest.digest,
        "rayline.git_commit": "c0ffee" * 6 + "abcd",
    }
    sweep = client.create_run(experiment, tags=tags).info.run_id
    runs = []
    for checkpoint, val_accuracy in trials:
        run = client.create_run(
            experiment, tags={"rayline.kind": "trial", "mlflow.parentRunId": sweep}
        ).info.run_id
        client.log_metric(run, "val_accuracy", val_accuracy)
        client.log_artifact(run, str(checkpoint), "checkpoint")
        client.set_terminated(run)
        runs.append(run)
    client.set_terminated(sweep)
    return sweep, runs


@dataclass(frozen=True, kw_only=True)
class Registered:
    """One sweep with two trials, registered once for all tests that only look."""

    settings: Settings
    client: MlflowClient
    sweep: str
    runs: list[str]
    versions: list[Version]


@pytest.fixture(scope="module")
def registered(line: Line, mlflow_server: str) -> Registered:
    settings = Settings(storage=line.storage.uri, mlflow_uri=mlflow_server, model="shared")
    client = MlflowClient(mlflow_server)
    sweep, (second, best) = make_sweep(client, line, [(line.second, 0.8), (line.best, 0.9)])
    found = register(settings, line.storage, line.manifest, sweep)
    return Registered(
        settings=settings, client=client, sweep=sweep, runs=[best, second], versions=found
    )


def numbers(versions: Sequence[Version]) -> list[tuple[int, tuple[str, ...]]]:
    return [(version.version, version.aliases) for version in versions]


def logged_models(client: MlflowClient, run_id: str) -> list[Any]:
    experiment = client.get_run(run_id).info.experiment_id
    return list(
        client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    )


def test_best_trials_become_versions_with_all_that_is_known_of_them(
    line: Line, registered: Registered
) -> None:
    settings, client = registered.settings, registered.client
    assert numbers(registered.versions) == [(1, ("champion",)), (2, ("challenger",))]
    assert [version.run_id for version in registered.versions] == registered.runs
    assert versions(settings) == registered.versions
    best = registered.versions[0]
    assert best.data_digest == line.manifest.digest
    assert best.git_commit == "c0ffee" * 6 + "abcd"
    assert best.val_test_gap == pytest.approx(best.val_accuracy - best.test_accuracy)
    assert set(best.per_class_accuracy) == set(line.manifest.class_names)

    # The numbers are those of the model that is in the registry, not only of the one in memory.
    labels = predicted(load_predictor(line.storage, best.bundle, card(line, best)), line.test)
    hits = labels == line.test.labels_N
    assert best.test_accuracy == pytest.approx(hits.mean())
    assert best.per_class_accuracy["7"] == pytest.approx(hits[line.test.labels_N == 7].mean())
    assert card(line, best).test_accuracy == best.test_accuracy
    assert card(line, best).version == 1
    assert card(line, best).runtime == best.runtime
    assert min(best.images_per_s["onnxruntime"].values()) > 0

    run = client.get_run(best.run_id)
    assert run.data.metrics["test_accuracy"] == best.test_accuracy
    assert run.data.metrics["test_accuracy_class/7"] == best.per_class_accuracy["7"]
    assert run.info.status == "FINISHED"
    evaluation = json.loads(
        Path(
            mlflow.artifacts.download_artifacts(
                run_id=best.run_id,
                artifact_path="evaluation.json",
                tracking_uri=settings.mlflow_uri,
            )
        ).read_text()
    )
    confusion = np.array(evaluation["confusion"])
    assert confusion.sum() == 1000
    assert np.trace(confusion) == hits.sum()
    (logged,) = logged_models(client, best.run_id)
    ranked = client.search_logged_models(
        [run.info.experiment_id],
        order_by=[
            {
                "field_name": "metrics.test_accuracy",
                "ascending": False,
                "dataset_name": "source",
                "dataset_digest": line.manifest.digest,
            }
        ],
    )
    assert [model.source_run_id for model in ranked] == [
        version.run_id
        for version in sorted(registered.versions, key=lambda version: -version.test_accuracy)
    ]
    assert {metric.key: metric.value for metric in logged.metrics}["test_accuracy"] == (
        best.test_accuracy
    )


def card(line: Line, version: Version) -> Any:
    return read_card(line.storage, version.bundle)


def predicted(predictor: Any, split: Split) -> Any:
    return predictor.predict(split.images_NHWC).argmax(axis=1)


def test_a_version_is_whole_without_the_project_and_equal_in_every_form(
    line: Line, registered: Registered, tmp_path: Path
) -> None:
    settings, version = registered.settings, registered.versions[0]
    np.save(tmp_path / "images.npy", line.test.images_NHWC)
    script = (
        "import numpy, mlflow, sys\n"
        "try:\n    import lib\n    sys.exit('the project must not be importable here')\n"
        "except ImportError:\n    pass\n"
        f"model = mlflow.pyfunc.load_model('models:/{settings.model}/1')\n"
        "images = numpy.load('images.npy')\n"
        "assert model.predict(images[:1]).shape == (1, 10)\n"
        "numpy.save('probabilities.npy', model.predict(images))\n"
    )
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "MLFLOW_TRACKING_URI": settings.mlflow_uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    pyfunc = np.load(tmp_path / "probabilities.npy")
    pt2 = TorchPredictor(Path(line.storage.path(f"{version.bundle}/{PT2_FILE}")))
    onnx = load_predictor(line.storage, version.bundle, card(line, version))
    assert pyfunc.dtype == np.float32
    for predictor in (pt2, onnx):
        probabilities = predictor.predict(line.test.images_NHWC)
        assert np.array_equal(probabilities.argmax(axis=1), pyfunc.argmax(axis=1))
        assert np.allclose(probabilities, pyfunc, atol=1e-5)
    assert 0 <= version.onnx_max_difference < 1e-4


def test_the_registry_says_what_a_version_is_and_onnx_and_class_names_travel_with_it(
    line: Line, registered: Registered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, version, client = registered.settings, registered.versions[0], registered.client
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_uri)
    about = client.get_model_version(settings.model, "1").description
    for words in (line.manifest.digest, f"{version.test_accuracy:.4f}", "1,000 test", "curl"):
        assert words in about
    assert client.get_run(version.run_id).data.tags["mlflow.note.content"] == about
    assert "10 classes: 0, 1" in client.get_registered_model(settings.model).description

    uri = f"models:/{settings.model}/1"
    folder = fetch(settings, "1", tmp_path / "m")["folder"]
    assert version.sweep_run_id in (tmp_path / "m" / "README.md").read_text()
    expected = load_predictor(line.storage, version.bundle, card(line, version))
    images = line.test.images_NHWC[:3]
    for place in (uri, folder):
        graph = mlflow.onnx.load_model(place)
        (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
        found = OnnxPredictor(tmp_path / "model.onnx").predict(images)
        assert np.array_equal(found.argmax(axis=1), expected.predict(images).argmax(axis=1))
    model = mlflow.pyfunc.load_model(folder)
    assert model.metadata.metadata["class_names"] == list(line.manifest.class_names)
    assert [output.name for output in model.metadata.signature.outputs] == ["probabilities"]
    assert model.predict(images).shape == (3, 10)


def test_splits_that_do_not_fit_in_memory_are_measured_from_their_shards(
    line: Line, registered: Registered, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "IN_MEMORY_BYTES", 1000)
    monkeypatch.delattr("lib.registry.publish.read_splits")
    sweep, _ = make_sweep(registered.client, line, [(line.best, 0.9)])
    (version,) = register(settings, line.storage, line.manifest, sweep, 1)
    held = registered.versions[0]
    assert version.val_accuracy == held.val_accuracy
    assert version.test_accuracy == held.test_accuracy
    assert version.per_class_accuracy == held.per_class_accuracy


def test_registering_again_repeats_nothing_and_leaves_aliases_alone(
    line: Line, registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, client = registered.settings, registered.client
    client.set_registered_model_alias(settings.model, "champion", "2")
    client.delete_registered_model_alias(settings.model, "challenger")
    try:
        again = register(settings, line.storage, line.manifest, registered.sweep)

        assert numbers(again) == [(1, ()), (2, ("champion",))]
        assert numbers(versions(settings)) == [(1, ()), (2, ("champion",))]
        assert [len(logged_models(client, run)) for run in registered.runs] == [1, 1]
        assert "exported" not in capsys.readouterr().out
    finally:
        client.set_registered_model_alias(settings.model, "champion", "1")
        client.set_registered_model_alias(settings.model, "challenger", "2")


def test_a_later_sweep_only_sets_the_challenger(
    line: Line, settings: Settings, client: MlflowClient
) -> None:
    first, _ = make_sweep(client, line, [(line.second, 0.8)])
    register(settings, line.storage, line.manifest, first, num_versions=1)
    later, _ = make_sweep(client, line, [(line.best, 0.9)])

    found = register(settings, line.storage, line.manifest, later, num_versions=1)

    assert numbers(found) == [(2, ("challenger",))]
    assert resolve(settings, settings.model, "champion").version == 1


def test_a_trial_far_below_logistic_regression_is_refused(
    line: Line, settings: Settings, client: MlflowClient
) -> None:
    sweep, (run,) = make_sweep(client, line, [(line.untrained, 0.99)])

    with pytest.raises(RefusedError, match="logistic regression") as refused:
        register(settings, line.storage, line.manifest, sweep)

    baseline = line.storage.read_json(baseline_path(line.manifest.digest))
    assert 0.8 < baseline["val_accuracy"] < 0.95
    assert f"{baseline['val_accuracy']:.4f}" in str(refused.value)
    assert "jobs.tune" in str(refused.value)
    assert versions(settings) == []
    assert logged_models(client, run) == []


def test_a_refused_runner_up_does_not_stop_the_best(
    line: Line, settings: Settings, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, (_, bad) = make_sweep(client, line, [(line.best, 0.99), (line.untrained, 0.98)])

    registered = register(settings, line.storage, line.manifest, sweep)

    assert numbers(registered) == [(1, ("champion",))]
    assert f"left out: trial {bad} is refused" in capsys.readouterr().out


class Died(BaseException):
    """Stands for the end of the process at a call: nothing of ours may handle it."""


@pytest.mark.parametrize(
    ("method", "nth"),
    [
        ("create_model_version", 1),
        ("create_model_version", 2),
        ("set_registered_model_alias", 2),
    ],
)
def test_an_interrupted_registration_goes_on_where_it_stopped(
    line: Line,
    settings: Settings,
    client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    nth: int,
) -> None:
    sweep, runs = make_sweep(client, line, [(line.best, 0.9), (line.second, 0.8)])
    calls: list[Any] = []
    real: Callable[..., Any] = getattr(MlflowClient, method)

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise Died
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, dies)
        with pytest.raises(Died):
            register(settings, line.storage, line.manifest, sweep)
    # What is young could be another registration's, which goes on.
    monkeypatch.setattr(publish, "GRACE_S", 0.0)
    before = versions(settings)
    assert not any(version.ready for version in before)

    registered = register(settings, line.storage, line.manifest, sweep)

    assert numbers(registered) == [(1, ("champion",)), (2, ("challenger",))]
    assert [version.run_id for version in registered] == runs
    assert all(version.ready for version in versions(settings))
    assert [version.created_ms for version in registered][: len(before)] == [
        version.created_ms for version in before
    ]
    assert [len(logged_models(client, run)) for run in runs] == [1, 1]
    for version in registered:
        assert card(line, version).version == version.version


def test_one_finished_trial_gives_one_version_and_says_so(
    line: Line, settings: Settings, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, runs = make_sweep(client, line, [(line.best, 0.9), (line.second, 0.95)])
    client.set_terminated(runs[1], "FAILED")

    registered = register(settings, line.storage, line.manifest, sweep)

    assert numbers(registered) == [(1, ("champion",))]
    assert registered[0].run_id == runs[0]
    assert "only 1 trial" in capsys.readouterr().out


def test_a_lost_bundle_is_made_again_from_mlflow(line: Line, registered: Registered) -> None:
    settings, version = registered.settings, registered.versions[0]
    files = {path: line.storage.read(path) for path in line.storage.list(version.bundle)}
    assert len(files) == 3
    shutil.rmtree(line.storage.path(version.bundle))

    assert ensure_bundle(settings, line.storage, version) == version.bundle

    assert {path: line.storage.read(path) for path in line.storage.list(version.bundle)} == files


def test_what_does_not_exist_is_named_with_what_does(
    line: Line, settings: Settings, client: MlflowClient, registered: Registered
) -> None:
    with pytest.raises(RegistryError, match="it has none: run jobs.tune"):
        resolve(settings, settings.model, "champion")
    with pytest.raises(RegistryError, match="no sweep '0123'"):
        register(settings, line.storage, line.manifest, "0123")
    other, _ = make_sweep(client, line, [(line.best, 0.9)], digest="f" * 32)
    with pytest.raises(RegistryError, match="trained on data set ffff"):
        register(settings, line.storage, line.manifest, other)
    empty, _ = make_sweep(client, line, [])
    with pytest.raises(RegistryError, match="no finished trial"):
        register(settings, line.storage, line.manifest, empty)
    with pytest.raises(RegistryError, match="no sweep"):
        register(settings, line.storage, line.manifest, registered.runs[0])
    known = registered.settings
    with pytest.raises(RegistryError, match=r"'7'; it has 1 \(champion\), 2 \(challenger\)"):
        resolve(known, known.model, "7")
    assert resolve(known, known.model, "2") == resolve(known, known.model, "challenger")


def test_a_server_that_is_away_is_said_at_once(line: Line) -> None:
    away = Settings(storage=line.storage.uri, mlflow_uri="http://127.0.0.1:1")
    with pytest.raises(RegistryError, match="make up"):
        register(away, line.storage, line.manifest, "0123")


@pytest.fixture(scope="module")
def exports(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Exported]]:
    folder = tmp_path_factory.mktemp("exports")
    return [
        export(load_served(file, line.manifest), line.test.images_NHWC[:2], folder / name, "run")
        for name, file in (("best", line.best), ("second", line.second))
    ]


def test_exports_with_different_labels_are_refused(line: Line, exports: list[Exported]) -> None:
    best, second = exports
    batches = [Batch(images_NHWC=line.test.images_NHWC, labels_N=line.test.labels_N)]
    check_equal(best, batches, "run")
    shutil.copy(second.onnx_file, best.folder / ONNX_FILE)

    with pytest.raises(RefusedError, match="different labels for [1-9]"):
        check_equal(best, batches, "run")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("damage", ["truncated", "pickled code", "other shape"])
def test_an_unusable_checkpoint_is_refused(line: Line, tmp_path: Path, damage: str) -> None:
    file, manifest = tmp_path / "model.pt", line.manifest
    if damage == "truncated":
        file.write_bytes(line.best.read_bytes()[:-500])
    elif damage == "pickled code":
        torch.save({"model": Touch(tmp_path / "ran"), "model_config": {}}, file)
    else:
        shutil.copy(line.best, file)
        manifest = Manifest.from_json({**line.manifest.to_json(), "height": 32})
    with pytest.raises(RegistryError, match="checkpoint"):
        load_served(file, manifest)
    assert not (tmp_path / "ran").exists()


def test_the_job_returns_the_versions_as_its_last_line(
    registered: Registered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAYLINE_STORAGE", registered.settings.storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.settings.mlflow_uri)
    monkeypatch.setenv("RAYLINE_MODEL", registered.settings.model)
    monkeypatch.setattr(sys, "argv", ["register", "--sweep", registered.sweep])

    with pytest.raises(SystemExit) as ended:
        jobs.register.main()

    assert ended.value.code == 0
    best, second = json.loads(capsys.readouterr().out.splitlines()[-1])["versions"]
    assert (best["version"], second["version"]) == (1, 2)
    assert best["name"] == "shared"
    assert best["aliases"] == ["champion"]
    assert best["test_accuracy"] == registered.versions[0].test_accuracy > 0.8
    assert best["gap"] == best["val_accuracy"] - best["test_accuracy"]
    assert best["bundle"] == registered.versions[0].bundle
    assert best["runtime"] in ("onnxruntime", "torch")
