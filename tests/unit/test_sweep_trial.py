"""What trials get from their base class: reports, kept state, failures; without Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib.errors import DeviceError, StorageError
from lib.storage import Storage
from lib.train.experiment import MAXIMIZE, Objective
from lib.train.trainable import (
    AT_RUNG,
    ENDS,
    FAILED,
    NO_DEVICE,
    NO_PLACE,
    REPORT,
    RESUME,
    RUNG_COUNT,
    Desk,
    SweepTrial,
)


class Counter(SweepTrial):
    """Counts; its score rises, but for the third epoch."""

    ended = 0

    def begin(self, params: Mapping[str, Any]) -> None:
        if params.get("broken"):
            raise ValueError("no such width")
        self._params, self._n = params, 0

    def advance(self) -> Mapping[str, Any]:
        self._n += 1
        if self._n == self._params.get("nan_at"):
            return {"score": math.nan}
        if self._n == self._params.get("silent_at"):
            return {"done": True}
        return {"score": float(self._n if self._n != 3 else 0), "done": self._n >= 5}

    def state(self) -> bytes:
        return str(self._n).encode()

    def load(self, state: bytes) -> None:
        self._n = int(state)

    def artifacts(self, is_best: bool) -> Mapping[str, bytes]:
        return {"best": str(self._n).encode()} if is_best else {}

    def end(self) -> None:
        self.ended += 1


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(
        storage=Storage(str(tmp_path)),
        folder="trials",
        objectives=(Objective(metric="score", goal=MAXIMIZE),),
        rungs=(2, 5),
        rung_counts=(1, 3),
    )


def started(desk: Desk, attempt: str, config: dict[str, Any]) -> Counter:
    trial = object.__new__(Counter)
    trial._trial_info = SimpleNamespace(trial_id=attempt)
    trial.setup(config, desk=desk, shared={})
    return trial


def test_reports_are_numbered_and_comparable_at_rungs(desk: Desk) -> None:
    trial = started(desk, "a", {})
    reports = [trial.step() for _ in range(5)]
    assert [report["epoch"] for report in reports] == [1, 2, 3, 4, 5]
    assert [report[REPORT] for report in reports] == [1, 2, 3, 4, 5]
    assert [report[AT_RUNG] for report in reports] == [False, True, False, False, True]
    assert [report[RUNG_COUNT] for report in reports] == [0, 1, 1, 1, 3]
    assert [report[ENDS] for report in reports] == [False] * 4 + [True]


def test_an_interrupted_trial_repeats_its_last_report_and_goes_on(desk: Desk) -> None:
    first = started(desk, "a", {})
    for _ in range(3):
        last = first.step()
    same = started(desk, "a", {})  # Its process died.
    assert same.step() == last
    assert same.step()["epoch"] == 4
    other = started(desk, "b", {RESUME: ["a"]})  # Its driver died: Tune knows it by another name.
    assert other.step()["epoch"] == 4
    assert other.step()["score"] == 5.0
    # Killed again before anything new was kept, it goes on from what was kept first.
    started(desk, "c", {RESUME: ["b", "a"]})
    third = started(desk, "d", {RESUME: ["c", "b0", "a"]})
    assert [third.step()["epoch"] for _ in range(2)] == [4, 5]
    assert started(desk, "e", {}).step()["epoch"] == 1


def test_what_is_kept_is_of_the_best_report(desk: Desk) -> None:
    trial = started(desk, "a", {})
    for kept in (b"1", b"2", b"2", b"4"):
        trial.step()
        assert desk.storage.read(desk.file("a", "best")) == kept
    resumed = started(desk, "b", {RESUME: ["a"]})
    resumed.step()
    assert not desk.storage.exists(desk.file("b", "best")), "that report was kept before"
    resumed.step()
    assert desk.storage.read(desk.file("b", "best")) == b"5"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"broken": True}, "ValueError: no such width"),
        ({"nan_at": 1}, "SearchError: the trial reported score = nan"),
        ({"silent_at": 1}, "SearchError: the trial reported no score"),
    ],
)
def test_a_failure_is_the_trials_and_the_next_one_runs(
    desk: Desk, config: dict[str, Any], reason: str
) -> None:
    trial = started(desk, "a", config)
    assert trial.step() == {FAILED: reason, "done": True}
    trial._trial_info = SimpleNamespace(trial_id="b")
    assert trial.reset_config({})
    assert trial.ended == 1
    assert trial.step()["score"] == 1.0


def test_a_trial_may_end_with_nothing_new(desk: Desk) -> None:
    trial = started(desk, "a", {"silent_at": 2})
    trial.step()
    assert trial.step() == {"done": True, ENDS: True, AT_RUNG: False}


def test_no_place_to_keep_a_report_is_said_to_the_sweep(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = started(desk, "a", {})

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib.storage.os.replace", full)
    assert "no space left" in trial.step()[NO_PLACE]


def test_an_object_store_that_is_away_ends_the_process_and_no_trial(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = started(desk, "a", {})
    trial.step()
    monkeypatch.setattr(Storage, "is_local", False)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", raises(StorageError("SLOW_DOWN")))
        with pytest.raises(StorageError):
            trial.step()
    # In its next process it goes on from the state before.
    again = started(desk, "a", {})
    assert [again.step()["epoch"] for _ in range(2)] == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(again, "advance", raises(OSError("NETWORK_CONNECTION")))
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):
            again.step()


def test_an_error_after_which_the_process_is_of_no_use_fails_no_trial(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = started(desk, "a", {})
    trial.step()
    monkeypatch.setattr(trial, "ends_process", lambda error: "illegal" in str(error))
    monkeypatch.setattr(trial, "advance", raises(RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        trial.step()
    monkeypatch.setattr(trial, "advance", raises(RuntimeError("wrong shape")))
    assert trial.step()[FAILED] == "RuntimeError: wrong shape"


def test_a_gpu_that_cannot_be_used_is_said_to_the_sweep(desk: Desk) -> None:
    class Unusable(Counter):
        def prepare(self, *args: Any, **shared: Any) -> None:
            raise DeviceError("the driver is too old")

    trial = object.__new__(Unusable)
    trial._trial_info = SimpleNamespace(trial_id="a")
    trial.setup({}, desk=desk, shared={})
    assert trial.step() == {NO_DEVICE: "the driver is too old", "done": True}


def raises(error: Exception) -> Any:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    return broken


def test_a_scheduler_can_clone_a_trial(desk: Desk, tmp_path: Path) -> None:
    donor, other = started(desk, "a", {}), started(desk, "b", {})
    for _ in range(4):
        donor.step()
    other.step()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    donor.save_checkpoint(str(folder))
    assert other.reset_config({})
    other.load_checkpoint(str(folder))
    report = other.step()
    assert (report["epoch"], report["score"]) == (5, 5.0)


def test_a_trial_that_another_process_took_over_is_never_begun_here(desk: Desk) -> None:
    begun: list[dict[str, Any]] = []

    class Noted(Counter):
        def begin(self, params: Mapping[str, Any]) -> None:
            begun.append(dict(params))
            super().begin(params)

    trial = object.__new__(Noted)
    trial._trial_info = SimpleNamespace(trial_id="a")
    trial.setup({"width": 1}, desk=desk, shared={})
    assert trial.reset_config({"width": 2})
    trial.step()
    assert begun == [{"width": 2}]
