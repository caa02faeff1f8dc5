"""Requests and latency of the last minutes, as several gateways count them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.serving.record import Record
from lib.storage import Storage
from lib.watch.metrics import LATENCY_BUCKETS_S
from lib.watch.stats import BUCKET_S, FOLDER, KEPT_S, Stats, _sum, collect, quantile_ms
from tests.unit.serving_parts import card

START = 1_700_000_000


class Clock:
    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


def record(version: int, num: int, *, status: int = 200, seconds: float = 0.004) -> Record:
    made = Record()
    for _ in range(num):
        made.add("anyone", status, card(version), seconds)
    return made


def test_what_gateways_counted_is_added_up(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    gateways = [Stats(storage, name, clock=clock) for name in ("a", "b")]
    clock.now += 5
    for stats in gateways:
        stats.add(record(1, 20))
        stats.flush()
    clock.now += 4
    gateways[1].add(record(2, 3, status=503, seconds=0.3))
    gateways[1].flush()
    assert collect(storage, clock.now)["versions"] == {}, "the bucket of now is not whole"
    found = collect(storage, clock.now + BUCKET_S)
    assert found["gateways"] == 2
    assert found["times"][-1] == START
    assert len(found["times"]) == KEPT_S / BUCKET_S
    first, second = found["versions"]["shapes/1"], found["versions"]["shapes/2"]
    assert first["statuses"] == {"200": 40}
    # One has counted for 5 s, the other for 9.
    assert first["requests_per_s"][-1] == pytest.approx(20 / 5 + 20 / 9, abs=0.01)
    assert first["requests_per_s"][:-1] == [0] * (len(found["times"]) - 1)
    assert 2 <= first["p50_ms"][-1] <= 5
    assert first["p50_ms"][0] is None
    assert second["errors_per_s"][-1] == pytest.approx(3 / 9, abs=0.01)
    assert 200 <= second["overall"]["p99_ms"] <= 500


def test_who_was_refused_is_counted_and_who_watches_is_not(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    stats = Stats(storage, "a", clock=clock)
    seen = Record()
    seen.add("unknown", 401, None, 0.001)
    seen.add("anyone", 200, None, 0.001)
    stats.add(seen)
    stats.flush()
    found = collect(storage, clock.now + BUCKET_S)
    assert (found["refused"], found["versions"]) == ({"401": 1}, {})


def test_old_buckets_and_files_of_dead_gateways_go(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    dead = Stats(storage, "dead", clock=clock)
    dead.add(record(1, 5))
    dead.flush()
    clock.now += KEPT_S / 2
    alive = Stats(storage, "alive", clock=clock)
    alive.add(record(1, 7))
    alive.flush()
    clock.now += BUCKET_S
    assert collect(storage, clock.now)["gateways"] == 2
    clock.now += KEPT_S - 2 * BUCKET_S
    assert collect(storage, clock.now)["versions"]["shapes/1"]["statuses"] == {"200": 7}
    clock.now += 3 * BUCKET_S
    alive.add(record(1, 1))
    alive.flush()
    clock.now += BUCKET_S
    assert collect(storage, clock.now)["versions"]["shapes/1"]["statuses"] == {"200": 1}
    Stats(storage, "next", clock=clock).flush()
    assert storage.list(FOLDER) == [f"{FOLDER}/alive.json"]


def test_an_idle_gateway_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    stats = Stats(storage, "a", clock=clock)
    written: list[Any] = []
    monkeypatch.setattr(Storage, "write", lambda self, *given: written.append(given))
    for requests in (4, 0, 0, 0, 0):
        stats.add(record(1, requests))
        stats.flush()
        clock.now += BUCKET_S / 2
    # Once with news, once more for the longer time that the bucket of then is of.
    assert len(written) == 2


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([0] * 14, 0.5, None),
        ([10] + [0] * 13, 0.5, 0.5),
        ([0, 0, 0, 100] + [0] * 10, 0.99, 9.95),
        ([50, 0, 0, 50] + [0] * 10, 0.5, 1.0),
        ([0] * 13 + [3], 0.5, 10_000),
    ],
)
def test_quantiles_lie_where_the_counts_do(
    counts: list[int], share: float, expected: float | None
) -> None:
    assert quantile_ms(counts, share) == (expected and pytest.approx(expected))


def test_counts_of_a_gateway_without_the_shortest_bounds_are_read_as_meant() -> None:
    finer = [0] * len(LATENCY_BUCKETS_S)
    finer[LATENCY_BUCKETS_S.index(0.0005)] = 3
    coarser = [7, *[0] * (len(LATENCY_BUCKETS_S) - 4)]
    # Up to 1 ms is the first bound of the older one.
    assert _sum(finer, coarser)[LATENCY_BUCKETS_S.index(0.001)] == 7
    assert quantile_ms(coarser, 1.0) == 1.0
