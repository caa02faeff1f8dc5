"""The rollout as a state machine: its way up, its ways back, and being killed anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from lib.errors import (
    ConfigError,
    RegistryError,
    RolloutError,
    ServingError,
    StartError,
    StorageError,
)
from lib.serving.traffic import ModelTraffic
from lib.watch import rollout
from lib.watch import rollout_state as states
from lib.watch.betting import blocks
from lib.watch.gates import Evidence, Outcome, Paired, Verdict
from lib.watch.rollout_state import Options, State
from lib.watch.rollout_world import Replayed

CHAMPION, CANDIDATE = 3, 4
OPTIONS = Options(who="ada")
BEFORE = ModelTraffic(
    weights={CHAMPION: 90.0, CANDIDATE: 10.0},
    bundles={2: "b2", CHAMPION: "b3", CANDIDATE: "b4"},
    champion=CHAMPION,
    previous_champion=2,
    pins={"user-1": CANDIDATE, "user-2": CHAMPION},
)


class Killed(BaseException):
    """What `kill -9` looks like from inside: nothing after it runs."""


class FakeWorld:
    """A line in memory; what is durable survives `Killed`."""

    def __init__(self, traffic: ModelTraffic = BEFORE) -> None:
        self.clock_us = 1_000_000
        self.saved: dict[str, object] | None = None
        self.now_served = traffic
        self.alias = traffic.champion
        self.notes: dict[int, str] = {}
        self.policies: list[ModelTraffic] = [traffic]
        self.effects = 0
        self.kill_at = -1
        self.seen: Callable[[State], Evidence] = lambda state: healthy()
        self.replayed = Replayed(verdict=Verdict(outcome=Outcome.PASS, reason="same"))
        self.aborted = False
        self.registry_is_down = False
        self.start_fails_at = ""
        self.said: list[str] = []

    def effect(self, do: Callable[[], None]) -> None:
        """Do something durable, and die just before or after it if that is wanted."""
        for is_done in (False, True):
            if self.effects == self.kill_at:
                self.effects += 1
                raise Killed
            self.effects += 1
            if not is_done:
                do()

    def now_us(self) -> int:
        self.clock_us += 1000
        return self.clock_us

    def rest(self) -> None:
        self.clock_us += 3_000_000

    def say(self, text: str) -> None:
        self.said.append(text)

    def load(self) -> State | None:
        return None if self.saved is None else State.from_json(self.saved)

    def save(self, state: State) -> None:
        self.effect(lambda: setattr(self, "saved", state.to_json()))

    def is_aborted(self, state: State) -> bool:
        return self.aborted

    def traffic(self) -> ModelTraffic:
        return self.now_served

    def bundle(self, version: int) -> str:
        return f"b{version}"

    def change(self, desired: ModelTraffic, why: str) -> None:
        if self.start_fails_at and self.start_fails_at in why:
            raise StartError("digits-v4 failed to start: broken")
        self.effect(lambda: self.put(desired))

    def put(self, desired: ModelTraffic) -> None:
        if desired != self.now_served:
            self.now_served = desired
            self.policies.append(desired)

    def withdraw(self, desired: ModelTraffic, why: str) -> None:
        self.effect(lambda: self.put(desired))

    def crown(self, desired: ModelTraffic, why: str) -> None:
        self.effect(lambda: self.put(desired))
        self.effect(lambda: setattr(self, "alias", desired.champion))

    def replay(self, state: State) -> Replayed:
        return self.replayed

    def check_metrics(self) -> None:
        pass

    def evidence(self, state: State) -> Evidence:
        return self.seen(state)

    def note(self, state: State) -> None:
        if self.registry_is_down:
            raise RegistryError("MLflow does not answer")
        self.effect(lambda: self.notes.update({state.candidate: state.status}))

    @property
    def shares(self) -> list[float]:
        """Of the candidate, in every policy that there was."""
        return [p.weights.get(CANDIDATE, 0.0) / sum(p.weights.values()) for p in self.policies]


def healthy(requests: int = 600, newest_us: int | None = 2**60) -> Evidence:
    half = np.arange(2 * requests) % 2 == 0
    nothing = np.zeros(2 * requests, bool)
    same = Paired(harm=np.zeros(requests), candidate=0.0, champion=0.0)
    return Evidence(
        requests=requests,
        champion_requests=requests,
        errors=blocks(half, nothing),
        latency=blocks(half, nothing),
        disagreement=same,
        confidence=same,
        newest_us=newest_us,
    )


def failing(state: State) -> Evidence:
    half = np.arange(1200) % 2 == 0
    return replace(healthy(), errors=blocks(half, half & (np.arange(1200) % 10 == 0)))


def failing_from(stage: str) -> Callable[[State], Evidence]:
    return lambda state: failing(state) if state.stage == stage else healthy()


def start(world: FakeWorld, options: Options = OPTIONS) -> State:
    return rollout.begin(world, "digits", CANDIDATE, options, max_disagreement=0.05)


def to_the_end(world: FakeWorld, options: Options = OPTIONS) -> State:
    start(world, options)
    return rollout.run(world)


def test_an_equal_candidate_takes_every_step_and_becomes_champion() -> None:
    world = FakeWorld()
    ended = to_the_end(world)
    assert ended.status == states.PROMOTED
    assert [share * 100 for share in world.shares] == pytest.approx([10, 0, 1, 5, 25, 50, 100, 100])
    assert (world.now_served.champion, world.now_served.previous_champion) == (CANDIDATE, CHAMPION)
    assert world.now_served.weights == {CANDIDATE: 100.0, CHAMPION: 0.0}
    assert world.now_served.shadows == {}
    assert world.alias == CANDIDATE
    assert world.notes == {CANDIDATE: "promoted"}
    passed = [line["stage"] for line in ended.history if line["status"] == "passed"]
    assert passed == list(OPTIONS.stages)
    assert rollout.result(ended)["champion"] == CANDIDATE


def test_shadows_first_and_then_the_champion_gets_copies_of_the_canarys_share() -> None:
    world = FakeWorld()
    to_the_end(world)
    shadow, one, five, quarter, half, whole = world.policies[1:7]
    assert (shadow.weights, shadow.shadows) == ({CHAMPION: 100.0}, {CANDIDATE: 20.0})
    assert one.shadows == five.shadows == {CHAMPION: 100.0}
    assert (quarter.shadows, half.shadows) == ({CHAMPION: 80.0}, {CHAMPION: 40.0})
    assert whole.shadows == {CHAMPION: 20.0}
    # Who was pinned stays so.
    assert half.pins == BEFORE.pins


def test_other_versions_keep_their_ratio_beside_the_canary() -> None:
    others = replace(BEFORE, weights={CHAMPION: 60.0, 2: 30.0, CANDIDATE: 10.0})
    world = FakeWorld(others)
    world.seen = failing_from("canary-25")
    to_the_end(world)
    quarter = world.policies[4]
    assert quarter.weights == pytest.approx({CHAMPION: 50.0, 2: 25.0, CANDIDATE: 25.0})
    assert world.now_served.weights == pytest.approx({CHAMPION: 200 / 3, 2: 100 / 3})


@pytest.mark.parametrize("stage", OPTIONS.stages[1:])
def test_a_breach_takes_everything_back_and_says_why(stage: str) -> None:
    world = FakeWorld()
    world.seen = failing_from(stage)
    ended = to_the_end(world)
    assert (ended.status, ended.stage) == (states.ROLLED_BACK, stage)
    served = world.now_served
    assert (served.champion, served.weights, served.shadows) == (CHAMPION, {CHAMPION: 100.0}, {})
    assert CANDIDATE not in served.bundles
    assert served.pins == {"user-2": CHAMPION}
    assert world.alias == CHAMPION
    assert world.notes == {CANDIDATE: "rolled_back"}
    with pytest.raises(RolloutError, match="error_rate breach: 20.00 %") as caught:
        rollout.result(ended)
    assert caught.value.details["gates"][0]["verdict"] == "breach"
    assert caught.value.details["stage"] == stage


def test_what_fails_on_logged_requests_never_gets_a_live_one() -> None:
    world = FakeWorld(replace(BEFORE, weights={CHAMPION: 100.0}, pins={}))
    world.replayed = Replayed(verdict=Verdict(outcome=Outcome.BREACH, reason="it fails"))
    ended = to_the_end(world)
    assert (ended.status, ended.stage, ended.reason) == ("rolled_back", "replay", "it fails")
    assert set(world.shares) == {0.0}


def test_a_version_that_does_not_start_is_refused() -> None:
    world = FakeWorld()
    world.start_fails_at = "shadow"
    ended = to_the_end(world)
    assert ended.status == states.ROLLED_BACK
    assert "failed to start" in ended.reason
    assert max(world.shares[1:]) == 0


@pytest.mark.parametrize(
    "seen",
    [
        lambda state: healthy(requests=0, newest_us=None),
        lambda state: healthy(requests=199),
        lambda state: (_ for _ in ()).throw(StorageError("the log can't be read")),
    ],
)
def test_no_data_or_too_little_or_a_dead_source_holds_and_never_promotes(
    seen: Callable[[State], Evidence],
) -> None:
    world = FakeWorld()
    world.seen = lambda state: seen(state) if state.stage == "canary-5" else healthy()
    ended = to_the_end(world)
    assert (ended.status, ended.stage) == (states.HELD, "canary-5")
    assert "not decided within 600 s" in ended.reason
    assert max(world.shares[2:]) == pytest.approx(0.05)
    # Nobody looks after it now.
    assert world.now_served.weights == {CHAMPION: 100.0}
    with pytest.raises(RolloutError, match="held at canary-5"):
        rollout.result(ended)
    # With data it goes on at the same step.
    world.seen = lambda state: healthy()
    rollout.resume(world)
    assert rollout.run(world).status == states.PROMOTED
    later = [share for share in world.shares[world.shares.index(0, 2) :] if share]
    assert later == pytest.approx([0.05, 0.25, 0.5, 1, 1])


def test_a_silent_candidate_or_a_dead_source_shows_as_paused_and_goes_on_by_itself() -> None:
    world = FakeWorld()
    looks: list[str] = []

    def seen(state: State) -> Evidence:
        looks.append(state.status)
        if len(looks) < 4:
            raise StorageError("the log can't be read")
        if len(looks) < 20:
            return healthy(requests=0, newest_us=None)
        return healthy()

    world.seen = seen
    assert to_the_end(world).status == states.PROMOTED
    assert looks[:3] == ["running", "paused", "paused"]
    assert looks[18] == "paused"
    assert [line["status"] for line in (world.load() or start(world)).history].count("paused") >= 1


def test_a_person_ends_it_or_changes_the_traffic_and_is_not_overruled() -> None:
    world = FakeWorld()

    def seen(state: State) -> Evidence:
        if state.stage == "canary-25":
            world.aborted = True
        return healthy(requests=0) if world.aborted else healthy()

    world.seen = seen
    ended = to_the_end(world)
    assert (ended.status, world.now_served.weights) == (states.ABORTED, {CHAMPION: 100.0})

    world = FakeWorld()
    theirs = replace(BEFORE, weights={CHAMPION: 70.0, CANDIDATE: 30.0})

    def meddled(state: State) -> Evidence:
        if state.stage == "canary-25":
            world.put(theirs)
        return healthy(requests=0) if state.stage == "canary-25" else healthy()

    world.seen = meddled
    ended = to_the_end(world)
    assert (ended.status, world.now_served) == (states.ABORTED, theirs)
    assert "somebody else changed the traffic" in ended.reason


@pytest.mark.parametrize(
    ("weights", "left"),
    [
        ({2: 70.0, CHAMPION: 10.0, CANDIDATE: 20.0}, {2: 70.0, CHAMPION: 10.0}),
        ({2: 0.0, CANDIDATE: 100.0}, {2: 100.0}),
    ],
)
def test_a_champion_that_a_person_took_back_stays_when_the_rollout_is_ended(
    weights: dict[int, float], left: dict[int, float]
) -> None:
    world = FakeWorld()

    def seen(state: State) -> Evidence:
        if state.stage != "canary-25":
            return healthy()
        world.put(
            replace(
                world.now_served,
                weights=weights,
                champion=2,
                previous_champion=CHAMPION,
                shadows={CANDIDATE: 5.0, CHAMPION: 7.0},
            )
        )
        world.aborted = True
        return healthy(requests=0)

    world.seen = seen
    ended = to_the_end(world)
    served = world.now_served
    assert (ended.status, served.champion) == (states.ABORTED, 2)
    assert (served.weights, served.shadows) == (left, {CHAMPION: 7.0})
    assert CANDIDATE not in served.bundles


@pytest.mark.parametrize("stage", ["shadow", "canary-25", "canary-100"])
@pytest.mark.parametrize("version", [CHAMPION, CANDIDATE])
def test_another_version_of_the_same_number_ends_it_and_stays(stage: str, version: int) -> None:
    world = FakeWorld()

    def seen(state: State) -> Evidence:
        if state.stage == stage:
            bundles = {**world.now_served.bundles, version: "of a model that was made again"}
            world.put(replace(world.now_served, bundles=bundles))
        return healthy()

    world.seen = seen
    ended = to_the_end(world)
    assert ended.status == states.ABORTED
    assert "somebody else changed the traffic" in ended.reason
    assert world.now_served.bundles[version] == "of a model that was made again"


def test_a_held_rollout_does_not_go_on_with_another_version_of_the_same_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = FakeWorld()
    start(world, replace(OPTIONS, stage_timeout_s=1))
    world.seen = lambda state: healthy(requests=0)
    assert rollout.run(world).status == states.HELD
    monkeypatch.setattr(world, "bundle", lambda version: f"another {version}")
    rollout.resume(world)
    assert rollout.run(world).status == states.ABORTED
    assert "another 4" not in world.now_served.bundles.values()


def test_a_change_that_shares_no_request_differently_is_no_reason_to_end() -> None:
    world = FakeWorld()

    def pinned(state: State) -> Evidence:
        if state.stage == "canary-25":
            world.put(replace(world.now_served, pins={"user-9": CHAMPION}))
        return healthy()

    world.seen = pinned
    assert to_the_end(world).status == states.PROMOTED
    assert world.now_served.pins == {"user-9": CHAMPION}


def test_a_registry_that_is_down_does_not_keep_traffic_on_a_bad_version() -> None:
    world = FakeWorld()
    world.registry_is_down = True
    world.seen = failing_from("canary-5")
    ended = to_the_end(world)
    assert (ended.status, ended.noted) == (states.ROLLED_BACK, False)
    assert world.now_served.weights == {CHAMPION: 100.0}


def test_one_rollout_at_a_time_and_none_of_the_champion() -> None:
    world = FakeWorld()
    start(world)
    with pytest.raises(RolloutError, match="version 4 is running at replay"):
        start(world)
    with pytest.raises(ServingError, match="version 3 is the champion already"):
        rollout.begin(FakeWorld(), "digits", CHAMPION, OPTIONS, max_disagreement=0.05)
    with pytest.raises(RolloutError, match="no rollout to go on with"):
        rollout.resume(FakeWorld())
    rollout.run(world)
    with pytest.raises(RolloutError, match="no rollout to go on with"):
        rollout.resume(world)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": ()},
        {"steps": (5, 50)},
        {"steps": (50, 5, 100)},
        {"steps": (0, 100)},
        {"min_requests": 0},
        {"stage_timeout_s": 0},
    ],
)
def test_options_that_make_no_rollout_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Options(**options)  # type: ignore[arg-type]


def good(state: State) -> Evidence:
    return healthy()


def silent(state: State) -> Evidence:
    return healthy(requests=0, newest_us=None) if state.stage == "canary-5" else healthy()


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (good, states.PROMOTED),
        (failing_from("canary-25"), states.ROLLED_BACK),
        (failing_from("shadow"), states.ROLLED_BACK),
        (silent, states.HELD),
    ],
)
def test_killed_before_or_after_any_write_it_goes_on_to_the_same_end(
    seen: Callable[[State], Evidence], expected: str
) -> None:
    options = Options(steps=(5, 25, 100), stage_timeout_s=20)
    whole = FakeWorld()
    whole.seen = seen
    assert to_the_end(whole, options).status == expected
    assert whole.effects > 10
    for kill_at in range(whole.effects):
        world = FakeWorld()
        world.seen, world.kill_at = seen, kill_at
        with pytest.raises(Killed):
            to_the_end(world, options)
        # What the command does when it is given again.
        if world.load() is None:
            start(world, options)
        elif (world.load() or start(world)).status not in states.ENDED:
            rollout.resume(world)
        ended = rollout.run(world)
        assert ended.status == expected, kill_at
        assert world.now_served == whole.now_served, kill_at
        assert (world.alias, world.notes) == (whole.alias, whole.notes), kill_at
        # Never a step skipped, and never back up after it was taken back.
        assert world.shares == pytest.approx(whole.shares), kill_at


def test_the_state_is_what_the_console_reads() -> None:
    world = FakeWorld()
    world.seen = failing_from("canary-5")
    content = to_the_end(world).to_json()
    assert State.from_json(content).to_json() == content
    assert (content["status"], content["stage"], content["weight"]) == (
        "rolled_back",
        "canary-5",
        0,
    )
    assert content["stages"][:3] == ("replay", "shadow", "canary-1")
    assert content["since"].endswith("+00:00")
    assert set(content["gates"][0]) >= {"name", "verdict", "value", "limit", "samples"}
    assert set(content["history"][0]) == {"time", "stage", "status", "reason"}
