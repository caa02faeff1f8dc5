"""What versions did between two readings of the counters: requests, errors, latency. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lib.watch import metrics

READ = tuple(
    metric.exported
    for metric in (
        metrics.REQUESTS,
        metrics.LATENCY_BUCKET,
        metrics.LATENCY_SUM,
        metrics.SHADOWED,
    )
)
"""The counters that a reading holds, as Prometheus names them."""
Key = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One series' value now."""

    name: str
    labels: Mapping[str, str]
    value: float

    @property
    def key(self) -> Key:
        """What tells the series from all others."""
        return self.name, frozenset(self.labels.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """All counters of one moment."""

    source: str
    """Where they were read: elsewhere the same series have other labels."""
    time_s: float
    samples: tuple[Sample, ...]


@dataclass(kw_only=True, slots=True)
class VersionCounts:
    """What one version did in between."""

    requests: float = 0.0
    errors: float = 0.0
    """Answers with a status of 500 or above."""
    latency_sum_s: float = 0.0
    buckets: dict[float, float] = field(default_factory=dict)
    """Upper bound in seconds → requests answered within it."""
    shadow: dict[str, float] = field(default_factory=dict)
    """Copies by what became of them: agreed, disagreed, dropped or failed."""

    def quantile_s(self, q: float) -> float:
        """Return a quantile of the latency, as Prometheus would; NaN without requests.

        It lies within the bucket that it is in, and is the highest finite bound at most.
        """
        bounds = sorted(self.buckets)
        total = self.buckets[bounds[-1]] if bounds else 0.0
        if total <= 0:
            return math.nan
        rank, lower_s, below = q * total, 0.0, 0.0
        for bound_s in bounds:
            within = self.buckets[bound_s]
            if within >= rank and within > below:
                if math.isinf(bound_s):
                    return lower_s
                return lower_s + (bound_s - lower_s) * (rank - below) / (within - below)
            lower_s, below = bound_s, within
        return lower_s


def between(before: Reading, after: Reading) -> dict[tuple[str, str], VersionCounts]:
    """Return what each (model, version) did between two readings of one source.

    A counter that is lower than before belongs to a process that started again: all of it counts.
    A series that is new counts from zero. One that is gone counts nothing.
    """
    if before.source != after.source:
        raise ValueError(f"readings of two sources: {before.source} and {after.source}")
    earlier = {sample.key: sample.value for sample in before.samples}
    counts: dict[tuple[str, str], VersionCounts] = defaultdict(VersionCounts)
    for sample in after.samples:
        past = earlier.get(sample.key, 0.0)
        grown = sample.value - past if sample.value >= past else sample.value
        version = sample.labels.get("version", "")
        if grown > 0 and version:
            _add(counts[sample.labels["model"], version], sample, grown)
    return dict(counts)


def matching(samples: Iterable[Sample], name: str, **labels: str) -> list[Sample]:
    """Return the samples of a metric that have these labels."""
    return [
        sample
        for sample in samples
        if sample.name == name
        and all(sample.labels.get(label) == value for label, value in labels.items())
    ]


def _add(counts: VersionCounts, sample: Sample, grown: float) -> None:
    if sample.name == metrics.REQUESTS.exported:
        counts.requests += grown
        counts.errors += grown * sample.labels["status"].startswith("5")
    elif sample.name == metrics.LATENCY_BUCKET.exported:
        bound_s = float(sample.labels["le"])
        counts.buckets[bound_s] = counts.buckets.get(bound_s, 0.0) + grown
    elif sample.name == metrics.LATENCY_SUM.exported:
        counts.latency_sum_s += grown
    elif sample.name == metrics.SHADOWED.exported:
        result = sample.labels["result"]
        counts.shadow[result] = counts.shadow.get(result, 0.0) + grown
