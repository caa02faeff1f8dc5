"""Katib's experiment files run for real: their own commands, and Rayline's training."""

from __future__ import annotations

import gzip
import io
import json
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from jobs import tune
from lib.config import Settings
from lib.data.ingest import ingest
from lib.data.manifest import Manifest
from lib.errors import ConfigError, SearchError
from lib.registry.trials import best_metrics
from lib.storage import Storage
from lib.train.asked import Asked, limits_asked_for, search_asked_for
from lib.train.result import SweepResult
from lib.train.search import resume_sweep, run_sweep

pytestmark = pytest.mark.long

MNIST = Path(__file__).parents[2] / "lib/data/mnist"
# Three reports a trial, better from one to the next, and best of all at x = 0.25.
LOSS = """
for epoch in 1 2 3; do
    awk "BEGIN { print \\"epoch $epoch: loss=\\" ($1 - 0.25) ^ 2 + 1 / $epoch }"
done
echo accuracy=$2
"""


@pytest.fixture
def settings(storage: Storage, mlflow_server: str, local_ray: None) -> Settings:
    name = f"katib-{uuid.uuid4().hex[:8]}"
    return Settings(storage=storage.uri, mlflow_uri=mlflow_server, model=name)


@pytest.fixture
def client(settings: Settings) -> MlflowClient:
    return MlflowClient(settings.mlflow_uri)


def write(folder: Path, script: str, **spec: Any) -> str:
    """Write an experiment whose trials run a shell script with x and the trial's name."""
    content = {
        "apiVersion": "kubeflow.org/v1beta1",
        "kind": "Experiment",
        "metadata": {"name": "shape"},
        "spec": {
            "objective": {
                "type": "minimize",
                "objectiveMetricName": "loss",
                "additionalMetricNames": ["accuracy"],
            },
            "algorithm": {"algorithmName": "random"},
            "parallelTrialCount": 2,
            "maxTrialCount": 6,
            "parameters": [
                {
                    "name": "x",
                    "parameterType": "double",
                    "feasibleSpace": {"min": "0", "max": "1"},
                }
            ],
            "trialTemplate": {
                "primaryContainerName": "main",
                "trialParameters": [{"name": "x", "reference": "x"}],
                "trialSpec": {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "spec": {
                        "template": {
                            "spec": {
                                "restartPolicy": "Never",
                                "containers": [
                                    {
                                        "name": "main",
                                        "command": ["/bin/sh", "-c", script, "trial"],
                                        "args": ["${trialParameters.x}", "0.5"],
                                        "resources": {"limits": {"cpu": "500m"}},
                                    }
                                ],
                            }
                        }
                    },
                },
            },
            **spec,
        },
    }
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(content))  # YAML too.
    return str(file)


def run(settings: Settings, file: str, **flags: Any) -> SweepResult:
    storage = Storage(settings.storage)
    return run_sweep(settings, storage, *search_asked_for(Asked(experiment=file, **flags), storage))


def children(client: MlflowClient, sweep_run_id: str) -> list[Run]:
    experiment_id = client.get_run(sweep_run_id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{sweep_run_id}'"
    return list(client.search_runs([experiment_id], filter_string=query))


def drawn(client: MlflowClient, sweep_run_id: str) -> set[str]:
    return {Path(item.path).stem for item in client.list_artifacts(sweep_run_id, "pictures")}


def test_an_experiment_file_is_run_by_its_job(
    settings: Settings,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings_of = {"algorithmName": "medianstop", "algorithmSettings": [
        {"name": "min_trials_required", "value": "1"}, {"name": "start_step", "value": "1"},
    ]}  # fmt: skip
    file = write(tmp_path, LOSS, earlyStopping=settings_of)
    monkeypatch.setenv("RAYLINE_STORAGE", settings.storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_uri)
    monkeypatch.setenv("RAYLINE_MODEL", settings.model)
    monkeypatch.setattr("sys.argv", ["tune", "--experiment", file])
    with pytest.raises(SystemExit) as ended:
        tune.main()
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["trials"], result["failed_trials"], result["data_digest"]) == (6, 0, None)

    runs = children(client, result["sweep_run_id"])
    assert len(runs) == 6
    assert {run.info.status for run in runs} == {"FINISHED"}
    epochs = {run.info.run_id: int(run.data.tags["rayline.epochs_trained"]) for run in runs}
    assert set(epochs.values()) <= {1, 2, 3, 4}
    best = min(runs, key=lambda run: best_metrics(run)["loss"])
    assert best.info.run_id == result["best"]["run_id"]
    for each in runs:
        x = float(each.data.params["x"])
        points = client.get_metric_history(each.info.run_id, "loss")
        assert points[0].value == pytest.approx((x - 0.25) ** 2 + 1, abs=1e-4)
        assert [item.path for item in client.list_artifacts(each.info.run_id)] == ["output.log"]
    whole = [run for run in runs if run.data.tags["rayline.ended"] == "trained to the end"]
    assert all(best_metrics(run)["accuracy"] == 0.5 for run in whole)
    assert {"curves", "parallel_coordinates"} <= drawn(client, result["sweep_run_id"])
    assert "confusion" not in drawn(client, result["sweep_run_id"])


def test_the_goal_ends_the_sweep_and_its_commands(
    settings: Settings, client: MlflowClient, tmp_path: Path
) -> None:
    script = f"echo $$ >> {tmp_path}/pids; echo loss=0.5; echo loss=0.001; exec sleep 600"
    goal = {"type": "minimize", "goal": 0.01, "objectiveMetricName": "loss"}
    result = run(settings, write(tmp_path, script, objective=goal, maxTrialCount=20))
    assert result.trials[0].value == 0.001
    runs = children(client, result.sweep_run_id)
    # Those that were under way beside it may have begun.
    assert len(runs) <= 6
    best = client.get_run(result.trials[0].run_id)
    assert best.data.tags["rayline.ended"] == "reached the target"
    pids = (tmp_path / "pids").read_text().split()
    assert pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_too_many_failed_trials_fail_the_sweep(
    settings: Settings, client: MlflowClient, tmp_path: Path
) -> None:
    # The first trial fails, and of the next two none: whichever begins first, not all have failed.
    script = 'echo loss=1; awk "BEGIN { exit ($1 > 0.5) ? 4 : 0 }"'
    file = write(tmp_path, script, maxFailedTrialCount=2, maxTrialCount=30)
    with pytest.raises(SearchError, match="trials failed, more than the 1 that the experiment") \
            as failed:  # fmt: skip
        run(settings, file, seed=3)
    sweep_run_id = str(failed.value).split("below sweep ")[1].split()[0]
    assert client.get_run(sweep_run_id).info.status == "FAILED"
    runs = children(client, sweep_run_id)
    assert len(runs) < 30
    broken = [run for run in runs if run.info.status == "FAILED"]
    assert len(broken) >= 2
    for each in broken:
        assert "exit code 4" in each.data.tags["rayline.ended"]
        assert [item.path for item in client.list_artifacts(each.info.run_id)] == ["output.log"]


def test_a_sweep_that_ended_runs_the_trials_it_is_given_more_of(
    settings: Settings, client: MlflowClient, tmp_path: Path
) -> None:
    storage, script = Storage(settings.storage), f"echo x >> {tmp_path}/ran; echo loss=$1"
    lasting = {"resumePolicy": "LongRunning"}
    first = run(settings, write(tmp_path, script, maxTrialCount=2, **lasting))
    more = limits_asked_for(Asked(experiment=write(tmp_path, script, maxTrialCount=5, **lasting)))
    result = resume_sweep(settings, storage, first.sweep_run_id, asked=more)
    assert {t.run_id for t in first.trials} < {t.run_id for t in result.trials}
    assert len(result.trials) == len(children(client, first.sweep_run_id)) == 5
    assert len((tmp_path / "ran").read_text().split()) == 5, "none was run again"
    assert len({trial.params["x"] for trial in result.trials}) == 5
    other = limits_asked_for(Asked(experiment=write(tmp_path, "echo loss=2", **lasting)))
    with pytest.raises(ConfigError, match="template would change"):
        resume_sweep(settings, storage, first.sweep_run_id, asked=other)

    never = run(settings, write(tmp_path, script, maxTrialCount=2))
    with pytest.raises(SearchError, match="resumePolicy Never"):
        resume_sweep(settings, storage, never.sweep_run_id)


def ingested(storage: Storage, folder: Path) -> Manifest:
    folder.mkdir()
    for part, count in (("train", 1500), ("t10k", 200)):
        for kind, header, row_bytes in (
            ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), 784),
            ("labels-idx1", struct.pack(">II", 2049, count), 1),
        ):
            with gzip.open(MNIST / f"{part}-{kind}-ubyte.gz") as stream:
                rows = stream.read(len(header) + count * row_bytes)[len(header) :]
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + rows)
    return ingest(storage, str(folder))


def test_a_file_can_train_raylines_nets_instead(
    settings: Settings, client: MlflowClient, storage: Storage, tmp_path: Path
) -> None:
    manifest = ingested(storage, tmp_path / "source")
    parameters = [
        {"name": "lr", "parameterType": "double", "feasibleSpace": {"min": "0.05", "max": "0.2"}},
        {"name": "momentum", "parameterType": "discrete", "feasibleSpace": {"list": ["0.7"]}},
        {"name": "batch-size", "parameterType": "int", "feasibleSpace": {"min": "32", "max": "64",
                                                                         "step": "32"}},
        {"name": "num-epochs", "parameterType": "int", "feasibleSpace": {"min": "1", "max": "2"}},
    ]  # fmt: skip
    objective = {"type": "maximize", "objectiveMetricName": "Validation-accuracy",
                 "additionalMetricNames": ["latency"]}  # fmt: skip
    file = write(tmp_path, "exit 1", parameters=parameters, objective=objective, maxTrialCount=5)
    result = run(settings, file, trainable="rayline", data=manifest.digest, preset="smoke")
    assert len(result.trials) == 5
    sweep = client.get_run(result.sweep_run_id)
    assert sweep.data.params["momentum"] == "0.7"
    assert sweep.data.params["stage_width"] == "8", "what the file does not name is the preset's"
    for trial in result.trials:
        each = client.get_run(trial.run_id)
        assert set(each.data.params) == {"learning_rate", "batch_size", "epochs"}
        assert each.data.tags["rayline.epochs_trained"] == each.data.params["epochs"]
        assert each.data.metrics["latency_ms"] > 0
        place = client.download_artifacts(trial.run_id, "checkpoint/model.pt", str(tmp_path))
        config = torch.load(place, weights_only=True)["train_config"]
        assert config["momentum"] == 0.7
        assert config["batch_size"] == int(each.data.params["batch_size"])
        assert config["learning_rate"] == float(each.data.params["learning_rate"])
    assert {"curves", "parallel_coordinates", "confusion"} <= drawn(client, result.sweep_run_id)
    place = client.download_artifacts(result.sweep_run_id, "pictures", str(tmp_path))
    for picture in Path(place).iterdir():
        assert min(Image.open(io.BytesIO(picture.read_bytes())).size) > 200
