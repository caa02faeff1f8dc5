"""The storage root: one small wrapper over a pyarrow file system, with atomic writes."""

from __future__ import annotations

import errno
import json
import os
import uuid
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lib.errors import StorageError


@dataclass(frozen=True, slots=True)
class Storage:
    """Files below the storage root, named by relative paths with `/`.

    A reader sees a file whole or not at all: local files are written beside their place, synced
    and renamed; object stores publish an object when its upload ends.
    """

    uri: str
    filesystem: pafs.FileSystem = field(init=False, repr=False, compare=False)
    root: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Resolve the URI; nothing is created."""
        try:
            filesystem, root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"RAYLINE_STORAGE={self.uri!r} can't be opened: {error}") from error
        object.__setattr__(self, "filesystem", filesystem)
        object.__setattr__(self, "root", root.rstrip("/"))

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        """Pickle by URI, so that a task on another node opens its own file system."""
        return (Storage, (self.uri,))

    @property
    def is_local(self) -> bool:
        """Whether the root is on a mounted file system."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, relative: str) -> str:
        """Return the path below the root as the file system (`self.filesystem`) names it."""
        return f"{self.root}/{relative}"

    def exists(self, relative: str) -> bool:
        """Whether a file is there."""
        info = self.filesystem.get_file_info(self.path(relative))
        return bool(info.type == pafs.FileType.File)

    def folders(self, relative: str) -> list[str]:
        """Return the folders in a folder, sorted, relative to the root; none if it is missing."""
        selector = pafs.FileSelector(self.path(relative), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        prefix = len(self.root) + 1
        return sorted(info.path[prefix:] for info in infos if info.type == pafs.FileType.Directory)

    def list(self, relative: str, *, recursive: bool = False) -> list[str]:
        """Return the files below a folder, sorted, relative to the root; none if it is missing."""
        selector = pafs.FileSelector(self.path(relative), allow_not_found=True, recursive=recursive)
        infos = self.filesystem.get_file_info(selector)
        prefix = len(self.root) + 1
        return sorted(
            info.path[prefix:]
            for info in infos
            if info.type == pafs.FileType.File and not info.base_name.startswith(".tmp-")
        )

    def read(self, relative: str) -> bytes:
        """Return a file's bytes; raise StorageError if it is missing."""
        return self.read_buffer(relative).to_pybytes()

    def read_buffer(self, relative: str) -> pa.Buffer:
        """Return a file's bytes without copying them; raise StorageError if it is missing."""
        try:
            with self.filesystem.open_input_file(self.path(relative)) as stream:
                return stream.read_buffer()
        except FileNotFoundError as error:
            raise StorageError(f"{self.path(relative)} is missing") from error

    def read_json(self, relative: str) -> Any:
        """Return a JSON file's content."""
        try:
            return json.loads(self.read(relative))
        except json.JSONDecodeError as error:
            raise StorageError(f"{self.path(relative)} is damaged: {error}") from error

    def write(self, relative: str, content: bytes | pa.Buffer) -> None:
        """Write a file atomically and durably; raise StorageError if the disk is full."""
        target = self.path(relative)
        folder, _, name = target.rpartition("/")
        temporary = f"{folder}/.tmp-{uuid.uuid4().hex}-{name}" if self.is_local else target
        try:
            self.filesystem.create_dir(folder, recursive=True)
            with self.filesystem.open_output_stream(temporary) as stream:
                stream.write(content)
            if self.is_local:
                _sync(temporary)
                os.replace(temporary, target)
                _sync(folder)
        except OSError as error:
            if self.is_local and os.path.exists(temporary):
                os.unlink(temporary)
            raise self.failure(relative, error) from error

    def failure(self, relative: str, error: OSError) -> StorageError:
        """Return the error to raise when writing a file failed; a full disk is named as such."""
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            return StorageError(
                f"no space left at {self.root} while writing {relative}; free space there or "
                "set RAYLINE_STORAGE to a larger place, then run the same command again"
            )
        return StorageError(f"{self.path(relative)} can't be written: {error}")

    def write_json(self, relative: str, content: Any) -> None:
        """Write a JSON file atomically, readable by people."""
        self.write(relative, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")

    def create_json(self, relative: str, content: Any) -> bool:
        """Write a JSON file if there is none of that name; return whether it was written.

        On a local file system two writers can't both succeed. Object stores check first, so there
        a race of the same second is decided by the last writer.
        """
        if not self.is_local:
            if self.exists(relative):
                return False
            self.write_json(relative, content)
            return True
        folder, slash, name = relative.rpartition("/")
        # Named so that `list` leaves it out, should this process die before it is unlinked.
        claim = f"{folder}{slash}.tmp-{uuid.uuid4().hex}-{name}"
        self.write_json(claim, content)
        try:
            os.link(self.path(claim), self.path(relative))
        except FileExistsError:
            return False
        finally:
            os.unlink(self.path(claim))
        return True

    def delete(self, relative: str) -> None:
        """Delete a file; a missing one is no error."""
        if self.exists(relative):
            self.filesystem.delete_file(self.path(relative))

    def delete_folder(self, relative: str) -> None:
        """Delete a folder and all in it; a missing one is no error."""
        try:
            self.filesystem.delete_dir(self.path(relative))
        except FileNotFoundError:
            return


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
