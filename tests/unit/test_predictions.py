"""Reading the prediction log: windows, labels that come late, twice or contradict, retention."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.config import Settings
from lib.errors import ConfigError, StorageError
from lib.line.ports import variables
from lib.serving.bundle import bundle_path
from lib.storage import Storage
from lib.watch import labels as label_logs
from lib.watch import predictions
from lib.watch.dossier import logged_requests
from lib.watch.labels import LabelLog, read_labels
from lib.watch.logged import read_logged
from lib.watch.predictions import SCHEMA, Retention, expire, joined, num_answers, read
from lib.watch.recorder import Recorder
from lib.watch.segments import MAX_US, SPAN_US, Segments, by_span, read_segments
from tests.unit.serving_parts import by_brightness, card

NOON_S = 1_800_014_400.0
HOUR_US = 3600 * 10**6
NOON_US = int(NOON_S * 1e6)
CARDS = {number: card(number) for number in (1, 2)}
PLAIN = pa.schema([("time_us", pa.int64()), ("number", pa.int64())])


class Clock:
    def __init__(self, now_s: float = NOON_S) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def log_answers(
    storage: Storage, request_ids: list[str], *, clock: Clock, count: int = 1, **changes: Any
) -> None:
    recorder = Recorder(storage, clock=clock)
    images_NHWC = np.zeros((count, 4, 6, 1), np.uint8)
    for request_id in request_ids:
        answer_NK = None if changes.get("status", 200) != 200 else by_brightness(images_NHWC)
        given = {"caller": "day", "latency_s": 0.1, **changes}
        version = CARDS[given.pop("version", 1)]
        recorder.add(version, images_NHWC, answer_NK, request_id=request_id, **given)
    recorder.close()


def give(storage: Storage, clock: Clock, *labels: tuple[str, int], index: int = 0) -> None:
    async def main() -> None:
        log = LabelLog(storage, clock=clock)
        for request_id, label in labels:
            await log.add("shapes", row(request_id, label, index))
            clock.now_s += 1

    asyncio.run(main())


def row(request_id: str, label: int, index: int = 0) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "index": index,
        "label": label,
        "class_name": CARDS[1].class_names[label],
        "caller": "day",
    }


def labels_of(table: pa.Table) -> dict[str, int | None]:
    return dict(zip(table["request_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_a_label_is_joined_however_late_it_comes(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    log_answers(storage, ["a", "b", "c"], clock=clock)
    window = {"start_us": NOON_US, "end_us": NOON_US + HOUR_US}
    assert labels_of(joined(storage, "shapes", **window)) == {"a": None, "b": None, "c": None}
    give(storage, clock, ("a", 2))
    clock.now_s += 5 * 86_400
    give(storage, clock, ("b", 1), ("unknown", 0))
    table = joined(storage, "shapes", **window)
    assert labels_of(table) == {"a": 2, "b": 1, "c": None}
    assert table.schema == SCHEMA.append(pa.field("label", pa.int32()))
    assert joined(storage, "shapes", **window, columns=["version"]).column_names == [
        "version",
        "label",
    ]


def test_the_last_label_counts_and_contradictions_are_told(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    log_answers(storage, ["once", "twice", "mind"], clock=clock)
    # By two gateways, whose files are read one after the other.
    give(storage, clock, ("once", 1), ("twice", 1), ("mind", 0), ("mind", 1))
    give(storage, clock, ("twice", 1), ("mind", 2))
    labels = read_labels(storage, "shapes", start_us=0, end_us=MAX_US)
    found = {
        row["request_id"]: (row["label"], row["is_contradicted"]) for row in labels.to_pylist()
    }
    assert found == {"once": (1, False), "twice": (1, False), "mind": (2, True)}
    early = read_labels(storage, "shapes", start_us=0, end_us=NOON_US + 3 * 10**6)
    assert labels_of(early)["mind"] == 0
    window = {"start_us": NOON_US, "end_us": NOON_US + HOUR_US}
    assert labels_of(joined(storage, "shapes", **window)) == {"once": 1, "twice": 1, "mind": 2}


def test_labels_find_their_image_in_a_batch_and_every_version_that_saw_it(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    log_answers(storage, ["batch"], clock=clock, count=3)
    log_answers(storage, ["batch"], clock=clock, count=3, version=2, is_shadow=True)
    give(storage, clock, ("batch", 2), index=1)
    table = joined(storage, "shapes", start_us=0, end_us=MAX_US)
    found = {(row["version"], row["index"]): row["label"] for row in table.to_pylist()}
    expected = {(version, index): None for version in (1, 2) for index in (0, 1, 2)}
    assert found == {**expected, (1, 1): 2, (2, 1): 2}


def test_a_request_id_used_twice_is_ambiguous_but_a_retry_is_not(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    log_answers(storage, ["same", "same", "other"], clock=clock)
    log_answers(storage, ["retried"], clock=clock, status=503)
    clock.now_s += 1
    log_answers(storage, ["retried"], clock=clock)
    give(storage, clock, ("same", 1), ("other", 1), ("retried", 2))
    table = joined(storage, "shapes", start_us=0, end_us=MAX_US)
    found = [(row["request_id"], row["status"], row["label"]) for row in table.to_pylist()]
    assert sorted(found, key=str) == [
        ("other", 200, 1),
        ("retried", 200, 2),
        ("retried", 503, 2),
        ("same", 200, None),
        ("same", 200, None),
    ]


def test_nothing_logged_is_an_empty_table(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    window = {"start_us": 0, "end_us": MAX_US}
    assert read(storage, "shapes", **window).schema == SCHEMA
    assert joined(storage, "shapes", **window).num_rows == 0
    assert read_labels(storage, "shapes", **window).num_rows == 0
    assert expire(storage, "shapes", 30) == 0


def test_days_expire_as_wholes_with_their_labels(tmp_path: Path) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    for day in range(5):
        clock.now_s = NOON_S + day * 86_400
        log_answers(storage, [f"day{day}"], clock=clock)
        give(storage, clock, (f"day{day}", 1))
    now = datetime.fromtimestamp(NOON_S, UTC) + timedelta(days=4, hours=11)
    assert expire(storage, "shapes", 2, now=now) == 2
    assert labels_of(joined(storage, "shapes", start_us=0, end_us=MAX_US)) == {
        "day2": 1,
        "day3": 1,
        "day4": 1,
    }
    assert read_labels(storage, "shapes", start_us=0, end_us=MAX_US).num_rows == 3
    assert expire(storage, "shapes", 2, now=now) == 0
    with pytest.raises(ConfigError, match="at least one day"):
        expire(storage, "shapes", 0)


def test_every_models_old_days_go_once_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    uptime_s = 0.0
    retention = Retention(storage, 30, clock=lambda: uptime_s)
    # Of what is no longer served too.
    for model in ("shapes", "gone"):
        storage.write(f"predictions/{model}/date=2020-01-01/1200-a.parquet", b"")
        storage.write(f"labels/{model}/date=2020-01-01/1200-a.parquet", b"")
    clock.now_s = time.time()
    log_answers(storage, ["today"], clock=clock)

    def old() -> list[str]:
        return [path for path in storage.list("", recursive=True) if "2020" in path]

    delete, failing = Storage.delete_folder, {"predictions/gone/date=2020-01-01"}

    def fail(self: Storage, relative: str) -> None:
        if relative in failing:
            raise OSError(5, "Input/output error")
        delete(self, relative)

    monkeypatch.setattr(Storage, "delete_folder", fail)
    retention.look()
    assert {path.split("/")[1] for path in old()} == {"gone"}
    assert len(storage.folders("predictions/shapes")) == 1
    failing.clear()
    uptime_s = 86_399.0
    retention.look()
    assert old()
    uptime_s = 86_401.0
    retention.look()
    assert old() == []


def test_how_long_the_log_is_kept_is_a_checked_setting() -> None:
    env = {"RAYLINE_STORAGE": "/s", "MLFLOW_TRACKING_URI": "http://m"}
    assert Settings.from_env(env).log_days == 30
    assert Settings.from_env({**env, "RAYLINE_LOG_DAYS": "7"}).log_days == 7
    for wrong in ("0", "-1", "1.5", "many"):
        with pytest.raises(ConfigError, match="RAYLINE_LOG_DAYS"):
            Settings.from_env({**env, "RAYLINE_LOG_DAYS": wrong})
    assert "RAYLINE_LOG_DAYS" in variables()


def test_labels_that_come_together_are_one_write_each_durable_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, write, writes = Storage(str(tmp_path)), Storage.write, []

    def counted(self: Storage, relative: str, content: Any) -> None:
        write(self, relative, content)
        writes.append(relative)

    monkeypatch.setattr(Storage, "write", counted)

    async def main() -> None:
        log = LabelLog(storage, clock=Clock())

        async def one(number: int) -> None:
            await log.add("shapes", row(f"r{number}", number % 3))
            there = read_labels(storage, "shapes", start_us=0, end_us=MAX_US)
            assert f"r{number}" in there["request_id"].to_pylist()

        await asyncio.gather(*(one(number) for number in range(50)))

    asyncio.run(main())
    assert len(writes) < 10
    assert len(set(writes)) == 1


def test_labels_fill_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_logs, "MAX_FILE_ROWS", 8)
    storage, clock = Storage(str(tmp_path)), Clock()
    give(storage, clock, *((f"r{number}", 1) for number in range(20)))
    assert len(storage.list("labels/shapes", recursive=True)) == 3
    assert read_labels(storage, "shapes", start_us=0, end_us=MAX_US).num_rows == 20


def test_a_label_that_was_not_written_is_not_acknowledged_nor_others_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))

    def full(self: Storage, relative: str, content: Any) -> None:
        raise StorageError("no space left")

    async def main() -> None:
        log = LabelLog(storage, clock=Clock())
        await log.add("shapes", row("first", 1))
        with monkeypatch.context() as patched:
            patched.setattr(Storage, "write", full)
            waiting = [log.add("shapes", row(f"r{number}", 1)) for number in range(3)]
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(error) for error in found] == [StorageError] * 3
        await log.add("shapes", row("last", 2))

    asyncio.run(main())
    labels = read_labels(storage, "shapes", start_us=0, end_us=MAX_US)
    assert labels_of(labels) == {"first": 1, "last": 2}


def plain(times_us: list[int]) -> pa.Table:
    return pa.table({"time_us": times_us, "number": times_us}, schema=PLAIN)


def test_readers_see_every_row_once_while_writers_replace_their_files(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    written = [0, 0]

    def write(place: int) -> None:
        segments = Segments(storage, "rows", max_rows=30, dictionary=[])
        for number in range(200):
            segments.append(plain([NOON_US + 2 * number + place]))
            written[place] = number + 1

    threads = [threading.Thread(target=write, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    is_over = False
    while not is_over:
        is_over = not any(thread.is_alive() for thread in threads)
        least = list(written)
        seen = read_segments(storage, "rows", PLAIN, start_us=0, end_us=MAX_US)
        numbers = seen["number"].to_numpy() - NOON_US
        assert (np.diff(numbers) > 0).all()
        for place in (0, 1):
            mine = numbers[numbers % 2 == place]
            assert mine.tolist() == list(range(place, 2 * len(mine), 2))
            assert len(mine) >= least[place]
    assert written == [200, 200]


def test_only_files_of_the_window_are_opened(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    segments = Segments(storage, "rows", max_rows=100, dictionary=[])
    for span in range(4):
        segments.append(plain([NOON_US + span * SPAN_US, NOON_US + (span + 1) * SPAN_US - 1]))
    # Whoever opens another one fails on it.
    for path in storage.list("rows", recursive=True):
        if "/1205-" not in path:
            (tmp_path / path).write_bytes(b"damaged")
    window = {"start_us": NOON_US + SPAN_US, "end_us": NOON_US + 2 * SPAN_US}
    assert read_segments(storage, "rows", PLAIN, **window).num_rows == 2
    with pytest.raises(pa.ArrowInvalid):
        read_segments(storage, "rows", PLAIN, start_us=NOON_US, end_us=NOON_US + 2 * SPAN_US)


def test_a_search_that_has_no_more_time_lists_no_further_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, clock = Storage(str(tmp_path)), Clock()
    for day in range(3):
        clock.now_s = NOON_S + day * 86_400
        log_answers(storage, [f"d{day}"], clock=clock)
    listed: list[str] = []
    real = Storage.list

    def noted(self: Storage, relative: str, **options: bool) -> list[str]:
        listed.append(relative.rpartition("date=")[2])
        return real(self, relative, **options)

    monkeypatch.setattr(Storage, "list", noted)
    window = {"start_us": 0, "end_us": MAX_US}
    assert num_answers(storage, "shapes", "d0", 0, **window, budget_s=-1) is None
    assert listed == ["2027-01-17"]
    assert num_answers(storage, "shapes", "d0", 0, **window) == 1
    assert listed[1:] == ["2027-01-17", "2027-01-16", "2027-01-15"]


def test_a_clock_that_is_set_back_overwrites_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    segments = Segments(storage, "rows", max_rows=100, dictionary=[])
    times_us = [NOON_US, NOON_US + SPAN_US, NOON_US + 1, NOON_US + SPAN_US + 1]
    for time_us in times_us:
        segments.append(plain([time_us]))
    seen = read_segments(storage, "rows", PLAIN, start_us=0, end_us=MAX_US)
    assert seen["time_us"].to_pylist() == sorted(times_us)
    parts = by_span(plain(times_us))
    assert [part["time_us"].to_pylist() for part in parts] == [times_us[::2], times_us[1::2]]


def test_answers_of_another_run_with_the_same_number_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_named", set())
    storage, clock = Storage(str(tmp_path)), Clock()
    again = replace(CARDS[1], run_id="f" * 32)
    log_answers(storage, ["a", "b"], clock=clock)
    recorder = Recorder(storage, clock=clock)
    answer: dict[str, Any] = {"caller": "day", "latency_s": 0.1}
    image, probabilities = np.full((1, 4, 6, 1), 9, np.uint8), np.eye(3, dtype=np.float32)[:1]
    recorder.add(again, image, probabilities, request_id="c", **answer)
    recorder.close()
    window = {"start_us": NOON_US, "end_us": NOON_US + HOUR_US}
    rows = read(storage, "shapes", **window, columns=["run_id"])
    assert sorted(rows["run_id"].to_pylist()) == [*2 * [CARDS[1].run_id], "f" * 32]
    now_us = NOON_US + HOUR_US
    found = read_logged(storage, "shapes", again, now_us=now_us)
    assert found.images_NHWC.tolist() == image.tolist()
    assert "2 rows are of another version 1 of shapes, of run" in capsys.readouterr().out
    # Labelled while both had the request id: ambiguous, though one of the answers is left out.
    log_answers(storage, ["c"], clock=clock)
    give(storage, clock, ("b", 1), ("c", 2))
    bundles = {1: bundle_path("shapes", 1, again.run_id)}
    known = joined(storage, "shapes", **window, columns=["request_id"], bundles=bundles)
    assert known.to_pylist() == [{"request_id": "c", "label": None}]
    assert capsys.readouterr().out == ""
    summed = logged_requests(storage, "shapes", 1, bundles[1], now_us / 1e6, read)
    assert summed["rows"] == 1
    # Files of older gateways have no such column: their rows are taken by number.
    for path in storage.list("predictions", recursive=True):
        table = pq.read_table(storage.path(path)).drop_columns(["run_id"])
        pq.write_table(table, storage.path(path))
    assert read(storage, "shapes", **window).schema == SCHEMA
    assert len(read_logged(storage, "shapes", again, now_us=now_us).images_NHWC) == 4
    read(storage, "shapes", **window, bundles=bundles)
    said = [line for line in capsys.readouterr().out.splitlines() if "have no run" in line]
    assert len(said) == 1
    assert "4 rows of version 1 of shapes have no run" in said[0]
