"""Raw copies of what can't be read by range, below the storage root while an ingest runs."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from lib.errors import StorageError
from lib.storage import Storage

STAGING = "data/staging"
STALE_AFTER_S = 24 * 3600
"""A staged file this old was left by an ingest that was killed."""


class Staging:
    """A folder of its own for one ingest, removed when the `with` block ends, however it ends."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._folder = f"{STAGING}/{uuid.uuid4().hex}"

    def __enter__(self) -> Staging:
        """Remove what killed ingests left behind."""
        _remove_stale(self.storage, time.time() - STALE_AFTER_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the folder."""
        self.storage.delete_folder(self._folder)

    def add(self, name: str, pieces: Iterable[bytes | memoryview], size_bytes: int) -> str:
        """Write a file piece by piece and return its path relative to the storage root."""
        check_free_space(self.storage, size_bytes)
        relative = f"{self._folder}/{name}"
        try:
            if self.storage.is_local:
                os.makedirs(self.storage.path(self._folder), exist_ok=True)
            with self.storage.filesystem.open_output_stream(self.storage.path(relative)) as file:
                for piece in pieces:
                    file.write(piece)
        except OSError as error:
            raise self.storage.failure(relative, error) from error
        return relative


def check_free_space(storage: Storage, needed_bytes: int) -> None:
    """Raise StorageError if a local storage root surely can't hold that much more."""
    if not storage.is_local:
        return
    folder = Path(storage.root)
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise StorageError(
            f"no space left at {storage.root}: {free_bytes / 2**20:.0f} MiB are free, at least "
            f"{needed_bytes / 2**20:.0f} MiB are needed; free space there or set RAYLINE_STORAGE "
            "to a larger place, then run the same command again"
        )


def _remove_stale(storage: Storage, before_s: float) -> None:
    newest: dict[str, float] = {}
    for info in storage.walk(STAGING, recursive=True):
        relative = info.path[len(storage.root) + 1 :].removeprefix(f"{STAGING}/")
        folder = f"{STAGING}/{relative.partition('/')[0]}"
        # Object stores give folders no time: the files in them decide.
        modified_s = info.mtime.timestamp() if info.mtime is not None else 0.0
        newest[folder] = max(newest.get(folder, 0.0), modified_s)
    for folder, modified_s in newest.items():
        if modified_s < before_s:
            storage.delete_folder(folder)
