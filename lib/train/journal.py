"""What a sweep has done, as an append-only file of JSON lines: what a resumed sweep goes on from.

Everything else about a sweep (the sampler's observations, the runs in MLflow, what is still to be
sent there) is made from it again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any

from lib.errors import SearchError, StorageError
from lib.storage import Storage

Event = Mapping[str, Any]
_READERS = 16
"""At once, of events in an object store: a sweep has thousands, each two requests."""


class Journal:
    """The events of one sweep. One process at a time may have it open.

    On a local file system it is one file, locked for as long as the process lives. Object stores
    can't append: there every event is an object, and two drivers of one sweep are not kept apart.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._folder = f"{folder}/journal"
        self.events: list[Event] = []
        """What was there when it was opened."""
        self._descriptor: int | None = None
        self._size = 0
        self._next = 1
        """Number of the next event, where each is an object."""
        if storage.is_local:
            self._open_file()
        else:
            names = self._storage.list(self._folder)
            with ThreadPoolExecutor(_READERS) as readers:
                self.events = list(readers.map(self._storage.read_json, names))
            self._next = 1 + max((int(PurePosixPath(name).stem) for name in names), default=0)

    def append(self, event: Event, *, durable: bool = False) -> None:
        """Add an event; raise StorageError if there is no place for it, and leave no part of it.

        It outlives this process at once, and the machine if `durable`.
        """
        line = json.dumps(event, sort_keys=True).encode() + b"\n"
        if self._descriptor is None:
            self._storage.write(f"{self._folder}/{self._next:08d}.json", line)
            self._next += 1
            return
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError("No space left for all of the line")
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            raise self._storage.failure(f"{self._folder}.jsonl", error) from error
        self._size += len(line)

    def close(self) -> None:
        """Let another process open it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Journal:
        """Return itself, for a `with` statement."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def _open_file(self) -> None:
        path = self._storage.path(f"{self._folder}.jsonl")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            # Freed by the kernel with the process, however that ends.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(path, "rb") as stream:
                content = stream.read()
            # The last line may have been cut off with the process that wrote it.
            self._size = content.rfind(b"\n") + 1
            os.ftruncate(self._descriptor, self._size)
        except BlockingIOError as error:
            self.close()
            raise SearchError(
                f"another process runs the sweep of {path}; wait for it, or end it first"
            ) from error
        except OSError as error:
            self.close()
            raise self._storage.failure(f"{self._folder}.jsonl", error) from error
        try:
            self.events = [json.loads(line) for line in content[: self._size].splitlines()]
        except json.JSONDecodeError as error:
            self.close()
            raise StorageError(f"{path} is damaged: {error}") from error
