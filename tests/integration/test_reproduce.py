"""A version trained again from its record: a real sweep, a real git repository, a real registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

import jobs.reproduce
from lib import provenance
from lib.config import Preset, Settings
from lib.data.ingest import ingest
from lib.data.loader import read_splits
from lib.data.manifest import load_manifest
from lib.errors import DataError, RefusedError, StorageError
from lib.registry import reproduce as module
from lib.registry.baseline import baseline_path
from lib.registry.models import Version
from lib.registry.registration import register
from lib.registry.reproduce import How, reproduce
from lib.registry.sweep_runs import code_path
from lib.registry.verdict import DIFFERS, IDENTICAL
from lib.storage import Storage
from lib.train.presets import preset_experiment
from lib.train.search import run_sweep
from lib.train.trial import Trial
from lib.train.work import image_work
from tests.data_sources import idx_files, write_files

PROJECT = Path(__file__).parents[2]
PRESET = Preset(name="tiny", num_trials=1, rungs=(2,), time_budget_s=120, widths=(8,), depths=(1,))
RETRAIN = "lib/train/retrain.py"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A champion whose sweep ran in a checkout with uncommitted changes."""

    settings: Settings
    storage: Storage
    version: Version
    checkout: Path


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project; its last commit trains wrongly, and the change that mends it is not committed.

    One module is not even tracked.
    """
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "mnist")
    shutil.copytree(PROJECT / "lib", root / "lib", ignore=ignored)
    right = (root / RETRAIN).read_text()
    peak = 'config["train_config"]'
    assert right.count(peak) == 1
    wrong = right.replace(peak, f'{{**{peak}, "learning_rate": 1e-6}}')
    (root / RETRAIN).write_text(wrong)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "all")
    mended = right.replace("import argparse\n", "import argparse\n\nimport lib.train.untracked\n")
    (root / RETRAIN).write_text(mended)
    (root / "lib/train/untracked.py").write_text(
        'import os\nprint("the untracked module", *sorted(os.environ), flush=True)\n'
    )
    return root


@pytest.fixture(scope="module")
def recorded(
    local_ray: None, mlflow_server: str, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    folder = tmp_path_factory.mktemp("reproduce")
    storage = Storage(str(folder / "storage"))
    manifest = ingest(storage, str(write_files(folder / "source", idx_files(1200, 300))))
    # These tests are not about the gate.
    storage.write_json(
        baseline_path(manifest.digest), {"val_accuracy": 0.0, "train_rows": 1, "seconds": 0.0}
    )
    settings = Settings(storage=storage.uri, mlflow_uri=mlflow_server, model="reproduced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(provenance.VARIABLE, provenance.collect(checkout).encode())
        experiment = preset_experiment(PRESET)
        work = image_work(storage, manifest, PRESET, experiment)
        sweep = run_sweep(settings, storage, experiment, work)
    version = register(settings, storage, manifest, sweep.sweep_run_id, num_versions=1)[0]
    return Recorded(settings=settings, storage=storage, version=version, checkout=checkout)


def again(recorded: Recorded, version: Version | None = None, **how: bool) -> Any:
    return reproduce(
        recorded.settings,
        recorded.storage,
        version or recorded.version,
        root=recorded.checkout,
        how=How(**how),
    )


def test_a_champion_of_a_changed_checkout_comes_out_identical(
    recorded: Recorded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    before = git(recorded.checkout, "status", "--porcelain")
    assert recorded.version.git_dirty

    found = again(recorded)

    assert found.verdict == IDENTICAL
    assert found.weights.differing == ()
    assert found.weights.tensors > 5
    assert found.val_accuracy == found.recorded_val_accuracy
    assert found.environment == {}
    assert found.conditions == ()
    assert (found.served.images, found.served.differing_labels) == (300, 0)
    assert found.served.test_accuracy == recorded.version.test_accuracy
    assert found.code.startswith(f"commit {recorded.version.git_commit[:12]}")
    printed = capsys.readouterr().out
    assert "the untracked module" in printed
    assert "PYTHONPATH" in printed
    for secret in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN_PATH"):
        assert secret not in printed
    assert f"epoch {found.epoch} of {found.epoch}: validation accuracy" in printed
    # The user's checkout is as it was.
    assert git(recorded.checkout, "status", "--porcelain") == before
    assert len(git(recorded.checkout, "worktree", "list").splitlines()) == 1


def test_other_code_gives_another_verdict_and_exit_code(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = replace(recorded.version, git_dirty=False)
    client = MlflowClient(recorded.settings.mlflow_uri)
    run = client.get_run(clean.run_id)
    for seed, status in (("1", "FINISHED"), ("2", "FAILED")):
        tags = {name: run.data.tags[name] for name in run.data.tags if name.startswith("rayline.")}
        other = client.create_run(run.info.experiment_id, tags={**tags, "rayline.seed": seed})
        client.log_batch(
            other.info.run_id,
            params=[Param(name, value) for name, value in run.data.params.items()],
            metrics=[Metric("val_accuracy", run.data.metrics["val_accuracy"] - 0.04, 0, 0)],
        )
        client.set_terminated(other.info.run_id, status)
    monkeypatch.setattr(module, "_PAGE", 1)
    monkeypatch.setenv("RAYLINE_STORAGE", recorded.storage.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorded.settings.mlflow_uri)
    monkeypatch.setattr("lib.line.layout.PROJECT_ROOT", recorded.checkout)
    monkeypatch.setattr("lib.registry.models.resolve", lambda *_: clean)
    monkeypatch.setattr(sys, "argv", ["reproduce", "champion"])

    with pytest.raises(SystemExit) as ended:
        jobs.reproduce.main()

    assert ended.value.code == 3
    printed = capsys.readouterr().out.splitlines()
    verdict = json.loads(printed[-1])
    assert verdict["verdict"] == DIFFERS
    assert "head.weight" in verdict["weights"]["differing"]
    assert verdict["val_accuracy"] < verdict["recorded_val_accuracy"] - verdict["noise"]["limit"]
    assert "nothing that was recorded differs" in printed[-2]
    # Of the trials with the same configuration and another seed, the one that finished counts.
    assert verdict["noise"]["seeds"] == 2
    assert verdict["noise"]["seed_deviation"] == pytest.approx(0.04 / 2**0.5)
    assert verdict["noise"]["limit"] >= 2 * verdict["noise"]["seed_deviation"]


def test_what_is_not_on_record_is_refused_with_the_way_out(
    recorded: Recorded, tmp_path: Path
) -> None:
    version = recorded.version
    with pytest.raises(RefusedError, match="no commit was recorded .*--this-code"):
        again(recorded, replace(version, git_commit=None))
    with pytest.raises(RefusedError, match=r"c0ffee.* is not in the checkout .*git fetch"):
        again(recorded, replace(version, git_commit="c0ffee" * 6 + "abcd", git_dirty=False))
    with pytest.raises(RefusedError, match="too many to record"):
        again(recorded, replace(version, sweep_run_id=version.run_id))
    with pytest.raises(RefusedError, match="no git checkout"):
        reproduce(recorded.settings, recorded.storage, version, root=tmp_path, how=How())


def test_weights_of_another_trial_are_no_result_of_a_configuration(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(recorded.storage, recorded.version.data_digest)
    splits = read_splits(recorded.storage, manifest, ["train", "val"])
    trial = Trial.__new__(Trial)
    trial.prepare(storage=recorded.storage, manifest=manifest, splits=splits, rungs=(2,))
    params = {"stage_width": 8, "depth": 1, "growth": 4, "augmentation": 0.5}
    params |= {"weight_decay": 5e-4, "label_smoothing": 0.1}

    def kept(name: str, learning_rate: float, start: bytes | None) -> tuple[Path, bytes]:
        trial.begin({**params, "learning_rate": learning_rate})
        if start:
            trial.load(start)
        file = tmp_path / f"{name}.pt"
        file.write_bytes(trial.artifacts(True)["model.pt"])
        return file, trial.state()

    own, own_state = kept("own", 0.1, None)
    resumed, _ = kept("resumed", 0.1, own_state)
    child, child_state = kept("child", 0.2, own_state)
    grandchild, _ = kept("grandchild", 0.2, child_state)
    files = [own, resumed, child, grandchild]
    inherited = [torch.load(file, weights_only=True)["inherited"] for file in files]
    assert inherited == [False, False, True, True]

    monkeypatch.setattr(module, "download", lambda *_: files[2])
    with pytest.raises(RefusedError, match="population-based training"):
        again(recorded)


def test_a_changed_pixel_is_found_before_anything_is_trained(recorded: Recorded) -> None:
    path = next(path for path in recorded.storage.list("data/shards"))
    content = recorded.storage.read(path)
    recorded.storage.write(path, content[:-200] + b"\0" + content[-199:])
    try:
        with pytest.raises(DataError, match=f"{path} at .* is damaged"):
            again(recorded)
    finally:
        recorded.storage.write(path, content)
    manifest = f"data/sets/{recorded.version.data_digest}.json"
    before = recorded.storage.read_json(manifest)
    names = [*before["class_names"][1:], before["class_names"][0]]
    recorded.storage.write_json(manifest, {**before, "class_names": names})
    try:
        with pytest.raises(DataError, match="manifest of data set .* was changed"):
            again(recorded)
    finally:
        recorded.storage.write_json(manifest, before)


def test_another_torch_or_code_is_taken_only_when_asked_for(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(device: str) -> dict[str, Any]:
        return {**real(device), "torch": "1.0", "processor": "another"}

    real = module.describe
    monkeypatch.setattr(module, "describe", elsewhere)
    with pytest.raises(RefusedError, match=r"torch decides .* → 1.0.*--rebuild-env"):
        again(recorded)
    assert "environment: processor" in capsys.readouterr().out

    lost = replace(recorded.version, git_commit=None)
    how = How(this_code=True, this_env=True)
    found = reproduce(recorded.settings, recorded.storage, lost, root=PROJECT, how=how)

    assert found.verdict == IDENTICAL
    assert "instead of commit unknown" in found.code
    assert "this checkout's code" in found.conditions[0]
    assert "identical on condition: trained with this checkout's code" in found.describe()
    assert "the untracked module" not in capsys.readouterr().out


class Trains(Exception):
    """Raised where code would be run."""


def test_code_from_mlflow_runs_only_where_it_is_trusted(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def would_run(*_: Any) -> None:
        raise Trains

    monkeypatch.setattr(module, "_retrain", would_run)
    path = code_path(recorded.version.sweep_run_id)
    kept = recorded.storage.read_json(path)
    assert kept == {"diff_sha256": provenance.collect(recorded.checkout).diff_sha256}
    with pytest.raises(Trains):
        again(recorded)
    try:
        # As submitted, the changes were others, or none.
        for other in ("0" * 64, None):
            recorded.storage.write_json(path, {"diff_sha256": other})
            with pytest.raises(RefusedError, match="not those that were submitted"):
                again(recorded, trust_diff=True)
        recorded.storage.delete(path)
        with pytest.raises(RefusedError, match="in MLflow alone.*--trust-diff"):
            again(recorded)
        with pytest.raises(Trains):
            again(recorded, trust_diff=True)
    finally:
        recorded.storage.write_json(path, kept)


def test_another_file_that_serves_is_found(recorded: Recorded, tmp_path: Path) -> None:
    version, storage = recorded.version, recorded.storage
    bundle = version.bundle
    onnx = storage.read(f"{bundle}/model.onnx")
    storage.write(f"{bundle}/model.onnx", onnx + b"rot")
    try:
        with pytest.raises(StorageError, match=r"model\.onnx is not the file"):
            again(recorded)
    finally:
        storage.write(f"{bundle}/model.onnx", onnx)
    # One whose digest nobody registered shows by its labels.
    client = MlflowClient(recorded.settings.mlflow_uri)
    file = Path(client.download_artifacts(version.run_id, "checkpoint/model.pt", str(tmp_path)))
    content = torch.load(file, weights_only=True)
    content["model"]["head.weight"] *= -1
    (tmp_path / "home").mkdir()
    torch.save(content, tmp_path / "retrained.pt")
    manifest = load_manifest(storage, version.data_digest)
    served = Path(storage.path(f"{bundle}/model.onnx"))
    found = module._compare_served(storage, manifest, served, tmp_path, version)
    assert found.images == 300
    assert found.test_accuracy == version.test_accuracy
    assert found.differing_labels > 200
