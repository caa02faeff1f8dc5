"""A rollout on a live line: the world that `lib.watch.rollout` is given, and its commands."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lib.cli import progress
from lib.config import Settings
from lib.errors import RaylineError, RolloutError
from lib.serving import deploy, policy
from lib.serving.bundle import Card, read_card
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.watch import rollout
from lib.watch import rollout_state as states
from lib.watch.evidence import Stage, gather
from lib.watch.gates import Evidence, Limits
from lib.watch.gauges import Gauges
from lib.watch.logged import read_answers, read_logged
from lib.watch.prometheus import Source, read, source
from lib.watch.replay import Logged, replay
from lib.watch.reported import ROLLOUT, of_rollout
from lib.watch.rollout_state import SHADOW, Options, State
from lib.watch.rollout_world import Replayed

LOOK_EVERY_S = 3.0
SETTLED_S = 5.0
"""Answers younger than this may not all be logged yet: gateways write every two seconds."""
DISAGREEMENT_SLACK = 0.02
ABORT_DEADLINE_S = 120


class Live:
    """What a rollout sees and does on a line."""

    def __init__(
        self,
        settings: Settings,
        storage: Storage,
        who: str,
        gauges: Gauges | None = None,
        source: Source | None = None,
    ) -> None:
        self._settings = settings
        self._gauges = gauges
        self._source = source
        self._storage = storage
        self._who = who

    def now_us(self) -> int:
        """Return the time, UTC, in microseconds since 1970."""
        return time.time_ns() // 1000

    def rest(self) -> None:
        """Wait until the next look."""
        time.sleep(LOOK_EVERY_S)

    def say(self, text: str) -> None:
        """Print a line."""
        progress("rollout", text)

    def load(self) -> State | None:
        """Return the newest state that was saved."""
        return states.load(self._storage, self._settings.model)

    def save(self, state: State) -> None:
        """Keep the state, durably."""
        states.save(self._storage, state)
        if self._gauges:
            self._gauges.update(of_rollout(state.to_json()), instead_of=ROLLOUT)

    def is_aborted(self, state: State) -> bool:
        """Whether a person asked for this rollout to end."""
        return self._storage.exists(_abort_path(state))

    def traffic(self) -> ModelTraffic:
        """Return the traffic in force."""
        current = policy.current(self._storage)
        if current is None or self._settings.model not in current.models:
            raise policy.not_served(self._settings.model, current)
        return current.models[self._settings.model]

    def bundle(self, version: int) -> str:
        """Return a version's bundle, published from the registry if need be."""
        return deploy.bundle(self._settings, self._storage, version)

    def change(self, desired: ModelTraffic, why: str) -> None:
        """Bring up what is new, then change the traffic."""
        deploy.put(self._settings, self._storage, desired, who=self._who, why=why)

    def withdraw(self, desired: ModelTraffic, why: str) -> None:
        """Change the traffic at once; what then can't be taken away waits for the next deploy."""
        try:
            deploy.put(self._settings, self._storage, desired, who=self._who, why=why, at_once=True)
        except RaylineError as error:
            if self.traffic() != desired:
                raise
            self.say(f"no request goes there any more, but it is still up: {error}")

    def crown(self, desired: ModelTraffic, why: str) -> None:
        """Change the traffic, then the registry's alias."""
        self.change(desired, why)
        deploy.align_registry(self._settings, desired)

    def replay(self, state: State) -> Replayed:
        """Let the candidate answer logged requests in this process."""

        def read(card: Card) -> Logged:
            return read_logged(self._storage, state.model, card, now_us=self.now_us())

        return replay(
            self._storage,
            self.bundle(state.candidate),
            self.bundle(state.champion),
            read,
            Limits(max_disagreement=state.max_disagreement),
        )

    def check_metrics(self) -> None:
        """Raise WatchError if the line's metrics can't be read.

        Nobody would see there what the log has lost.
        """
        if self._source:
            read(self._source)

    def evidence(self, state: State) -> Evidence:
        """Return what was logged since the rollout began."""
        stage = Stage(
            candidate=state.candidate,
            champion=state.champion,
            started_us=state.served_since_us or state.since_us,
            is_shadow=state.stage == SHADOW,
            has_champion=state.weight < 100,
        )
        rows = read_answers(
            self._storage,
            state.model,
            state.bundles,
            start_us=state.evidence_since_us,
            end_us=self.now_us() - int(SETTLED_S * 1e6),
        )
        return gather(rows, stage, Limits(max_disagreement=state.max_disagreement))

    def note(self, state: State) -> None:
        """Write onto the version in MLflow how it ended."""
        # Imported late: MLflow takes seconds, and going back must not wait for it.
        from lib.registry.notes import note_rollout

        note_rollout(
            self._settings,
            state.model,
            state.candidate,
            status=state.status,
            reason=state.reason,
            evidence={
                "stage": state.stage,
                "champion": state.champion,
                "gates": list(state.gates),
                "history": list(state.history),
            },
            is_refused=state.status == states.ROLLED_BACK,
        )


def roll_out(
    settings: Settings,
    storage: Storage,
    candidate: int,
    options: Options,
    *,
    gauges: Gauges | None = None,
) -> Mapping[str, Any]:
    """Roll a version out, or go on with its rollout that was interrupted or held.

    Returns how it ended; raises RolloutError, with all that is known, unless it was promoted.
    """
    world = Live(settings, storage, options.who, gauges, _source(settings))
    with _alone(storage, settings.model):
        found = world.load()
        if found and found.candidate == candidate and found.status not in states.FINAL:
            rollout.resume(world)
        else:
            most = max_disagreement(storage, world, candidate)
            rollout.begin(world, settings.model, candidate, options, max_disagreement=most)
        return rollout.result(rollout.run(world))


def go_on(
    settings: Settings, storage: Storage, *, who: str, gauges: Gauges | None = None
) -> Mapping[str, Any]:
    """Go on with the rollout that was interrupted or held, as `roll_out` does."""
    world = Live(settings, storage, who, gauges, _source(settings))
    with _alone(storage, settings.model):
        rollout.resume(world)
        return rollout.result(rollout.run(world))


def abort(settings: Settings, storage: Storage, *, who: str) -> Mapping[str, Any]:
    """End the rollout: the candidate gets no more requests. Returns how it was left."""
    world = Live(settings, storage, who)
    state = world.load()
    if state is None or state.status in states.FINAL:
        raise RolloutError("there is no rollout to end")
    storage.write_json(_abort_path(state), {"who": who})
    end = time.monotonic() + ABORT_DEADLINE_S
    while state.status not in states.FINAL:
        try:
            with _alone(storage, settings.model):
                if (found := world.load()) and found.status == states.HELD:
                    world.save(found.entering(found.stage, world.now_us()))
                state = rollout.run(world)
        except RolloutError:
            # The process that runs it sees the wish at its next look.
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
            state = world.load() or state
    return {"model": state.model, "candidate": state.candidate, "status": state.status}


def interrupted(storage: Storage, model: str) -> State | None:
    """Return the rollout that is under way and that nobody runs: its process was killed.

    On object stores there are no locks to tell, so none is found there.
    """
    state = states.load(storage, model)
    if state is None or state.status in states.ENDED or not storage.is_local:
        return None
    try:
        with _alone(storage, model):
            # It may have ended while we looked.
            state = states.load(storage, model)
    except RolloutError:
        return None
    return state if state and state.status not in states.ENDED else None


def max_disagreement(storage: Storage, world: Live, candidate: int) -> float:
    """Return how often candidate and champion may disagree: if they do, one of them is wrong."""
    cards = [
        read_card(storage, world.bundle(number)) for number in (candidate, world.traffic().champion)
    ]
    return sum(1 - card.test_accuracy for card in cards) + DISAGREEMENT_SLACK


def _source(settings: Settings) -> Source:
    return source(settings.serve_api or settings.ray_address, os.environ)


def _abort_path(state: State) -> str:
    return f"rollouts/{state.model}/abort-{state.id}.json"


@contextmanager
def _alone(storage: Storage, model: str) -> Iterator[None]:
    """Let one process at a time run a model's rollout; a killed one is in nobody's way.

    Only a mounted storage root can be locked. Elsewhere, a state that somebody looks after is not
    touched.
    """
    if not storage.is_local:
        state = states.load(storage, model)
        silent_s = time.time() - (state.looked_us / 1e6 if state else 0)
        if state and state.status not in states.ENDED and silent_s < 10 * LOOK_EVERY_S:
            raise RolloutError(f"another process runs it: it looked {silent_s:.0f} s ago")
        yield
        return
    path = storage.path(f"rollouts/{model}/.lock")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RolloutError(
                f"another process runs the rollout of {model}; `--abort` ends it"
            ) from None
        yield
