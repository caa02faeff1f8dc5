"""Channels: how a gateway calls the replicas of a version on its own node.

A call through a Serve handle takes some 1.6 ms of processor time on both sides together (worked
out from a profile), one over a Unix socket far less, and nothing is unpickled. Replicas put their
sockets into one folder of the node; a gateway that finds none there, since the replica is on
another node, at zero or just gone, uses the handle.

A frame is a count and raw bytes: N as uint32 and N images of uint8 to the replica, N as uint32 and
N × classes probabilities of float32 back. N = 0 is a call that failed; the cause follows, for the
gateway's log: its length in bytes as uint32, and UTF-8.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import socket
import struct
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from lib.errors import ServingError
from lib.secrets import PRIVATE_DIR_VARIABLE, check_owner, make_private
from lib.serving.batcher import ReplicaLost

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]

_SUFFIX, _OLD_SUFFIX = ".v2.sock", ".v1.sock"
"""Tell the format of frames: gateways and versions may run different code. The old one has no cause
of a failure."""
_MAX_CAUSE = 2000
_COUNT = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group, as Linux tells them of the other end of a Unix socket."""
_MAX_NAME = 48
"""Of an application's folder: paths of sockets have at most 107 bytes."""
_log = logging.getLogger(__name__)


class ChannelClosed(Exception):
    """The replica went away before it got the call; another one can be asked."""


def channel_folder(cluster_address: str, private_dir: str | None = None) -> Path:
    """Return the folder of a cluster's sockets on this node; short, as paths of sockets must be.

    Args:
        cluster_address: Of Ray's control store: two clusters on one node keep apart.
        private_dir: RAYLINE_PRIVATE_DIR of this node, a folder that only this user may enter.
            Without one the sockets are in a folder below /tmp, which is used only if it is this
            user's and closed to others.
    """
    digest = hashlib.sha256(cluster_address.encode()).hexdigest()[:8]
    if private_dir:
        return Path(private_dir) / f"ch-{digest}"
    return Path(tempfile.gettempdir()) / f"rayline-ch-{os.getuid()}-{digest}"


def _subfolder(folder: Path, application: str) -> Path:
    """Return the folder of an application's sockets; a long name is cut and ends in its hash."""
    if len(application) > _MAX_NAME:
        digest = hashlib.sha256(application.encode()).hexdigest()[:16]
        application = f"{application[: _MAX_NAME - 17]}-{digest}"
    return folder / application


def _is_own_peer(transport: asyncio.BaseTransport) -> bool:
    """Whether the process at the other end of a Unix socket is this user's, or can't be known."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # Not Linux: the folder's mode alone keeps others out.
    found = transport.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    _, uid, _ = _CREDENTIALS.unpack(found)
    return bool(uid == os.getuid())


class _Frames(asyncio.Protocol):
    """Cuts a stream into frames of a count and that many rows."""

    def __init__(self, row_bytes: int) -> None:
        self._row_bytes = row_bytes
        self._buffer = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not _is_own_peer(transport):
            _log.error("a process of another user at a socket of this user's versions: refused")
            cast(asyncio.Transport, transport).abort()
            return
        # uvloop's transports are of no class of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _COUNT.size:
            (count,) = _COUNT.unpack_from(self._buffer)
            end = self.frame_bytes(count)
            if len(self._buffer) < end:
                return
            frame, self._buffer = self._buffer, self._buffer[end:]
            self.received(count, frame)

    def frame_bytes(self, count: int) -> int:
        return _COUNT.size + count * self._row_bytes

    def received(self, count: int, frame: bytearray) -> None:
        raise NotImplementedError


class _Replica(_Frames):
    def __init__(
        self,
        predict: Callable[[Images], Probabilities],
        shape: tuple[int, int, int],
        *,
        tells_cause: bool,
    ) -> None:
        super().__init__(int(np.prod(shape)))
        self._predict, self._shape = predict, shape
        self._tells_cause = tells_cause

    def received(self, count: int, frame: bytearray) -> None:
        assert self.transport is not None
        pixels = np.frombuffer(frame, np.uint8, count * self._row_bytes, _COUNT.size)
        try:
            probabilities = self._predict(pixels.reshape(count, *self._shape))
        except Exception as error:
            _log.exception("a batch of %d images failed", count)
            cause = f"{type(error).__name__}: {error}"[:_MAX_CAUSE].encode(errors="replace")
            self.transport.write(
                _COUNT.pack(0) + (_COUNT.pack(len(cause)) + cause if self._tells_cause else b"")
            )
            return
        self.transport.write(
            _COUNT.pack(count) + np.ascontiguousarray(probabilities, np.float32).tobytes()
        )


@dataclass(frozen=True, slots=True)
class ChannelServer:
    """A replica's sockets, one a format of frames; they live as long as this."""

    paths: tuple[Path, ...]
    """Of the newest format first."""
    servers: tuple[asyncio.AbstractServer, ...]

    def withdraw(self) -> None:
        """Take the names away: no gateway connects any more, what is connected goes on."""
        for path in reversed(self.paths):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Listen no longer."""
        for server in self.servers:
            server.close()


async def serve_channel(
    folder: Path,
    application: str,
    replica: str,
    predict: Callable[[Images], Probabilities],
    shape: tuple[int, int, int],
) -> ChannelServer:
    """Answer calls to a replica from gateways on this node, as long as the result is kept."""
    place = _subfolder(folder, application)
    for needed in (folder, place):
        try:
            make_private(needed)
        except PermissionError as error:
            raise ServingError(f"{error}; remove it, or set {PRIVATE_DIR_VARIABLE}") from error
    paths, servers = [], []
    # The newest first: a gateway takes the old one only where there is no other.
    for suffix in (_SUFFIX, _OLD_SUFFIX):
        path = place / f"{replica}{suffix}"
        make = functools.partial(_Replica, predict, shape, tells_cause=suffix == _SUFFIX)
        # Under its own name only once it listens: a gateway must not find it before.
        hidden = path.with_suffix(".new")
        servers.append(await asyncio.get_running_loop().create_unix_server(make, str(hidden)))
        paths.append(hidden.rename(path))
    return ChannelServer(tuple(paths), tuple(servers))


class Channel(_Frames):
    """A gateway's connection to one replica. Calls are answered in their order."""

    def __init__(
        self,
        num_classes: int,
        *,
        tells_cause: bool,
        forget: Callable[[Channel], None] = lambda channel: None,
    ) -> None:
        super().__init__(4 * num_classes)
        self._num_classes = num_classes
        self._tells_cause = tells_cause
        self._forget = forget
        self._waiting: deque[asyncio.Future[Probabilities]] = deque()
        self.is_open = True

    @property
    def in_flight(self) -> int:
        """Calls that are not answered yet."""
        return len(self._waiting)

    async def call(self, images_NHWC: Images) -> Probabilities:
        """Return the probabilities of a batch.

        Raises ReplicaLost if the replica goes away meanwhile, ChannelClosed if it had gone before,
        and ServingError if the version failed on this batch.
        """
        if not self.is_open or self.transport is None:
            raise ChannelClosed
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.transport.writelines(
            [_COUNT.pack(len(images_NHWC)), np.ascontiguousarray(images_NHWC).data.cast("B")]
        )
        return await future

    def frame_bytes(self, count: int) -> int:
        """Return the length of the frame that begins the buffer, or of a part that it must have."""
        if count or not self._tells_cause:
            return super().frame_bytes(count)
        if len(self._buffer) < 2 * _COUNT.size:
            return 2 * _COUNT.size
        (length,) = _COUNT.unpack_from(self._buffer, _COUNT.size)
        return 2 * _COUNT.size + int(length)

    def received(self, count: int, frame: bytearray) -> None:
        """Answer the oldest call."""
        future = self._waiting.popleft()
        if future.done():
            return
        if count == 0:
            cause = frame[2 * _COUNT.size :].decode(errors="replace") or "see its log"
            future.set_exception(ServingError(f"the version failed on this batch: {cause}"))
            return
        values = np.frombuffer(frame, np.float32, count * self._num_classes, _COUNT.size)
        future.set_result(values.reshape(count, self._num_classes))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what is in flight, and be called no more."""
        self.is_open = False
        self._forget(self)
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(ReplicaLost("its replica ended in the middle of the call"))


class Channels:
    """All channels from one gateway to the replicas of one version on its node."""

    def __init__(self, folder: Path, application: str, num_classes: int) -> None:
        self._root, self._folder = folder, _subfolder(folder, application)
        self._is_refused = False
        self._num_classes = num_classes
        self._open: dict[str, Channel] = {}

    @property
    def num_open(self) -> int:
        """How many replicas can be called."""
        return len(self._open)

    def pick(self) -> Channel | None:
        """Return the channel with the fewest calls in flight, None if there is none."""
        if len(self._open) < 2:
            return next(iter(self._open.values()), None)
        return min(self._open.values(), key=lambda channel: channel.in_flight)

    async def refresh(self) -> None:
        """Connect to the replicas that have come, forget those that have gone."""
        found = self._sockets()
        for name in set(self._open) - found:
            self._close(name)
        for name in found:
            if name not in self._open:
                await self._connect(name)

    def _sockets(self) -> set[str]:
        """Return the names of the sockets; none if another user could have put them there."""
        try:
            for folder in (self._root, self._folder):
                if check_owner(folder).st_mode & 0o077:
                    raise PermissionError(f"{folder} is open to other users")
            names = set(os.listdir(self._folder))
            found = {name for name in names if name.endswith(_SUFFIX)}
            found |= {
                name
                for name in names
                if name.endswith(_OLD_SUFFIX)
                and name.removesuffix(_OLD_SUFFIX) + _SUFFIX not in names
            }
        except FileNotFoundError:
            found = set()
        except PermissionError as error:
            if not self._is_refused:
                _log.error("%s: calling versions by Serve's handles, which is slower", error)
            self._is_refused = True
            return set()
        self._is_refused = False
        return found

    def close(self) -> None:
        """Close all."""
        for name in list(self._open):
            self._close(name)

    async def _connect(self, name: str) -> None:
        def forget(channel: Channel) -> None:
            if self._open.get(name) is channel:
                del self._open[name]

        def make() -> Channel:
            return Channel(self._num_classes, tells_cause=name.endswith(_SUFFIX), forget=forget)

        path = self._folder / name
        try:
            _, channel = await asyncio.get_running_loop().create_unix_connection(make, str(path))
        except ConnectionRefusedError:
            # Its process is dead.
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            pass  # It has just gone, or is too busy; the next round tries again.
        else:
            if channel.transport is not None and channel.is_open:
                self._open[name] = channel

    def _close(self, name: str) -> None:
        channel = self._open.pop(name)
        # What is in flight there is still answered: the replica ends the connection.
        if channel.transport is not None and not channel.in_flight:
            channel.transport.close()
