"""The log of a gateway or version: a file of JSON lines that is there at once and stays bounded."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lib.errors import ConfigError
from lib.serving.client import wait_until
from lib.serving.payload import PayloadError
from serve_apps import logs
from serve_apps.logs import ProcessLog

LOGGER = logging.getLogger("lib.serving.anything")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[ProcessLog]:
    log = ProcessLog(folder / "rayline", "gateway-abc", **options).start()
    try:
        yield log
    finally:
        log.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fail(request_id: str) -> None:
    try:
        raise ValueError("the\ncause")
    except ValueError as error:
        logs.failed(request_id, 500, error)


def test_a_failure_is_found_by_its_request_id_while_the_process_runs(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        fail("id-1")
        try:
            raise PayloadError(503, "not stored") from OSError("disk full")
        except PayloadError as error:
            logs.failed("id-2", 503, error)
        # Nothing is flushed or closed here: a process that is killed has it on disk already.
        wait_until(lambda: len(lines(log.path)) == 2, deadline_s=10, what="the log")
        failure, refusal = lines(log.path)
    assert failure["request_id"] == "id-1"
    assert (failure["status"], failure["level"]) == (500, "ERROR")
    assert failure["error"] == "ValueError: the\ncause"
    assert 'raise ValueError("the' in failure["traceback"]
    assert failure["time"].endswith("+00:00")
    assert (refusal["request_id"], refusal["status"]) == ("id-2", 503)
    assert refusal["message"] == "request refused: not stored"
    assert refusal["error"] == "OSError: disk full"
    assert "traceback" not in refusal


def test_counts_at_info_are_in_it_and_nobody_else_reads_it(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        LOGGER.info("%d requests of %s", 3, "day")
        logging.getLogger("serve_apps.x").warning("odd: %s", {"a": 1})
        logging.getLogger("somebody.else").error("not ours")
    assert [line["message"] for line in lines(log.path)] == ["3 requests of day", "odd: {'a': 1}"]
    assert lines(log.path)[0]["logger"] == "lib.serving.anything"
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


def test_tracebacks_are_limited_and_every_failure_has_its_line(tmp_path: Path) -> None:
    clock = Clock()
    with running(tmp_path, clock=clock) as log:
        for number in range(logs.TRACEBACKS_PER_S + 7):
            fail(f"id-{number}")
        LOGGER.info("counts")
        clock.now_s += 1
        fail("later")
    *burst, counts, later = lines(log.path)
    assert [line["request_id"] for line in burst] == [f"id-{n}" for n in range(len(burst))]
    assert all(line["error"] for line in burst)
    assert sum("traceback" in line for line in burst) == logs.TRACEBACKS_PER_S
    assert counts["tracebacks_suppressed"] == 7
    assert "traceback" in later
    assert "tracebacks_suppressed" not in later


def test_what_a_slow_disk_makes_it_leave_out_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_QUEUED", 3)
    log = ProcessLog(tmp_path, "gateway-abc")
    handler = log._handler
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        # The thread has not started yet: nothing is written.
        for number in range(10):
            LOGGER.info("line %d", number)
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)
    log.start()
    wait_until(lambda: len(lines(log.path)) == 3, deadline_s=10, what="the log")
    LOGGER.info("after")
    log.close()
    assert lines(log.path)[-1] == {**lines(log.path)[-1], "message": "after", "lines_dropped": 7}


def test_the_files_stay_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_FILES", 4)
    folder = tmp_path / "rayline"
    folder.mkdir()
    for age in range(10):
        path = folder / f"gateway-{age}.jsonl"
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    with running(tmp_path, max_bytes=2000) as log:
        for number in range(200):
            LOGGER.info("line %d", number)
    assert lines(log.path)[-1]["message"] == "line 199"
    assert {path.name for path in folder.iterdir()} == {
        *(f"gateway-{age}.jsonl" for age in range(4)),
        "gateway-abc.jsonl",
        "gateway-abc.jsonl.1",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4000


def test_a_process_whose_file_another_one_deleted_begins_a_new_one(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        for request_id in ("id-1", "id-2"):
            fail(request_id)
            wait_until(lambda: bool(lines(log.path)), deadline_s=20, what="the line")
            assert [line["request_id"] for line in lines(log.path)] == [request_id]
            log.path.unlink()


def test_the_access_log_has_its_share_of_requests(tmp_path: Path) -> None:
    assert logs.access_share({}) == 0
    assert logs.access_share({"RAYLINE_ACCESS_LOG": "0.01"}) == 0.01
    for wrong in ("1.5", "-1", "some"):
        with pytest.raises(ConfigError, match="RAYLINE_ACCESS_LOG"):
            logs.access_share({"RAYLINE_ACCESS_LOG": wrong})
    with running(tmp_path) as log:
        for number in range(2000):
            logs.access(0.1, request_id=str(number), path="/predict", status=200)
    found = lines(log.path)
    # Of 2,000 at 0.1: more than 10 standard deviations to either side.
    assert 60 < len(found) < 340
    assert found[0]["path"] == "/predict"
    assert found[0]["logger"].endswith("access")
