"""How a sweep ends: what is recorded, drawn and raised, and in which order; without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lib.config import Settings
from lib.errors import SearchError
from lib.registry.sweep_runs import SweepRun
from lib.registry.tracking import SweepRecord
from lib.storage import Storage
from lib.train.experiment import DOUBLE, MAXIMIZE, Experiment, Named, Objective, Parameter
from lib.train.feed import Feed
from lib.train.journal import Journal
from lib.train.progress import (
    ASKED,
    CUT,
    ENDED,
    FAILED,
    FINISHED,
    REPORTED,
    SESSION,
    STARTED,
    Progress,
)
from lib.train.result import SweepResult
from lib.train.samplers import Study
from lib.train.session import Session
from lib.train.trainable import Desk
from lib.train.work import Work
from tests.sweeps import TinyTrial

EXPERIMENT = Experiment(
    name="ends",
    objectives=(Objective(metric="score", goal=MAXIMIZE),),
    parameters=(Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0),),
    algorithm=Named("random"),
    num_trials=6,
)


@dataclass
class Record:
    """Stands for the record in MLflow."""

    calls: list[str] = field(default_factory=list)
    failed: bool | None = None
    pictures: dict[str, bytes] = field(default_factory=dict)

    def close(self, metrics: dict[str, float], *, failed: bool, files: dict[str, str]) -> None:
        self.calls.append("close")
        self.failed = failed

    def check(self) -> None:
        self.calls.append("check")

    def attach(self, files: dict[str, bytes]) -> None:
        self.calls.append("attach")
        self.pictures = files


@dataclass
class Ended:
    record: Record
    storage: Storage
    result: Any
    seen: list[bytes | None]


def end(folder: Path, ends: Sequence[str], *, limit: int | None = None, draw: bool = True) -> Ended:
    """End a sweep whose trials ended like this; the n-th of them kept the file `n`."""
    experiment = replace(EXPERIMENT, max_failed_trials=limit)
    storage = Storage(str(folder))
    progress, study = Progress(Journal(storage, "sweeps/s"), experiment), Study(experiment)
    progress.add(SESSION)
    desk = Desk(storage=storage, folder="sweeps/s/trials", objectives=experiment.objectives)
    for how in ends:
        number, params, sampled = study.ask()
        progress.add(ASKED, trial=number, params=params, sampled=sampled)
        progress.add(STARTED, trial=number, attempt=f"a{number}")
        storage.write(desk.file(f"a{number}", "model"), str(number).encode())
        for epoch in range(1, 3 if how == FINISHED else 1):
            metrics = {"score": params["x"] * epoch}
            progress.add(REPORTED, trial=number, report=epoch, epoch=epoch, rung=epoch,
                         metrics=metrics)  # fmt: skip
        progress.add(ENDED, trial=number, how=how, why="the target of 3 was reached")
        study.tell(progress.trials[number])
    seen: list[bytes | None] = []

    def confusion(kept: Any) -> list[list[int]]:
        seen.append(kept("model"))
        return [[3, 1], [0, 4]]

    work = Work(
        kind="tiny",
        spec={},
        trainable=TinyTrial,
        shared=lambda resources: {},
        artifacts={"model": "kept/model"},
        confusion=confusion,
        manifest=cast(Any, SimpleNamespace(class_names=("a", "b"), digest="d", rows=lambda _: 1)),
    )
    feed = Feed(progress, desk, work.artifacts)
    settings = Settings(storage=storage.uri, mlflow_uri="http://127.0.0.1:1")
    session = Session(settings, storage, "sweeps/s", experiment, work, progress, study, desk, feed)
    sweep, record = SweepRun(run_id="s", experiment_id="e", tags={}), Record()
    result: Any
    try:
        result = session.result(sweep, cast(SweepRecord, record), draw=draw)
    except SearchError as error:
        result = error
    return Ended(record, storage, result, seen)


def test_pictures_are_left_once_all_that_counts_is_recorded(tmp_path: Path) -> None:
    ended = end(tmp_path, [FINISHED] * 6)
    assert ended.record.calls == ["close", "check", "attach"]
    assert set(ended.record.pictures) == {
        f"pictures/{name}.png"
        for name in ("curves", "importance", "parallel_coordinates", "confusion")
    }
    assert isinstance(ended.result, SweepResult)
    best = ended.result.trials[0].number
    assert ended.seen == [str(best).encode()], "of the best model, as its trial kept it"
    assert ended.storage.list("sweeps", recursive=True) == ["sweeps/s/journal.jsonl"]


def test_pictures_can_be_left_out(tmp_path: Path) -> None:
    ended = end(tmp_path, [FINISHED] * 6, draw=False)
    assert ended.record.calls == ["close", "check"]


def test_a_sweep_without_a_result_leaves_no_picture_and_says_why(tmp_path: Path) -> None:
    ended = end(tmp_path / "failed", [FAILED] * 3)
    assert (ended.record.failed, ended.record.pictures) == (True, {})
    assert str(ended.result).startswith("none of 3 trials left a model (3 failed);")
    ended = end(tmp_path / "cut", [FAILED, CUT])
    assert "(1 failed, the others were cut off: the target" in str(ended.result)
    assert "none could start" in str(end(tmp_path / "none", []).result)


def test_more_failed_trials_than_allowed_fail_the_sweep_with_its_pictures(tmp_path: Path) -> None:
    ends = [FINISHED, FAILED, FAILED]
    ended = end(tmp_path / "over", ends, limit=1)
    assert ended.record.failed
    assert "pictures/confusion.png" in ended.record.pictures
    assert "2 of 3 trials failed, more than the 1 that the experiment" in str(ended.result)
    ended = end(tmp_path / "at", ends, limit=2)
    assert ended.record.failed is False
    assert len(ended.result.trials) == 1


def test_a_fault_in_drawing_fails_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(figure: Any) -> bytes:
        raise MemoryError("no memory for pixels")

    monkeypatch.setattr("lib.train.pictures.png", broken)
    ended = end(tmp_path, [FINISHED] * 6)
    assert isinstance(ended.result, SweepResult)
    assert ended.record.pictures == {}
    assert capsys.readouterr().out.count("WARNING") == 1
