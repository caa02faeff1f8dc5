"""What was killed goes on by itself: once, not without end, and not what somebody works on."""

from __future__ import annotations

import asyncio
import fcntl
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobs import monitor as monitor_job
from lib.config import Settings
from lib.errors import LineError, RetrainError, TooFewError
from lib.storage import Storage
from lib.watch import live, retrain, retrain_record
from lib.watch import rollout_state as states
from lib.watch.interrupted import Interrupted
from lib.watch.labels import LabelLog
from lib.watch.retrain_asked import Options
from lib.watch.retrain_record import DONE, FAILED, RUNNING, STARTING_S, Record, StepRecord
from lib.watch.retrains import MIN_LABELS, RetrainJobs
from tests.retrains import MODEL, FakeSteps, done

CANDIDATE = 2


@dataclass
class Jobs:
    """What Ray was asked for."""

    asked: list[list[str]] = field(default_factory=list)
    is_away: bool = False

    def submit(self, settings: Settings, arguments: Sequence[str]) -> None:
        if self.is_away:
            raise LineError("Ray is away")
        self.asked.append(list(arguments))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def settings(storage: Storage) -> Settings:
    return Settings(storage=storage.uri, mlflow_uri="http://nowhere", model=MODEL)


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def interrupted(settings: Settings, storage: Storage, jobs: Jobs) -> Interrupted:
    return Interrupted(settings=settings, storage=storage, submit=jobs.submit)


def killed(storage: Storage, *, attempts: int = 1, version: int | None = None) -> Record:
    """Leave the record of a retrain whose process took it up and is gone."""
    record = retrain.begin(storage, MODEL, "drift", who="monitor")
    record = replace(record, asked=None, attempts=attempts)
    if version is not None:
        made = StepRecord(name="register", state="done", started=0.0, result={"version": version})
        record = replace(record, steps=(made,))
    retrain_record.write(storage, record)
    return record


def rolling(storage: Storage, status: str = states.RUNNING) -> None:
    """Leave the state of a rollout that is on its way."""
    everything = {1: 100.0}
    states.save(
        storage,
        states.State(
            id="1-v2",
            model=MODEL,
            candidate=CANDIDATE,
            champion=1,
            who="ada",
            stages=("replay", "shadow", "canary-100"),
            stage="shadow",
            status=status,
            min_requests=10,
            stage_timeout_s=60,
            max_disagreement=0.1,
            before_weights=everything,
            before_shadows={},
            set_weights=everything,
            set_shadows={},
            evidence_since_us=0,
        ),
    )


def test_a_killed_retrain_goes_on_once(
    storage: Storage, interrupted: Interrupted, jobs: Jobs
) -> None:
    assert interrupted.go_on() is None
    record = killed(storage)
    assert interrupted.go_on() == f"retrain {record.id}"
    assert interrupted.go_on() is None, "its process is on its way"
    assert jobs.asked == [["-m", "jobs.retrain", "--resume", record.id]]
    ended = retrain.run(storage, record, FakeSteps(storage))
    assert (ended.state, ended.asked, ended.attempts) == (DONE, None, 0)
    assert interrupted.go_on() is None


def test_one_whose_process_never_came_is_asked_for_again(
    storage: Storage, interrupted: Interrupted, jobs: Jobs
) -> None:
    record = replace(killed(storage), asked=time.time() - STARTING_S - 1)
    retrain_record.write(storage, record)
    assert interrupted.go_on() == f"retrain {record.id}"


def test_while_ray_is_away_nothing_is_lost(
    storage: Storage, interrupted: Interrupted, jobs: Jobs
) -> None:
    record = killed(storage)
    jobs.is_away = True
    with pytest.raises(LineError):
        interrupted.go_on()
    assert retrain_record.read(storage, MODEL, record.id) == record
    jobs.is_away = False
    assert interrupted.go_on() == f"retrain {record.id}"


def test_one_that_somebody_works_on_is_left_alone(
    storage: Storage, interrupted: Interrupted, jobs: Jobs
) -> None:
    killed(storage)
    with retrain_record.only_one(storage, MODEL):
        assert interrupted.go_on() is None
    assert jobs.asked == []


def test_a_step_that_kills_every_process_is_given_up(
    storage: Storage, settings: Settings, interrupted: Interrupted, jobs: Jobs
) -> None:
    class Deadly(FakeSteps):
        def search(self, digest: str, params: Any) -> Any:
            raise Killed

    class Killed(BaseException):
        """Passes by everything that handles errors, as SIGKILL does."""

    record = retrain.begin(storage, MODEL, "drift", who="monitor")
    tries = 0
    with pytest.raises(Killed):
        retrain.run(storage, record, Deadly(storage))
    while interrupted.go_on():
        tries += 1
        with pytest.raises(Killed):
            retrain.run(storage, record, Deadly(storage))
    # The first process did a step before it died.
    assert tries == retrain.MOST_ATTEMPTS
    kept = retrain_record.read(storage, MODEL, record.id)
    assert kept.state == FAILED
    assert f"died {tries} times in the same step" in kept.why
    # A person may still have it go on.
    assert retrain.run(storage, record, FakeSteps(storage)).state == DONE
    assert done(storage)["data"] == 1


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_one_that_was_told_to_end_does_not_go_on(
    storage: Storage, interrupted: Interrupted, signal: type[BaseException]
) -> None:
    class Told(FakeSteps):
        def search(self, digest: str, params: Any) -> Any:
            raise signal

    record = retrain.begin(storage, MODEL, "person", who="ada")
    with pytest.raises(signal):
        retrain.run(storage, record, Told(storage))
    kept = retrain_record.read(storage, MODEL, record.id)
    assert (kept.state, kept.why) == (FAILED, "its process was told to end")
    assert interrupted.go_on() is None


def test_a_record_of_before_is_read(storage: Storage) -> None:
    content = killed(storage).to_json()
    for name in ("asked", "attempts"):
        del content[name]
    content["options"] = {"preset": "smoke", "days": 2.0}
    old = Record.from_json(json.loads(json.dumps(content)))
    assert (old.asked, old.attempts) == (None, 0)
    assert Options.from_json(old.options) == Options(preset="smoke", days=2.0)


def test_a_killed_rollout_goes_on_once(
    storage: Storage, settings: Settings, interrupted: Interrupted, jobs: Jobs
) -> None:
    now_s = 0.0
    interrupted.clock = lambda: now_s
    rolling(storage)
    assert interrupted.go_on() == f"rollout of version {CANDIDATE}"
    assert interrupted.go_on() is None, "its process is on its way"
    now_s = STARTING_S
    assert interrupted.go_on() == f"rollout of version {CANDIDATE}"
    assert jobs.asked == 2 * [["-m", "jobs.rollout", "--resume"]]


@pytest.mark.parametrize("status", states.ENDED)
def test_a_rollout_that_has_ended_or_waits_for_a_person_is_left_alone(
    storage: Storage, interrupted: Interrupted, status: str
) -> None:
    rolling(storage, status)
    assert interrupted.go_on() is None


def test_a_rollout_that_somebody_runs_is_left_alone(
    storage: Storage, interrupted: Interrupted
) -> None:
    rolling(storage)
    with open(storage.path(f"rollouts/{MODEL}/.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert live.interrupted(storage, MODEL) is None
        assert interrupted.go_on() is None
    found = live.interrupted(storage, MODEL)
    assert found is not None
    assert found.candidate == CANDIDATE


def test_a_retrains_rollout_is_left_to_the_retrain(
    storage: Storage, interrupted: Interrupted, jobs: Jobs
) -> None:
    rolling(storage)
    record = killed(storage, version=CANDIDATE)
    assert interrupted.go_on() == f"retrain {record.id}"
    assert interrupted.go_on() is None
    # Once that is given up, nobody else would look after the candidate.
    retrain_record.write(storage, retrain_record.ended(record, FAILED, "given up"))
    assert interrupted.go_on() == f"rollout of version {CANDIDATE}"


def test_a_rollout_beside_a_retrain_of_another_version_goes_on(
    storage: Storage, interrupted: Interrupted
) -> None:
    rolling(storage)
    killed(storage, version=CANDIDATE + 1)
    interrupted.go_on()
    assert interrupted.go_on() == f"rollout of version {CANDIDATE}"


def test_none_is_started_with_too_few_labels_and_then_as_it_was_asked_for(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrain, "_submit", lambda *ignored: None)
    options = Options(preset="smoke", days=1, steps=(10, 100), min_requests=50)
    made = RetrainJobs(settings, storage, options)

    async def label(first: int, end: int) -> None:
        log = LabelLog(storage)
        more = {"index": 0, "label": 3, "class_name": "3", "caller": "anyone"}
        names = (f"r{number}" for number in range(first, end))
        await asyncio.gather(*(log.add(MODEL, {"request_id": name, **more}) for name in names))

    asyncio.run(label(0, MIN_LABELS - 1))
    with pytest.raises(TooFewError, match=f"{MIN_LABELS - 1} labels came"):
        made.start("drift")
    assert made.history() == [], "the cool-down would begin"
    asyncio.run(label(MIN_LABELS, MIN_LABELS + 1))
    name = made.start("drift")
    record = retrain_record.read(storage, MODEL, name)
    assert (record.state, Options.from_json(record.options)) == (RUNNING, options)
    assert record.end_us - record.start_us == 86_400 * 10**6
    with pytest.raises(RetrainError, match="about to begin"):
        made.start("drift")


def test_the_monitor_takes_the_options_of_what_it_starts(
    settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Looks:
        def __init__(self, **given: Any) -> None:
            seen.append(given)

        def look(self) -> dict[str, Any]:
            return {"model": MODEL, "paused": {}}

    monkeypatch.setattr("lib.watch.monitor.Monitor", Looks)
    monkeypatch.setattr("lib.watch.gauges.connect", lambda: None)
    monkeypatch.setenv("RAYLINE_STORAGE", storage.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_uri)
    asked = ["--preset", "smoke", "--days", "2", "--steps", "20,100", "--min-requests", "30"]
    with pytest.raises(SystemExit):
        monitor_job.main(["--once", "--act", *asked, "--step-timeout", "900"])
    assert seen[0]["acts"]
    rollout = {"steps": (20, 100), "min_requests": 30, "step_timeout_s": 900}
    wanted = Options(preset="smoke", days=2, **rollout)
    assert seen[0]["retrains"].options == wanted
    with pytest.raises(SystemExit):
        monitor_job.main(["--once"])
    assert seen[1]["retrains"].options == Options()
