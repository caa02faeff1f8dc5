"""Reads the bodies of requests: each within a deadline, all together within a bound on bytes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from lib.config import MAX_BODY_BYTES
from lib.serving.payload import PayloadError

DEADLINE_S = 30.0
"""For a whole body: 16 MiB in this time is 4.5 Mbit/s."""
STALL_S = 10.0
"""For the next part of a body."""
MAX_HELD_BYTES = 256 * 2**20
"""Of all bodies of a gateway that came in more than one part, until they are answered."""
_SWEEP_EVERY_S = 1.0

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """The client closed the connection before the end of its request's body."""


class Bodies:
    """Reads bodies and counts the bytes that are held for them.

    A body that arrives in one message, as nearly all do, is passed on as it is and not counted.
    """

    def __init__(
        self,
        *,
        deadline_s: float = DEADLINE_S,
        stall_s: float = STALL_S,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._deadline_s = deadline_s
        self._stall_s = stall_s
        self._max_held_bytes = max_held_bytes
        self.held_bytes = 0
        # One timer looks at all bodies: a timeout for each would cost a tenth of a small request.
        self._ends: dict[asyncio.Task[Any], float] = {}
        self._is_sweeping = False
        self._late: set[asyncio.Task[Any]] = set()

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> tuple[bytes, int]:
        """Read a body; return it and the bytes that the caller must `release` after its answer.

        Raises:
            PayloadError: 413 for a body over MAX_BODY_BYTES, before more of it is read; 408 at the
                deadline; 503 if the bodies of all requests hold too much.
            ClientGone: The client left before the end of the body.
        """
        length = headers.get(b"content-length")
        # Python refuses to convert very long numbers, hence the bound on the digits.
        if length is not None and not (
            length.isdigit() and len(length) < 20 and int(length) <= MAX_BODY_BYTES
        ):
            raise _too_large()
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        end = loop.time() + self._deadline_s
        self._ends[task] = end - self._deadline_s + self._stall_s
        if not self._is_sweeping:
            self._is_sweeping = True
            loop.call_later(min(_SWEEP_EVERY_S, self._stall_s), self._sweep, loop)
        body, held = io.BytesIO(), 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                is_last = not message.get("more_body")
                if is_last and not held:
                    return part, 0
                self.hold(len(part))
                held += len(part)
                # Grows by reallocation and hands its buffer over: a list of parts joined at the end
                # takes twice the memory, and a buffer of Content-Length takes it for clients that
                # only claim to send.
                body.write(part)
                if held > MAX_BODY_BYTES:
                    raise _too_large()
                if is_last:
                    return body.getvalue(), held
                self._ends[task] = min(end, loop.time() + self._stall_s)
        except BaseException as error:
            self.release(held)
            if isinstance(error, asyncio.CancelledError) and task in self._late:
                self._late.discard(task)
                task.uncancel()
                raise PayloadError(
                    408,
                    f"the body was not complete within {self._deadline_s:g} s, or no part of it "
                    f"came for {self._stall_s:g} s; send it again, a smaller one if the "
                    "connection is slow",
                ) from None
            raise
        finally:
            self._ends.pop(task, None)

    def hold(self, num_bytes: int) -> None:
        """Count bytes that are held; raise PayloadError 503, counting nothing, over the bound."""
        if self.held_bytes + num_bytes > self._max_held_bytes:
            raise PayloadError(503, "large bodies fill the gateway's memory; try again")
        self.held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Stop counting bytes of a request that is over."""
        self.held_bytes -= num_bytes

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for task in [task for task, end in self._ends.items() if now > end]:
            del self._ends[task]
            self._late.add(task)
            task.cancel()
        self._is_sweeping = bool(self._ends)
        if self._is_sweeping:
            loop.call_later(min(_SWEEP_EVERY_S, self._stall_s), self._sweep, loop)


def _too_large() -> PayloadError:
    return PayloadError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
