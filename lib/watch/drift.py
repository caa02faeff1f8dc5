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

The live requests of some days are mostly of two kinds themselves, the usual one and a new one, and
later requests may all be of the new. Where these are the share s of the live ones, they are the
mixture in which the live sample has the weight 1 / s and the ingested one the rest, below 0. So
weights above 1 are tried too, up to 5, as far as the live sample is known well enough: its error
counts as often as it does. On MNIST this took no alarm away: other kinds (shifted, blurred, other
digits, a class too often) stay nearer to the mixtures that count few errors. What it does hide is
more of the same: drift further away from the ingested images in the direction of the new kind. A
new kind that is less of the live requests than that, or one of several, raises alarms until a
retrain has seen more of it.

The reference is a sample of these, and the same one for every window: were its own error part of
each test, as in a two-sample test, a small sample that happens to be off would look like drift
again and again. So that error is bounded once, by the inequality of Dvoretzky, Kiefer and Wolfowitz
(with Massart's constant, 1990), and added to the tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lib.watch.distances import compare, compare_answers, holm, mixtures
from lib.watch.populations import Floats, Reference, Window

LEVEL = 0.01
"""Share of windows without drift that may raise an alarm."""
TOLERANCE = 0.02
"""Distance of distribution functions, and of a class's share, that is not called drift.

Measured: MNIST's test images, by other writers, are up to 0.045 from its training images (median of
the features: 0.012). Without a tolerance half of all shuffled blocks of 2,000 of them raise an
alarm, with this one 1 %; of windows of 250 it is 1.6 % and 0.2 %.
"""
INPUTS, PREDICTIONS = "inputs", "predictions"
MIN_ANSWERS = 50
"""Answers of a version in a window below which they are not tested."""


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
    samples = [population.features_NF for population in reference.populations]
    weights_MP = mixtures(samples, tolerance)
    tests_M = [_Tests() for _ in weights_MP]
    heat_maps: list[tuple[tuple[float, ...], ...]] = [() for _ in weights_MP]
    classes: list[dict[int, tuple[float, ...]]] = [{} for _ in weights_MP]
    if len(window.features_NF):
        found_MF, p_values_MF = compare(window.features_NF, samples, weights_MP, tolerance)
        rows, columns = reference.grid
        for mixture, tests in enumerate(tests_M):
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
        found_MT, p_values_MT = compare_answers(
            answers, held_out, weights, len(reference.class_names), tolerance
        )
        what = ["confidence", "entropy", *(f"class {name}" for name in reference.class_names)]
        names = [f"version {version}: {name}" for name in what]
        for mixture, tests in enumerate(tests_M):
            tests.add(PREDICTIONS, names, found_MT[mixture], p_values_MT[mixture])
            classes[mixture][version] = tuple(float(value) for value in found_MT[mixture, 2:])
    num_rows = max(len(window.features_NF), sum(map(len, window.answers.values())))
    results = [
        _result(tests, num_rows, level, heat_map, its_classes)
        for tests, heat_map, its_classes in zip(tests_M, heat_maps, classes, strict=True)
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
