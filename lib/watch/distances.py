"""How far samples are from mixtures of others, and how likely that is by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from lib.watch.populations import Answers, Floats

_REFERENCE_LEVEL = 0.1
"""Chance that any distribution function of a sample is further off than it is taken to be: for each
population, and in each group of tests (features; confidence and entropy; shares of classes)."""
_MIXTURES = 11
"""From the first sample alone to the second alone."""
MOST_UNMIXED = 5.0
"""The largest weight of the second sample: the new kind is a fifth of it, or more."""
_UNMIXED = 13
"""From the second sample alone to that weight, in steps of a seventh."""
_MOST_ERROR = 1 / 3
"""Of a mixture with a weight above 1: beyond it, hardly anything would be too far away."""
_THINNED = 500
"""Rows of the second sample that tell whether it is like the first."""


def mixtures(samples: Sequence[npt.NDArray[np.float32]], tolerance: float) -> Floats:
    """Return the mixtures, (M, P), that are tried of one sample, or of ingested and live images.

    A live weight above 1 takes ingested images out of the live ones. That needs something else
    among them: of a sample like the first one only its error would be left, which would hide drift
    of any kind.
    """
    if len(samples) == 1:
        return np.ones((1, 1))
    ingested, live = samples
    mixed_MP = _weights(np.linspace(0.0, 1.0, _MIXTURES))
    errors_P = np.array([reference_error(*sample.shape) for sample in samples])
    # Rows at even distances of each sorted column are distributed like all of it.
    thinned = live[:: max(1, len(live) // _THINNED)]
    (distance_F,), _ = compare(thinned, [ingested], np.ones((1, 1)), tolerance)
    if np.abs(distance_F).max() <= tolerance + errors_P.sum():
        return mixed_MP
    unmixed_MP = _weights(np.geomspace(1.0, MOST_UNMIXED, _UNMIXED)[1:])
    is_known_M = np.abs(unmixed_MP) @ errors_P <= _MOST_ERROR
    return np.concatenate([mixed_MP, unmixed_MP[is_known_M]])


def _weights(live_M: Floats) -> Floats:
    return np.stack([1.0 - live_M, live_M], axis=1)


def compare(
    window_NF: npt.NDArray[np.float32],
    samples: Sequence[npt.NDArray[np.float32]],
    weights_MP: Floats,
    tolerance: float,
) -> tuple[Floats, Floats]:
    """Return signed Kolmogorov–Smirnov distance and p-value, (M, F), of M mixtures of P samples.

    A sample's columns are each in ascending order. By the triangle inequality the distance to
    a distribution that is so far away exceeds the usual statistic by no more than that: without it,
    the usual distribution gives the p-value. Ties, such as cells that are always black, make it
    larger than it need be, never smaller.
    """
    columns = zip(np.sort(window_NF, axis=0).T, *(sample.T for sample in samples), strict=True)
    distance_MF = np.stack(
        [_distances(ours, theirs, weights_MP) for ours, *theirs in columns], axis=1
    )
    errors_P = [reference_error(*sample.shape) for sample in samples]
    allowed_M1 = (tolerance + np.abs(weights_MP) @ errors_P)[:, None]
    p_value_MF = stats.kstwo.sf(np.maximum(np.abs(distance_MF) - allowed_M1, 0), len(window_NF))
    return distance_MF, np.clip(p_value_MF, 0, 1)


def reference_error(num_rows: int, num_columns: int) -> float:
    """Return how far distribution functions of so many rows may be from those they are drawn of."""
    return math.sqrt(math.log(2 * num_columns / _REFERENCE_LEVEL) / (2 * num_rows))


def _distances(
    ours: npt.NDArray[np.float32],
    samples: Sequence[npt.NDArray[np.float32]],
    weights_MP: Floats,
) -> Floats:
    """Return the largest distance of our distribution function from that of each mixture, (M,).

    As `scipy.stats.ks_2samp` has it of ascending samples, but the reference need not be sorted each
    time, which takes nearly all of that one's time. The functions are furthest apart at, or just
    before, one of our values; with a weight above 1 perhaps elsewhere, and what is found is a lower
    bound then.
    """

    def above_MN(side: Literal["left", "right"]) -> Floats:
        at_theirs_PN = np.stack([np.searchsorted(s, ours, side) / len(s) for s in samples])
        at_ours_N = np.searchsorted(ours, ours, side) / len(ours)
        # With a weight above 1 it can leave the range of a distribution function, and what is cut
        # off there makes no distance to one larger.
        return np.asarray(np.clip(weights_MP @ at_theirs_PN, 0.0, 1.0) - at_ours_N)

    # Where our function is below theirs, our values are the larger ones.
    larger_M, smaller_M = above_MN("left").max(axis=1), -above_MN("right").min(axis=1)
    return np.where(larger_M >= smaller_M, larger_M, -smaller_M)


def compare_answers(
    answers: Answers,
    held_out: Sequence[Answers],
    weights_MP: Floats,
    num_classes: int,
    tolerance: float,
) -> tuple[Floats, Floats]:
    """Return distances and p-values, (M, 2 + K): confidence, entropy, the share of each class."""
    ours, *theirs = (
        np.stack([given.confidence_N, given.entropy_N], axis=1) for given in (answers, *held_out)
    )
    distance, p_value = compare(ours, [np.sort(s, axis=0) for s in theirs], weights_MP, tolerance)
    counts, *known = (
        np.bincount(given.predicted_N, minlength=num_classes) for given in (answers, *held_out)
    )
    shares_MK = np.clip(weights_MP @ [its / its.sum() for its in known], 0.0, 1.0)
    errors_P = [reference_error(len(given), num_classes) for given in held_out]
    allowed_M1 = (tolerance + np.abs(weights_MP) @ errors_P)[:, None]
    shift_MK = counts / len(answers) - shares_MK
    p_shares_MK = _share_p_values(counts, shares_MK, allowed_M1)
    return np.hstack([distance, shift_MK]), np.hstack([p_value, p_shares_MK])


def _share_p_values(counts: npt.NDArray[np.int64], shares_MK: Floats, allowed_M1: Floats) -> Floats:
    """Return the exact p-value of every class, two-sided, of the nearest share allowed."""
    num = int(counts.sum())
    upper = stats.binom.sf(counts - 1, num, np.minimum(shares_MK + allowed_M1, 1.0))
    lower = stats.binom.cdf(counts, num, np.maximum(shares_MK - allowed_M1, 0.0))
    return np.asarray(np.minimum(1.0, 2 * np.minimum(upper, lower)), dtype=np.float64)


def holm(p_values: Floats) -> Floats:
    """Return p-values corrected by Holm's method: the chance of any false one is the level."""
    order = np.argsort(p_values)
    steps = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * steps))
    return adjusted
