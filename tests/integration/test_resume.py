"""Sweeps whose parts are killed under them: nothing is lost, nothing runs twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run

from lib.config import Settings
from lib.errors import RegistryError, SearchError, StorageError
from lib.storage import Storage
from lib.train.experiment import DOUBLE, MAXIMIZE, Objective, Parameter
from lib.train.samplers import Study
from lib.train.search import SweepResult, resume_sweep, run_sweep
from tests.sweeps import NUM_EPOCHS, NUM_TRIALS, TinyTrial, tiny_experiment, tiny_work

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
_DEADLINE_S = 90


@pytest.fixture
def settings(storage: Storage, mlflow_server: str, local_ray: None) -> Settings:
    return Settings(storage=storage.uri, mlflow_uri=mlflow_server, model="tiny")


def events(storage: Storage) -> list[dict[str, Any]]:
    """What the journal of the only sweep holds, while it runs."""
    found = list(Path(storage.path("sweeps")).glob("*/journal.jsonl"))
    lines = found[0].read_bytes().split(b"\n")[:-1] if found else []
    return [json.loads(line) for line in lines]


def epochs(storage: Storage) -> list[list[Any]]:
    """Every epoch that was worked: parameter, epoch, process."""
    log = Path(storage.path("epochs.log"))
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def num_ended(storage: Storage) -> int:
    return sum(event["event"] == "ended" for event in events(storage))


def wait_until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.02)


def start_driver(
    storage: Storage,
    mlflow_uri: str,
    address: str,
    sampler: str = "random",
    stderr: int | None = None,
    **env: str,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps", storage.uri, mlflow_uri, address, sampler],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def sweep_id(storage: Storage) -> str:
    (folder,) = Path(storage.path("sweeps")).iterdir()
    return folder.name


def resume(settings: Settings, storage: Storage) -> SweepResult:
    return resume_sweep(settings, storage, sweep_id(storage), work_of=tiny_work)


def trial_runs(settings: Settings, sweep_run_id: str) -> list[Run]:
    client = MlflowClient(settings.mlflow_uri)
    experiment_id = client.get_run(sweep_run_id).info.experiment_id
    query = f"tags.`mlflow.parentRunId` = '{sweep_run_id}'"
    return list(client.search_runs([experiment_id], filter_string=query))


def assert_nothing_lost(settings: Settings, storage: Storage, result: SweepResult) -> None:
    """Every trial ran to its end once, is recorded once with all epochs, and the sampler has it."""
    assert len(result.trials) == NUM_TRIALS
    assert result.num_failed == 0
    assert result.num_observations == NUM_TRIALS
    ends = Counter(e["trial"] for e in events(storage) if e["event"] == "ended")
    assert ends == {number: 1 for number in range(NUM_TRIALS)}
    runs = trial_runs(settings, result.sweep_run_id)
    assert sorted(int(run.data.tags["rayline.trial"]) for run in runs) == list(range(NUM_TRIALS))
    assert {run.info.run_id for run in runs} == {trial.run_id for trial in result.trials}
    client = MlflowClient(settings.mlflow_uri)
    for run in runs:
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "score")
        assert {point.step for point in points} == set(range(1, NUM_EPOCHS + 1))
        assert [item.path for item in client.list_artifacts(run.info.run_id, "kept")] == [
            "kept/best.txt"
        ]
    sweep = client.get_run(result.sweep_run_id)
    assert sweep.info.status == "FINISHED"
    assert sweep.data.tags["rayline.record_complete"] == "true"
    assert not [path for path in storage.list("sweeps", recursive=True) if "/trials/" in path]


def undisturbed(sampler: str) -> list[float]:
    study = Study(tiny_experiment(sampler))
    return sorted(float(study.ask()[1]["x"]) for _ in range(NUM_TRIALS))


@pytest.mark.parametrize("sampler", ["random", "grid", "sobol", "tpe"])
def test_the_driver_is_killed(settings: Settings, storage: Storage, sampler: str) -> None:
    driver = start_driver(
        storage, settings.mlflow_uri, ray.get_runtime_context().gcs_address, sampler
    )
    try:
        wait_until(lambda: num_ended(storage) >= 3 or driver.poll() is not None)
    finally:
        driver.kill()
        driver.wait()
    ended = {e["trial"]: e for e in events(storage) if e["event"] == "ended"}
    assert 3 <= len(ended) < NUM_TRIALS
    finished = {e["params"]["x"] for e in events(storage) if e.get("trial") in ended
                and e["event"] == "asked"}  # fmt: skip
    wait_until(lambda: ray.available_resources().get("CPU") == 2)  # Its trials are gone too.
    before = len(epochs(storage))

    result = resume(settings, storage)
    assert_nothing_lost(settings, storage, result)
    again = epochs(storage)[before:]
    assert not {x for x, _, _ in again} & finished, "no finished trial is run again"
    # What was under way goes on from what it kept: at most the epoch it was in is worked again.
    assert sum(Counter((x, epoch) for x, epoch, _ in epochs(storage)).values()) <= (
        NUM_TRIALS * NUM_EPOCHS + 2
    )
    if sampler != "tpe":
        assert sorted(trial.params["x"] for trial in result.trials) == undisturbed(sampler)
    assert resume(settings, storage) == result, "there is nothing left to do"
    assert len(epochs(storage)) == before + len(again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_driver_is_told_to_end(
    settings: Settings, storage: Storage, number: signal.Signals
) -> None:
    address = ray.get_runtime_context().gcs_address
    driver = start_driver(storage, settings.mlflow_uri, address, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: num_ended(storage) >= 3 or driver.poll() is not None)
        driver.send_signal(number)
        _, output = driver.communicate(timeout=_DEADLINE_S)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode != 0
    if number == signal.SIGINT:
        assert f"tune --resume {sweep_id(storage)}` goes on" in output.decode()
    assert not [event for event in events(storage) if event["event"] == "closed"]
    assert 3 <= num_ended(storage) < NUM_TRIALS
    assert_nothing_lost(settings, storage, resume(settings, storage))


def test_a_trials_process_is_killed(settings: Settings, storage: Storage) -> None:
    def kill() -> None:
        wait_until(lambda: any(epoch == 2 for _, epoch, _ in epochs(storage)))
        os.kill(next(pid for _, epoch, pid in epochs(storage) if epoch == 2), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run_sweep(settings, storage, tiny_experiment(), tiny_work(storage))
    killer.join()
    assert_nothing_lost(settings, storage, result)
    assert len(epochs(storage)) <= NUM_TRIALS * NUM_EPOCHS + 1


class AwayTrial(TinyTrial):
    """Its storage is away, as often in a trial as a file says."""

    def advance(self) -> Mapping[str, Any]:
        path = Path(self._log).with_name("away")
        if self._epoch == 1 and (left := int(path.read_text())):
            path.write_text(str(left - 1))
            raise StorageError("the bucket answers SLOW_DOWN")
        return super().advance()


def test_storage_that_is_away_costs_no_trial(settings: Settings, storage: Storage) -> None:
    experiment = tiny_experiment(num_trials=2, num_parallel=1)
    work = replace(tiny_work(storage), trainable=AwayTrial)
    away = Path(storage.path("away"))
    away.write_text("2")
    result = run_sweep(settings, storage, experiment, work)
    assert (len(result.trials), result.num_failed) == (2, 0)
    assert Counter(epoch for _, epoch, _ in epochs(storage)) == dict.fromkeys((1, 2, 3, 4), 2)

    place = Storage(storage.path("other"))
    work = replace(tiny_work(place), trainable=AwayTrial)
    lasting = Path(place.path("away"))
    lasting.write_text("9")
    with pytest.raises(StorageError, match="the bucket answers SLOW_DOWN"):
        run_sweep(settings, place, experiment, work)
    lasting.write_text("0")
    result = resume_sweep(settings, place, sweep_id(place), work_of=lambda *_: work)
    assert (len(result.trials), result.num_failed) == (2, 0)


def test_the_node_is_killed(settings: Settings, storage: Storage) -> None:
    place = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    # Epochs so long that trials are still to come when Ray has noticed.
    driver = start_driver(
        storage, settings.mlflow_uri, "local", TINY_RAY_DIR=place, TINY_EPOCH_S="0.8"
    )
    try:
        wait_until(lambda: num_ended(storage) >= 3 or driver.poll() is not None)
        for process in psutil.Process(driver.pid).children(recursive=True):
            if process.name().startswith("raylet"):
                process.kill()
        # Ray ends a driver whose raylet is gone, or leaves it waiting.
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=3)
        left = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    finally:
        driver.kill()
        driver.wait()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(place, ignore_errors=True)
    assert 3 <= num_ended(storage) < NUM_TRIALS
    result = resume(settings, storage)
    assert_nothing_lost(settings, storage, result)
    assert sorted(trial.params["x"] for trial in result.trials) == undisturbed("random")


@pytest.fixture
def own_mlflow(tmp_path: Path) -> Iterator[Callable[[], tuple[str, subprocess.Popen[bytes]]]]:
    """Yield what starts a server of the test's own, on the same port and data every time."""
    from tests.integration.conftest import free_port, start_mlflow

    port, started = free_port(), []

    def start() -> tuple[str, subprocess.Popen[bytes]]:
        uri, server = start_mlflow(tmp_path / "mlflow", port)
        started.append(server)
        return uri, server

    yield start
    for server in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_the_mlflow_server_is_killed(
    storage: Storage,
    local_ray: None,
    own_mlflow: Callable[[], tuple[str, subprocess.Popen[bytes]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri, server = own_mlflow()
    settings = Settings(storage=storage.uri, mlflow_uri=uri, model="tiny")

    def kill() -> None:
        wait_until(lambda: num_ended(storage) >= 2)
        os.killpg(server.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RegistryError, match="nothing is lost.*--resume"):
        run_sweep(settings, storage, tiny_experiment(), tiny_work(storage))
    killer.join()
    assert "MLflow did not take a record, kept" in capsys.readouterr().out
    assert num_ended(storage) == NUM_TRIALS, "the search did not wait for it"
    worked = len(epochs(storage))
    own_mlflow()
    assert_nothing_lost(settings, storage, resume(settings, storage))
    assert len(epochs(storage)) == worked, "what was missing is sent, and nothing is run"


def test_a_full_disk_ends_the_sweep_and_it_goes_on(settings: Settings, small_disk: Path) -> None:
    storage = Storage(str(small_disk / "storage"))

    def fill() -> None:
        wait_until(lambda: num_ended(storage) >= 2)
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as f:
            while True:
                f.write(bytes(1024))

    filler = threading.Thread(target=fill)
    filler.start()
    with pytest.raises(StorageError, match="no space left"):
        run_sweep(settings, storage, tiny_experiment(), tiny_work(storage))
    filler.join()
    (small_disk / "ballast").unlink()
    assert num_ended(storage) < NUM_TRIALS
    assert_nothing_lost(settings, storage, resume(settings, storage))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "rayline-test", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root: run the tests as root, or `sudo make test`")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_two_sweeps_at_once_do_not_disturb_each_other(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    other = Storage(str(tmp_path / "other"))
    driver = start_driver(other, settings.mlflow_uri, ray.get_runtime_context().gcs_address)
    try:
        wait_until(lambda: epochs(other) or driver.poll() is not None)
        mine = run_sweep(settings, storage, tiny_experiment(), tiny_work(storage))
        assert driver.wait(timeout=_DEADLINE_S) == 0
    finally:
        driver.kill()
        driver.wait()
    assert_nothing_lost(settings, storage, mine)
    assert_nothing_lost(settings, other, resume(settings, other))


def test_a_loss_that_is_no_number_fails_its_trial_alone(
    settings: Settings, storage: Storage
) -> None:
    experiment = tiny_experiment(
        parameters=(Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0),),
        first_guesses=({"x": 1.0}, {"x": 0.5}),
        num_trials=3,
    )
    result = run_sweep(settings, storage, experiment, tiny_work(storage))
    assert (result.num_failed, len(result.trials), result.num_observations) == (1, 2, 3)
    runs = {
        run.data.tags["rayline.trial"]: run for run in trial_runs(settings, result.sweep_run_id)
    }
    assert runs["0"].info.status == "FAILED"
    assert "reported score = nan" in runs["0"].data.tags["rayline.ended"]
    processes = {pid for _, _, pid in epochs(storage)}
    assert len(processes) <= 2, "a trial that fails does not cost a process"


def test_limits_end_a_sweep_and_a_sweep_may_forbid_to_be_resumed(
    settings: Settings, storage: Storage, tmp_path: Path
) -> None:
    bad = tiny_experiment(
        parameters=(Parameter(name="x", kind=DOUBLE, low=0.9999, high=1.0),),
        max_failed_trials=1,
        num_trials=30,
        resume_policy="Never",
    )
    with pytest.raises(SearchError, match="none of"):
        run_sweep(settings, storage, bad, tiny_work(storage))
    failed = [e for e in events(storage) if e.get("how") == "failed"]
    assert 2 <= len(failed) <= 4, "those that ran when the limit was passed"
    with pytest.raises(SearchError, match="resumePolicy Never"):
        resume(settings, storage)

    place = Storage(str(tmp_path / "target"))
    aimed = tiny_experiment(
        objectives=(Objective(metric="score", goal=MAXIMIZE, target=0.4),),
        first_guesses=({"x": 0.1}, {"x": 0.8}),
        num_trials=30,
        num_parallel=1,
    )
    result = run_sweep(settings, place, aimed, tiny_work(place))
    assert result.trials[0].value == pytest.approx(0.4)
    assert len(epochs(place)) == NUM_EPOCHS + 2, "one trial at a time, the second half way"


def test_several_objectives_leave_a_pareto_front(settings: Settings, storage: Storage) -> None:
    experiment = tiny_experiment(
        "tpe",
        objectives=(
            Objective(metric="score", goal=MAXIMIZE), Objective(metric="cost", goal="minimize"),
        ),
        num_trials=4,
    )  # fmt: skip
    result = run_sweep(settings, storage, experiment, tiny_work(storage))
    assert len(result.pareto) == 4, "who scores more costs more"
    text = MlflowClient(settings.mlflow_uri).download_artifacts(
        result.sweep_run_id, "pareto.json", str(storage.root)
    )
    assert {row["trial"] for row in json.loads(Path(text).read_text())} == {0, 1, 2, 3}
