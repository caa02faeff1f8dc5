"""Experiment files through a whole sweep, with commands that are real and a Tune that is not."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from lib.config import Settings
from lib.errors import ConfigError, SearchError
from lib.leases.ledger import Ask, Grant, Leases
from lib.leases.share import Share
from lib.registry.sweep_runs import SweepRun
from lib.storage import Storage
from lib.train.asked import Asked, limits_asked_for, search_asked_for
from lib.train.resources import TrialResources
from lib.train.result import SweepResult
from lib.train.search import resume_sweep, run_sweep
from tests.unit.test_katib import TEMPLATE

SETTINGS = Settings(storage="/nowhere", mlflow_uri="http://127.0.0.1:9")
_IDS = itertools.count()


class OneAfterTheOther:
    """Stands for Tune's Tuner: runs trials in this process, one after the other."""

    def __init__(self, trainable: Any, tune_config: Any, run_config: Any) -> None:
        self._trainable, self._config, self._run = trainable, tune_config, run_config

    def fit(self) -> None:
        (report,), limits = self._run.callbacks, self._run.stop
        kind, arguments = self._trainable
        worker = None
        while not limits.stop_all():
            report.on_step_begin(0, [])
            trial = SimpleNamespace(trial_id=f"t{next(_IDS)}", last_result=None, error_file=None)
            trial.run_metadata = SimpleNamespace(num_failures=0)
            trial.config = self._config.search_alg.searcher.suggest(trial.trial_id)
            report.on_step_end(0, [])
            if not isinstance(trial.config, dict):
                break
            if worker is None:
                worker = object.__new__(kind)
                worker._trial_info = trial
                worker.setup(trial.config, **arguments)
            else:
                worker._trial_info = trial
                worker.reset_config(trial.config)
            report.on_trial_start(0, [], trial)
            over = False
            while not over:
                trial.last_result = worker.step()
                report.on_trial_result(0, [], trial, trial.last_result)
                over = limits(trial.trial_id, trial.last_result) or trial.last_result["done"]
            report.on_trial_complete(0, [], trial)
        if worker is not None:
            worker.cleanup()


class Record:
    """Stands for the record in MLflow: takes everything at once."""

    last: ClassVar[Record]

    def __init__(self, settings: Any, sweep: Any, *, noted: Any, **rest: Any) -> None:
        self._noted = noted
        self.files: dict[int, dict[str, bytes | None]] = {}
        self.endings: dict[int, Any] = {}
        self.pictures: dict[str, bytes] = {}
        Record.last = self

    def started(self, trial: int, params: Any) -> None:
        self._noted(trial, f"run-{trial}")

    def changed(self, *event: Any) -> None: ...

    def reported(self, *event: Any) -> None: ...

    def ended(self, trial: int, ending: Any) -> None:
        self.endings[trial] = ending
        self.files[trial] = {path: read() for path, read in ending.files.items()}
        self._noted(trial, None)

    def close(self, metrics: Any, *, failed: bool, files: Any) -> None:
        self.failed = failed

    def check(self) -> None: ...

    def attach(self, files: dict[str, bytes]) -> None:
        self.pictures = files


class Alone(Share):
    """Stands for the lease of a sweep that shares the cluster with nobody."""

    def __init__(self, *given: Any) -> None:
        super().__init__(
            Leasing(), sweep="s", owner="ann", limit=None, measure=lambda: ({"CPU": 0.0}, {})
        )


class Leasing:
    """Stands for the lease actor."""

    is_new = False

    def __init__(self) -> None:
        self._leases = Leases(lease_s=15.0)

    def renew(self, ask: Ask) -> Grant:
        return self._leases.renew(ask, time.monotonic())

    def release(self, sweep: str) -> None:
        self._leases.release(sweep)


@pytest.fixture(autouse=True)
def _no_ray_and_no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepRun(run_id="s", experiment_id="e", tags={})
    monkeypatch.setattr("lib.train.session.tune.Tuner", OneAfterTheOther)
    monkeypatch.setattr("lib.train.session.tune.with_resources", lambda trainable, _: trainable)
    monkeypatch.setattr(
        "lib.train.session.tune.with_parameters", lambda kind, **arguments: (kind, arguments)
    )
    free = TrialResources(cpus=1.0, gpus=0.0, num_parallel=1)
    monkeypatch.setattr("lib.train.resources.trial_resources", lambda *_: free)
    monkeypatch.setattr("lib.train.search.start_sweep", lambda *given, **rest: sweep)
    monkeypatch.setattr("lib.train.search.reopen_sweep", lambda *given: sweep)
    monkeypatch.setattr("lib.train.search.SweepRecord", Record)
    monkeypatch.setattr("lib.train.search.RayLender", Leasing)
    monkeypatch.setattr("lib.train.search.share_of", Alone)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def write(folder: Path, script: str, **spec: Any) -> Asked:
    """Write an experiment whose trials run a shell script with their learning rate."""
    import yaml

    content = yaml.safe_load(TEMPLATE.replace("1e-3", "0.00001"))
    pod = content["spec"]["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]
    numbers = ["${trialParameters.learningRate}", "${trialParameters.momentum}"]
    pod["containers"][0]["command"] = ["/bin/sh", "-c", script, "trial", *numbers]
    content["spec"].update(spec)
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(content))
    return Asked(experiment=str(file))


def run(storage: Storage, asked: Asked, **rest: Any) -> SweepResult:
    return run_sweep(SETTINGS, storage, *search_asked_for(asked, storage), **rest)


def test_a_command_is_searched_from_a_file_to_pictures(storage: Storage, tmp_path: Path) -> None:
    objective = {"type": "minimize", "objectiveMetricName": "loss",
                 "additionalMetricNames": ["accuracy"]}  # fmt: skip
    script = "echo loss=1; echo loss=$1 accuracy=0.5; echo accuracy=0.25"
    asked = write(tmp_path, script, objective=objective, maxTrialCount=6)
    result = run(storage, asked)
    assert len(result.trials) == 6
    best = result.trials[0]
    assert best.value == min(trial.params["lr"] for trial in result.trials)
    assert best.metrics["accuracy"] == 0.25, "written after the last loss, and part of the result"
    assert best.epoch == 3
    assert all(b"accuracy=0.25" in (files["output.log"] or b"")
               for files in Record.last.files.values())  # fmt: skip
    assert {"pictures/curves.png", "pictures/parallel_coordinates.png"} <= set(Record.last.pictures)


def test_the_goal_ends_the_sweep(storage: Storage, tmp_path: Path) -> None:
    objective = {"type": "minimize", "objectiveMetricName": "loss", "goal": 0.5}
    asked = write(tmp_path, "echo loss=0.1; exec sleep 600", objective=objective)
    result = run(storage, asked, draw=False)
    assert len(result.trials) == 1
    assert Record.last.endings[0].why == "reached the target"


def test_a_goal_that_was_left_again_ends_nothing(storage: Storage, tmp_path: Path) -> None:
    objective = {"type": "minimize", "objectiveMetricName": "loss", "goal": 0.5,
                 "metricStrategies": [{"name": "loss", "value": "latest"}]}  # fmt: skip
    asked = write(tmp_path, "echo loss=0.1; echo loss=0.9", objective=objective, maxTrialCount=3)
    result = run(storage, asked, draw=False)
    assert [trial.value for trial in result.trials] == [0.9] * 3


def test_failed_trials_end_the_sweep_at_katibs_count(storage: Storage, tmp_path: Path) -> None:
    script = "echo loss=1; test -e once || { touch once; exit 0; }; exit 4"
    script = f"cd {tmp_path}; {script}"
    with pytest.raises(SearchError, match="2 of 3 trials failed, more than the 1"):
        run(storage, write(tmp_path, script, maxFailedTrialCount=2), draw=False)
    assert Record.last.failed
    assert b"loss=1" in (Record.last.files[2]["output.log"] or b"")
    assert "exit code 4" in Record.last.endings[2].why


def test_an_ended_sweep_runs_the_trials_it_is_given_more_of(
    storage: Storage, tmp_path: Path
) -> None:
    script = f"echo x >> {tmp_path}/ran; echo loss=$1"
    lasting: Mapping[str, Any] = {"resumePolicy": "LongRunning", "parallelTrialCount": 1}
    first = run(storage, write(tmp_path, script, maxTrialCount=2, **lasting), draw=False)
    more = limits_asked_for(write(tmp_path, script, maxTrialCount=5, **lasting))
    result = resume_sweep(SETTINGS, storage, first.sweep_run_id, asked=more, draw=False)
    assert {t.number for t in result.trials} == {0, 1, 2, 3, 4}
    assert len((tmp_path / "ran").read_text().split()) == 5, "none was run again"
    again = resume_sweep(SETTINGS, storage, first.sweep_run_id, draw=False)
    assert len(again.trials) == 5
    other = limits_asked_for(write(tmp_path, "echo loss=2", maxTrialCount=9, **lasting))
    with pytest.raises(ConfigError, match="template would change"):
        resume_sweep(SETTINGS, storage, first.sweep_run_id, asked=other, draw=False)


def test_never_is_about_a_search_that_ended(storage: Storage, tmp_path: Path) -> None:
    asked = write(tmp_path, "echo loss=$1", maxTrialCount=3)
    first = run(storage, asked, draw=False)
    with pytest.raises(SearchError, match="resumePolicy Never"):
        resume_sweep(SETTINGS, storage, first.sweep_run_id, draw=False)
    journal = Path(storage.path(f"sweeps/{first.sweep_run_id}/journal.jsonl"))
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    killed = [event for event in events if event["event"] != "closed"]
    journal.write_text("".join(json.dumps(event) + "\n" for event in killed))
    assert len(resume_sweep(SETTINGS, storage, first.sweep_run_id, draw=False).trials) == 3
