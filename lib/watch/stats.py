"""Requests and latency of the last minutes, as the console draws them: each gateway's file, merged.

A gateway books what it counted between two reports to the time of the report, so nothing is done
for a request, and writes its buckets to `watch/stats/GATEWAY.json`. Whoever asks any gateway
sees all of them, at most one report late.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from lib.errors import StorageError
from lib.serving.record import Record
from lib.storage import Storage
from lib.watch.metrics import LATENCY_BUCKETS_S

BUCKET_S = 10
KEPT_S = 900
"""How far back the buckets go."""
FOLDER = "watch/stats"

Clock = Callable[[], float]


@dataclass(slots=True)
class Bucket:
    """What one gateway answered in BUCKET_S seconds, so far."""

    seconds: float = 0.0
    """Time that the counts are of; a rate is counts over this."""
    requests: dict[str, dict[str, int]] = field(default_factory=dict)
    """`model/version` → status → requests; the empty name holds those refused before a version."""
    latency: dict[str, list[int]] = field(default_factory=dict)
    """`model/version` → requests by latency, one count per bound of LATENCY_BUCKETS_S."""

    def add(self, record: Record) -> None:
        """Add what was counted."""
        for (model, version, _, status), count in record.requests.items():
            if not model and status < 400:
                # Who looks at the console is not the traffic that it shows.
                continue
            statuses = self.requests.setdefault(f"{model}/{version}" if model else "", {})
            statuses[str(status)] = statuses.get(str(status), 0) + count
        for (model, version), (counts, _) in record.latency.items():
            name = f"{model}/{version}"
            self.latency[name] = _sum(self.latency.get(name, ()), counts)


class Stats:
    """One gateway's buckets, and the file that they are in."""

    def __init__(self, storage: Storage, gateway: str, *, clock: Clock = time.time) -> None:
        self._storage = storage
        self._path = f"{FOLDER}/{gateway}.json"
        self._clock = clock
        self._buckets: dict[int, Bucket] = {}
        self._booked_s = clock()
        self._is_first = True
        self._is_changed = False

    def add(self, record: Record) -> None:
        """Book what was counted since the last call to the bucket of now."""
        now_s = self._clock()
        at = _start(now_s)
        bucket = self._buckets.setdefault(at, Bucket())
        bucket.seconds += min(max(now_s - self._booked_s, 0.0), KEPT_S)
        bucket.add(record)
        self._booked_s = now_s
        self._is_changed = bool(bucket.requests)
        self._buckets = {
            start: kept for start, kept in self._buckets.items() if at - KEPT_S < start <= at
        }

    def flush(self) -> None:
        """Write the buckets if there is news in them; call it in a thread."""
        if self._is_first:
            self._forget_the_dead()
            self._is_first = False
        if self._is_changed:
            content = {str(start): asdict(bucket) for start, bucket in self._buckets.items()}
            self._storage.write(self._path, orjson.dumps(content))
            self._is_changed = False

    def _forget_the_dead(self) -> None:
        """Delete the files of gateways that have answered nothing for so long."""
        oldest = _start(self._clock()) - KEPT_S
        for path, buckets in _files(self._storage):
            if max(map(int, buckets), default=0) < oldest:
                self._storage.delete(path)


def collect(storage: Storage, now_s: float) -> dict[str, Any]:
    """Return what all gateways answered lately; see `serve_apps.watching` for its form."""
    # Not every gateway has reported on the bucket of now: it would always look like a fall.
    last = _start(now_s) - BUCKET_S
    times = range(last - KEPT_S + BUCKET_S, last + 1, BUCKET_S)
    gateways = 0
    refused: Counter[str] = Counter()
    series: dict[str, _Series] = {}
    for _, buckets in _files(storage):
        seen = [(index, buckets[str(at)]) for index, at in enumerate(times) if str(at) in buckets]
        gateways += bool(seen)
        for index, bucket in seen:
            for name, statuses in bucket["requests"].items():
                if name:
                    series.setdefault(name, _Series(len(times))).count(index, bucket, name)
                else:
                    refused.update(statuses)
    return {
        "bucket_s": BUCKET_S,
        "times": list(times),
        "gateways": gateways,
        "versions": {name: series[name].render() for name in sorted(series)},
        "refused": dict(sorted(refused.items())),
    }


class _Series:
    """One version's buckets of all gateways."""

    def __init__(self, length: int) -> None:
        self._rate: list[float] = [0.0] * length
        self._errors: list[float] = [0.0] * length
        self._latency: list[Sequence[int]] = [()] * length
        self._statuses: Counter[str] = Counter()

    def count(self, index: int, bucket: Mapping[str, Any], name: str) -> None:
        statuses = bucket["requests"][name]
        self._statuses.update(statuses)
        seconds = max(float(bucket["seconds"]), 1.0)
        self._rate[index] += sum(statuses.values()) / seconds
        self._errors[index] += sum(n for k, n in statuses.items() if int(k) >= 500) / seconds
        self._latency[index] = _sum(self._latency[index], bucket["latency"].get(name, ()))

    def render(self) -> dict[str, Any]:
        whole: Sequence[int] = ()
        for counts in self._latency:
            whole = _sum(whole, counts)
        return {
            "statuses": dict(sorted(self._statuses.items())),
            "requests_per_s": [round(rate, 3) for rate in self._rate],
            "errors_per_s": [round(rate, 3) for rate in self._errors],
            "p50_ms": [quantile_ms(counts, 0.5) for counts in self._latency],
            "p99_ms": [quantile_ms(counts, 0.99) for counts in self._latency],
            "overall": {"p50_ms": quantile_ms(whole, 0.5), "p99_ms": quantile_ms(whole, 0.99)},
        }


def quantile_ms(counts: Sequence[int], share: float) -> float | None:
    """Return a quantile of counts by latency, None of none.

    Within a bucket the requests are taken to be spread evenly, as Prometheus does; beyond the
    last bound all that is known is the bound.
    """
    rank, below, lower_s = share * sum(counts), 0, 0.0
    bounds_s = LATENCY_BUCKETS_S[len(LATENCY_BUCKETS_S) - len(counts) :]
    for count, upper_s in zip(counts, bounds_s, strict=True):
        if count and below + count >= rank:
            width_s = upper_s - lower_s if upper_s != LATENCY_BUCKETS_S[-1] else 0.0
            return round(1000 * (lower_s + width_s * (rank - below) / count), 3)
        below += count
        lower_s = upper_s
    return None


def _files(storage: Storage) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for path in storage.list(FOLDER):
        try:
            found.append((path, storage.read_json(path)))
        except StorageError:
            # A gateway that started meanwhile has deleted the file of a dead one.
            continue
    return found


def _start(now_s: float) -> int:
    return int(now_s // BUCKET_S) * BUCKET_S


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Return counts by latency of two; those of an older gateway lack the shortest bounds."""
    if not left or not right:
        return list(left or right)
    length = max(len(left), len(right))
    padded = [[0] * (length - len(counts)) + list(counts) for counts in (left, right)]
    return [a + b for a, b in zip(*padded, strict=True)]
