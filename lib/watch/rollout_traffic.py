"""The traffic of each stage of a rollout: pure functions of what was there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lib.serving.traffic import ModelTraffic
from lib.watch.rollout_state import State, share

COPIES_PERCENT = 20.0
"""Of all requests, that both versions answer: what copying costs at most. Pairs of answers show
differences with far fewer requests than two separate samples do."""


def with_candidate(current: ModelTraffic, state: State, bundle: str) -> ModelTraffic:
    """Return the traffic of the state's stage; pins and placement stay as they are.

    In the shadow stage the candidate gets copies. As a canary it gets its share, and the champion
    copies of that.
    """
    percent = share(state.stage)
    weights = {v: w * (100 - percent) / 100 for v, w in _others(state).items()}
    if percent:
        weights = {**weights, state.candidate: percent}
        shadows = {state.champion: min(100.0, 100 * COPIES_PERCENT / percent)}
    else:
        shadows = {state.candidate: COPIES_PERCENT}
    return replace(
        current,
        weights=weights,
        shadows={**_other_shadows(state), **shadows},
        bundles={**current.bundles, state.candidate: bundle},
    )


def without_candidate(current: ModelTraffic, state: State) -> ModelTraffic:
    """Return the traffic from before the rollout, but nothing goes to the candidate.

    Where it became champion, somebody wants it so; where another version did, all that the rollout
    takes back is the candidate.
    """
    if current.champion == state.candidate:
        return current
    is_theirs = current.champion != state.champion
    before = _without(current.weights, state.candidate) if is_theirs else _others(state)
    shadows = _without(current.shadows, state.candidate) if is_theirs else _other_shadows(state)
    kept = state.candidate == current.previous_champion
    gone = () if kept else (state.candidate,)
    weights = {v: w for v, w in before.items() if v in current.bundles}
    if not any(weights.values()):
        weights = {current.champion: 100.0}
    return replace(
        current,
        weights={**weights, **({state.candidate: 0.0} if kept else {})},
        shadows=shadows,
        pins={key: v for key, v in current.pins.items() if v != state.candidate},
        bundles={v: path for v, path in current.bundles.items() if v not in gone},
    )


def crowned(current: ModelTraffic, state: State) -> ModelTraffic:
    """Return the traffic with the candidate as champion; the one before stays warm."""
    shadows = _other_shadows(state)
    kept = {state.candidate, state.champion, *shadows, *current.pins.values()}
    return replace(
        current,
        weights={state.candidate: 100.0, state.champion: 0.0},
        champion=state.candidate,
        previous_champion=state.champion,
        shadows=shadows,
        bundles={v: path for v, path in current.bundles.items() if v in kept},
    )


def is_as_set(current: ModelTraffic, state: State) -> bool:
    """Whether the traffic is what the rollout, or who was before it, set last."""
    return (
        current.champion == state.champion
        and _same(current.weights, state.set_weights)
        and _same(current.shadows, state.set_shadows)
    )


def has_same_versions(current: ModelTraffic, state: State) -> bool:
    """Whether candidate and champion, where they are served, are those that the rollout is about.

    Other versions may have their numbers, in a model that was deleted and made again.
    """
    return all(
        current.bundles.get(version, bundle) == bundle for version, bundle in state.bundles.items()
    )


def is_served(current: ModelTraffic, state: State) -> bool:
    """Whether any request could reach the candidate, and not another version of its number."""
    ours = state.bundles.get(state.candidate)
    if ours and current.bundles.get(state.candidate, ours) != ours:
        return False
    return (
        state.candidate in current.bundles
        or current.weights.get(state.candidate, 0.0) > 0
        or state.candidate in (*current.shadows, *current.pins.values())
    )


def is_same(current: ModelTraffic, other: ModelTraffic) -> bool:
    """Whether two policies share requests in the same way."""
    return (
        current.champion == other.champion
        and _same(current.weights, other.weights)
        and _same(current.shadows, other.shadows)
    )


def _others(state: State) -> dict[int, float]:
    """Return the shares of all but the candidate, in percent."""
    weights = _without(state.before_weights, state.candidate)
    total = sum(weights.values())
    if not total:
        return {**weights, state.champion: 100.0}
    return {v: 100 * w / total for v, w in weights.items()}


def _other_shadows(state: State) -> dict[int, float]:
    mine = (state.candidate, state.champion)
    return {v: percent for v, percent in state.before_shadows.items() if v not in mine}


def _without(shares: Mapping[int, float], version: int) -> dict[int, float]:
    return {v: share for v, share in shares.items() if v != version}


def _same(one: Mapping[int, float], other: Mapping[int, float]) -> bool:
    # A version without weight is there or not: no request goes to it.
    return all(abs(one.get(v, 0.0) - other.get(v, 0.0)) < 1e-9 for v in {*one, *other})
