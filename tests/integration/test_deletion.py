"""Deleting sweeps and the checkpoints of trials, on a real MLflow server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lib.config import Settings
from lib.errors import RefusedError, RegistryError
from lib.registry.deletion import delete_sweep, versions_of
from lib.registry.garbage import collect
from lib.storage import Storage
from lib.train.journal import Journal

DIGEST = "5e1f" * 8
Sweep = tuple[str, list[str]]


@pytest.fixture
def settings(storage: Storage, mlflow_server: str) -> Settings:
    return Settings(storage=storage.uri, mlflow_uri=mlflow_server, ray_address="http://127.0.0.1:1")


@pytest.fixture
def client(settings: Settings) -> MlflowClient:
    return MlflowClient(settings.mlflow_uri)


@pytest.fixture
def sweep(
    client: MlflowClient, storage: Storage, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., Sweep]:
    """Make a sweep of finished trials with these accuracies and a file for a checkpoint."""
    experiment = client.create_experiment(f"rayline/{request.function.__name__}")
    (tmp_path / "model.pt").write_bytes(b"weights")

    def make(*accuracies: float) -> Sweep:
        tags = {"rayline.data_digest": DIGEST}
        parent = client.create_run(experiment, tags={**tags, "rayline.kind": "sweep"}).info.run_id
        tags |= {"rayline.kind": "trial", "mlflow.parentRunId": parent}
        trials = []
        for accuracy in accuracies:
            run = client.create_run(experiment, tags=tags).info.run_id
            client.log_metric(run, "val_accuracy", accuracy)
            client.log_artifact(run, str(tmp_path / "model.pt"), "checkpoint")
            client.set_terminated(run)
            trials.append(run)
        client.set_terminated(parent)
        storage.write_json(f"sweeps/{parent}/sweep.json", {"work": {"data_digest": DIGEST}})
        with Journal(storage, f"sweeps/{parent}") as journal:
            journal.append({"event": "closed"})
        return parent, trials

    return make


def has_checkpoint(client: MlflowClient, run_id: str) -> bool:
    return bool(client.list_artifacts(run_id, "checkpoint"))


def make_version(client: MlflowClient, run_id: str, name: str) -> None:
    client.create_registered_model(name)
    client.create_model_version(
        name, f"runs:/{run_id}/checkpoint", run_id=run_id, tags={"rayline.data_digest": DIGEST}
    )


def test_a_sweep_goes_with_its_runs_files_and_state(
    settings: Settings, storage: Storage, client: MlflowClient, sweep: Callable[..., Sweep]
) -> None:
    (gone, trials), (kept, others) = sweep(0.7, 0.8), sweep(0.9)
    for run_id in (gone, kept):
        storage.write_json(f"steps/tune/{run_id}.json", {"result": {"sweep_run_id": run_id}})
    shown = delete_sweep(settings, storage, gone, remove=False)
    assert (shown["runs"], shown["deleted"]) == (3, False)
    assert all(has_checkpoint(client, run) for run in trials)

    assert delete_sweep(settings, storage, gone, remove=True)["deleted"]
    for run in (gone, *trials):
        assert client.get_run(run).info.lifecycle_stage == "deleted"
        assert client.list_artifacts(run) == []
    assert storage.list("", recursive=True) == [
        f"steps/tune/{kept}.json",
        f"sweeps/{kept}/journal.jsonl",
        f"sweeps/{kept}/sweep.json",
    ]
    assert has_checkpoint(client, others[0])
    with pytest.raises(RegistryError, match="no sweep"):
        delete_sweep(settings, storage, "nonsense", remove=True)


def test_a_sweep_that_runs_or_has_a_version_stays(
    settings: Settings, storage: Storage, client: MlflowClient, sweep: Callable[..., Sweep]
) -> None:
    run_id, trials = sweep(0.7, 0.8)
    with (
        Journal(storage, f"sweeps/{run_id}"),
        pytest.raises(RefusedError, match="is running"),
    ):
        delete_sweep(settings, storage, run_id, remove=True)
    make_version(client, trials[1], "of-a-sweep")
    with pytest.raises(RefusedError, match="1 of of-a-sweep"):
        delete_sweep(settings, storage, run_id, remove=True)
    assert "1 of of-a-sweep" in versions_of(settings, {DIGEST})
    assert all(has_checkpoint(client, run) for run in trials)


def test_gc_keeps_the_checkpoints_of_the_best_trials_and_of_versions(
    settings: Settings, storage: Storage, client: MlflowClient, sweep: Callable[..., Sweep]
) -> None:
    _, (third, best, version, second) = sweep(0.7, 0.9, 0.6, 0.8)
    make_version(client, version, "kept-by-gc")
    listed = collect(settings, storage, remove=False, keep_trials=2)
    mine = {third, best, version, second}
    (surplus,) = [found for found in listed["garbage"] if found["what"] in mine]
    assert surplus["what"] == third
    assert surplus["why"] == "not of the 2 best trials of its sweep, and no version"
    assert not mine & {g["what"] for g in collect(settings, storage, remove=False)["garbage"]}
    removed = collect(settings, storage, remove=True, keep_trials=2)
    assert removed["failed"] == []
    assert [has_checkpoint(client, run) for run in (best, second, third, version)] == [
        True, True, False, True,
    ]  # fmt: skip
    again = collect(settings, storage, remove=False, keep_trials=2)
    assert not mine & {found["what"] for found in again["garbage"]}
    assert client.get_run(third).data.metrics["val_accuracy"] == 0.7
