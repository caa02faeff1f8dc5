"""Whether a window of requests looks like the training data: tests, and how often they may look.

A window's features are each compared with the reference by a Kolmogorov–Smirnov test, and so are
the confidence and the entropy of each version's answers; the share of every predicted class by the
binomial distribution. Holm's method corrects for their number, so the level
holds for the window as a whole. (Rabanser, Günnemann, Lipton, "Failing Loudly", 2019, found such
tests as good as multivariate ones, and they say what moved.)

Live images never come from exactly the distribution of the training images, and with enough rows
any difference is "significant". So the hypothesis tested is that no distribution function is
further than `tolerance` from the training data's anywhere.

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
class Reference:
    """What requests are compared with."""

    features_NF: npt.NDArray[np.float32]
    """Of a sample of the training images; every column by itself in ascending order."""
    feature_names: tuple[str, ...]
    grid: tuple[int, int]
    """The first rows·columns features are the cells of this grid."""
    class_names: tuple[str, ...]
    answers: Mapping[int, Answers] = field(default_factory=dict)
    """Version → its answers to held-out images; on those it was trained with it is too sure."""

    def __post_init__(self) -> None:
        """Sort the columns: all that is compared are their distributions."""
        object.__setattr__(self, "features_NF", np.sort(self.features_NF, axis=0))


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
    tests = _Tests()
    heat_map: tuple[tuple[float, ...], ...] = ()
    if len(window.features_NF):
        found, p_values = compare(window.features_NF, reference.features_NF, tolerance)
        tests.add(INPUTS, reference.feature_names, found, p_values)
        rows, columns = reference.grid
        cells = found[: rows * columns].reshape(rows, columns)
        heat_map = tuple(tuple(float(value) for value in row) for row in cells)
    classes: dict[int, tuple[float, ...]] = {}
    for version, answers in window.answers.items():
        held_out = reference.answers.get(version)
        if held_out is None or len(answers) < MIN_ANSWERS:
            continue
        found, p_values = _compare_answers(answers, held_out, len(reference.class_names), tolerance)
        what = ["confidence", "entropy", *(f"class {name}" for name in reference.class_names)]
        names = [f"version {version}: {name}" for name in what]
        tests.add(PREDICTIONS, names, found, p_values)
        classes[version] = tuple(float(value) for value in found[2:])
    num_rows = max(len(window.features_NF), sum(map(len, window.answers.values())))
    return _result(tests, num_rows, level, heat_map, classes)


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
    window_NF: npt.NDArray[np.float32], reference_MF: npt.NDArray[np.float32], tolerance: float
) -> tuple[Floats, Floats]:
    """Return signed Kolmogorov–Smirnov distance and p-value of every column.

    The reference's columns are each in ascending order. By the triangle inequality the distance to
    a distribution that is so far away exceeds the usual statistic by no more than that: without it,
    the usual distribution gives the p-value. Ties, such as cells that are always black, make it
    larger than it need be, never smaller.
    """
    columns = zip(np.sort(window_NF, axis=0).T, reference_MF.T, strict=True)
    distance = np.array([_distance(ours, theirs) for ours, theirs in columns])
    allowed = tolerance + reference_error(*reference_MF.shape)
    p_value = stats.kstwo.sf(np.maximum(np.abs(distance) - allowed, 0), len(window_NF))
    return distance, np.clip(p_value, 0, 1)


def reference_error(num_rows: int, num_columns: int) -> float:
    """Return how far distribution functions of so many rows may be from those they are drawn of."""
    return math.sqrt(math.log(2 * num_columns / _REFERENCE_LEVEL) / (2 * num_rows))


def _distance(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """Return the largest distance of the distribution functions of two ascending samples.

    As `scipy.stats.ks_2samp` has it, but the reference need not be sorted each time, which takes
    nearly all of that one's time. The functions are furthest apart at, or just before, one of our
    values.
    """

    def above(side: Literal["left", "right"]) -> Floats:
        at_theirs = np.searchsorted(theirs, ours, side) / len(theirs)
        return np.asarray(at_theirs - np.searchsorted(ours, ours, side) / len(ours))

    # Where our function is below theirs, our values are the larger ones.
    larger, smaller = float(above("left").max()), float(-above("right").min())
    return larger if larger >= smaller else -smaller


def _compare_answers(
    answers: Answers, held_out: Answers, num_classes: int, tolerance: float
) -> tuple[Floats, Floats]:
    ours, theirs = (
        np.stack([given.confidence_N, given.entropy_N], axis=1) for given in (answers, held_out)
    )
    distance, p_value = compare(ours, np.sort(theirs, axis=0), tolerance)
    counts, reference = (
        np.bincount(given.predicted_N, minlength=num_classes) for given in (answers, held_out)
    )
    shares = counts / len(answers) - reference / len(held_out)
    p_shares = _share_p_values(counts, reference, tolerance)
    return np.concatenate([distance, shares]), np.concatenate([p_value, p_shares])


def _share_p_values(
    counts: npt.NDArray[np.int64], reference: npt.NDArray[np.int64], tolerance: float
) -> Floats:
    """Return the exact p-value of every class, two-sided, of the nearest share allowed."""
    num, num_reference = int(counts.sum()), int(reference.sum())
    shares = reference / num_reference
    allowed = tolerance + reference_error(num_reference, len(reference))
    upper = stats.binom.sf(counts - 1, num, np.minimum(shares + allowed, 1.0))
    lower = stats.binom.cdf(counts, num, np.maximum(shares - allowed, 0.0))
    return np.asarray(np.minimum(1.0, 2 * np.minimum(upper, lower)), dtype=np.float64)


def holm(p_values: Floats) -> Floats:
    """Return p-values corrected by Holm's method: the chance of any false one is the level."""
    order = np.argsort(p_values)
    steps = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * steps))
    return adjusted
