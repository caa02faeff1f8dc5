"""jobs/models against a real MLflow server, with real versions of a small noisy data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import jobs.models
from lib.config import Settings
from lib.data.loader import Split
from lib.data.manifest import Manifest, Preprocess, manifest_path
from lib.errors import RefusedError, RegistryError
from lib.registry import publish
from lib.registry.backup import backup
from lib.registry.baseline import Baseline
from lib.registry.fetch import fetch
from lib.registry.garbage import collect
from lib.registry.inspection import ORIGINAL_RUN_TAG, describe, difference
from lib.registry.leaderboard import best, leaderboard
from lib.registry.models import logged_model_id, resolve, versions
from lib.registry.registration import register
from lib.registry.removal import artifact_bytes, delete
from lib.registry.restore import restore
from lib.registry.runtime import Measured
from lib.serving import policy
from lib.serving.bundle import read_card
from lib.serving.predictor import OnnxPredictor, load_predictor
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.train.loop import Examples, TrainConfig, Trainer
from lib.train.model import ModelConfig

MODEL = "shelf"
COMMIT = "c0ffee" * 6 + "abcd"


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Versions 1, 2 and 4, something else's version 3, and a trial that learned validation."""

    settings: Settings
    storage: Storage
    client: MlflowClient
    manifest: Manifest
    test: Split
    sweep: str
    trials: list[str]
    """Of the first sweep: versions 1 and 2, a finished one and a failed one without version."""
    leaky_sweep: str
    leaky_trial: str


def noisy(random: np.random.Generator, rows: int) -> tuple[Any, Any]:
    """Images whose class shows in one of three bands; a quarter of the labels are wrong."""
    truth = random.integers(0, 3, rows)
    images = random.integers(0, 120, (rows, 12, 12), dtype=np.uint8)
    for label in range(3):
        images[truth == label, 4 * label : 4 * label + 4] += 100
    wrong = random.random(rows) < 0.25
    labels = np.where(wrong, (truth + random.integers(1, 3, rows)) % 3, truth)
    return images, labels


def split(random: np.random.Generator, rows: int) -> Split:
    images, labels = noisy(random, rows)
    return Split(images_NHWC=images[..., None], labels_N=labels)


def manifest_of(splits: Mapping[str, Split]) -> Manifest:
    pixels = splits["train"].images_NHWC / 255
    return Manifest(
        digest="5e1f" * 8,
        source="noisy",
        source_digests={},
        height=12,
        width=12,
        channels=1,
        class_names=("top", "middle", "bottom"),
        counts={name: tuple(np.bincount(s.labels_N).tolist()) for name, s in splits.items()},
        split_digests={},
        pixel_mean=(float(pixels.mean()),),
        pixel_std=(float(pixels.std()),),
        preprocess=Preprocess(mode="L", fill=(0,)),
        shards=(),
        seed=0,
    )


@pytest.fixture(scope="module")
def shelf(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    """Registered for real but for what needs Ray: data are in memory, runtimes not compared."""
    with pytest.MonkeyPatch.context() as patch:
        yield filled_shelf(mlflow_server, tmp_path_factory.mktemp("shelf"), patch)


def filled_shelf(mlflow_server: str, folder: Path, patch: pytest.MonkeyPatch) -> Shelf:
    random = np.random.default_rng(0)
    sizes = {"train": 900, "val": 300, "test": 600}
    splits = {name: split(random, rows) for name, rows in sizes.items()}
    manifest = manifest_of(splits)
    storage = Storage(str(folder / "storage"))
    storage.write_json(manifest_path(manifest.digest), manifest.to_json())
    patch.setattr(publish, "read_splits", lambda *_: splits)
    baseline = Baseline(val_accuracy=0.6, train_rows=900, seconds=1.0)
    patch.setattr(publish, "ensure_baseline", lambda *_: baseline)

    def speed(images_per_s: float) -> None:
        rates = {"onnxruntime": {1: 900.0, 128: images_per_s}, "torch": {1: 100.0, 128: 200.0}}
        measured = Measured(device="cpu", images_per_s=rates, labels_agree=True)
        patch.setattr(publish, "measure_where_served", lambda *_: measured)

    examples = {
        name: Examples(
            images_NHWC=torch.from_numpy(found.images_NHWC),
            labels_N=torch.from_numpy(found.labels_N),
        )
        for name, found in splits.items()
    }

    def checkpoint(name: str, width: int, epochs: int, learned: str = "train") -> Path:
        model = ModelConfig.from_manifest(manifest, stage_width=width, depth=1)
        config = TrainConfig(rungs=(epochs,), batch_size=32, label_smoothing=0.0, weight_decay=0.0)
        config = replace(config, augmentation=replace(config.augmentation, strength=0.0))
        trainer = Trainer(model, config, train=examples[learned], val=examples["val"])
        for _ in range(epochs):
            trainer.run_epoch()
        file = folder / name / "model.pt"
        file.parent.mkdir()
        torch.save({"model": trainer.net.state_dict(), "model_config": asdict(model)}, file)
        return file

    settings = Settings(
        storage=storage.uri, mlflow_uri=mlflow_server, model=MODEL, ray_address="http://127.0.0.1:1"
    )
    client = MlflowClient(mlflow_server)
    experiment = client.create_experiment(f"rayline/{MODEL}")

    def sweep(*trials: tuple[Path, float, str], width: int = 6) -> tuple[str, list[str]]:
        tags = {
            "rayline.data_digest": manifest.digest,
            "rayline.git_commit": COMMIT,
            "rayline.package.torch": "2.14.1",
        }
        parent = client.create_run(experiment, tags={**tags, "rayline.kind": "sweep"}).info.run_id
        runs = []
        for file, val_accuracy, status in trials:
            tags |= {"rayline.kind": "trial", "mlflow.parentRunId": parent}
            run = client.create_run(experiment, tags=tags).info.run_id
            client.log_param(run, "stage_width", width)
            for epoch in (1, 2):
                client.log_metric(run, "val_accuracy", val_accuracy - 0.1 * (2 - epoch), step=epoch)
            client.log_artifact(run, str(file), "checkpoint")
            client.set_terminated(run, status)
            runs.append(run)
        client.set_terminated(parent)
        return parent, runs

    small, large = checkpoint("small", 6, 3), checkpoint("large", 8, 3)
    first, trials = sweep(
        (large, 0.75, "FINISHED"),
        (small, 0.74, "FINISHED"),
        (small, 0.73, "FINISHED"),
        (small, 0.10, "FAILED"),
    )
    speed(2_000.0)
    register(settings, storage, manifest, first)
    model_id = logged_model_id(client.get_model_version(MODEL, "1"))
    client.create_model_version(MODEL, f"models:/{model_id}", model_id=model_id)
    later, _ = sweep((small, 0.76, "FINISHED"), width=7)
    speed(2_100.0)
    register(settings, storage, manifest, later)
    bundles = {version.version: version.bundle for version in versions(settings)}
    traffic = ModelTraffic(
        weights={1: 90.0, 4: 10.0},
        bundles={number: bundles[number] for number in (1, 4)},
        champion=1,
        pins={"user-7": 4},
    )
    policy.commit(storage, None, {MODEL: traffic}, default_model=MODEL, who="me", why="test")
    leaky_sweep, (leaky,) = sweep((checkpoint("leaky", 24, 30, "val"), 0.99, "FINISHED"))
    return Shelf(
        settings=settings,
        storage=storage,
        client=client,
        manifest=manifest,
        test=splits["test"],
        sweep=first,
        trials=trials,
        leaky_sweep=leaky_sweep,
        leaky_trial=leaky,
    )


@pytest.fixture
def models(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Run `python -m jobs.models ...`; return what it printed before the JSON, and the JSON."""
    monkeypatch.setenv("RAYLINE_STORAGE", shelf.settings.storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shelf.settings.mlflow_uri)
    monkeypatch.setenv("RAYLINE_MODEL", MODEL)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", shelf.settings.ray_address)

    def call(*arguments: str, code: int = 0) -> tuple[str, dict[str, Any]]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            jobs.models.main(arguments)
        output = capsys.readouterr().out
        assert ended.value.code == code, output
        text, _, last = output.rstrip("\n").rpartition("\n")
        return text, json.loads(last)

    return call


def test_the_leaderboard_has_every_version_and_says_what_is_not_ours(
    shelf: Shelf, models: Any
) -> None:
    text, listed = models("list")
    known = {version.version: version for version in versions(shelf.settings)}
    entries = listed["entries"]
    assert {entry["version"] for entry in entries} == set(known) == {1, 2, 4}
    assert [(e["rank"], e["version"], e["score"]) for e in entries] == [
        (1, 4, 0.76),
        (2, 1, 0.75),
        (3, 2, 0.74),
    ]
    by_number = {entry["version"]: entry for entry in entries}
    assert by_number[1]["aliases"] == ["champion"]
    assert by_number[1]["served"] == "90 %"
    assert by_number[4]["served"] == "10 %, 1 pin"
    assert all(entry["gap_holds"] for entry in entries)
    assert [other["version"] for other in listed["foreign"]] == [3]
    assert "not listed: version 3" in text
    assert f"{100 * known[1].test_accuracy:.2f} %" in text

    _, with_trials = models("list", "--trials")
    assert with_trials["total"] == 5  # Of the failed trial and of version 3 there is no row.
    loose = [entry["run_id"] for entry in with_trials["entries"] if entry["version"] is None]
    assert sorted(loose) == sorted([shelf.trials[2], shelf.leaky_trial])
    only = models("list", "--json", "--top", "1", "--data", shelf.manifest.digest[:6])
    assert only[0] == ""
    assert len(only[1]["entries"]) == 1
    _, refused = models("list", "--data", "0000", code=1)
    assert shelf.manifest.digest[:12] in refused["message"]


def test_a_trial_of_any_rank_is_shown_and_becomes_a_version_when_it_is_fetched(
    shelf: Shelf, models: Any, tmp_path: Path
) -> None:
    aliases = dict(shelf.client.get_registered_model(MODEL).aliases)
    third = shelf.trials[2]
    text, shown = models("best", "--rank", "3", "--sweep", shelf.sweep)
    assert (shown["version"], shown["run_id"], shown["score"]) == (None, third, 0.73)
    assert "--fetch DIR registers it" in text
    # Over all sweeps on the data the later one and the one that learned validation come first.
    assert models("best", "--rank", "5")[1]["run_id"] == third

    text, found = models("best", "--rank", "5", "--fetch", str(tmp_path / "m"))

    try:
        version = resolve(shelf.settings, MODEL, str(found["version"]))
        assert (version.run_id, version.ready, found["rank"]) == (third, True, 5)
        assert f"trial {third}, of rank 5, is no version yet" in text
        assert shelf.client.get_registered_model(MODEL).aliases == aliases
        served = policy.current(shelf.storage)
        assert served is not None
        assert served.models[MODEL].weights == {1: 90.0, 4: 10.0}
        answers = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict(shelf.test.images_NHWC)
        hits = (answers.argmax(axis=1) == shelf.test.labels_N).mean()
        assert hits == pytest.approx(found["test_accuracy"])
        again = models("best", "--rank", "5", "--fetch", str(tmp_path / "again"))
        assert again[1]["version"] == found["version"]
        # Its sweep's registration still gives it what it gives versions.
        register(shelf.settings, shelf.storage, shelf.manifest, shelf.sweep, 3)
        challenger = shelf.client.get_registered_model(MODEL).aliases["challenger"]
        assert int(challenger) == found["version"]
    finally:
        if "challenger" in aliases:
            shelf.client.set_registered_model_alias(MODEL, "challenger", aliases["challenger"])
        else:
            shelf.client.delete_registered_model_alias(MODEL, "challenger")
        delete(shelf.settings, shelf.storage, str(found["version"]), remove=True)


def test_a_refusal_by_rank_names_rank_and_trial_and_a_rank_too_many_says_how_many(
    shelf: Shelf, models: Any, tmp_path: Path
) -> None:
    _, refused = models("best", "--fetch", str(tmp_path / "m"), code=3)
    assert refused["error"] == "RefusedError"
    assert f"rank 1, {shelf.leaky_trial}, is not made a version" in refused["message"]
    assert {version.version for version in versions(shelf.settings)} == {1, 2, 4}
    _, few = models("best", "--rank", "4", "--sweep", shelf.sweep, code=1)
    assert "3 finished trials" in few["message"]
    (tmp_path / "m" / "x").mkdir(parents=True)
    _, full = models("best", "--fetch", str(tmp_path / "m"), code=1)
    assert "not empty" in full["message"]


def test_which_was_third_best_and_can_i_have_it(shelf: Shelf, models: Any, tmp_path: Path) -> None:
    ranked = sorted(versions(shelf.settings), key=lambda v: (-v.test_accuracy, v.version))
    text, found = models("best", "--rank", "3", "--split", "test", "--fetch", str(tmp_path / "m"))
    assert found["version"] == ranked[2].version
    assert f"jobs.deploy promote {found['version']}" in text

    images = shelf.test.images_NHWC
    pyfunc = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict(images)
    onnx = OnnxPredictor(tmp_path / "m" / "model.onnx").predict(images)
    assert np.allclose(pyfunc, onnx, atol=1e-5)
    hits = (pyfunc.argmax(axis=1) == shelf.test.labels_N).mean()
    assert hits == pytest.approx(found["test_accuracy"])
    assert json.loads((tmp_path / "m" / "card.json").read_text())["version"] == found["version"]
    assert models("best")[1]["run_id"] == models("list", "--trials")[1]["entries"][0]["run_id"]

    _, refused = models("fetch", "1", str(tmp_path / "m"), code=1)
    assert "not empty" in refused["message"]
    few = models("best", "--rank", "4", "--split", "test", code=1)[1]
    assert "3 versions" in few["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_all_that_is_known_and_what_differs(shelf: Shelf, models: Any) -> None:
    text, shown = models("show", "champion")
    version = resolve(shelf.settings, MODEL, "champion")
    assert shown["version"] == 1
    assert shown["metrics"]["test_accuracy"] == version.test_accuracy
    assert shown["data"]["rows"]["test"] == 600
    assert shown["packages"] == {"torch": "2.14.1"}
    assert shown["served"] == {
        "now": "90 %",
        "pins": [],
        "bundle": version.bundle,
        "bundle_is_there": True,
    }
    for words in (version.run_id, COMMIT[:8], "in line", "champion", "stage_width 6"):
        assert words in text
    _, differs = models("diff", "1", "4")
    assert differs["parameters"] == {"stage_width": {"a": "6", "b": "7"}}
    assert differs["data"] == differs["code"] == differs["packages"] == {}
    change = resolve(shelf.settings, MODEL, "4").val_accuracy - version.val_accuracy
    # What is the same in both is not named.
    assert differs["metrics"].get("val_accuracy", {"change": 0.0})["change"] == pytest.approx(
        change
    )
    assert differs["metrics"]["images_per_s, batch 128"]["change"] == 100.0
    _, unknown = models("show", "17", code=1)
    assert "no version '17'" in unknown["message"]


def test_a_model_that_learned_validation_is_refused_and_the_way_back_is_named(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RefusedError, match="validation promised") as refused:
        register(shelf.settings, shelf.storage, shelf.manifest, shelf.leaky_sweep)

    assert "version 1, the champion, whose gap held, serves on" in str(refused.value)
    assert {version.version for version in versions(shelf.settings)} == {1, 2, 4}
    run = shelf.client.get_run(shelf.leaky_trial)
    assert run.data.tags["rayline.refused"] == str(refused.value)
    logged = shelf.client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{shelf.leaky_trial}'"
    )
    assert list(logged) == []


class Died(BaseException):
    """Stands for the end of the process at a call."""


def dying(monkeypatch: pytest.MonkeyPatch, method: str, nth: int) -> None:
    real: Callable[..., Any] = getattr(MlflowClient, method)
    calls: list[Any] = []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise Died
        return real(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, method, dies)


def comparable(listed: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**entry, "run_id": None} for entry in listed["entries"]]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An empty line of another kind: MLflow on SQLite without a server."""
    (tmp_path / "line").mkdir()
    monkeypatch.chdir(tmp_path / "line")  # Where MLflow without a server keeps its artifacts.
    uri = f"sqlite:///{tmp_path}/line/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # Its SQL store asks this one for models.
    return Settings(
        storage=str(tmp_path / "line" / "storage"),
        mlflow_uri=uri,
        model=MODEL,
    )


def test_a_backup_goes_into_an_empty_line_though_its_restore_was_cut_off(
    shelf: Shelf, empty: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = backup(shelf.settings, shelf.storage, tmp_path / "saved")
    assert saved["models"][MODEL] == [1, 2, 4]
    assert any("version 3" in note for note in saved["notes"])
    target = Storage(empty.storage)
    with monkeypatch.context() as patch:
        dying(patch, "finalize_logged_model", 2)
        with pytest.raises(Died):
            restore(empty, target, tmp_path / "saved")

    done = restore(empty, target, tmp_path / "saved")

    assert done["models"][MODEL] == [1, 2, 4]
    before = leaderboard(shelf.settings, shelf.storage)
    after = leaderboard(empty, target)
    assert comparable(after.to_json(9)) == comparable(before.to_json(9))
    assert after.foreign == ()
    old = {version.version: version for version in versions(shelf.settings)}
    client = MlflowClient(empty.mlflow_uri)
    served = policy.current(target)
    assert served is not None
    assert served.models[MODEL].weights == {1: 90.0, 4: 10.0}
    for version in versions(empty):
        run = client.get_run(version.run_id)
        assert run.data.tags[ORIGINAL_RUN_TAG] == old[version.version].run_id
        assert run.data.tags["mlflow.parentRunId"] == version.sweep_run_id
        assert [m.value for m in client.get_metric_history(version.run_id, "val_accuracy")] == [
            m.value
            for m in shelf.client.get_metric_history(old[version.version].run_id, "val_accuracy")
        ]
        model_id = logged_model_id(client.get_model_version(MODEL, str(version.version)))
        assert model_id
        logged = client.get_logged_model(model_id)
        measured = {metric.key: metric.value for metric in logged.metrics or []}
        assert measured["test_accuracy"] == version.test_accuracy
    for number, bundle in served.models[MODEL].bundles.items():
        version = resolve(empty, MODEL, str(number))
        card = read_card(target, bundle)
        assert (bundle, card.run_id) == (version.bundle, version.run_id)
        labels = load_predictor(target, bundle, card).predict(shelf.test.images_NHWC)
        assert (labels.argmax(axis=1) == shelf.test.labels_N).mean() == pytest.approx(
            version.test_accuracy
        )
    fetch(empty, "2", tmp_path / "two")
    assert mlflow.pyfunc.load_model(str(tmp_path / "two")).predict(
        shelf.test.images_NHWC[:3]
    ).shape == (3, 3)
    same = difference(describe(empty, target, "1"), describe(shelf.settings, shelf.storage, "1"))
    assert not any(same[part] for part in ("parameters", "metrics", "data", "code", "packages"))
    # Again, it finds all there; a line with another such model is not touched.
    assert restore(empty, target, tmp_path / "saved")["models"] == done["models"]
    with pytest.raises(RegistryError, match="has a model '.*' already"):
        restore(shelf.settings, shelf.storage, tmp_path / "saved")


def test_a_damaged_backup_is_refused_before_anything_is_written(
    shelf: Shelf, empty: Settings, tmp_path: Path
) -> None:
    backup(shelf.settings, shelf.storage, tmp_path / "saved")
    (tmp_path / "saved" / "models" / MODEL / "1" / "model.onnx").write_bytes(b"other")
    with pytest.raises(RegistryError, match=r"model\.onnx is missing or was changed"):
        restore(empty, Storage(empty.storage), tmp_path / "saved")
    assert versions(empty) == []
    with pytest.raises(RegistryError, match="is no backup"):
        restore(empty, Storage(empty.storage), tmp_path)


def test_what_serves_is_not_deleted_and_a_delete_that_was_cut_off_goes_on(
    shelf: Shelf, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = resolve(shelf.settings, MODEL, "2")
    for number, reason in (("1", "champion, serving (90 %)"), ("4", "serving (10 %)")):
        _, refused = models("delete", number, code=3)
        assert reason in refused["message"]
    _, planned = models("delete", "2")
    assert planned["deleted"] is False
    assert shelf.storage.list(version.bundle)
    model_id = logged_model_id(shelf.client.get_model_version(MODEL, "2"))
    assert model_id
    location = shelf.client.get_logged_model(model_id).artifact_location
    assert artifact_bytes(shelf.settings, location) > 0
    with monkeypatch.context() as patch:
        dying(patch, "delete_model_version", 1)
        with pytest.raises(Died):
            delete(shelf.settings, shelf.storage, "2", remove=True)
    assert not resolve(shelf.settings, MODEL, "2").ready

    assert delete(shelf.settings, shelf.storage, "2", remove=True)["deleted"] is True

    assert artifact_bytes(shelf.settings, location) == 0

    assert {found.version for found in versions(shelf.settings)} == {1, 4}
    assert shelf.storage.list(version.bundle) == []
    assert shelf.client.get_run(version.run_id).data.metrics["val_accuracy"] == 0.74
    with pytest.raises(RegistryError, match="no version '2'"):
        delete(shelf.settings, shelf.storage, "2", remove=True)


def test_garbage_is_listed_first_then_removed_and_nothing_else_is(shelf: Shelf) -> None:
    storage, client = shelf.storage, shelf.client
    experiment = client.get_run(shelf.sweep).info.experiment_id
    left = client.create_logged_model(experiment, "model", tags={"rayline.model": MODEL})
    storage.write(f"models/{MODEL}/9-deadbeef/model.onnx", b"x" * 1000)
    storage.write_json("steps/tune/0.json", {"result": {"sweep_run_id": "gone"}})
    storage.write_json("steps/tune/1.json", {"result": {"sweep_run_id": shelf.sweep}})
    storage.write("sweeps/0/trials/0/state", b"state")
    storage.write("sweeps/0/journal.jsonl", b"{}")
    storage.write("code/0.zip", b"code")
    Path(storage.path("traffic/.tmp-0-0.json")).write_bytes(b"half")
    expected = {
        ("logged model", left.model_id),
        ("checkpoint", shelf.trials[3]),
        ("bundle", f"models/{MODEL}/9-deadbeef"),
        ("step", "steps/tune/0.json"),
        ("sweep state", "sweeps/0/trials"),
        ("half-written", "traffic/.tmp-0-0.json"),
    }

    def found(content: Mapping[str, Any]) -> set[tuple[str, str]]:
        # Other tests use the same server.
        ours = {what for _, what in expected} | {run for run in shelf.trials}
        there = {(g["kind"], g["what"]) for g in content["garbage"]}
        return {thing for thing in there if thing[1] in ours or "/" in thing[1]}

    young = collect(shelf.settings, storage, remove=False)
    assert found(young) == set()
    files = storage.list("", recursive=True)
    listed = collect(shelf.settings, storage, remove=False, grace_s=0, tune_grace_s=0)
    assert found(listed) == expected
    assert any("code archives" in note for note in listed["notes"])
    assert storage.list("", recursive=True) == files

    removed = collect(shelf.settings, storage, remove=True, grace_s=0, tune_grace_s=0)

    assert removed["failed"] == []
    assert found(collect(shelf.settings, storage, remove=False, grace_s=0, tune_grace_s=0)) == set()
    gone = set(files) - set(storage.list("", recursive=True))
    assert gone == {
        f"models/{MODEL}/9-deadbeef/model.onnx",
        "steps/tune/0.json",
        "sweeps/0/trials/0/state",
    }
    assert not Path(storage.path("traffic/.tmp-0-0.json")).exists()
    assert client.list_artifacts(shelf.trials[3], "checkpoint") == []
    assert [file.path for file in client.list_artifacts(shelf.trials[2], "checkpoint")] == [
        "checkpoint/model.pt"
    ]
    entry = best(leaderboard(shelf.settings, storage, split="test"), 1)
    assert fetch(shelf.settings, str(entry.version), Path(storage.root).parent / "still")["onnx"]


def test_bundles_stay_when_mlflow_is_another_s(shelf: Shelf, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("models/elsewhere/1-0123abcd/model.onnx", b"x")
    content = collect(shelf.settings, storage, remove=True, grace_s=0, tune_grace_s=0)
    assert storage.exists("models/elsewhere/1-0123abcd/model.onnx")
    assert any("MLFLOW_TRACKING_URI" in note for note in content["notes"])


def test_a_server_that_is_away_is_said_at_once(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    _, said = models("list", code=5)
    assert "make up" in said["message"]
