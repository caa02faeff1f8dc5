"""How well the versions do, from what was logged: with labels accuracy, without them its shadows.

Arrays in, numbers out. Intervals are Wilson's, which hold near 0 and 1 and for few rows too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

NO_LABEL = -1
FAILED = -1
"""Predicted class of a request that failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What was logged, one value a row in each, and of some of it the truth."""

    image_id_N: npt.NDArray[Any]
    """The same for every version that was asked about an image."""
    time_us_N: npt.NDArray[np.int64]
    version_N: npt.NDArray[np.int32]
    shadow_N: npt.NDArray[np.bool_]
    predicted_N: npt.NDArray[np.int32]
    """Index of the class, or FAILED."""
    confidence_N: npt.NDArray[np.float32]
    entropy_N: npt.NDArray[np.float32]
    """Of the probabilities, in nats; both are NaN where the request failed."""
    label_N: npt.NDArray[np.int32]
    """Index of the true class, or NO_LABEL."""

    def take(self, chosen: npt.NDArray[Any]) -> Rows:
        """Return some rows, by mask or by number."""
        return Rows(**{name: getattr(self, name)[chosen] for name in Rows.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share of some rows, with its confidence interval; no numbers without rows."""

    count: int
    rows: int
    share: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, count: int, rows: int, confidence: float = 0.95) -> Share:
        """Return `count` of `rows` with Wilson's interval."""
        if rows == 0:
            return cls(count=0, rows=0, share=None, low=None, high=None)
        low, high = wilson(count, rows, confidence)
        return cls(count=count, rows=rows, share=count / rows, low=low, high=high)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionQuality:
    """What is known of one version in a window."""

    version: int
    shadow: bool
    rows: int
    failed: Share
    accuracy: Share
    """Over the rows with a label; failed ones count as wrong."""
    class_accuracy: tuple[Share, ...]
    """By true class: the share of its rows that was found."""
    class_shares: tuple[float, ...]
    """Distribution of the predicted classes."""
    confidence: float | None
    """Mean probability of the predicted class."""
    entropy: float | None
    """Mean, in nats."""

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """How often a shadow said something else than the version that answered."""

    shadow: int
    answered_by: int
    disagreed: Share
    shadow_accuracy: Share
    """Of the compared rows that have a label."""
    answered_accuracy: Share

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON types."""
        return asdict(self)


def wilson(count: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share."""
    # As `scipy.stats.binomtest(…).proportion_ci` has it, which first does a test that takes 3 ms.
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = (count + z2 / 2) / (rows + z2)
    half = math.sqrt(z2 * (count * (rows - count) / rows + z2 / 4)) / (rows + z2)
    # By rounding it would leave out 0 or 1 by a hair.
    low = max(0.0, middle - half) if count else 0.0
    high = min(1.0, middle + half) if count < rows else 1.0
    return low, high


def by_version(rows: Rows, num_classes: int, *, with_classes: bool = True) -> list[VersionQuality]:
    """Return what is known of every version, as the one that answered and as a shadow.

    Without classes, `class_accuracy` is empty: its intervals are most of the work.
    """
    found = []
    for shadow in (False, True):
        of_kind = rows.shadow_N == shadow
        for version in np.unique(rows.version_N[of_kind]):
            mine = rows.take(of_kind & (rows.version_N == version))
            found.append(_of_version(mine, int(version), shadow, num_classes, with_classes))
    return found


def disagreements(rows: Rows) -> list[Disagreement]:
    """Compare every shadow's answers with those that the callers got, image by image."""
    shadows, answered = rows.take(rows.shadow_N), rows.take(~rows.shadow_N)
    order = np.argsort(answered.image_id_N, kind="stable")
    ids = answered.image_id_N[order]
    if not len(ids) or not len(shadows.image_id_N):
        return []
    places = np.minimum(np.searchsorted(ids, shadows.image_id_N), len(ids) - 1)
    known = ids[places] == shadows.image_id_N
    answered, shadows = answered.take(order[places[known]]), shadows.take(known)
    worked = (answered.predicted_N != FAILED) & (shadows.predicted_N != FAILED)
    answered, shadows = answered.take(worked), shadows.take(worked)
    pairs = np.unique(np.stack([shadows.version_N, answered.version_N], axis=1), axis=0)
    found = []
    for shadow, by in pairs:
        both = (shadows.version_N == shadow) & (answered.version_N == by)
        ours, theirs = shadows.take(both), answered.take(both)
        differ = int((ours.predicted_N != theirs.predicted_N).sum())
        found.append(
            Disagreement(
                shadow=int(shadow),
                answered_by=int(by),
                disagreed=Share.of(differ, int(both.sum())),
                shadow_accuracy=_accuracy(ours),
                answered_accuracy=_accuracy(theirs),
            )
        )
    return found


def sliding(rows: Rows, *, width_us: int, step_us: int, end_us: int) -> Iterator[tuple[int, Rows]]:
    """Yield windows of rows, oldest first, with the time each ends at; the last ends at `end_us`.

    A window holds the rows of the `width_us` before its end.
    """
    if not len(rows.time_us_N):
        return
    first = int(rows.time_us_N.min())
    steps = max(0, (end_us - first) // step_us)
    for back in range(steps, -1, -1):
        end = end_us - back * step_us
        yield end, rows.take((rows.time_us_N > end - width_us) & (rows.time_us_N <= end))


def is_worse(accuracy: Share, expected: float, *, margin: float, confidence: float) -> bool:
    """Whether the accuracy is, with this confidence, more than `margin` below the expected one."""
    if not accuracy.rows:
        return False
    # The exact test: Wilson's interval is too sure of itself where nearly all are right.
    allowed = min(max(expected - margin, 0.0), 1.0)
    test = stats.binomtest(accuracy.count, accuracy.rows, allowed, alternative="less")
    return bool(test.pvalue < 1 - confidence)


def _of_version(
    rows: Rows, version: int, shadow: bool, num_classes: int, with_classes: bool
) -> VersionQuality:
    worked = rows.predicted_N != FAILED
    num_worked = int(worked.sum())
    counts = np.bincount(rows.predicted_N[worked], minlength=num_classes)
    confidence = float(rows.confidence_N[worked].mean()) if num_worked else None
    return VersionQuality(
        version=version,
        shadow=shadow,
        rows=len(worked),
        failed=Share.of(len(worked) - num_worked, len(worked)),
        accuracy=_accuracy(rows),
        class_accuracy=_class_accuracy(rows, num_classes) if with_classes else (),
        class_shares=tuple(float(count) / max(1, num_worked) for count in counts),
        confidence=confidence,
        entropy=float(rows.entropy_N[worked].mean()) if num_worked else None,
    )


def _accuracy(rows: Rows) -> Share:
    labelled = rows.label_N != NO_LABEL
    hits = labelled & (rows.label_N == rows.predicted_N)
    return Share.of(int(hits.sum()), int(labelled.sum()))


def _class_accuracy(rows: Rows, num_classes: int) -> tuple[Share, ...]:
    labelled = rows.label_N != NO_LABEL
    totals = np.bincount(rows.label_N[labelled], minlength=num_classes)
    hits = labelled & (rows.label_N == rows.predicted_N)
    found = np.bincount(rows.label_N[hits], minlength=num_classes)
    return tuple(Share.of(int(f), int(t)) for f, t in zip(found, totals, strict=True))
