"""Counts of what a gateway answered, as Prometheus will see them."""

from __future__ import annotations

from lib.serving.record import Record
from lib.watch.metrics import LATENCY_BUCKET, LATENCY_BUCKETS_S, LATENCY_SUM, REQUESTS
from tests.unit.serving_parts import card


def test_buckets_are_cumulative_and_a_bound_is_within_its_bucket() -> None:
    record = Record()
    for seconds in (0.0005, 0.001, 0.03, 60.0):
        record.add("day", 200, card(2), seconds)
    grown = {(metric, labels): value for metric, labels, value in record.increments()}
    assert grown[REQUESTS, ("shapes", "2", "day", "200")] == 4
    buckets = {
        labels[2]: value for (metric, labels), value in grown.items() if metric is LATENCY_BUCKET
    }
    assert (buckets["0.001"], buckets["0.02"], buckets["0.05"], buckets["10"]) == (2, 2, 3, 3)
    assert buckets["+Inf"] == 4
    assert len(buckets) == len(LATENCY_BUCKETS_S)
    assert abs(grown[LATENCY_SUM, ("shapes", "2")] - 60.0315) < 1e-9


def test_a_request_that_met_no_version_is_counted_without_one() -> None:
    record = Record()
    record.add("unknown", 401, None, 0.001)
    assert list(record.increments()) == [(REQUESTS, ("", "", "unknown", "401"), 1)]
