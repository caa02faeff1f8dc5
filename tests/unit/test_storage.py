"""Storage on a disk and on an S3 store that fails requests."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow.fs as pafs
import pytest

import lib.storage
from lib.errors import MissingError, StorageError
from lib.storage import Storage
from lib.train.journal import Journal
from tests.object_store import DENIED, LOST, RESET, SLOW_DOWN, ObjectStore, object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store("bucket") as running:
        yield running


@pytest.fixture
def remote(store: ObjectStore, request: pytest.FixtureRequest) -> Iterator[Storage]:
    """A root of its own for each test."""
    yield Storage(f"s3://bucket/{request.function.__name__}")
    store.fault = lambda request: None


@pytest.fixture
def impatient(remote: Storage, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The SDK tries once, the time is that which was slept; return the delays."""
    _, (options,) = remote.filesystem.__reduce__()
    once = pafs.AwsStandardS3RetryStrategy(max_attempts=1)
    object.__setattr__(remote, "filesystem", pafs.S3FileSystem(**options, retry_strategy=once))
    delays: list[float] = []
    clock = SimpleNamespace(sleep=delays.append, monotonic=lambda: sum(delays))
    monkeypatch.setattr(lib.storage, "time", clock)
    return delays


def first(number: int, fault: str) -> Iterator[str | None]:
    yield from [fault] * number
    while True:
        yield None


def test_a_file_is_written_with_one_request(store: ObjectStore, remote: Storage) -> None:
    store.requests.clear()
    remote.write("a/b/c.bin", b"content")
    assert store.requests == [f"PUT /bucket/{remote.root.partition('/')[2]}/a/b/c.bin"]
    assert remote.read("a/b/c.bin") == b"content"
    assert remote.list("a", recursive=True) == ["a/b/c.bin"]
    assert remote.folders("a") == ["a/b"]


def test_an_event_of_a_sweep_costs_one_request(store: ObjectStore, remote: Storage) -> None:
    with Journal(remote, "sweeps/1") as journal:
        store.requests.clear()
        for number in range(3):
            journal.append({"event": "reported", "number": number}, durable=True)
        assert len(store.requests) == 3
    with Journal(remote, "sweeps/1") as journal:
        assert [event["number"] for event in journal.events] == [0, 1, 2]


def test_a_journal_of_objects_overwrites_nothing_after_a_failed_write(
    store: ObjectStore, remote: Storage
) -> None:
    with Journal(remote, "sweep") as journal:
        journal.append({"event": "a"})
        store.fault = lambda request: DENIED
        with pytest.raises(StorageError):
            journal.append({"event": "lost"})
        store.fault = lambda request: None
        journal.append({"event": "b"})
    # As one that was written before numbers were kept dense left it.
    remote.delete("sweep/journal/00000001.json")
    for event in ("c", "d"):
        with Journal(remote, "sweep") as journal:
            journal.append({"event": event})
    with Journal(remote, "sweep") as journal:
        assert [event["event"] for event in journal.events] == ["b", "c", "d"]


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET])
def test_transient_errors_are_retried_with_growing_delays(
    store: ObjectStore, remote: Storage, impatient: list[float], fault: str
) -> None:
    remote.write("file", b"content")
    faults = first(3, fault)
    store.fault = lambda request: next(faults)
    assert remote.read("file") == b"content"
    assert len(impatient) == 3
    assert all(most / 2 <= delay <= most for delay, most in zip(impatient, (1, 2, 4), strict=True))
    for work in (lambda: remote.write("file", b"new"), lambda: remote.delete("file")):
        faults = first(2, fault)
        work()
    assert not remote.exists("file")


def test_errors_that_last_end_within_the_bound(
    store: ObjectStore, remote: Storage, impatient: list[float]
) -> None:
    store.fault = lambda request: SLOW_DOWN
    with pytest.raises(StorageError, match=r"file can't be written.*SLOW_DOWN.*failed for 30 s"):
        remote.write("file", b"content")
    assert 20 < sum(impatient) <= lib.storage.RETRY_S
    for work in (lambda: remote.list(""), lambda: remote.exists("x"), lambda: remote.read("x")):
        with pytest.raises(StorageError, match="failed for 30 s"):
            work()


def test_a_refusal_is_not_retried_and_names_the_credentials(
    store: ObjectStore, remote: Storage, impatient: list[float]
) -> None:
    store.fault = lambda request: DENIED
    store.requests.clear()
    for work in (
        lambda: remote.write("file", b"content"),
        lambda: remote.read("file"),
        lambda: remote.create_json("file", {}),
        lambda: remote.list(""),
    ):
        with pytest.raises(StorageError, match="check the credentials"):
            work()
    assert len(store.requests) == 4
    assert not impatient


def test_a_missing_file_is_told_from_other_errors(remote: Storage, tmp_path: Path) -> None:
    for storage in (remote, Storage(str(tmp_path))):
        with pytest.raises(MissingError, match="none.json is missing"):
            storage.read_json("none.json")
        storage.delete("none.json")
        storage.delete_folder("none")


def create_at_once(storage: Storage, name: str, writers: int) -> list[int]:
    """Let writers create a file at the same time; return those that did."""
    barrier = threading.Barrier(writers)
    winners = []

    def create(number: int) -> None:
        barrier.wait()
        if storage.create_json(name, {"writer": number}):
            winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


def test_of_two_writers_on_s3_one_creates_a_file(
    store: ObjectStore, remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have looked before one writes.
    monkeypatch.setattr(Storage, "exists", lambda *_: False)
    for number in range(3):
        (winner,) = create_at_once(remote, f"{number}.json", 4)
        assert remote.read_json(f"{number}.json") == {"writer": winner}


def test_creating_a_file_succeeds_when_the_answer_is_lost(
    store: ObjectStore, remote: Storage
) -> None:
    faults = first(1, LOST)
    store.fault = lambda request: next(faults) if request.startswith("PUT") else None
    assert remote.create_json("file.json", {"by": 1})
    assert not remote.create_json("file.json", {"by": 2})
    assert remote.read_json("file.json") == {"by": 1}


def test_the_uri_says_where_a_file_is_created(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    endpoint = store.url.removeprefix("http://")
    storage = Storage(
        f"s3://key:secret@bucket/by-uri?region=us-east-1&scheme=http&endpoint_override={endpoint}"
    )
    assert storage.create_json("file.json", {"by": 1})
    assert storage.read_json("file.json") == {"by": 1}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_is_created_once_where_hard_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(code, os.strerror(code))))
    storage = Storage(str(tmp_path))
    for number in range(10):
        (winner,) = create_at_once(storage, f"folder/{number}.json", 8)
        assert storage.read_json(f"folder/{number}.json") == {"writer": winner}
    assert len(os.listdir(tmp_path / "folder")) == 10


def test_a_claim_that_a_dead_writer_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=PermissionError(errno.EPERM, "")))
    monkeypatch.setattr(lib.storage, "_CLAIM_S", 0.1)
    (tmp_path / ".tmp-claim-file.json").touch()
    with pytest.raises(StorageError, match=r"claim-file\.json.*delete that file"):
        Storage(str(tmp_path)).create_json("file.json", {})
    assert os.listdir(tmp_path) == [".tmp-claim-file.json"]


def test_errors_of_a_disk_name_file_and_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_bytes(b"")
    storage = Storage(str(tmp_path))
    with pytest.raises(StorageError, match=r"taken/file can't be written.*check the disk"):
        storage.write("taken/file", b"content")
    with pytest.raises(StorageError, match=r"can't be read.*check the disk"):
        storage.read("")

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=full))
    with pytest.raises(StorageError, match="free space there"):
        storage.write("file", b"content")
    assert os.listdir(tmp_path) == ["taken"]
