"""The order of a retrain, its record, and what is left when it is killed anywhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import jobs.retrain
import lib.storage
from lib.config import Settings
from lib.errors import ConfigError, LineError, RetrainError, ServingError, TooFewError
from lib.storage import Storage
from lib.watch import retrain, retrain_record
from lib.watch.lineage import of_retrain, to_mermaid, to_svg
from lib.watch.retrain_asked import Options
from lib.watch.retrain_record import DONE, FAILED, REFUSED, RUNNING, Record, history, interrupted
from tests.retrains import MODEL, STEPS, FakeSteps, done

ROOT = Path(__file__).parents[2]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def settings(storage: Storage) -> Settings:
    return Settings(storage=storage.uri, mlflow_uri="http://nowhere", model=MODEL)


def begin(storage: Storage, reason: str = "drift") -> Record:
    return retrain.begin(storage, MODEL, reason, who="somebody")


def once(*names: str) -> Counter[str]:
    return Counter(names)


class Killed(BaseException):
    """Passes by everything that handles errors, as SIGKILL does."""


def killer(monkeypatch: pytest.MonkeyPatch, fatal: int, *, after: bool) -> Callable[[], list[str]]:
    """Die at a write; return what was being written when it happened."""
    # What is written outlives a process without it.
    monkeypatch.setattr(lib.storage, "_sync", lambda path: None)
    write, paths = Storage.write, []

    def deadly(self: Storage, relative: str, content: Any) -> None:
        paths.append(relative)
        if len(paths) == fatal and not after:
            raise Killed
        write(self, relative, content)
        if len(paths) == fatal:
            raise Killed

    monkeypatch.setattr(Storage, "write", deadly)
    return lambda: paths


def test_each_step_is_done_once_and_is_on_record(storage: Storage) -> None:
    record = retrain.run(storage, begin(storage), FakeSteps(storage))
    assert done(storage) == once(*STEPS)
    assert record.state == DONE
    assert record.ended is not None
    assert [(step.name, step.state) for step in record.steps] == [(name, "done") for name in STEPS]
    assert history(storage, MODEL) == [record]
    assert record.step("rollout").result == {"status": "promoted"}  # type: ignore[union-attr]
    json.dumps(record.to_json())


def test_a_second_retrain_of_the_same_does_nothing(storage: Storage) -> None:
    retrain.run(storage, begin(storage), FakeSteps(storage))
    record = retrain.run(storage, begin(storage, "person"), FakeSteps(storage))
    assert done(storage) == once(*STEPS)
    assert record.state == DONE
    assert all(step.reused for step in record.steps)
    other = retrain.run(storage, begin(storage), FakeSteps(storage, rows="b"))
    assert not any(step.reused for step in other.steps[:4])


def num_writes(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> int:
    record = begin(storage)
    with monkeypatch.context() as patch:
        paths = killer(patch, -1, after=False)
        retrain.run(storage, record, FakeSteps(storage))
        return len(paths())


def test_killed_at_any_write_it_goes_on_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = num_writes(Storage(str(tmp_path / "whole" / "storage")), monkeypatch)
    assert count >= 4 * len(STEPS)
    for fatal in range(1, count + 1):
        for after in (False, True):
            storage = Storage(str(tmp_path / f"{fatal}-{after}" / "storage"))
            record = begin(storage)
            with monkeypatch.context() as patch:
                paths = killer(patch, fatal, after=after)
                with pytest.raises(Killed):
                    retrain.run(storage, record, FakeSteps(storage))
                last = paths()[-1]
            ended = retrain.run(storage, record, FakeSteps(storage))
            assert ended.state == DONE
            again = done(storage) - once(*STEPS)
            # Only work whose result was not on disk yet can be lost.
            lost = last.startswith("steps/") and not after
            assert again == (once(last.split("/")[1]) if lost else once()), (last, after)
            assert done(storage) - again == once(*STEPS)
            assert interrupted(storage, MODEL) is None


@pytest.mark.parametrize("fatal", [2, 8, 14, 21])
def test_a_real_kill_frees_the_model_and_is_found(
    storage: Storage, settings: Settings, fatal: int
) -> None:
    record = begin(storage)
    dead = subprocess.run(
        [sys.executable, "-m", "tests.retrains", storage.uri, record.id, str(fatal)],
        cwd=ROOT,
        check=False,
        capture_output=True,
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert history(storage, MODEL)[0].state == RUNNING
    assert interrupted(storage, MODEL) == record.id
    taken_up: list[str] = []
    found = retrain.start(
        settings, storage, "quality", submit=lambda settings, name: taken_up.append(name)
    )
    assert taken_up == [record.id] == [found]
    ended = retrain.run(storage, record, FakeSteps(storage))
    assert (ended.state, ended.reason) == (DONE, "drift")
    assert all(times <= 2 for times in done(storage).values())
    assert len(history(storage, MODEL)) == 1


def test_two_at_once_are_kept_apart(storage: Storage, settings: Settings) -> None:
    record = begin(storage)
    with retrain_record.only_one(storage, MODEL):
        with pytest.raises(RetrainError, match="under way"):
            retrain.run(storage, record, FakeSteps(storage))
        with pytest.raises(RetrainError, match="under way"):
            retrain.start(settings, storage, "drift", submit=lambda *ignored: None)
        assert interrupted(storage, MODEL) is None
        with retrain_record.only_one(storage, "another-model"):
            pass
    assert done(storage) == once()
    assert len(history(storage, MODEL)) == 1


def test_one_that_waits_for_its_process_is_not_started_again(
    storage: Storage, settings: Settings
) -> None:
    first = retrain.start(settings, storage, "drift", submit=lambda *ignored: None)
    with pytest.raises(RetrainError, match=first):
        retrain.start(settings, storage, "drift", submit=lambda *ignored: None)


def test_one_that_another_keeps_from_beginning_is_not_on_record(
    storage: Storage, settings: Settings
) -> None:
    def run_new(reason: str = "person") -> Record:
        return retrain.run_new(storage, MODEL, reason, FakeSteps(storage), who="ada")

    with retrain_record.only_one(storage, MODEL), pytest.raises(RetrainError, match="under way"):
        run_new()
    assert history(storage, MODEL) == []
    waiting = retrain.start(settings, storage, "drift", submit=lambda *ignored: None)
    with pytest.raises(RetrainError, match=f"{waiting} of {MODEL} is about to begin"):
        run_new()
    assert [record.id for record in history(storage, MODEL)] == [waiting]
    retrain.run(storage, retrain_record.read(storage, MODEL, waiting), FakeSteps(storage))
    with pytest.raises(RetrainError, match="needs a reason"):
        run_new(" ")
    record = run_new()
    assert (record.state, record.who, record.asked) == (DONE, "ada", None)
    assert history(storage, MODEL)[-1] == record
    assert interrupted(storage, MODEL) is None


def test_the_job_puts_none_on_record_before_it_may_begin(
    storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLINE_STORAGE", storage.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_uri)
    monkeypatch.setenv("RAYLINE_MODEL", MODEL)
    monkeypatch.setattr("lib.ray_session.connect_ray", lambda: None)
    with retrain_record.only_one(storage, MODEL), pytest.raises(SystemExit):
        jobs.retrain.main([])
    assert history(storage, MODEL) == []


def test_a_job_that_ray_refuses_is_on_record_as_failed(
    storage: Storage, settings: Settings
) -> None:
    def refuse(settings: Settings, retrain_id: str) -> None:
        raise LineError("Ray does not answer")

    with pytest.raises(LineError):
        retrain.start(settings, storage, "drift", submit=refuse)
    (record,) = history(storage, MODEL)
    assert (record.state, record.why) == (FAILED, "Ray does not answer")
    assert retrain.start(settings, storage, "drift", submit=lambda *ignored: None) != record.id


def test_no_labelled_rows_are_refused_on_record(storage: Storage) -> None:
    record = begin(storage)
    with pytest.raises(TooFewError, match="POST /feedback"):
        retrain.run(storage, record, FakeSteps(storage, rows=""))
    (kept,) = history(storage, MODEL)
    assert kept.state == REFUSED
    assert "0 new labelled live images" in kept.why
    assert done(storage) == once()
    assert retrain.run(storage, record, FakeSteps(storage)) == kept


def test_a_candidate_that_the_gate_refuses_is_withdrawn_and_not_rolled_out(
    storage: Storage,
) -> None:
    record = retrain.run(storage, begin(storage), FakeSteps(storage, passes=False))
    assert (record.state, record.why) == (REFUSED, "no better")
    assert done(storage) == once("data", "tune", "register", "gate", "withdraw")


def test_an_error_can_be_resumed(storage: Storage) -> None:
    steps, record = FakeSteps(storage), begin(storage)
    steps.error = ServingError("Serve is away")
    with pytest.raises(ServingError):
        retrain.run(storage, record, steps)
    (kept,) = history(storage, MODEL)
    assert (kept.state, kept.why) == (FAILED, "Serve is away")
    steps.error = None
    assert retrain.run(storage, record, steps).state == DONE
    assert done(storage) == once(*STEPS)


def test_what_is_gone_is_made_again_with_all_that_follows(storage: Storage) -> None:
    steps, record = FakeSteps(storage), begin(storage)
    steps.error = ServingError("Serve is away")
    with pytest.raises(ServingError):
        retrain.run(storage, record, steps)
    steps.error, steps.gone = None, {"tune"}
    ended = retrain.run(storage, record, steps)
    assert ended.state == DONE
    assert [step.name for step in ended.steps] == list(STEPS)
    # Made of the same sweep: what follows is taken from what was kept.
    assert done(storage) == once(*STEPS, "tune")


def test_an_unknown_retrain_and_an_empty_reason_are_said(storage: Storage) -> None:
    record = begin(storage)
    with pytest.raises(RetrainError, match=f"no retrain 'x'; the last ones: {record.id}"):
        retrain_record.read(storage, MODEL, "x")
    with pytest.raises(RetrainError, match="needs a reason"):
        begin(storage, " ")
    with pytest.raises(RetrainError, match="days=0"):
        Options(days=0)


def test_its_rollout_has_time_for_few_requests() -> None:
    def timeout_s(**given: Any) -> float:
        options = Options(**given)
        assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options
        return options.rollout("ada").stage_timeout_s

    # 200 answers of a share of 1 %.
    assert timeout_s() == pytest.approx(20_000 / (10 / 3))
    assert timeout_s(min_requests=500) == pytest.approx(15_000)
    assert timeout_s(steps=(10, 50, 100), min_requests=100) == 600
    assert timeout_s(step_timeout_s=900) == 900
    for wrong in ({"step_timeout_s": 0}, {"steps": ()}, {"steps": (0, 100)}):
        with pytest.raises(ConfigError, match="--step"):
            Options(**wrong)  # type: ignore[arg-type]
    older = {"preset": "quick", "days": 7.0, "min_requests": 200}
    assert Options.from_json(older) == Options()


def test_the_lineage_leads_from_the_requests_to_the_rollout(storage: Storage) -> None:
    record = retrain.run(storage, begin(storage), FakeSteps(storage))
    kept = storage.read_json(f"lineage/{MODEL}/{record.id}.json")
    edges = {tuple(edge) for edge in kept["edges"]}
    way = ["requests", "data", "sweep", "run", "version", "gate", "rollout"]
    assert set(zip(way, way[1:], strict=False)) | {("parent", "data")} == edges
    assert {node["id"] for node in kept["nodes"]} == {*way, "parent"}
    picture = ElementTree.fromstring(storage.read(f"lineage/{MODEL}/{record.id}.svg").decode())
    text = "".join(picture.itertext())
    assert "version 2" in text
    assert "trigger: drift" in text
    assert "data --> sweep" in to_mermaid(of_retrain(record.to_json()))


def test_names_in_a_lineage_can_hold_any_letters(storage: Storage) -> None:
    graph = of_retrain(begin(storage, '<script>"& drift').to_json())
    ElementTree.fromstring(to_svg(graph))
    assert "<script>" not in to_svg(graph) + to_mermaid(graph)
