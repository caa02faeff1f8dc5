"""The storage root: one small wrapper over a pyarrow file system, with atomic writes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from lib.errors import MissingError, StorageError

RETRY_S = 30.0
"""How long transient errors of an object store are retried. The AWS SDK has then retried each
request three times itself, within some two seconds: too little for a store that throttles."""
_MAX_DELAY_S = 8.0
_TIMEOUTS_S = {"connect_timeout": 3.0, "request_timeout": 5.0}
"""The SDK's own, 1 s and 3 s, are short for a busy store or a far one."""
_TRANSIENT = re.compile(
    "NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT|SERVICE_UNAVAILABLE|INTERNAL_FAILURE"
    r"|HTTP status (409|429|50[0234])"
)
"""In an error of the AWS SDK: another try may work."""
_DENIED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|ExpiredToken|InvalidToken"
    "|[Cc]redentials|HTTP status (400|401|403)"
)
"""HEAD requests have no text: an expired token is a bare 400 there."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""How file systems refuse hard links: SMB, gcsfuse, WSL's mounts of Windows drives."""
_CLAIM_S = 10.0
"""How long a writer waits for another one that creates the same file."""

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Storage:
    """Files below the storage root, named by relative paths with `/`.

    A reader sees a file whole or not at all: local files are written beside their place, synced
    and renamed; object stores publish an object when its upload ends. Every error of the file
    system is raised as StorageError, that of a missing file as MissingError.
    """

    uri: str
    filesystem: pafs.FileSystem = field(init=False, repr=False, compare=False)
    root: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Resolve the URI; nothing is created."""
        try:
            filesystem, root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowException, OSError) as error:
            raise StorageError(f"RAYLINE_STORAGE={self.uri!r} can't be opened: {error}") from error
        if isinstance(filesystem, pafs.S3FileSystem):
            # A URI can't set these. Opening late makes a small file one PUT, else it is three
            # requests of a multipart upload.
            _, (options,) = filesystem.__reduce__()
            filesystem = pafs.S3FileSystem(
                **{**options, **_TIMEOUTS_S, "allow_delayed_open": True},
                retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),
            )
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

    def attempt(self, action: str, relative: str, work: Callable[[], _Result]) -> _Result:
        """Return the result of `work`, which uses the file system; it may be called repeatedly.

        Transient errors of an object store are retried with backoff for `RETRY_S`.

        Args:
            action: What is done to the file, for the message: `read`, `written`, …
            relative: The file or folder.
            work: Does it.

        Raises: MissingError if a file is missing, StorageError for any other error.
        """
        start_s = time.monotonic()
        for tries in itertools.count():
            try:
                return work()
            except FileNotFoundError as error:
                raise MissingError(f"{self.path(relative)} is missing") from error
            except OSError as error:
                delay_s = random.uniform(0.5, 1.0) * min(2.0**tries, _MAX_DELAY_S)
                is_last = time.monotonic() - start_s + delay_s > RETRY_S
                if is_last or self.is_local or not _TRANSIENT.search(str(error)):
                    raise self.failure(relative, error, action) from error
                _log.warning("%s is not %s yet, trying again: %s", relative, action, error)
                time.sleep(delay_s)
        raise AssertionError("unreachable")

    def infos(self, relatives: Sequence[str]) -> list[pafs.FileInfo]:
        """Return type, size and time of some files; a missing one has the type NotFound."""
        paths = [self.path(relative) for relative in relatives]
        where = relatives[0] if relatives else ""
        return list(self.attempt("read", where, lambda: self.filesystem.get_file_info(paths)))

    def exists(self, relative: str) -> bool:
        """Whether a file is there."""
        (info,) = self.infos([relative])
        return bool(info.type == pafs.FileType.File)

    def walk(self, relative: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        """Return all files and folders in a folder, hidden ones too; none if it is missing."""
        base = self.path(relative).rstrip("/")
        selector = pafs.FileSelector(base, allow_not_found=True, recursive=recursive)
        return list(
            self.attempt("listed", relative, lambda: self.filesystem.get_file_info(selector))
        )

    def folders(self, relative: str) -> list[str]:
        """Return the folders in a folder, sorted, relative to the root; none if it is missing."""
        prefix = len(self.root) + 1
        return sorted(
            info.path[prefix:]
            for info in self.walk(relative)
            if info.type == pafs.FileType.Directory
        )

    def list(self, relative: str, *, recursive: bool = False) -> list[str]:
        """Return the files below a folder, sorted, relative to the root; none if it is missing."""
        prefix = len(self.root) + 1
        return sorted(
            info.path[prefix:]
            for info in self.walk(relative, recursive=recursive)
            if info.type == pafs.FileType.File and not info.base_name.startswith(".tmp-")
        )

    def read(self, relative: str) -> bytes:
        """Return a file's bytes; raise MissingError if it is missing."""
        return self.read_buffer(relative).to_pybytes()

    def read_buffer(self, relative: str) -> pa.Buffer:
        """Return a file's bytes without copying them; raise MissingError if it is missing."""

        def read() -> pa.Buffer:
            with self.filesystem.open_input_file(self.path(relative)) as stream:
                return stream.read_buffer()

        return self.attempt("read", relative, read)

    def read_json(self, relative: str) -> Any:
        """Return a JSON file's content."""
        try:
            return json.loads(self.read(relative))
        except ValueError as error:
            raise StorageError(f"{self.path(relative)} is damaged: {error}") from error

    def write(self, relative: str, content: bytes | pa.Buffer) -> None:
        """Write a file atomically and durably; raise StorageError if the disk is full."""
        target = self.path(relative)

        def write() -> None:
            # Without `create_dir`: object stores have no folders, and it costs a request a level.
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(content)

        def write_file() -> None:
            folder, _, name = target.rpartition("/")
            temporary = f"{folder}/.tmp-{uuid.uuid4().hex}-{name}"
            self.filesystem.create_dir(folder, recursive=True)
            try:
                with self.filesystem.open_output_stream(temporary) as stream:
                    stream.write(content)
                _sync(temporary)
                os.replace(temporary, target)
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
                raise
            _sync(folder)

        self.attempt("written", relative, write_file if self.is_local else write)

    def failure(self, relative: str, error: OSError, action: str = "written") -> StorageError:
        """Return the error to raise when an action on a file failed: what, where, the next step."""
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            return StorageError(
                f"no space left at {self.root} while writing {relative}; free space there or "
                "set RAYLINE_STORAGE to a larger place, then run the same command again"
            )
        if isinstance(error, PermissionError):
            step = f"let this user read and write {self.root}"
        elif self.is_local:
            step = f"check the disk and the mount of {self.root}"
        elif _TRANSIENT.search(str(error)):
            step = (
                f"the store failed for {RETRY_S:.0f} s: check that it is up and reachable "
                "(endpoint_override in the URI, AWS_ENDPOINT_URL), then run the same command again"
            )
        elif _DENIED.search(str(error)):
            step = (
                "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE; a token may have expired) "
                "and that they allow this in the bucket"
            )
        else:
            step = f"check the bucket, region and endpoint of {self.uri}"
        return StorageError(f"{self.path(relative)} can't be {action}: {error}; {step}")

    def write_json(self, relative: str, content: Any) -> None:
        """Write a JSON file atomically, readable by people."""
        self.write(relative, _to_json(content))

    def create_json(self, relative: str, content: Any) -> bool:
        """Write a JSON file if there is none of that name; return whether it was written.

        Of several writers one succeeds. Only on object stores other than S3, for which pyarrow
        has no conditional write, a race of the same second is decided by the last writer.
        """
        if not self.is_local and self.exists(relative):
            return False
        if isinstance(self.filesystem, pafs.S3FileSystem):
            return self._put_if_none(relative, _to_json(content))
        if not self.is_local:
            self.write_json(relative, content)
            return True
        folder, slash, name = relative.rpartition("/")
        # Named so that `list` leaves it out, should this process die before it is unlinked.
        whole = f"{folder}{slash}.tmp-{uuid.uuid4().hex}-{name}"
        self.write_json(whole, content)
        try:
            return self.attempt("written", relative, lambda: self._link(whole, relative))
        finally:
            self.delete(whole)

    def _link(self, whole: str, relative: str) -> bool:
        """Give a written file its name, unless that is taken."""
        try:
            os.link(self.path(whole), self.path(relative))
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._replace_claimed(whole, relative)
        return True

    def _replace_claimed(self, whole: str, relative: str) -> bool:
        """Do what `_link` does where there are no hard links, under a claim of this name.

        Creating the file itself exclusively would show readers half of it. A claim is never taken
        over: two that find an old one would both take it.
        """
        folder, slash, name = relative.rpartition("/")
        claim = self.path(f"{folder}{slash}.tmp-claim-{name}")
        deadline_s = time.monotonic() + _CLAIM_S
        while not os.path.exists(self.path(relative)):
            try:
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                if time.monotonic() > deadline_s:
                    raise StorageError(
                        f"{self.path(relative)} can't be written: {claim} says that another "
                        "process is writing it; if none is, delete that file and run the same "
                        "command again"
                    ) from None
                time.sleep(0.02)
                continue
            try:
                # Another one may have had the claim since the look above.
                if os.path.exists(self.path(relative)):
                    return False
                os.replace(self.path(whole), self.path(relative))
                _sync(os.path.dirname(claim))
                return True
            finally:
                os.unlink(claim)
        return False

    def _s3_client(self) -> Any:
        """Return boto3's client for the same store: pyarrow has no conditional writes."""
        import boto3  # Takes half a second, and few commands create a file.
        from botocore.config import Config

        _, (options,) = self.filesystem.__reduce__()
        endpoint = options["endpoint_override"]
        is_virtual = options["force_virtual_addressing"] or not endpoint
        return boto3.client(
            "s3",
            endpoint_url=f"{options['scheme']}://{endpoint}"
            if endpoint and "://" not in endpoint
            else endpoint or None,
            region_name=options["region"] or None,
            aws_access_key_id=options["access_key"],
            aws_secret_access_key=options["secret_key"],
            aws_session_token=options["session_token"] or None,
            verify=options["tls_ca_file_path"] or None,
            config=Config(
                connect_timeout=_TIMEOUTS_S["connect_timeout"],
                read_timeout=_TIMEOUTS_S["request_timeout"],
                retries={"mode": "standard", "total_max_attempts": 3},
                s3={"addressing_style": "auto" if is_virtual else "path"},
            ),
        )

    def _put_if_none(self, relative: str, content: bytes) -> bool:
        """Create an object by a PUT that fails if there is one; return whether this call did."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        client = self._s3_client()
        bucket, _, key = self.path(relative).partition("/")
        writer = uuid.uuid4().hex

        def put() -> bool:
            try:
                client.put_object(
                    Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", Metadata={"by": writer}
                )
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                # An earlier try may have done it, and its answer was lost.
                found = client.head_object(Bucket=bucket, Key=key)
                return bool(found["Metadata"].get("by") == writer)
            return True

        def work() -> bool:
            try:
                return put()
            except HTTPClientError as error:
                raise OSError(f"NETWORK_CONNECTION: {error}") from error
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                raise OSError(f"{error} (HTTP status {status})") from error
            except BotoCoreError as error:
                raise OSError(str(error)) from error

        return self.attempt("written", relative, work)

    def delete(self, relative: str) -> None:
        """Delete a file; a missing one is no error."""
        with contextlib.suppress(MissingError):
            self.attempt(
                "deleted", relative, lambda: self.filesystem.delete_file(self.path(relative))
            )

    def delete_folder(self, relative: str) -> None:
        """Delete a folder and all in it; a missing one is no error."""
        with contextlib.suppress(MissingError):
            self.attempt(
                "deleted", relative, lambda: self.filesystem.delete_dir(self.path(relative))
            )


def _to_json(content: Any) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
