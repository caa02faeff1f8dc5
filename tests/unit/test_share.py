"""A driver's side of the lease, with a lender in this process, and what the search makes of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lib.leases.ledger import Ask, Grant
from lib.leases.lender import Lender
from lib.leases.share import LenderAwayError, Share
from lib.storage import Storage
from lib.train.experiment import DOUBLE, MAXIMIZE, Experiment, Named, Objective, Parameter
from lib.train.journal import Journal
from lib.train.progress import SESSION, Progress
from lib.train.samplers import Study
from lib.train.schedulers import AtRungs
from lib.train.searcher import StudySearcher, TrialSource

FREE = {"CPU": 2.0}
EXPERIMENT = Experiment(
    name="shared",
    objectives=(Objective(metric="score", goal=MAXIMIZE),),
    parameters=(Parameter(name="x", kind=DOUBLE, low=0.0, high=1.0),),
    algorithm=Named("random"),
    num_trials=10,
)


class Remote:
    """The lender in this process; it can be taken away."""

    def __init__(self) -> None:
        self.lender = Lender()
        self.asks: list[Ask] = []
        self.tries: Counter[str] = Counter()
        """Renewals by owner, those that got no answer too."""
        self.is_away = False
        self.is_new = False

    def renew(self, ask: Ask) -> Grant:
        self.tries[ask.owner] += 1
        if self.is_away:
            raise LenderAwayError("gone")
        self.asks.append(ask)
        return self.lender.renew(ask)

    def release(self, sweep: str) -> None:
        self.lender.release(sweep)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.leases.share.BEAT_S", 0.1)
    monkeypatch.setattr("lib.leases.share._WAITING_BEAT_S", 0.02)


def share(remote: Remote, owner: str, limit: int | None = None) -> Share:
    taken = {"CPU": 0.0}
    return Share(
        remote, sweep=f"of-{owner}", owner=owner, limit=limit, measure=lambda: (taken, FREE)
    )


def ask(mine: Share) -> float:
    return mine.ask(size={"CPU": 1.0}, parallel=2, most=3, free=FREE, free_most=FREE)


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it never came to that"
        time.sleep(0.01)


def let_ask(remote: Remote, *owners: str) -> None:
    """Wait until each of them has asked some more times."""
    goals = {owner: remote.tries[owner] + 3 for owner in owners}
    wait_until(lambda: all(remote.tries[owner] >= goal for owner, goal in goals.items()))


def test_a_sweep_alone_starts_trials_without_asking_and_keeps_one_waiting() -> None:
    remote = Remote()
    with share(remote, "ann") as mine:
        assert mine.room() is None
        ask(mine)
        before, start_s = len(remote.asks), time.monotonic()
        for left in range(2000, 0, -1):
            mine.update(running=2, pending=left % 2, left=left)
            assert mine.limit == 3, "one more than there is room for: no slot is ever idle"
        beats = (time.monotonic() - start_s) / 0.1
        assert len(remote.asks) - before <= beats + 2
    assert not remote.lender.view()["leases"], "it gave all back"


def test_a_limit_holds_for_a_sweep_alone_too() -> None:
    for limit, trials in ((1, 1), (2, 2), (3, 3), (None, 3)):
        with share(Remote(), "ann", limit) as mine:
            ask(mine)
            assert mine.limit == trials


def test_a_slot_is_asked_for_again_and_goes_to_who_waits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    remote = Remote()
    with share(remote, "ann") as anns, share(remote, "bob") as bobs:
        ask(anns)
        anns.update(running=2, pending=0, left=8)
        wait_until(lambda: anns.is_settled and anns.limit == 2)
        wait_until(lambda: (bobs.room() or {}).get("CPU") == 2.0)

        waited: list[float] = []
        waiting = threading.Thread(target=lambda: waited.append(ask(bobs)))
        waiting.start()
        wait_until(lambda: any(told.owner == "bob" and told.wants for told in remote.asks))
        asked_s = time.monotonic()
        let_ask(remote, "bob")
        assert not waited, "there is no slot"
        without_s = time.monotonic() - asked_s
        anns.update(running=1, pending=0, left=8)
        assert anns.limit == 1, "not lent on before it was asked for"
        waiting.join(timeout=5)
        assert waited
        assert waited[0] >= without_s
        assert bobs.limit == 1
        wait_until(lambda: anns.is_settled)
        assert anns.limit == 1
        bobs.update(running=1, pending=0, left=5)
        # Bob's trial ends, and nobody has fewer than none: the slot is his again.
        bobs.update(running=0, pending=0, left=5)
        wait_until(lambda: bobs.is_settled and bobs.limit == 1)
    assert "waiting for a slot: ann holds 2" in capsys.readouterr().out


def test_a_process_without_a_trial_is_not_taken_for_less_room() -> None:
    remote = Remote()
    with share(remote, "ann") as anns, share(remote, "bob") as bobs:
        for mine in (anns, bobs):
            ask(mine)
            mine.update(running=1, pending=0, left=8)
        wait_until(lambda: anns.is_shared and bobs.is_shared and (anns.limit, bobs.limit) == (1, 1))
        # Its process stays until it is known whose the slot is, so nothing is free.
        for _ in range(5):
            before = len(remote.asks)
            anns.update(running=0, pending=0, left=8)
            wait_until(lambda: anns.is_settled)
            assert anns.limit == 1, "bob has his, so it is ann's again"
            told = next(a for a in remote.asks[before:] if a.owner == "ann" and not a.uses)
            assert told.free is None
            anns.update(running=1, pending=0, left=7)
            wait_until(lambda: anns.is_settled)


def test_without_a_lender_the_sweep_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lib.leases.share._ANSWER_S", 0.3)
    remote = Remote()
    remote.is_away = True
    with share(remote, "ann") as mine:
        assert mine.room() is None
        ask(mine)
        assert mine.limit == 3
        let_ask(remote, "ann")
        assert capsys.readouterr().out.count("nobody lends slots to sweeps now") == 1
        remote.is_away = False
        remote.lender.renew(Ask(sweep="b", owner="bob", uses=2, size={"CPU": 1.0}, wants=2))
        wait_until(lambda: mine.is_shared)


def test_the_first_sweep_begins_while_the_lenders_process_starts() -> None:
    remote = Remote()
    remote.is_away = remote.is_new = True
    with share(remote, "ann") as mine:
        assert mine.room() is None
        assert ask(mine) < 1
        mine.update(running=2, pending=1, left=7)
        assert mine.limit == 3
        remote.lender.renew(Ask(sweep="b", owner="bob", uses=0, size={"CPU": 1.0}, wants=2))
        remote.is_away = False
        wait_until(lambda: mine.is_shared)
        wait_until(lambda: remote.asks[-1].uses == 3)
        assert all(said.free != FREE for said in remote.asks if said.placed), "free is what is left"
        assert mine.limit <= 3


def test_a_lender_that_restarts_changes_nothing() -> None:
    remote = Remote()
    with share(remote, "ann") as anns, share(remote, "bob") as bobs:
        ask(anns)
        anns.update(running=1, pending=0, left=8)
        wait_until(lambda: anns.is_shared and anns.is_settled)
        ask(bobs)
        bobs.update(running=1, pending=0, left=8)
        wait_until(lambda: (anns.limit, bobs.limit) == (1, 1))
        remote.is_away = True
        let_ask(remote, "ann", "bob")
        assert (anns.limit, bobs.limit) == (1, 1)
        remote.lender, remote.is_away = Lender(recovers=True), False
        wait_until(lambda: len(remote.lender.view()["leases"]) == 2)
        assert (anns.limit, bobs.limit) == (1, 1)


class Slots:
    """Grants what a test says."""

    limit, is_shared, is_settled = 2, True, True
    told: tuple[int, int, int] = (0, 0, 0)
    pauses = 0

    def update(self, *, running: int, pending: int, left: int) -> None:
        self.told = (running, pending, left)

    def pause(self) -> None:
        self.pauses += 1


@pytest.fixture
def slots() -> Slots:
    return Slots()


@pytest.fixture
def searcher(tmp_path: Path, slots: Slots) -> Iterator[StudySearcher]:
    with Journal(Storage(str(tmp_path / "storage")), "sweep") as journal:
        progress = Progress(journal, EXPERIMENT)
        progress.add(SESSION)
        yield StudySearcher(Study(EXPERIMENT), progress, slots)


def trials(*statuses: str) -> list[Any]:
    return [SimpleNamespace(status=status) for status in statuses]


def test_no_more_trials_are_handed_out_than_there_are_slots(
    searcher: StudySearcher, slots: Slots
) -> None:
    searcher.begin_step([])
    assert [searcher.suggest(f"t{n}") is not None for n in range(3)] == [True, True, False]
    searcher.end_step()
    searcher.begin_step(trials("RUNNING", "PENDING", "PAUSED", "TERMINATED"))
    assert slots.told == (1, 1, 8 + 1)
    assert searcher.suggest("t3") is None
    assert not searcher.may_resume()


def test_without_a_slot_it_waits_and_does_not_ask_without_end(
    searcher: StudySearcher, slots: Slots
) -> None:
    slots.limit = 0
    searcher.begin_step(trials("TERMINATED"))
    assert slots.pauses == 1
    assert searcher.suggest("t") is None


def test_a_process_goes_with_its_slot_and_the_sweep_goes_on(
    searcher: StudySearcher, slots: Slots
) -> None:
    source = TrialSource(searcher)
    source._total_samples = 10
    both = trials("RUNNING", "RUNNING")
    searcher.begin_step(both)
    both[0].status = "TERMINATED"
    assert not source.is_finished(), "the next trial takes its process"
    slots.limit, slots.is_settled = 1, False
    assert not source.is_finished(), "perhaps the slot stays"
    slots.is_settled = True
    assert source.is_finished(), "Tune keeps no process then"
    slots.is_shared = False
    assert not source.is_finished()
    slots.is_shared = True
    searcher.end_step()
    assert not source.is_finished(), "and the sweep is not over"


def test_a_paused_trial_needs_a_slot_to_go_on(searcher: StudySearcher, slots: Slots) -> None:
    paused, pending = trials("PAUSED", "PENDING")
    inner = SimpleNamespace(choose_trial_to_run=lambda controller: paused)
    progress = cast(Progress, SimpleNamespace(trials={}))
    scheduler = AtRungs("hyperband", cast(Any, inner), progress, searcher.may_resume)
    searcher.begin_step(trials("RUNNING", "PAUSED"))
    assert scheduler.choose_trial_to_run(None) is paused
    slots.limit = 1
    assert scheduler.choose_trial_to_run(None) is None
    inner.choose_trial_to_run = lambda controller: pending
    assert scheduler.choose_trial_to_run(None) is pending, "it had its slot when it was asked for"
    slots.is_shared = False
    inner.choose_trial_to_run = lambda controller: paused
    assert scheduler.choose_trial_to_run(None) is paused


def test_a_process_that_has_come_free_is_for_a_trial_without_one() -> None:
    # Hashed as Tune's trials are.
    running, starting, requested, new = (
        type("Trial", (), {"status": status})()
        for status in ("RUNNING", "PENDING", "PENDING", "PENDING")
    )
    actors = {running: "up", starting: "coming", requested: "asked for"}
    manager = SimpleNamespace(is_actor_started=lambda actor: actor in ("up", "coming"))
    inner = SimpleNamespace(choose_trial_to_run=lambda controller: starting)
    progress = cast(Progress, SimpleNamespace(trials={}))
    scheduler = AtRungs("asha", cast(Any, inner), progress)

    def chosen(*known: Any) -> Any:
        return scheduler.choose_trial_to_run(
            SimpleNamespace(
                get_trials=lambda: known,
                _tune_controller=SimpleNamespace(_trial_to_actor=actors, _actor_manager=manager),
            )
        )

    assert chosen(running, starting, requested, new) is requested
    assert chosen(running, starting, new) is new
    assert chosen(running, starting) is None, "its own process is kept"
