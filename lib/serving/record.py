"""What a gateway answered, counted: a request costs some additions, a report goes out at times."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from lib.serving.bundle import Card
from lib.watch import metrics
from lib.watch.metrics import LATENCY_BUCKETS_S, Metric, le

_BOUNDS_S = LATENCY_BUCKETS_S[:-1]
Increment = tuple[Metric, tuple[str, ...], float]
"""A counter, its labels, and what it has grown by."""


class Record:
    """Counts since the last report, or of all reports together."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str, int]] = Counter()
        """By model, version, caller and status; model and version are empty where none was met."""
        self.latency: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        """By model and version: requests by bucket; their seconds, those of failed ones, and the
        images of the others."""

    def add(
        self, caller: str, status: int, card: Card | None, seconds: float, num_images: int = 0
    ) -> None:
        """Count a request that was answered."""
        if card is None:
            self.requests["", "", caller, status] += 1
            return
        key = (card.name, str(card.version))
        self.requests[*key, caller, status] += 1
        found = self.latency.get(key)
        if found is None:
            found = self.latency[key] = ([0] * len(LATENCY_BUCKETS_S), [0.0, 0.0, 0])
        counts, total = found
        counts[bisect_left(_BOUNDS_S, seconds)] += 1
        total[0] += seconds
        if status == 200:
            total[2] += num_images
        else:
            total[1] += seconds

    def merge(self, other: Record) -> None:
        """Add what another one has counted."""
        self.requests.update(other.requests)
        for key, (counts, total) in other.latency.items():
            mine, my_total = self.latency.get(key, ([0] * len(counts), [0.0] * len(total)))
            self.latency[key] = (
                [a + b for a, b in zip(mine, counts, strict=True)],
                [a + b for a, b in zip(my_total, total, strict=True)],
            )

    def increments(self) -> Iterator[Increment]:
        """Yield what each counter has grown by; buckets hold what is in the lower ones too."""
        for (model, version, caller, status), count in self.requests.items():
            yield metrics.REQUESTS, (model, version, caller, str(status)), count
        for key, (counts, total) in self.latency.items():
            for bound_s, count in zip(LATENCY_BUCKETS_S, accumulate(counts), strict=True):
                yield metrics.LATENCY_BUCKET, (*key, le(bound_s)), count
            yield metrics.LATENCY_SUM, key, total[0]
