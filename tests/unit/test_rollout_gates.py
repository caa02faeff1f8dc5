"""The gates: how seldom they stop an equal candidate, how soon a worse one, and what they want."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lib.watch.betting import (
    blocks,
    mean_above,
    mean_below,
    rate_above,
    rate_below,
)
from lib.watch.gates import (
    ACCURACY,
    DISAGREEMENT,
    ERRORS,
    LATENCY,
    NOTHING,
    Evidence,
    Limits,
    Outcome,
    Paired,
    enough,
    judge,
    judge_replay,
)

LIMITS = Limits(max_disagreement=0.04)
NUM_STAGES = 6
LOOK_EVERY = 20
"""Answers of the candidate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Two versions behind one address."""

    share: float = 0.5
    error_rates: tuple[float, float] = (0.0, 0.0)
    """Of candidate and champion."""
    slower: float = 1.0
    """Times the champion's latency."""
    accuracies: tuple[float, float] = (0.985, 0.985)
    busy_share: float = 0.0
    """Of the time, in which both are slow and fail often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A gate's evidence, at every look."""

    worse: npt.NDArray[np.float64]
    not_worse: npt.NDArray[np.float64]


def simulate(world: World, seed: int, num_answers: int) -> dict[str, Seen]:
    """What each gate has seen at every look, in so many answers of the candidate."""
    rng = np.random.default_rng(seed)
    total = int(num_answers / world.share)
    is_candidate = rng.random(total) < world.share
    is_busy = (np.arange(total) // 200) % 10 < 10 * world.busy_share
    failed = rng.random(total) < np.where(is_candidate, *world.error_rates) + 0.2 * is_busy
    latency = rng.lognormal(1.0, 0.3, total) * np.where(is_busy, 3.0, 1.0)
    latency *= np.where(is_candidate, world.slower, 1.0)
    slow = latency > np.exp(1.0 + 0.3 * 2.326) * LIMITS.latency_factor
    right = rng.random((2, num_answers)) < np.array(world.accuracies)[:, None]
    harm = right[1].astype(float) - right[0]
    errors, latencies = blocks(is_candidate, failed), blocks(is_candidate, slow)
    each = np.arange(1, num_answers + 1)
    return {
        ERRORS: at_looks(
            errors.candidate.cumsum(),
            rate_above(errors, margin=LIMITS.error_margin),
            rate_below(errors, limit=LIMITS.error_limit),
        ),
        LATENCY: at_looks(
            latencies.candidate.cumsum(),
            rate_above(latencies, margin=LIMITS.latency_margin),
            rate_below(latencies, limit=LIMITS.latency_limit),
        ),
        ACCURACY: at_looks(
            each,
            mean_above(harm, margin=LIMITS.accuracy_margin, lowest=-1.0),
            mean_below(harm, limit=LIMITS.accuracy_limit, highest=1.0),
        ),
    }


def at_looks(
    answers: npt.NDArray[np.int64], worse: npt.NDArray[Any], not_worse: npt.NDArray[Any]
) -> Seen:
    looks = np.searchsorted(answers, np.arange(LOOK_EVERY, answers[-1], LOOK_EVERY))
    return Seen(worse=worse[looks], not_worse=not_worse[looks])


def stopped_after(seen: dict[str, Seen]) -> float:
    """Answers of the candidate until a look that finds a breach; infinite if there is none."""
    first = math.inf
    for name, gate in seen.items():
        found = np.flatnonzero(gate.worse >= enough(name, LIMITS, NUM_STAGES))
        first = min(first, LOOK_EVERY * (found[0] + 1) if len(found) else math.inf)
    return first


def passed_after(seen: dict[str, Seen]) -> float:
    """Answers of the candidate until a look that lets it through."""
    num_looks = min(len(gate.worse) for gate in seen.values())
    shown = [gate.not_worse[:num_looks] >= math.log(1 / LIMITS.beta) for gate in seen.values()]
    found = np.flatnonzero(np.all(shown, axis=0))
    answers = LOOK_EVERY * (found + 1)
    return float(answers[answers >= 200][0]) if (answers >= 200).any() else math.inf


@pytest.mark.parametrize(
    "world",
    [
        World(),
        World(share=0.05),
        World(error_rates=(0.01, 0.01), accuracies=(0.9, 0.9)),
        # What both suffer at the same time is held against neither.
        World(busy_share=0.3, error_rates=(0.005, 0.005)),
    ],
)
def test_an_equal_candidate_looked_at_every_20_requests_is_seldom_stopped(world: World) -> None:
    runs = 200
    stopped = sum(stopped_after(simulate(world, seed, 2000)) < math.inf for seed in range(runs))
    assert stopped <= LIMITS.alpha * runs


def test_a_candidate_worse_by_just_the_margin_is_stopped_no_more_often_than_stated() -> None:
    # The worst that the hypothesis allows: here nothing is left in hand.
    rng = np.random.default_rng(1)
    runs, margin, champion, alpha = 1000, 0.01, 0.02, 0.05
    alarms = {"rates": 0, "means": 0}
    for _ in range(runs):
        is_candidate = rng.random(3000) < 0.5
        rates = np.where(is_candidate, champion + margin * (1 - champion), champion)
        arms = blocks(is_candidate, rng.random(3000) < rates)
        alarms["rates"] += bool((rate_above(arms, margin=margin) >= math.log(1 / alpha)).any())
        harm = rng.choice([-1.0, 0.0, 1.0], 2000, p=[0.02, 0.95, 0.03])
        path = mean_above(harm, margin=margin, lowest=-1.0)
        alarms["means"] += bool((path >= math.log(1 / alpha)).any())
    # Three standard errors above the level; and the test is not idle.
    assert max(alarms.values()) <= runs * alpha + 3 * math.sqrt(runs * alpha * (1 - alpha))
    assert min(alarms.values()) > 0


@pytest.mark.parametrize(
    ("world", "typical", "nearly_always"),
    [
        (World(share=0.05, error_rates=(0.02, 0.0)), 400, 800),
        (World(share=0.5, error_rates=(0.02, 0.0)), 800, 1500),
        (World(share=0.05, slower=1.5), 400, 800),
        (World(share=0.5, slower=1.5), 800, 1500),
        (World(accuracies=(0.955, 0.985)), 1200, 2600),
    ],
)
def test_a_worse_candidate_is_stopped_within_so_many_of_its_answers(
    world: World, typical: int, nearly_always: int
) -> None:
    answers = [stopped_after(simulate(world, seed, 3000)) for seed in range(60)]
    assert np.median(answers) <= typical
    assert np.percentile(answers, 95) <= nearly_always


@pytest.mark.parametrize(
    "world",
    [
        World(share=0.2, error_rates=(0.02, 0.0)),
        World(share=0.2, slower=1.5),
        World(share=0.2, accuracies=(0.955, 0.985)),
    ],
)
def test_what_is_worse_by_the_limit_hardly_ever_passes(world: World) -> None:
    runs = 100
    passed = 0
    for seed in range(runs):
        seen = simulate(world, seed, 3000)
        passed += passed_after(seen) < stopped_after(seen)
    assert passed <= runs * LIMITS.beta + 3 * math.sqrt(runs * LIMITS.beta)


def test_an_equal_candidate_passes_soon() -> None:
    needed = [passed_after(simulate(World(share=0.2), seed, 3000)) for seed in range(100)]
    assert np.median(needed) <= 600
    assert np.percentile(needed, 95) <= 1500


def test_blocks_are_as_short_as_they_can_be_and_hold_both() -> None:
    candidate = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1], bool)
    hits = np.array([1, 0, 1, 0, 0, 1, 0, 0, 1, 1], bool)
    arms = blocks(candidate, hits)
    # 0 0 1 | 1 1 0 | 1 0 | 1 1 …
    assert arms.champion.tolist() == [2, 1, 1]
    assert arms.candidate.tolist() == [1, 2, 1]
    assert arms.champion_hits.tolist() == [1, 1, 0]
    assert arms.candidate_hits.tolist() == [1, 0, 0]
    for one_sided in (candidate[:0], np.ones(5, bool), np.zeros(5, bool)):
        assert not len(blocks(one_sided, one_sided).candidate)


def test_without_answers_there_is_no_evidence_either_way() -> None:
    nothing = blocks(np.zeros(0, bool), np.zeros(0, bool))
    empty: npt.NDArray[np.float64] = np.zeros(0)
    paths = (
        rate_above(nothing, margin=0.01),
        rate_below(nothing, limit=0.05),
        mean_above(empty, margin=0.01, lowest=-1),
        mean_below(empty, limit=0.1, highest=1),
    )
    assert [len(path) for path in paths] == [0, 0, 0, 0]


def calm(requests: int = 500, pairs: int = 400) -> Evidence:
    """Evidence of two versions that both do well."""
    half = np.arange(2 * requests) % 2 == 0
    nothing = np.zeros(2 * requests, bool)
    same = Paired(harm=np.zeros(pairs), candidate=0.0, champion=0.0)
    return Evidence(
        requests=requests,
        champion_requests=requests,
        errors=blocks(half, nothing),
        latency=blocks(half, nothing),
        disagreement=same,
        confidence=same,
    )


def test_no_data_or_too_little_waits_and_never_passes() -> None:
    def outcome(evidence: Evidence, expects_labels: bool = False) -> Outcome:
        return judge(
            evidence, LIMITS, min_requests=200, num_stages=6, expects_labels=expects_labels
        ).outcome

    assert outcome(calm()) is Outcome.PASS
    assert outcome(calm(requests=0)) is Outcome.WAIT
    assert outcome(calm(requests=199)) is Outcome.WAIT
    assert outcome(calm(pairs=20)) is Outcome.WAIT
    assert outcome(replace(calm(), disagreement=NOTHING)) is Outcome.WAIT
    # Labels are to come: what stands in for them does not count.
    assert outcome(calm(), expects_labels=True) is Outcome.WAIT
    # A champion that answers nobody is no comparison.
    alone = blocks(np.ones(900, bool), np.zeros(900, bool))
    assert outcome(replace(calm(), errors=alone)) is Outcome.WAIT


def test_with_labels_a_model_may_disagree_and_without_them_it_may_not() -> None:
    rng = np.random.default_rng(2)
    differs = (rng.random(400) < 0.3).astype(float)
    other = replace(calm(), disagreement=Paired(harm=differs, candidate=0.3, champion=0.0))
    found = judge(other, LIMITS, min_requests=200, num_stages=6)
    assert found.outcome is Outcome.BREACH
    assert found.reason.startswith(DISAGREEMENT)
    better = Paired(harm=-differs, candidate=0.95, champion=0.65)
    right = replace(other, accuracy=better)
    assert judge(right, LIMITS, min_requests=200, num_stages=6).outcome is Outcome.PASS


def test_a_breach_names_its_gate_and_carries_its_numbers() -> None:
    half = np.arange(1000) % 2 == 0
    bad = blocks(half, half & (np.arange(1000) % 20 == 0))
    found = judge(replace(calm(), errors=bad), LIMITS, min_requests=200, num_stages=6)
    assert found.outcome is Outcome.BREACH
    first = found.to_json()[0]
    assert (first["name"], first["verdict"], first["samples"]) == (ERRORS, "breach", 500)
    assert first["value"] == pytest.approx(0.1)
    assert first["worse"] == 1.0
    slow = judge(replace(calm(), latency=bad), LIMITS, min_requests=200, num_stages=6)
    assert [f.name for f in slow.findings if f.verdict is Outcome.BREACH] == [LATENCY]


def test_a_replay_goes_by_labels_where_there_are_enough() -> None:
    rng = np.random.default_rng(3)
    differs = (rng.random(1000) < 0.3).astype(float)
    much = Paired(harm=differs, candidate=0.3, champion=0.0)
    few = Paired(harm=-differs[:10], candidate=1.0, champion=0.7)
    assert judge_replay(few, much, LIMITS).outcome is Outcome.BREACH
    better = Paired(harm=-differs, candidate=0.95, champion=0.65)
    assert judge_replay(better, much, LIMITS).outcome is Outcome.PASS
    worse = Paired(harm=differs, candidate=0.65, champion=0.95)
    found = judge_replay(worse, NOTHING, LIMITS)
    assert found.outcome is Outcome.BREACH
    assert found.findings[0].name == ACCURACY
    assert judge_replay(NOTHING, NOTHING, LIMITS).outcome is Outcome.PASS
    # A model for changed data disagrees, and its labels only come later.
    assert judge_replay(few, much, LIMITS, expects_labels=True).outcome is Outcome.PASS
