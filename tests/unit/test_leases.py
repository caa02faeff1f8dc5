"""Who gets which slot, without Ray: fair order, limits, serving's share, silence and restarts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from lib.config import Settings
from lib.errors import ConfigError
from lib.leases.ledger import Ask, Leases
from lib.leases.owners import limit_of, read_limits
from lib.leases.usage import usage

LEASE_S = 15.0
ROOM = {"CPU": 2.0, "GPU": 0.0}


def ask(sweep: str, *, owner: str = "", cpus: float = 1.0, **said: object) -> Ask:
    return Ask(
        **{
            "sweep": sweep,
            "owner": owner or sweep,
            "wants": 2,
            "size": {"CPU": cpus, "GPU": 0.0},
            "most": ROOM,
            **said,
        }  # type: ignore[arg-type]
    )


def leases() -> Leases:
    return Leases(lease_s=LEASE_S)


@dataclass(kw_only=True)
class Sweep:
    """A driver that obeys: starts trials up to its slots, and tells of each change."""

    name: str
    owner: str = ""
    trial_s: int
    cpus: float = 1.0
    wants: int = 2
    limit: int | None = None
    slots: int = 0
    ends_s: list[int] = field(default_factory=list)
    done: int = 0
    alive: bool = True

    def placed(self, room: float) -> int:
        return len(self.ends_s) if self.alive and self.cpus <= room else 0

    def tell(self, shared: Leases, now_s: int, free_cpus: float, room: float) -> None:
        if not self.alive:
            return
        grant = shared.renew(
            ask(
                self.name,
                owner=self.owner or self.name,
                cpus=self.cpus,
                wants=self.wants,
                limit=self.limit,
                uses=len(self.ends_s),
                placed=self.placed(room),
                slots=self.slots,
                free={"CPU": free_cpus, "GPU": 0.0},
                most={"CPU": room, "GPU": 0.0},
            ),
            now_s,
        )
        self.slots = grant.slots
        while len(self.ends_s) < self.slots:
            self.ends_s.append(now_s + self.trial_s)


def play(
    sweeps: list[Sweep], *, seconds: int, room: float = 2.0, starts: dict[str, int] | None = None
) -> list[Counter[str]]:
    """Let sweeps share a cluster second by second; return what each ran in every second."""
    shared, ran = leases(), []
    for now_s in range(seconds):
        for sweep in sweeps:
            if now_s < (starts or {}).get(sweep.name, 0):
                continue
            if sweep.placed(room):
                sweep.done += sum(end_s <= now_s for end_s in sweep.ends_s)
                sweep.ends_s = [end_s for end_s in sweep.ends_s if end_s > now_s]
            taken = sum(other.cpus * other.placed(room) for other in sweeps)
            sweep.tell(shared, now_s, room - taken, room)
        used = sum(sweep.cpus * sweep.placed(room) for sweep in sweeps)
        assert used <= room + 1e-6, f"at {now_s} s {used} of {room} CPUs are in use"
        ran.append(Counter({sweep.name: len(sweep.ends_s) for sweep in sweeps if sweep.alive}))
    return ran


def test_a_sweep_alone_has_all_and_is_told_that_it_need_not_ask() -> None:
    grant = leases().renew(ask("a", wants=8, free={"CPU": 1.0}), 0)
    assert (grant.slots, grant.alone) == (8, True), "whatever was measured"
    assert leases().renew(ask("a", wants=8, limit=3), 0).slots == 3


def test_a_later_sweep_gets_its_share_as_trials_end_and_none_is_ended_for_it() -> None:
    ran = play(
        [Sweep(name="ann", trial_s=10), Sweep(name="bob", trial_s=10)],
        seconds=100,
        starts={"bob": 5},
    )
    assert ran[4] == Counter(ann=2, bob=0)
    assert all(second["ann"] == 2 for second in ran[:10])
    assert all(second == {"ann": 1, "bob": 1} for second in ran[12:])


def test_short_trials_do_not_crowd_out_long_ones() -> None:
    sweeps = [Sweep(name="short", trial_s=1), Sweep(name="long", trial_s=30)]
    ran = play(sweeps, seconds=200, starts={"long": 3})
    assert all(second["long"] == 1 for second in ran[6:])


def test_owners_share_not_sweeps() -> None:
    sweeps = [
        *(Sweep(name=f"ann-{n}", owner="ann", trial_s=5, wants=4) for n in range(3)),
        Sweep(name="bob", trial_s=5, wants=4),
    ]
    ran = play(sweeps, seconds=120, room=4.0)
    late = ran[40:]
    assert all(second["bob"] == 2 for second in late), "three sweeps of ann's count as one owner"
    shares = [sum(second[f"ann-{n}"] for second in late) / len(late) for n in range(3)]
    assert shares == pytest.approx([2 / 3] * 3, abs=0.2), "which take turns among themselves"


def test_more_owners_than_slots_take_turns() -> None:
    sweeps = [Sweep(name=name, trial_s=4) for name in ("ann", "bob", "eve", "joe", "kim")]
    play(sweeps, seconds=400)
    done = [sweep.done for sweep in sweeps]
    assert min(done) >= 0.7 * max(done) > 20


def test_no_owner_exceeds_his_limit_and_what_he_may_not_have_others_get() -> None:
    sweeps = [
        Sweep(name="ann-1", owner="ann", trial_s=5, wants=4, limit=1),
        Sweep(name="ann-2", owner="ann", trial_s=5, wants=4, limit=1),
        Sweep(name="bob", trial_s=5, wants=4),
    ]
    ran = play(sweeps, seconds=100, room=4.0)
    assert max(second["ann-1"] + second["ann-2"] for second in ran) == 1
    assert all(second["bob"] == 3 for second in ran[20:])
    assert min(sweeps[0].done, sweeps[1].done) > 5


def test_large_trials_are_not_passed_by_small_ones_for_ever() -> None:
    sweeps = [
        Sweep(name="small", trial_s=3),
        Sweep(name="large", trial_s=3, cpus=2.0, wants=1),
    ]
    play(sweeps, seconds=200, starts={"large": 4})
    assert min(sweep.done for sweep in sweeps) > 20


def test_who_asks_for_more_than_there_is_holds_nobody_up() -> None:
    sweeps = [Sweep(name="ann", trial_s=3), Sweep(name="huge", trial_s=3, cpus=5.0, wants=1)]
    ran = play(sweeps, seconds=50, starts={"huge": 4})
    assert sweeps[1].done == 0
    assert all(second["ann"] == 2 for second in ran[10:])


def test_gpus_and_cpus_do_not_stand_in_each_others_way() -> None:
    shared = leases()
    room = {"CPU": 8.0, "GPU": 1.0}
    free = {"free": room, "most": room}
    gpu = {"size": {"CPU": 1.0, "GPU": 0.5}, "wants": 2, **free}
    assert shared.renew(ask("ann", **gpu), 0).slots == 2
    used = {**gpu, "uses": 2, "placed": 2, "slots": 2, "free": {"CPU": 6.0, "GPU": 0.0}}
    shared.renew(ask("bob", **gpu), 1)
    shared.renew(ask("ann", **used), 1)
    assert shared.renew(ask("bob", **{**gpu, "free": None}), 2).slots == 0, "no GPU is left"
    assert shared.renew(ask("eve", wants=8, free=None, most=room), 2).slots == 5, (
        "one CPU is kept for the trial that waits for a GPU"
    )


def test_a_dead_drivers_slots_come_back_when_its_lease_is_over() -> None:
    shared = leases()
    free = {"CPU": 2.0, "GPU": 0.0}
    shared.renew(ask("ann", free=free), 0)
    shared.renew(ask("ann", uses=2, placed=2, slots=2, free={"CPU": 0.0, "GPU": 0.0}), 1)
    waiting = ask("bob", free=None)
    assert shared.renew(waiting, 2).slots == 0
    assert shared.renew(waiting, 1 + LEASE_S).slots == 0
    grant = shared.renew(waiting, 1.1 + LEASE_S)
    assert (grant.slots, grant.alone) == (2, True)


def test_a_sweep_that_ends_gives_its_slots_back_at_once() -> None:
    shared = leases()
    shared.renew(ask("ann", uses=2, placed=2, slots=2, free={"CPU": 0.0, "GPU": 0.0}), 0)
    assert shared.renew(ask("bob"), 1).slots == 0
    shared.release("ann")
    assert shared.renew(ask("bob"), 2).slots == 2


def test_what_serving_reserves_or_is_kept_for_it_is_no_sweeps() -> None:
    shared = leases()
    most = {"CPU": 3.0, "GPU": 0.0}  # Of four CPUs one is kept for replicas to come.
    shared.renew(ask("ann", wants=4, free={"CPU": 4.0, "GPU": 0.0}, most=most), 0)
    assert shared.room == {"CPU": 3.0, "GPU": 0.0}
    shared.renew(ask("bob", wants=4, most=most), 1)
    held = ask("ann", wants=4, uses=2, placed=2, slots=2, most=most, free={"CPU": 1.0, "GPU": 0})
    for second in range(9):  # Replicas have come: of four, two are left to trials.
        shared.renew(replace(held, free={"CPU": 0.2, "GPU": 0.0}), 2 + second)
    assert shared.room == {"CPU": 2.2, "GPU": 0.0}
    assert shared.renew(ask("bob", wants=4, most=most), 11).slots == 0


def test_one_odd_measurement_changes_nothing() -> None:
    shared = leases()
    most = {"CPU": 4.0, "GPU": 0.0}
    for second, free in enumerate([2.0, 2.0, 0.0, 2.0, 3.0, 2.0]):
        shared.renew(ask("ann", free={"CPU": free, "GPU": 0.0}, most=most), second)
    assert shared.room == ROOM


def test_a_process_that_starts_is_not_taken_for_less_room() -> None:
    shared = leases()
    shared.renew(ask("a", uses=1, placed=1, slots=1, free={"CPU": 1.0}), 0.0)
    shared.renew(ask("b", free={"CPU": 1.0}), 0.0)
    shared.renew(ask("b", uses=1, placed=0, slots=1), 0.1)
    for second in range(1, 11):
        # The second core is b's, and nothing runs on it yet.
        shared.renew(ask("a", uses=1, placed=1, slots=1, free={"CPU": 0.0}), float(second))
    assert shared.room == {"CPU": 2.0}
    assert shared.renew(ask("a", uses=0, slots=0), 11.0).slots == 1, "its trial has ended"


def test_after_a_restart_nothing_is_lent_before_all_have_been_heard() -> None:
    shared = Leases(lease_s=LEASE_S, recovers_until_s=100.0)
    measured = {"free": {"CPU": 0.0, "GPU": 0.0}}
    assert shared.renew(ask("bob"), 86).slots == 0, "ann has not been heard yet"
    assert shared.renew(ask("ann", uses=1, placed=1, slots=2, **measured), 87).slots == 2
    assert shared.renew(ask("bob"), 99).slots == 0
    shared.renew(ask("ann", uses=2, placed=2, slots=2, **measured), 100)
    assert shared.renew(ask("bob"), 101).slots == 0, "now it is known what ann holds"


def test_limits_are_read_and_refused_by_name() -> None:
    limits = read_limits("X", " ann=2, *=4 ,")
    assert limits == {"ann": 2, "*": 4}
    assert (limit_of(limits, "ann"), limit_of(limits, "bob")) == (2, 4)
    assert limit_of({"ann": 2}, "bob") is None
    settings = Settings(storage="/data", mlflow_uri="http://127.0.0.1:5000")
    for text, message in (
        ("ann", "'ann' is no limit"),
        ("ann=0", "at least 1"),
        ("=3", "'=3' is no limit"),
        ("ann=two", "'ann=two' is no limit"),
        ("ann=1,ann=2", "ann is given two limits"),
    ):
        with pytest.raises(ConfigError, match=f"RAYLINE_OWNER_LIMITS=.*{message}"):
            replace(settings, owner_limits=text)


@pytest.mark.parametrize("given", ["-1", "nan", "inf", "many"])
def test_serving_is_kept_a_number_of_cpus(given: str) -> None:
    env = {"RAYLINE_STORAGE": "/data", "MLFLOW_TRACKING_URI": "http://mlflow"}
    assert Settings.from_env({**env, "RAYLINE_SERVE_CPUS": "0.4"}).serve_cpus == 0.4
    with pytest.raises(ConfigError, match="RAYLINE_SERVE_CPUS="):
        Settings.from_env({**env, "RAYLINE_SERVE_CPUS": given})


def test_who_uses_what_is_summed_up_by_owner() -> None:
    lease = {"sweep": "s1", "owner": "ann", "limit": None, "slots": 2, "running": 1, "wants": 2,
             "trial": {"CPU": 0.8, "GPU": 0.0}, "seconds": 90.0}  # fmt: skip
    seen = {"room": {"CPU": 1.6, "GPU": 0.0}, "leases": [lease, {**lease, "sweep": "s2"}]}
    used = usage(seen, {"CPU": 2.0})
    assert used["owners"] == {"ann": {"sweeps": 2, "slots": 4, "wants": 4}}
    assert used["cpu"] == {"total": 2.0, "for_trials": 1.6, "in_trials": 1.6}
    nobody = usage(None, {"CPU": 2.0})
    assert nobody["owners"] == {}
    assert math.isclose(nobody["cpu"]["in_trials"], 0.0)
