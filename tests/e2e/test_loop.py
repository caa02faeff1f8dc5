"""The loop closes by itself: drift → retrain → register → rollout → promoted, with nobody there.

Callers begin to send digits with black and white exchanged, and their true labels. A monitor that
may act is all that runs beside the line. Then the same while its parts are killed again and again.

RAYLINE_KILL_SEED=7 repeats the kills of a run that printed 7.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lib.serving import policy
from lib.watch import live, memory
from lib.watch import retrain_record as records
from lib.watch import rollout_state as states
from lib.watch.memory import Memory
from lib.watch.retrain_record import DONE, RUNNING, Record
from lib.watch.sequence import Evidence
from tests.data_sources import mnist
from tests.e2e.callers import Callers, calling
from tests.e2e.clients import until
from tests.e2e.conftest import LiveLine
from tests.e2e.drills import Drill, left_as_it_was

pytestmark = pytest.mark.long

INVERTED_NHW = 255 - mnist("test")[0]
WITHIN_S = 600.0
EVERY_S = 20
ROLLOUT = ("--steps", "10,50,100", "--min-requests", "100")
MONITOR = ("jobs.monitor", "--every", str(EVERY_S), "--act", "--preset", "smoke", *ROLLOUT)
CALM_WINDOWS = 6
KILLS_A_STEP = 2
KILLED_WITHIN_S = 1800.0


@pytest.fixture
def drill(line: LiveLine) -> Iterator[Drill]:
    with left_as_it_was(line) as made:
        forget_drift(made)
        yield made


def forget_drift(drill: Drill) -> None:
    """Let the monitor begin now, whatever other tests have sent before."""
    known = memory.recall(drill.storage, drill.line.model)
    now_us = time.time_ns() // 1000
    fresh = Memory(
        number=(known[0].number if known else 0) + 1,
        cursor_us=now_us,
        block_from_us=now_us,
        reference="",
        evidence=Evidence(),
    )
    look = {"time": now_us / 1e6, "windows": [], "block": None, "series": []}
    assert memory.remember(drill.storage, drill.line.model, fresh, look)


class Watching:
    """A monitor in a process of its own, which can be killed and started again."""

    def __init__(self, drill: Drill, log: Path) -> None:
        self._drill, self._log = drill, log
        self.process: subprocess.Popen[str] = drill.start(*MONITOR, log=log)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def again(self) -> None:
        self.process = self._drill.start(*MONITOR, log=self._log)

    def await_look(self) -> dict[str, Any]:
        """Return the next state that it writes."""
        path, now_s = memory.state_path(self._drill.line.model), time.time()
        seen: dict[str, Any] = {}

        def looked() -> bool:
            assert self.process.poll() is None, self._log.read_text()[-3000:]
            if self._drill.storage.exists(path):
                seen.clear()
                seen.update(self._drill.storage.read_json(path))
            return bool(seen and seen["time"] > now_s)

        until(looked, deadline_s=120, every_s=0.5, what="a look of the monitor")
        return seen


@contextlib.contextmanager
def watching(drill: Drill, log: Path) -> Iterator[Watching]:
    made = Watching(drill, log)
    try:
        yield made
    finally:
        made.kill()
        print(log.read_text()[-20_000:])


def begin(drill: Drill, callers: Callers, monitor: Watching, known: set[str]) -> float:
    """Let callers send what is strange from now on; return when that is, once a retrain began."""
    until(lambda: callers.answered > 500, deadline_s=120, what="500 answers to usual images")
    # Right after a look: the next one finds many strange requests, and not the first few.
    state = monitor.await_look()
    assert state["trigger"]["triggers"] == [], state["trigger"]
    drifted_s = time.time()
    callers.changed_share = 1.0
    until(lambda: bool(new(drill, known)), deadline_s=180, every_s=0.5, what="a retrain")
    return drifted_s


def new(drill: Drill, known: set[str]) -> list[Record]:
    return [record for record in drill.retrains() if record.id not in known]


def await_windows(monitor: Watching, *, champion: int, windows: int) -> dict[str, Any]:
    """Return what is seen of drift once so many windows were tested for this champion."""
    seen: dict[str, Any] = {}

    def tested() -> bool:
        look = monitor.await_look()
        if look["champion"] == champion and "drift" in look:
            seen.update(look["drift"])
        return bool(seen) and seen["evidence"]["windows"] >= windows

    until(tested, deadline_s=300, what=f"{windows} windows of version {champion}")
    return seen


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# First, since what is strange to the champion stays in the log for an hour, and asks for a retrain.
@pytest.mark.timeout(1200)
def test_a_persons_rollout_that_was_killed_goes_on_under_the_monitor(
    drill: Drill, tmp_path: Path
) -> None:
    generation = current(drill).generation
    version = drill.register(lambda model: model)
    log = tmp_path / "rollout.log"
    with calling(drill.line, INVERTED_NHW) as callers:
        process = drill.start("jobs.rollout", str(version), *ROLLOUT, log=log)
        drill.wait_for(version, "canary-10")
        process.kill()
        process.wait()
        with watching(drill, tmp_path / "monitor.log") as monitor:
            assert monitor.await_look()["went_on"] == f"rollout of version {version}"

            def is_promoted() -> bool:
                state = drill.state()
                assert state is not None
                assert state.status not in (states.HELD, states.ROLLED_BACK, states.ABORTED), state
                return state.status == states.PROMOTED

            until(is_promoted, deadline_s=420, every_s=1, what="its promotion")
    print(log.read_text())
    assert callers.failures == []
    assert_all_at_peace(drill, version, since_generation=generation)


@pytest.mark.timeout(1500)
def test_strange_requests_get_a_model_that_knows_them_within_ten_minutes(
    drill: Drill, tmp_path: Path
) -> None:
    before, known = drill.traffic(), {record.id for record in drill.retrains()}
    with (
        calling(drill.line, INVERTED_NHW) as callers,
        watching(drill, tmp_path / "monitor.log") as monitor,
    ):
        drifted_s = begin(drill, callers, monitor, known)

        def is_over() -> bool:
            return new(drill, known)[-1].state != RUNNING

        until(is_over, deadline_s=WITHIN_S, every_s=1, what="the end of the retrain")
        (record,) = new(drill, known)
        assert (record.state, record.why) == (DONE, ""), record.why
        made = record.step("register")
        assert made is not None
        version = made.result["version"]
        promoted_s = record.ended or 0.0

        def answers() -> Any:
            return callers.right(version=version, is_changed=True, since_s=promoted_s)

        until(lambda: len(answers()) >= 500, deadline_s=120, what="500 answers of the new champion")
        usual = callers.right(version=before.champion, is_changed=False)
        strange = callers.right(version=before.champion, is_changed=True)
        after = answers()
        # What was strange is known now: the new champion's reference has seen it. How well follows
        # from how much of it there was among the labelled requests (`lib.watch.drift`).
        calm = await_windows(monitor, champion=version, windows=CALM_WINDOWS)
    rollout = drill.state()
    assert rollout is not None
    print(
        json.dumps(
            {
                "from_the_first_strange_request_s": {
                    "retrain began": round(record.started - drifted_s, 1),
                    "promoted": round(promoted_s - drifted_s, 1),
                },
                "steps_s": {step.name: step.seconds for step in record.steps},
                "rollout": [
                    f"{event['time']} {event['stage']}: {event['status']}"
                    for event in rollout.history
                ],
                "reason": record.reason,
                "accuracy": {
                    "usual requests, old champion": percent(usual.mean()),
                    "strange requests, old champion": percent(strange.mean()),
                    "strange requests, new champion": percent(after.mean()),
                },
                "drift after the promotion": {
                    name: calm[name] for name in ("score", "p_value", "evidence", "block")
                },
                "answered": callers.answered,
            },
            indent=2,
        )
    )
    assert callers.failures == []
    assert promoted_s - drifted_s <= WITHIN_S
    assert after.mean() > 0.8
    assert after.mean() > strange.mean() + 0.4
    traffic = drill.traffic()
    assert (traffic.champion, traffic.previous_champion) == (version, before.champion)
    assert drill.aliases()["champion"] == str(version)
    assert calm["score"] < 0.5, calm


@pytest.mark.timeout(2700)
def test_killed_at_random_points_it_ends_as_if_nothing_had_happened(
    drill: Drill, tmp_path: Path
) -> None:
    seed = int(os.environ.get("RAYLINE_KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"RAYLINE_KILL_SEED={seed}")
    rng = random.Random(seed)
    known = {record.id for record in drill.retrains()}
    versions, sets = drill.versions(), set(drill.storage.list("data/sets"))
    generation = current(drill).generation
    killed: list[tuple[str, str]] = []
    with (
        calling(drill.line, INVERTED_NHW) as callers,
        watching(drill, tmp_path / "monitor.log") as monitor,
    ):
        drifted_s, callers.changed_share = time.time(), 1.0
        until(lambda: bool(new(drill, known)), deadline_s=300, every_s=0.5, what="a retrain")
        while (record := new(drill, known)[-1]).state == RUNNING:
            assert time.time() < drifted_s + KILLED_WITHIN_S, record
            time.sleep(rng.uniform(1, 12))
            victim = rng.choice(("monitor", "retrain", "retrain"))
            step = step_of(new(drill, known)[-1])
            if Counter(killed)[victim, step] >= KILLS_A_STEP:
                continue
            if victim == "monitor":
                monitor.kill()
                monitor.again()
            elif not kill_jobs(drill):
                continue
            killed.append((victim, step))
            print(f"{time.time() - drifted_s:6.1f} s: killed the {victim} in step {step}")
    print(json.dumps({"ended_after_s": round(time.time() - drifted_s), "killed": killed}))
    assert callers.failures == []
    # The rollout is a step of the retrain, in the same process.
    assert ("retrain", "rollout") in killed
    (record,) = new(drill, known)
    assert (record.state, record.why) == (DONE, ""), record.why
    results = {step.name: step.result for step in record.steps}
    assert results["rollout"]["status"] == "promoted"
    version = results["register"]["version"]
    assert drill.versions() - versions == {version}
    made = set(drill.storage.list("data/sets")) - sets
    assert made == {f"data/sets/{results['data']['digest']}.json"}
    assert_all_at_peace(drill, version, since_generation=generation)


def current(drill: Drill) -> policy.Policy:
    found = policy.current(drill.storage)
    assert found is not None
    return found


def step_of(record: Record) -> str:
    return record.steps[-1].name if record.steps else "none"


def kill_jobs(drill: Drill) -> bool:
    """Kill the process of the retrain; return whether there was one."""
    found = drill.jobs("retrain")
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return bool(found)


def assert_all_at_peace(drill: Drill, version: int, *, since_generation: int) -> None:
    """One version has all requests, everybody knows it, and nothing is left half done."""
    model, traffic = drill.line.model, drill.traffic()
    assert traffic.champion == version
    assert {v for v, weight in traffic.weights.items() if weight} == {version}
    assert traffic.shadows == {}
    for made in policy.history(drill.storage):
        if made.generation > since_generation:
            assert sum(made.models[model].weights.values()) == pytest.approx(100), made
    assert drill.aliases()["champion"] == str(version)
    assert drill.aliases().get("challenger") != str(version)
    state = drill.state()
    assert state is not None
    assert (state.candidate, state.status, state.noted) == (version, states.PROMOTED, True)
    until(lambda: not drill.jobs("retrain", "rollout"), what="the end of all jobs")
    assert records.interrupted(drill.storage, model) is None
    assert live.interrupted(drill.storage, model) is None
