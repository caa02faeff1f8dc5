"""Progressive rollout: replay → shadow → canary shares → promoted, or back to the champion at once.

A state machine over an injected world. What is intended is written before it is done, and all that
is done can be done twice, so a rollout that is killed anywhere goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lib.errors import RaylineError, RolloutError, ServingError, StartError
from lib.watch import rollout_state as states
from lib.watch.gates import Limits, Outcome, judge
from lib.watch.rollout_state import Options, State, iso
from lib.watch.rollout_traffic import (
    crowned,
    has_same_versions,
    is_as_set,
    is_same,
    is_served,
    with_candidate,
    without_candidate,
)
from lib.watch.rollout_world import World

NO_DATA_S = 30.0
"""Without an answer of the candidate for so long, a rollout counts as paused."""


def begin(
    world: World, model: str, candidate: int, options: Options, *, max_disagreement: float
) -> State:
    """Begin a rollout and save its state; nothing is changed yet.

    Raises RolloutError if another one is not at its end, ServingError if there is nothing to do.
    """
    before = world.load()
    if before and before.status not in states.FINAL:
        raise RolloutError(
            f"the rollout of version {before.candidate} is {before.status} at {before.stage}; "
            "go on with it (--resume) or end it (--abort) first"
        )
    current = world.traffic()
    if candidate == current.champion:
        raise ServingError(f"version {candidate} is the champion already")
    bundle = world.bundle(candidate)
    now_us = world.now_us()
    state = State(
        id=f"{now_us}-v{candidate}",
        model=model,
        candidate=candidate,
        champion=current.champion,
        who=options.who,
        stages=options.stages,
        min_requests=options.min_requests,
        stage_timeout_s=options.stage_timeout_s,
        max_disagreement=max_disagreement,
        before_weights=current.weights,
        before_shadows=current.shadows,
        set_weights=current.weights,
        set_shadows=current.shadows,
        evidence_since_us=now_us,
        bundles={candidate: bundle, current.champion: current.bundles[current.champion]},
    )
    state = state.entering(options.stages[0], now_us).event(now_us, "started", "")
    world.save(state)
    return state


def resume(world: World) -> State:
    """Return the rollout to go on with; raise RolloutError if there is none.

    One that was held enters its stage again, with new evidence.
    """
    state = world.load()
    if state is None or state.status in states.FINAL:
        raise RolloutError("there is no rollout to go on with; start one with its version's number")
    if state.status == states.HELD:
        now_us = world.now_us()
        current = world.traffic()
        state = replace(
            state.entering(state.stage, now_us),
            set_weights=current.weights,
            set_shadows=current.shadows,
            evidence_since_us=now_us,
            then="",
        ).event(now_us, "resumed", "")
        if current.champion != state.champion:
            raise RolloutError(
                f"the champion is version {current.champion} now, and the rollout of version "
                f"{state.candidate} compares with {state.champion}: end it (--abort), start again"
            )
        world.save(state)
    return state


def run(world: World) -> State:
    """Take the saved rollout to its end and return that: promoted, rolled back, held or aborted."""
    while True:
        state = world.load()
        if state is None:
            raise RolloutError("there is no rollout")
        if state.status in states.ENDED:
            return state
        _next(world, state)


def _next(world: World, state: State) -> None:
    """Do one thing, and save what it led to."""
    if state.status == states.WITHDRAWING:
        _withdraw(world, state)
    elif world.is_aborted(state) and state.status != states.PROMOTING:
        _leave(world, state, states.ABORTED, "a person ended it")
    elif state.status == states.PROMOTING:
        _promote(world, state)
    elif state.stage == states.REPLAY:
        _guarded(world, state, _replay)
    elif state.served_since_us is None:
        _guarded(world, state, _enter)
    else:
        _guarded(world, state, _look)


def _guarded(world: World, state: State, action: Callable[[World, State], None]) -> None:
    """Do it; where something that it needs is down, pause, until the stage's time is over."""
    try:
        action(world, state)
    except RaylineError as error:
        _wait(world, state, f"{type(error).__name__}: {error}", is_pause=True)


def _replay(world: World, state: State) -> None:
    replayed = world.replay(state)
    state = replace(state, expects_labels=replayed.expects_labels, gates=replayed.verdict.to_json())
    if replayed.verdict.outcome is Outcome.BREACH:
        _leave(world, state, states.ROLLED_BACK, replayed.verdict.reason)
    else:
        _advance(world, state, replayed.verdict.reason)


def _enter(world: World, state: State) -> None:
    current = world.traffic()
    desired = with_candidate(current, state, world.bundle(state.candidate))
    is_about_these = has_same_versions(current, state) and has_same_versions(desired, state)
    if not is_about_these or not (is_as_set(current, state) or is_same(current, desired)):
        _superseded(world, state)
        return
    try:
        world.change(desired, f"rollout of version {state.candidate}: {state.stage}")
    except StartError as error:
        _leave(world, state, states.ROLLED_BACK, str(error))
        return
    now_us = world.now_us()
    world.save(
        replace(
            state,
            status=states.RUNNING,
            reason="",
            served_since_us=now_us,
            set_weights=desired.weights,
            set_shadows=desired.shadows,
        ).event(now_us, "serving", f"{state.weight:g} % of the requests")
    )


def _look(world: World, state: State) -> None:
    current = world.traffic()
    if not is_as_set(current, state) or not has_same_versions(current, state):
        _superseded(world, state)
        return
    evidence = world.evidence(state)
    verdict = judge(
        evidence,
        Limits(max_disagreement=state.max_disagreement),
        min_requests=state.min_requests,
        num_stages=state.num_live_stages,
        expects_labels=state.expects_labels,
    )
    state = replace(state, gates=verdict.to_json())
    world.say(f"{state.stage}: {evidence.requests} answers; {verdict.reason}")
    if verdict.outcome is Outcome.BREACH:
        _leave(world, state, states.ROLLED_BACK, verdict.reason)
    elif verdict.outcome is Outcome.PASS:
        # Only here: what the log shows of a breach is acted on, whatever else is away.
        world.check_metrics()
        _advance(world, state, verdict.reason)
    else:
        since_us = max(evidence.newest_us or 0, state.served_since_us or 0)
        silent_s = (world.now_us() - since_us) / 1e6
        if is_pause := silent_s > NO_DATA_S:
            verdict = replace(
                verdict, reason=f"no answer of the candidate for {silent_s:.0f} s; {verdict.reason}"
            )
        _wait(world, state, verdict.reason, is_pause=is_pause)


def _advance(world: World, state: State, reason: str) -> None:
    now_us = world.now_us()
    state = state.event(now_us, "passed", reason)
    world.say(f"{state.stage}: passed; {reason}")
    following = state.next_stage
    if following is None:
        world.save(replace(state, status=states.PROMOTING, reason=reason))
    else:
        world.save(state.entering(following, now_us))


def _wait(world: World, state: State, reason: str, *, is_pause: bool) -> None:
    now_us = world.now_us()
    if now_us - state.since_us > state.stage_timeout_s * 1e6:
        why = f"{state.stage} was not decided within {state.stage_timeout_s:g} s: {reason}"
        _leave(world, state, states.HELD, why)
        return
    status = states.PAUSED if is_pause else states.RUNNING
    if status != state.status:
        world.say(f"{state.stage}: {status}: {reason}")
        state = state.event(now_us, status, reason)
    world.save(replace(state, status=status, reason=reason, looked_us=now_us))
    world.rest()


def _leave(world: World, state: State, then: str, reason: str) -> None:
    """Note that the candidate is to get nothing any more; the next step does it."""
    world.say(f"{state.stage}: {then}: {reason}")
    state = replace(state, status=states.WITHDRAWING, then=then, reason=reason)
    world.save(state.event(world.now_us(), then, reason))


def _withdraw(world: World, state: State) -> None:
    current = world.traffic()
    desired = without_candidate(current, state) if is_served(current, state) else current
    why = f"rollout of version {state.candidate} {state.then}: {state.reason}"
    world.withdraw(desired, why)
    state = replace(
        state,
        status=state.then,
        served_since_us=None,
        set_weights=desired.weights,
        set_shadows=desired.shadows,
    )
    world.save(_noted(world, state))


def _promote(world: World, state: State) -> None:
    current = world.traffic()
    is_done = current.champion == state.candidate
    if not has_same_versions(current, state) or not (is_done or is_as_set(current, state)):
        _superseded(world, state)
        return
    desired = current if current.champion == state.candidate else crowned(current, state)
    world.crown(desired, f"rollout of version {state.candidate}: {state.reason}")
    state = replace(
        state,
        status=states.PROMOTED,
        set_weights=desired.weights,
        set_shadows=desired.shadows,
    ).event(world.now_us(), states.PROMOTED, "")
    world.save(_noted(world, state))


def _superseded(world: World, state: State) -> None:
    """End without touching the traffic: what a person decided since then is theirs."""
    reason = "somebody else changed the traffic meanwhile; it stays as they left it"
    world.say(f"{state.stage}: {reason}")
    state = replace(state, status=states.ABORTED, reason=reason)
    world.save(_noted(world, state.event(world.now_us(), states.ABORTED, reason)))


def _noted(world: World, state: State) -> State:
    try:
        world.note(state)
    except RaylineError as error:
        # What is served does not wait for the registry.
        world.say(f"the registry does not know of it yet: {error}")
        return replace(state, noted=False)
    return replace(state, noted=True)


def result(state: State) -> Mapping[str, object]:
    """Return how a rollout ended; raise RolloutError with all of it unless it was promoted."""
    found = {
        "model": state.model,
        "candidate": state.candidate,
        "champion": state.candidate if state.status == states.PROMOTED else state.champion,
        "status": state.status,
        "stage": state.stage,
        "reason": state.reason,
        "gates": list(state.gates),
        "began": iso(int(state.id.partition("-")[0])),
        "noted": state.noted,
    }
    if state.status != states.PROMOTED:
        what = f"version {state.candidate} was {state.status.replace('_', ' ')} at {state.stage}"
        raise RolloutError(f"{what}: {state.reason}", details=found)
    return found
