"""From a retrain to its rollout: what goes on, what is not begun again, and what gives way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.config import Settings
from lib.errors import RolloutError
from lib.storage import Storage
from lib.watch import live, retrain
from lib.watch import rollout_state as states
from lib.watch.hand_over import hand_over
from lib.watch.rollout_state import Options, State
from tests.unit.test_interrupted import MODEL, rolling


class Rollouts:
    """Stands for `lib.watch.live`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.error: RolloutError | None = None

    def roll_out(
        self, settings: Settings, storage: Storage, version: int, options: Options
    ) -> Mapping[str, Any]:
        self.calls.append(("roll_out", version))
        if self.error:
            raise self.error
        return {"status": "promoted", "steps": options.steps}

    def abort(self, settings: Settings, storage: Storage, *, who: str) -> Mapping[str, Any]:
        self.calls.append(("abort", who))
        return {"status": "aborted"}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> Rollouts:
    made = Rollouts()
    monkeypatch.setattr(live, "roll_out", made.roll_out)
    monkeypatch.setattr(live, "abort", made.abort)
    return made


def hand(storage: Storage, version: int) -> Mapping[str, Any]:
    settings = Settings(storage=storage.uri, mlflow_uri="http://nowhere", model=MODEL)
    return hand_over(settings, storage, version, Options(steps=(20, 100), who="monitor"))


def leave(storage: Storage, **changed: Any) -> State:
    rolling(storage)
    found = states.load(storage, MODEL)
    assert found is not None
    found = replace(found, **changed)
    states.save(storage, found)
    return found


def test_it_is_rolled_out_as_asked_and_an_end_without_promotion_is_a_result(
    storage: Storage, rollouts: Rollouts
) -> None:
    assert hand(storage, 3) == {"status": "promoted", "steps": (20, 100)}
    rollouts.error = RolloutError("stopped", details={"status": "rolled_back"})
    assert hand(storage, 3) == {"status": "rolled_back"}
    rollouts.error = RolloutError("another process runs it")
    with pytest.raises(RolloutError, match="another process"):
        hand(storage, 3)


def test_one_that_ended_is_not_begun_again(storage: Storage, rollouts: Rollouts) -> None:
    leave(storage, status=states.ROLLED_BACK, reason="p99")
    assert hand(storage, 2) == {"status": "rolled_back", "stage": "shadow", "reason": "p99"}
    assert rollouts.calls == []


def test_the_held_version_of_an_earlier_retrain_gives_way(
    storage: Storage, rollouts: Rollouts
) -> None:
    earlier = retrain.begin(storage, MODEL, "drift", who="monitor")
    leave(storage, status=states.HELD, who=earlier.by)
    hand(storage, 3)
    assert rollouts.calls == [("abort", "monitor"), ("roll_out", 3)]


@pytest.mark.parametrize(
    ("version", "status", "who"),
    [(3, states.HELD, "ada"), (3, states.RUNNING, "monitor, retrain x"), (2, states.HELD, "a, b")],
    ids=["a persons", "one under way", "its own"],
)
def test_nothing_else_does(
    storage: Storage, rollouts: Rollouts, version: int, status: str, who: str
) -> None:
    leave(storage, status=status, who=who)
    hand(storage, version)
    assert rollouts.calls == [("roll_out", version)]
