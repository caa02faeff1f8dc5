"""Whether a window of requests looks like the training data: tests, and how often they may look.

A window's features are each compared with the reference by a Kolmogorov–Smirnov test, and so are
the confidence and the entropy of each version's answers; the share of every predicted class by the
binomial distribution. Holm's method corrects for their number, so the level
holds for the window as a whole. (Rabanser, Günnemann, Lipton, "Failing Loudly", 2019, found such
tests as good as multivariate ones, and they say what moved.)

Live images never come from exactly the distribution of the training images, and with enough rows
any difference is "significant". So the hypothesis tested is that no distribution function is
further than `tolerance` from the training data's anywhere.

A version that was trained again on live requests knows two populations: the images that were
ingested, and those requests. Any mixture of both is what it was trained for, so the hypothesis is
that there is one which the window agrees with: the mixture that speaks most against drift counts.

The reference is a sample of these, and the same one for every window: were its own error part of
each test, as in a two-sample test, a small sample that happens to be off would look like drift
again and again. So that error is bounded once, by the inequality of Dvoretzky, Kiefer and Wolfowitz
(with Massart's constant, 1990), and added to the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

LEVEL = 0.01
"""Share of windows without drift that may raise an alarm."""
TOLERANCE = 0.02
"""Distance of distribution functions, and of a class's share, that is not called drift.

Measured: MNIST's test images, by other writers, are up to 0.045 from its training images (median of
the features: 0.012). Without a tolerance half of all shuffled blocks of 2,000 of them raise an
alarm, with this one 1 %; of windows of 250 it is 1.6 % and 0.2 %.
"""
_REFERENCE_LEVEL = 0.1
"""Chance that any distribution function of the reference is further off than it is taken to be."""
_MIXTURES = 11
"""From the first population alone to the second alone."""
INPUTS, PREDICTIONS = "inputs", "predictions"
MIN_ANSWERS = 50
"""Answers of a version in a window below which they are not tested."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What a version answered: one value a row in each."""

    predicted_N: npt.NDArray[np.int32]
    confidence_N: npt.NDArray[np.float32]
    """Probability of the predicted class."""
    entropy_N: npt.NDArray[np.float32]
    """Of the probabilities, in nats."""

    @classmethod
    def of(cls, probabilities_NK: npt.NDArray[np.float32]) -> Answers:
        """Return what is tested of an answer's probabilities."""
        safe = np.maximum(probabilities_NK, np.float32(1e-30))
        return cls(
            predicted_N=probabilities_NK.argmax(axis=1).astype(np.int32),
            confidence_N=probabilities_NK.max(axis=1).astype(np.float32),
            entropy_N=-(probabilities_NK * np.log(safe)).sum(axis=1, dtype=np.float32),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.predicted_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """A sample of images that the champion was trained for."""

    features_NF: npt.NDArray[np.float32]
    """Every column by itself in ascending order."""
    answers: Mapping[int, Answers] = field(default_factory=dict)
    """Version → its answers to held-out images; on those it was trained with it is too sure."""

    def __post_init__(self) -> None:
        """Sort the columns: all that is compared are their distributions."""
        object.__setattr__(self, "features_NF", np.sort(self.features_NF, axis=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What requests are compared with."""

    populations: tuple[Population, ...]
    """One or two: images that were ingested, and live requests."""
    feature_names: tuple[str, ...]
    grid: tuple[int, int]
    """The first rows·columns features are the cells of this grid."""
    class_names: tuple[str, ...]

    @property
    def weights_MP(self) -> Floats:
        """The mixtures that are tried: of M, the share of each of P populations."""
        if len(self.populations) == 1:
            return np.ones((1, 1))
        live_M = np.linspace(0.0, 1.0, _MIXTURES)
        return np.stack([1.0 - live_M, live_M], axis=1)

    def answers(self, version: int) -> list[Answers]:
        """Return a version's answers to each population; it may know the first one alone."""
        return [known.answers[version] for known in self.populations if version in known.answers]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Requests of one stretch of time."""

    features_NF: npt.NDArray[np.float32]
    """No rows if the log holds none: then only answers are tested."""
    answers: Mapping[int, Answers] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """One thing that was tested."""

    what: str
    distance: float
    """Of the distribution functions or shares, 0–1; positive where values are larger now."""
    p_value: float
    """After Holm's correction."""

    def to_json(self) -> dict[str, Any]:
        """Return the shift as JSON types."""
        return {"what": self.what, "distance": round(self.distance, 4), "p_value": self.p_value}


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftResult:
    """What the tests of a window say."""

    rows: int
    p_value: float
    """Of the whole window: chance of differences like these, or larger ones, without drift."""
    score: float
    """The largest distance of anything tested, 0–1."""
    alarm: bool
    kinds: Mapping[str, tuple[float, float]]
    """`inputs` and `predictions`, as far as they were tested → score and p-value."""
    moved: tuple[Shift, ...]
    """What differs at this level, the largest distance first."""
    heat_map: tuple[tuple[float, ...], ...]
    """Distance per cell of the grid; positive is brighter. Empty without features."""
    classes: Mapping[int, tuple[float, ...]]
    """Version → per class, the share of answers minus that of the reference."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {
            "rows": self.rows,
            "p_value": self.p_value,
            "score": round(self.score, 4),
            "alarm": self.alarm,
            "kinds": {
                kind: {"score": round(score, 4), "p_value": p_value}
                for kind, (score, p_value) in self.kinds.items()
            },
            "moved": [shift.what for shift in self.moved],
            "shifts": [shift.to_json() for shift in self.moved],
            "heat_map": [[round(value, 3) for value in row] for row in self.heat_map],
            "classes": {
                str(version): [round(value, 4) for value in shares]
                for version, shares in self.classes.items()
            },
        }


@dataclass(slots=True)
class _Tests:
    """Tests of one window, before they are corrected for their number."""

    names: list[str] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    p_values: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, kind: str, names: Sequence[str], distances: Floats, p_values: Floats) -> None:
        self.names += names
        self.distances += distances.tolist()
        self.p_values += p_values.tolist()
        self.kinds += [kind] * len(names)


def score(
    reference: Reference, window: Window, *, level: float = LEVEL, tolerance: float = TOLERANCE
) -> DriftResult:
    """Test a window against the reference; nothing that could be tested is no drift."""
    weights_MP = reference.weights_MP
    mixtures = [_Tests() for _ in weights_MP]
    heat_maps: list[tuple[tuple[float, ...], ...]] = [() for _ in weights_MP]
    classes: list[dict[int, tuple[float, ...]]] = [{} for _ in weights_MP]
    if len(window.features_NF):
        samples = [population.features_NF for population in reference.populations]
        found_MF, p_values_MF = compare(window.features_NF, samples, weights_MP, tolerance)
        rows, columns = reference.grid
        for mixture, tests in enumerate(mixtures):
            found = found_MF[mixture]
            tests.add(INPUTS, reference.feature_names, found, p_values_MF[mixture])
            cells = found[: rows * columns].reshape(rows, columns)
            heat_maps[mixture] = tuple(tuple(float(value) for value in row) for row in cells)
    for version, answers in window.answers.items():
        held_out = reference.answers(version)
        if not held_out or len(answers) < MIN_ANSWERS:
            continue
        # A version of other data than the champion's may have learned of one population alone.
        weights = weights_MP if len(held_out) > 1 else np.ones((len(weights_MP), 1))
        found_MT, p_values_MT = _compare_answers(
            answers, held_out, weights, len(reference.class_names), tolerance
        )
        what = ["confidence", "entropy", *(f"class {name}" for name in reference.class_names)]
        names = [f"version {version}: {name}" for name in what]
        for mixture, tests in enumerate(mixtures):
            tests.add(PREDICTIONS, names, found_MT[mixture], p_values_MT[mixture])
            classes[mixture][version] = tuple(float(value) for value in found_MT[mixture, 2:])
    num_rows = max(len(window.features_NF), sum(map(len, window.answers.values())))
    results = [
        _result(tests, num_rows, level, heat_map, its_classes)
        for tests, heat_map, its_classes in zip(mixtures, heat_maps, classes, strict=True)
    ]
    return max(results, key=lambda result: (result.p_value, -result.score))


def _result(
    tests: _Tests,
    num_rows: int,
    level: float,
    heat_map: tuple[tuple[float, ...], ...],
    classes: Mapping[int, tuple[float, ...]],
) -> DriftResult:
    shifts = [
        Shift(what=name, distance=distance, p_value=float(p_value))
        for name, distance, p_value in zip(
            tests.names, tests.distances, holm(np.array(tests.p_values)), strict=True
        )
    ]
    of_kind = {
        kind: [shift for shift, its in zip(shifts, tests.kinds, strict=True) if its == kind]
        for kind in dict.fromkeys(tests.kinds)
    }
    p_value = min((shift.p_value for shift in shifts), default=1.0)
    return DriftResult(
        rows=num_rows,
        p_value=p_value,
        score=max((abs(shift.distance) for shift in shifts), default=0.0),
        alarm=p_value < level,
        kinds={
            kind: (max(abs(one.distance) for one in its), min(one.p_value for one in its))
            for kind, its in of_kind.items()
        },
        moved=tuple(
            sorted(
                (shift for shift in shifts if shift.p_value < level),
                key=lambda shift: -abs(shift.distance),
            )
        ),
        heat_map=heat_map,
        classes=classes,
    )


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
    allowed_M1 = (tolerance + weights_MP @ errors_P)[:, None]
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
    before, one of our values.
    """

    def above_MN(side: Literal["left", "right"]) -> Floats:
        at_theirs_PN = np.stack([np.searchsorted(s, ours, side) / len(s) for s in samples])
        at_ours_N = np.searchsorted(ours, ours, side) / len(ours)
        return np.asarray(weights_MP @ at_theirs_PN - at_ours_N)

    # Where our function is below theirs, our values are the larger ones.
    larger_M, smaller_M = above_MN("left").max(axis=1), -above_MN("right").min(axis=1)
    return np.where(larger_M >= smaller_M, larger_M, -smaller_M)


def _compare_answers(
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
    shares_MK = weights_MP @ [its / its.sum() for its in known]
    errors_P = [reference_error(len(given), num_classes) for given in held_out]
    allowed_M1 = (tolerance + weights_MP @ errors_P)[:, None]
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
