"""Sweeps on a small real data set, with the real Tune and a real MLflow server."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run

from lib.config import PRESETS, Preset, Settings
from lib.data.ingest import ingest
from lib.data.loader import read_splits
from lib.data.manifest import Manifest
from lib.errors import RegistryError, SearchError
from lib.registry.sweep_runs import PACKAGES, start_sweep
from lib.registry.tracking import SweepRecord
from lib.registry.trials import CHECKPOINT_PATH, ranked_trials
from lib.storage import Storage
from lib.train.experiment import (
    DISCRETE,
    LATENCY_MS,
    MAXIMIZE,
    MINIMIZE,
    Experiment,
    Parameter,
)
from lib.train.model import ConvNet, ModelConfig
from lib.train.presets import first_guesses, preset_experiment, search_space
from lib.train.resources import trial_resources
from lib.train.search import SweepResult, run_sweep
from lib.train.work import image_work
from tests.data_sources import idx_files, write_files
from tests.sweeps import NUM_EPOCHS, tiny_experiment, tiny_work

pytestmark = pytest.mark.long

METRICS = ("train_loss", "val_loss", "val_accuracy", "lr", "images_per_s", "num_parameters")
PRESET = replace(PRESETS["smoke"], num_trials=3, rungs=(1, 3), time_budget_s=300)


@dataclass(frozen=True, kw_only=True)
class Data:
    storage: Storage
    manifest: Manifest


@pytest.fixture(scope="module")
def data(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("search")
    source = write_files(folder / "source", idx_files(3000, 500))
    storage = Storage(str(folder / "storage"))
    return Data(storage=storage, manifest=ingest(storage, str(source)))


@pytest.fixture
def settings(data: Data, mlflow_server: str) -> Settings:
    """Every test has an experiment of its own on the shared server."""
    return Settings(
        storage=data.storage.uri, mlflow_uri=mlflow_server, model=f"digits-{uuid.uuid4().hex[:8]}"
    )


@pytest.fixture
def client(settings: Settings) -> MlflowClient:
    return MlflowClient(settings.mlflow_uri)


def test_cores_that_have_just_come_free_are_used(local_ray: None) -> None:
    @ray.remote(num_cpus=1)
    def work() -> None: ...

    ray.get([work.remote() for _ in range(20)])
    assert trial_resources(0.0).num_parallel == 2


def sweep(
    data: Data, settings: Settings, preset: Preset, experiment: Experiment | None = None
) -> SweepResult:
    """Run a sweep of a preset, or of an experiment with that preset's rungs."""
    asked = experiment or preset_experiment(preset)
    work = image_work(data.storage, data.manifest, preset, asked)
    return run_sweep(settings, data.storage, asked, work)


def sweeps_and_trials(client: MlflowClient, settings: Settings) -> tuple[list[Run], list[Run]]:
    experiment = client.get_experiment_by_name(f"rayline/{settings.model}")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return (
        [run for run in runs if run.data.tags["rayline.kind"] == "sweep"],
        [run for run in runs if run.data.tags["rayline.kind"] == "trial"],
    )


def test_a_sweep_and_its_trials_are_recorded(
    data: Data, settings: Settings, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    result = sweep(data, settings, PRESET)
    (parent,), trials = sweeps_and_trials(client, settings)

    assert parent.info.run_id == result.sweep_run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["rayline.data_digest"] == data.manifest.digest
    assert parent.data.tags["rayline.preset"] == "smoke"
    assert parent.data.tags["rayline.record_complete"] == "true"
    assert parent.data.params["sampler"] == "tpe"
    assert parent.data.params["scheduler"] == "asha"
    assert parent.inputs.dataset_inputs[0].dataset.digest == data.manifest.digest
    assert parent.data.metrics["trials"] == 3
    assert parent.data.metrics["val_accuracy"] == pytest.approx(result.trials[0].value)

    assert len(trials) == len(result.trials) == 3
    assert "--sweep RUN_ID" in parent.data.tags["mlflow.note.content"]
    for run in trials:
        inputs = {i.tags[0].value: i.dataset.digest for i in run.inputs.dataset_inputs}
        assert inputs == dict.fromkeys(("training", "validation"), data.manifest.digest)
        assert run.data.tags["mlflow.source.name"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["rayline.data_digest"] == data.manifest.digest
        assert run.data.tags["rayline.seed"] == "0"
        assert all(f"rayline.package.{name}" in run.data.tags for name in PACKAGES)
        assert set(run.data.params) == {parameter.name for parameter in search_space(PRESET)}
        assert run.data.tags["rayline.rungs"] == "1,3"
        assert run.data.tags["rayline.num_threads"] == "1"
        best_epoch = int(run.data.tags["rayline.best_epoch"])
        assert run.data.metrics["best/epoch"] == best_epoch
        assert run.data.tags["rayline.epochs_trained"] in ("1", "3")
        for name in METRICS:
            points = client.get_metric_history(run.info.run_id, name)
            curve = {point.step: point.value for point in points}
            assert set(curve) in ({1}, {1, 2, 3}), "a trial ends at a rung"
            assert len(points) == len(curve), "an epoch has one value"
            assert run.data.metrics[f"best/{name}"] == curve[best_epoch]
    # The first is the known-good configuration, and trains to the last rung.
    assert max(trial.epoch for trial in result.trials) > 1

    ranked = ranked_trials(client, result.sweep_run_id, data.manifest.digest)
    assert ranked[0].metrics["val_accuracy"] == pytest.approx(result.trials[0].value)
    kept = {path.rpartition("/")[2] for path in data.storage.list("sweeps", recursive=True)}
    assert kept == {"code.json", "journal.jsonl", "sweep.json"}
    lines = capsys.readouterr().out.splitlines()
    assert any("trial 1/3 starts: " in line for line in lines)
    assert any("best so far" in line for line in lines)
    assert all(line.startswith("[") for line in lines if line), "only our own progress lines"


def test_the_recorded_checkpoint_is_that_of_the_best_epoch(
    data: Data, settings: Settings, tmp_path: Path
) -> None:
    result = sweep(data, settings, PRESET)
    val = read_splits(data.storage, data.manifest, ("val",))["val"]
    for trial in result.trials:
        content = torch.load(
            download_artifacts(
                run_id=trial.run_id,
                artifact_path=CHECKPOINT_PATH,
                dst_path=str(tmp_path / trial.run_id),
                tracking_uri=settings.mlflow_uri,
            ),
            weights_only=True,
        )
        net = ConvNet(ModelConfig.from_dict(content["model_config"])).eval()
        net.load_state_dict(content["model"])
        with torch.inference_mode():
            labels = net(torch.from_numpy(val.images_NHWC)).argmax(dim=1)
        accuracy = float((labels.numpy() == val.labels_N).mean())
        assert content["epoch"] == trial.epoch
        assert accuracy == pytest.approx(trial.value, abs=1e-6)
        assert content["train_config"]["learning_rate"] == trial.params["learning_rate"]


def only_rates(preset: Preset, *rates: float) -> Experiment:
    """Return a search that tries these learning rates alone, the first of them first."""
    experiment = preset_experiment(preset)
    return replace(
        experiment,
        parameters=tuple(
            Parameter(name=p.name, kind=DISCRETE, values=rates) if p.name == "learning_rate" else p
            for p in experiment.parameters
        ),
        first_guesses=({**first_guesses(preset)[0], "learning_rate": rates[0]},),
    )


def test_trials_shorter_than_the_start_of_a_process_run_in_all_slots(
    settings: Settings, storage: Storage
) -> None:
    result = run_sweep(settings, storage, tiny_experiment(num_trials=40), tiny_work(storage))
    assert len(result.trials) == 40
    log = Path(storage.path("epochs.log")).read_text()
    epochs = [json.loads(line) for line in log.splitlines()]
    assert len({pid for _, _, pid in epochs}) == 2
    assert len(epochs) == 40 * NUM_EPOCHS, "none began twice"


def test_a_trial_that_fails_does_not_end_the_sweep(
    data: Data, settings: Settings, client: MlflowClient
) -> None:
    preset = replace(PRESET, num_trials=5, rungs=(1,))
    result = sweep(data, settings, preset, only_rates(preset, 1e30, 0.1))
    (parent,), trials = sweeps_and_trials(client, settings)
    failed = [run for run in trials if run.data.params["learning_rate"] == "1e+30"]
    assert parent.info.status == "FINISHED"
    assert result.num_failed == len(failed) > 0
    assert len(result.trials) == len(trials) - len(failed) > 0
    for run in failed:
        assert run.info.status == "FAILED"
        assert "the training loss became nan" in run.data.tags["rayline.ended"]
    ranked = ranked_trials(client, result.sweep_run_id, data.manifest.digest)
    assert {trial.run_id for trial in ranked} == {trial.run_id for trial in result.trials}


def test_a_sweep_whose_trials_all_fail_is_an_error(
    data: Data, settings: Settings, client: MlflowClient
) -> None:
    with pytest.raises(SearchError, match="none of 3 trials left a model"):
        sweep(data, settings, PRESET, only_rates(PRESET, 1e30))
    (parent,), trials = sweeps_and_trials(client, settings)
    assert [run.info.status for run in (parent, *trials)] == ["FAILED"] * 4


def test_a_time_budget_too_short_for_one_epoch_is_an_error(
    data: Data, settings: Settings, client: MlflowClient
) -> None:
    preset = replace(PRESET, time_budget_s=0.01)
    with pytest.raises(SearchError, match="time budget"):
        sweep(data, settings, preset)
    (parent,), trials = sweeps_and_trials(client, settings)
    assert parent.info.status == "FAILED"
    assert all(run.info.status == "KILLED" for run in trials)


@pytest.mark.parametrize("reserved_cpus", [1.4, 2.0])
def test_a_sweep_runs_beside_what_reserves_the_cpus(
    data: Data, settings: Settings, reserved_cpus: float
) -> None:
    @ray.remote(num_cpus=reserved_cpus)
    class Replica:
        def ready(self) -> bool:
            return True

    replica = Replica.remote()
    try:
        assert ray.get(replica.ready.remote())
        preset = replace(PRESET, num_trials=2, rungs=(1,))
        assert sweep(data, settings, preset).trials
    finally:
        ray.kill(replica)


def test_an_mlflow_server_that_is_away_is_said_at_once(data: Data, settings: Settings) -> None:
    away = replace(settings, mlflow_uri="http://127.0.0.1:9")
    with pytest.raises(RegistryError, match="MLflow does not answer"):
        sweep(data, away, PRESET)


def test_a_lost_record_is_said_and_raised_at_the_end(
    data: Data, settings: Settings, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = start_sweep(
        settings, data.storage, name="x", manifest=None, tags={}, facts={}, experiment={}
    )
    record = SweepRecord(settings, parent, run_ids={}, noted=lambda trial, run_id: None)
    client.delete_run(parent.run_id)  # It can't be written to any more.
    record.close({"seconds": 1.0}, failed=False, files={})
    with pytest.raises(RegistryError, match="is incomplete"):
        record.check()
    assert "WARNING: MLflow did not take a record" in capsys.readouterr().out


@pytest.mark.parametrize("scheduler", ["hyperband", "medianstopping", "pbt", "none"])
def test_every_scheduler_drives_real_trials(
    data: Data, settings: Settings, client: MlflowClient, scheduler: str
) -> None:
    preset = replace(PRESET, num_trials=4, rungs=(1, 2))
    experiment = preset_experiment(preset, sampler="random", scheduler=scheduler)
    result = sweep(data, settings, preset, experiment)
    _, trials = sweeps_and_trials(client, settings)
    assert len(result.trials) == len(trials) == 4
    assert {run.info.status for run in trials} == {"FINISHED"}
    assert max(int(run.data.tags["rayline.epochs_trained"]) for run in trials) == 2
    assert result.num_observations == 4


def test_size_and_latency_can_be_searched_first(
    data: Data, settings: Settings, client: MlflowClient
) -> None:
    names = ("num_parameters", LATENCY_MS, "val_accuracy")
    preset = replace(PRESET, num_trials=4, rungs=(1, 3), widths=(8, 24))
    result = sweep(data, settings, preset, preset_experiment(preset, objectives=names))
    points = {}
    for trial in result.trials:
        curve = client.get_metric_history(trial.run_id, "val_accuracy")
        best = max(point.value for point in curve)
        assert trial.metrics["val_accuracy"] == best
        assert trial.epoch == min(point.step for point in curve if point.value == best)
        points[trial.number] = [trial.metrics[name] for name in names]
    accuracies = [trial.metrics["val_accuracy"] for trial in result.trials]
    assert accuracies == sorted(accuracies, reverse=True), "the smallest net is not the best"
    front = {
        number
        for number, (size, ms, accuracy) in points.items()
        if not any(
            a <= size and b <= ms and c >= accuracy and (a, b, c) != (size, ms, accuracy)
            for a, b, c in points.values()
        )
    }
    assert {trial.number for trial in result.pareto} == front
    (parent,), _ = sweeps_and_trials(client, settings)
    assert parent.data.metrics["pareto_trials"] == len(front)
    assert json.loads(parent.data.tags["rayline.objectives"]) == [
        {"metric": "num_parameters", "goal": MINIMIZE, "constant": True},
        {"metric": LATENCY_MS, "goal": MINIMIZE, "constant": True},
        {"metric": "val_accuracy", "goal": MAXIMIZE, "constant": False},
    ]
