"""The gateway's end of the prediction log: what is written, what a crash or a full disk costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib.config import Settings, log_images_percent
from lib.errors import ConfigError, StorageError
from lib.storage import Storage
from lib.watch import recorder as recorders
from lib.watch.features import features
from lib.watch.predictions import SCHEMA, read
from lib.watch.recorder import Recorder
from lib.watch.segments import MAX_US, by_span
from tests.unit.serving_parts import by_brightness, card

CARDS = {number: card(number) for number in (1, 2)}
NOON_S = 1_800_014_400.0
"""12:00:00 UTC of some day."""


def image(number: int) -> np.ndarray[Any, Any]:
    return np.full((1, 4, 6, 1), number % 256, np.uint8)


def add(recorder: Recorder, number: int, *, version: int = 1, **changes: Any) -> None:
    images_NHWC = image(number)
    given = {"request_id": f"r{number}", "caller": "day", "latency_s": 0.002, **changes}
    recorder.add(CARDS[version], images_NHWC, by_brightness(images_NHWC), **given)


def log_of(storage: Storage, **options: Any) -> pa.Table:
    return read(storage, "shapes", **{"start_us": 0, "end_us": MAX_US, **options})


def counts(recorder: Recorder) -> dict[str, float]:
    return {labels[0]: value for _, labels, value in recorder.increments()}


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@dataclass
class Disk:
    """Storage.write, which can be made to fail."""

    is_full: bool = False
    writes: list[str] = field(default_factory=list)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, write = Disk(), Storage.write

    def checked(self: Storage, relative: str, content: Any) -> None:
        if disk.is_full:
            raise StorageError("no space left")
        disk.writes.append(relative)
        write(self, relative, content)

    monkeypatch.setattr(Storage, "write", checked)
    return disk


def test_rows_hold_what_was_answered(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    recorder = Recorder(storage, clock=lambda: NOON_S)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 1), np.uint8)
    asked = {"caller": "day", "latency_s": 0.5}
    answer_NK = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25], [0, 0, 1]], np.float32)
    recorder.add(CARDS[1], pictures, answer_NK, request_id="batch", **asked)
    recorder.add(CARDS[2], pictures[:1], None, request_id="failed", status=503, **asked)
    recorder.add(CARDS[2], pictures[:2], answer_NK[1:], request_id="batch", is_shadow=True, **asked)
    recorder.close()
    log = log_of(storage)
    assert log.schema == SCHEMA
    rows = {(row["request_id"], row["index"], row["shadow"]): row for row in log.to_pylist()}
    assert len(rows) == 6
    second = rows["batch", 1, False]
    assert second["time_us"] == int(NOON_S * 1e6)
    assert (second["version"], second["predicted"], second["status"]) == (1, 0, 200)
    assert second["probabilities"] == [0.5, 0.25, 0.25]
    assert second["latency_ms"] == 500
    assert second["image"] == pictures[1].tobytes()
    assert second["features"] == pytest.approx(features(pictures)[1].tolist())
    failed = rows["failed", 0, False]
    assert (failed["version"], failed["status"], failed["predicted"]) == (2, 503, -1)
    assert failed["probabilities"] is None
    assert failed["image"] == pictures[0].tobytes()
    shadow = rows["batch", 1, True]
    assert (shadow["version"], shadow["predicted"]) == (2, 2)
    assert shadow["image"] is shadow["features"] is None
    assert counts(recorder) == {"accepted": 6, "written": 6, "dropped": 0, "without_image": 0}
    assert counts(recorder) == {"accepted": 0, "written": 0, "dropped": 0, "without_image": 0}


def test_a_crash_loses_only_what_came_in_since_the_last_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(recorders, "_TICK_S", 0.005)
    monkeypatch.setattr(recorders, "FLUSH_EVERY_S", 0.05)

    async def scenario() -> None:
        recorder = Recorder(storage)
        running = asyncio.create_task(recorder.run())
        for number in range(300):
            add(recorder, number)
        await until(lambda: log_of(storage).num_rows == 300)
        # Killed here: nothing is closed.
        running.cancel()
        for number in range(7):
            add(recorder, number)
        assert log_of(storage).num_rows == 300

    asyncio.run(scenario())


def test_many_rows_do_not_wait_for_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(recorders, "_TICK_S", 0.005)
    monkeypatch.setattr(recorders, "FLUSH_EVERY_S", 3600)
    monkeypatch.setattr(recorders, "FLUSH_ROWS", 10)

    async def scenario() -> None:
        recorder = Recorder(storage)
        running = asyncio.create_task(recorder.run())
        for number in range(9):
            add(recorder, number)
        await asyncio.sleep(0.05)
        assert log_of(storage).num_rows == 0
        add(recorder, 9)
        await until(lambda: log_of(storage).num_rows == 10)
        running.cancel()

    asyncio.run(scenario())


def test_a_full_disk_costs_what_is_beyond_the_bound_and_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(recorders, "MAX_ROWS", 50)

    async def scenario() -> None:
        recorder = Recorder(storage)
        add(recorder, 0)
        await recorder.flush()
        disk.is_full = True
        for number in range(1, 100):
            add(recorder, number)
            if number % 20 == 0:
                await recorder.flush()
        seen = counts(recorder)
        # The rest is lost if the gateway is killed now.
        assert seen["accepted"] - seen["written"] - seen["dropped"] == 50
        assert seen == {"accepted": 100, "written": 1, "dropped": 49, "without_image": 0}
        disk.is_full = False
        await recorder.flush()
        add(recorder, 100)
        await recorder.flush()
        kept = [*range(51), 100]
        assert log_of(storage)["request_id"].to_pylist() == [f"r{number}" for number in kept]
        assert counts(recorder) == {"accepted": 1, "written": 51, "dropped": 0, "without_image": 0}

    asyncio.run(scenario())


def test_a_flush_writes_what_came_in_while_another_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    write = Storage.write

    async def scenario() -> None:
        recorder = Recorder(storage)

        def slow(self: Storage, relative: str, content: Any) -> None:
            time.sleep(0.05)
            write(self, relative, content)

        monkeypatch.setattr(Storage, "write", slow)
        flushes = []
        for number in range(30):
            add(recorder, number)
            if number % 10 == 9:
                flushes.append(asyncio.create_task(recorder.flush()))
                await asyncio.sleep(0.01)
        add(recorder, 30)
        recorder.close()
        await asyncio.gather(*flushes)
        assert log_of(storage)["request_id"].to_pylist() == [f"r{number}" for number in range(31)]
        assert counts(recorder) == {
            "accepted": 31,
            "written": 31,
            "dropped": 0,
            "without_image": 0,
        }

    asyncio.run(scenario())


def test_the_share_of_images_is_drawn_by_the_request_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "FEATURE_ROWS", 1000)
    monkeypatch.setattr(recorders, "KEPT_IMAGES", 1000)
    chosen = []
    for name in ("a", "b"):
        storage = Storage(str(tmp_path / name))
        recorder = Recorder(storage, image_percent=30)
        for number in range(1000):
            add(recorder, number)
        recorder.close()
        log = log_of(storage)
        assert log["features"].null_count == 0
        assert log["predicted"].to_pylist() == [number % 256 % 3 for number in range(1000)]
        found = dict(zip(log["request_id"].to_pylist(), log["image"].to_pylist(), strict=True))
        assert all(
            pixels in (None, image(number).tobytes())
            for number in range(1000)
            for pixels in [found[f"r{number}"]]
        )
        chosen.append({name for name, pixels in found.items() if pixels is not None})
    assert chosen[0] == chosen[1]
    assert 220 < len(chosen[0]) < 380


@pytest.mark.parametrize(("bound", "most"), [("KEPT_IMAGE_BYTES", 24 * 100), ("KEPT_IMAGES", 100)])
def test_a_busy_gateway_keeps_fewer_images_and_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(recorders, bound, most)
    monkeypatch.setattr(recorders, "FEATURE_ROWS", 500)
    recorder = Recorder(storage)
    for number in range(1000):
        add(recorder, number)
    recorder.close()
    log = log_of(storage)
    assert 60 < 1000 - log["image"].null_count < 140
    assert 420 < 1000 - log["features"].null_count < 580
    rows = [row for row in log.to_pylist() if row["features"] is not None]
    for row in rows:
        expected = features(image(int(row["request_id"][1:])))[0].tolist()
        assert row["features"] == pytest.approx(expected)


def test_images_beyond_the_bound_of_memory_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(recorders, "MAX_IMAGE_BYTES", 24 * 10)
    recorder = Recorder(storage)
    for number in range(25):
        add(recorder, number)
    recorder.close()
    pictures = log_of(storage)["image"].to_pylist()
    assert pictures == [*(image(number).tobytes() for number in range(10)), *15 * [None]]
    assert counts(recorder)["without_image"] == 15


def test_small_flushes_become_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    monkeypatch.setattr(recorders, "FILE_ROWS", 40)
    now_s = NOON_S

    recorder = Recorder(storage, clock=lambda: now_s)
    for number in range(100):
        now_s += 2
        add(recorder, number, version=1 + number % 2)
        recorder.close()
        assert log_of(storage).num_rows == number + 1
    assert log_of(storage)["request_id"].to_pylist() == [f"r{number}" for number in range(100)]
    # 100 rows in 200 s: two full files, and the rest.
    assert len(storage.list("predictions/shapes", recursive=True)) == 3


def test_an_answer_that_is_being_written_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(Storage(str(tmp_path)), clock=lambda: NOON_S)
    add(recorder, 0, version=1)
    add(recorder, 1, version=2)
    seen = []

    def cut(rows: pa.Table) -> list[pa.Table]:
        seen.append(recorder.num_answers("shapes", "r0", 0))
        return by_span(rows)

    monkeypatch.setattr(recorders, "by_span", cut)
    recorder.close()
    assert seen == [1, 1]
    assert recorder.num_answers("shapes", "r0", 0) == 0


def test_each_day_has_its_folder(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    now_s = NOON_S + 12 * 3600 - 2
    recorder = Recorder(storage, clock=lambda: now_s)
    for number in range(4):
        add(recorder, number)
        now_s += 1
    recorder.close()
    days = storage.folders("predictions/shapes")
    assert [day.rpartition("=")[2] for day in days] == ["2027-01-15", "2027-01-16"]
    assert log_of(storage).num_rows == 4
    midnight_us = int((NOON_S + 12 * 3600) * 1e6)
    before = log_of(storage, end_us=midnight_us, columns=["request_id"])
    assert before.to_pylist() == [{"request_id": "r0"}, {"request_id": "r1"}]
    after = log_of(storage, start_us=midnight_us, columns=["request_id"])
    assert after.to_pylist() == [{"request_id": "r2"}, {"request_id": "r3"}]


def test_the_share_of_images_is_a_checked_setting() -> None:
    env = {"RAYLINE_STORAGE": "/s", "MLFLOW_TRACKING_URI": "http://m"}
    assert Settings.from_env(env).log_images == 100
    assert Settings.from_env({**env, "RAYLINE_LOG_IMAGES": "2.5"}).log_images == 2.5
    for wrong in ("-1", "101", "nan", "many"):
        with pytest.raises(ConfigError, match="RAYLINE_LOG_IMAGES"):
            log_images_percent({"RAYLINE_LOG_IMAGES": wrong})
