"""Sequential tests: evidence that may be looked at as often as one likes. Pure functions.

Each test returns the logarithms of e-values, one after each value or block: the capital of a
gambler who starts with 1 and bets against the null hypothesis at fair odds. While the hypothesis
holds, the capital ever reaches 1/α with a chance of at most α (Ville's inequality), however often
and whenever one looks, so the hypothesis is rejected as soon as the logarithm is log(1/α) or more.
A gambler who does not know how wrong the hypothesis is shares the capital among several bets, and
has the mean of what they become.

Sources: I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting",
JRSS B 86, 2024 (means); R. Turner, A. Ly and P. Grünwald, "Generic E-variables for exact sequential
k-sample tests that allow for optional stopping", J. Stat. Plan. Inference 230, 2024 (two arms).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_FRACTIONS = (0.95, 0.5, 0.2, 0.05)
"""Of the largest bet that can't ruin the gambler."""
_JUMPS = (0.01, 0.03, 0.1, 0.4)
"""Excess rates that are bet on."""
_PRIOR_RATE, _PRIOR_WEIGHT = 0.001, 100.0
"""Of the champion, until there are answers: as if so many had been seen."""


def mean_above(values: Floats, *, margin: float, lowest: float) -> Floats:
    """Return log e against "the mean is ≤ margin"; no value is below `lowest`.

    The mean may change from value to value, as long as it stays within the hypothesis. What it is
    after all values does not depend on their order.
    """
    return _mixed(
        [
            np.log1p(fraction / (margin - lowest) * (values - margin)).cumsum()
            for fraction in _FRACTIONS
        ]
    )


def mean_below(values: Floats, *, limit: float, highest: float) -> Floats:
    """Return log e against "the mean is ≥ limit"; no value is above `highest`."""
    return mean_above(-values, margin=-limit, lowest=-highest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Hits (failed, too slow) of two arms, in blocks of neighbours in time.

    Each block has answers of both, so that whatever changes over time changes for both.
    """

    candidate: Ints
    """Answers of the candidate in each block."""
    candidate_hits: Ints
    champion: Ints
    champion_hits: Ints


def blocks(is_candidate: Bools, is_hit: Bools) -> Blocks:
    """Cut answers in the order of time into blocks, each as short as it can be.

    What comes after the last whole block is left for the next look.
    """
    ends = _block_ends(is_candidate)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    used = int(ends[-1]) if len(ends) else 0
    arms = (is_candidate[:used], ~is_candidate[:used])
    hits = is_hit[:used]

    def per_block(chosen: Bools) -> Ints:
        if not used:
            return np.zeros(0, np.int64)
        return np.asarray(np.add.reduceat(chosen.astype(np.int64), starts))

    return Blocks(
        candidate=per_block(arms[0]),
        candidate_hits=per_block(arms[0] & hits),
        champion=per_block(arms[1]),
        champion_hits=per_block(arms[1] & hits),
    )


def rate_above(arms: Blocks, *, margin: float) -> Floats:
    """Return log e against "the candidate's rate is ≤ the champion's with `margin` on top".

    The rates may be any in each block. The margin is a handicap: each answer of the champion that
    is no hit counts as one with the chance `margin`, and the bet takes the mean over that chance.
    """
    champion = _handicapped(_seen_before(arms), margin)
    return _mixed(
        [
            _likelihood_ratio(arms, champion + jump * (1 - champion), champion, margin)
            for jump in _JUMPS
        ]
    )


def rate_below(arms: Blocks, *, limit: float) -> Floats:
    """Return log e against "the candidate's rate is ≥ the champion's with `limit` on top"."""
    seen = _seen_before(arms)
    champion = _handicapped(seen, limit)
    bets = (seen, (seen + champion) / 2)
    return _mixed([_likelihood_ratio(arms, candidate, champion, limit) for candidate in bets])


def _handicapped(rate: Floats, handicap: float) -> Floats:
    return rate + handicap * (1 - rate)


def _seen_before(arms: Blocks) -> Floats:
    """Return the champion's rate before each block: a bet must not know the block itself."""
    answers = np.cumsum(arms.champion) - arms.champion
    hits = np.cumsum(arms.champion_hits) - arms.champion_hits
    rate: Floats = (hits + _PRIOR_RATE * _PRIOR_WEIGHT) / (answers + _PRIOR_WEIGHT)
    return rate


def _likelihood_ratio(arms: Blocks, candidate: Floats, champion: Floats, handicap: float) -> Floats:
    """Return log e of a bet on these rates; that of the champion is the handicapped one.

    Under one common rate the expected ratio is at most 1, whatever that rate is, because the rate
    in the denominator is the mean of both weighted by the block's answers (Turner et al., thm. 1).
    """
    n, m = arms.candidate, arms.champion
    common = (n * candidate + m * champion) / np.maximum(n + m, 1)
    hit, miss = champion / common, (1 - champion) / (1 - common)
    terms: Floats = (
        arms.candidate_hits * np.log(candidate / common)
        + (n - arms.candidate_hits) * np.log((1 - candidate) / (1 - common))
        + arms.champion_hits * np.log(hit)
        + (m - arms.champion_hits) * np.log(handicap * hit + (1 - handicap) * miss)
    )
    return terms.cumsum()


def _block_ends(is_candidate: Bools) -> Ints:
    changes = np.flatnonzero(is_candidate[1:] != is_candidate[:-1]) + 1
    ends: list[int] = []
    done = 0
    # A block ends with the first answer of the other arm.
    for change in changes.tolist():
        if change > done:
            done = change + 1
            ends.append(done)
    return np.array(ends, np.int64)


def _mixed(logs: list[Floats]) -> Floats:
    mixed: Floats = np.logaddexp.reduce(logs) - np.log(len(logs))
    return mixed
