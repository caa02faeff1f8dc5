"""Micro-batches that adapt by themselves: what arrives during a call is the next batch."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from lib.errors import ServingError
from lib.serving.tracing import Trace

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Predict = Callable[[Images], Awaitable[Probabilities]]
_Batch = list[tuple[Images, asyncio.Future[Probabilities]]]

WHOLE_TRIES = 2
"""Of a batch that takes its replica down; then it is halved, to find the request that does it."""


class QueueFull(Exception):
    """More images are waiting than the bound allows."""


class Unavailable(Exception):
    """No replica of the version answered before the deadline."""


class ReplicaLost(Exception):
    """The replica went away in the middle of a call; what it was asked may be the cause."""


class NotFinite(ServingError):
    """A version answered NaN or infinity."""


class Batcher:
    """Joins the requests for one version into batches, with at most one call a replica in flight.

    A call starts whenever something waits and a replica is free, so nothing waits for a timer;
    under load a batch holds what came in during the call before it, or in the same turn of the
    event loop. Several free replicas share what waits.

    Args:
        predict: Answers a batch; raises ReplicaLost if the replica went away meanwhile.
        max_batch: Images a call. A request with more is answered by several calls.
        max_queued: Images that may wait.
        num_replicas: Returns how many replicas can be called now.
    """

    def __init__(
        self,
        predict: Predict,
        *,
        max_batch: int = 128,
        max_queued: int = 2048,
        num_replicas: Callable[[], int] = lambda: 1,
    ) -> None:
        self._predict = predict
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._num_replicas = num_replicas
        self._calls = 0
        self._queue: deque[tuple[Images, asyncio.Future[Probabilities]]] = deque()
        self._queued_images = 0
        self._traces: dict[asyncio.Future[Probabilities], Trace] = {}
        self._is_starting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._holds: set[asyncio.Future[None]] = set()

    async def wait_idle(self) -> None:
        """Return once nothing is waiting, in flight or held."""
        while self._tasks or self._holds:
            await asyncio.wait([*self._tasks, *self._holds])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep `wait_idle` from returning while a request is on its way to `submit`."""
        hold: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._holds.add(hold)
        try:
            yield
        finally:
            self._holds.discard(hold)
            hold.set_result(None)

    async def submit(self, images_NHWC: Images, trace: Trace | None = None) -> Probabilities:
        """Return the probabilities of these images.

        A trace gets its mark `queue` when they leave the queue.

        Raises QueueFull at the bound, NotFinite if the answer for these images is, ReplicaLost if
        they took replica after replica down, and what else the call raised, for all of its batch.
        """
        if self._queued_images + len(images_NHWC) > self._max_queued:
            raise QueueFull
        if len(images_NHWC) <= self._max_batch:
            return await self._enqueue(images_NHWC, trace)
        starts = range(0, len(images_NHWC), self._max_batch)
        parts = [
            self._enqueue(
                images_NHWC[start : start + self._max_batch], trace if start == starts[-1] else None
            )
            for start in starts
        ]
        try:
            return np.concatenate(await asyncio.gather(*parts))
        finally:
            # After a failure nobody waits for the others.
            for part in parts:
                part.cancel()

    def drop_queue(self) -> None:
        """Refuse what waits, as if the queue had been full; what is in flight is answered."""
        for _, future in self._queue:
            if not future.done():
                future.set_exception(QueueFull())
        self._queue.clear()
        self._traces.clear()
        self._queued_images = 0

    def _enqueue(self, images_NHWC: Images, trace: Trace | None) -> asyncio.Future[Probabilities]:
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._queue.append((images_NHWC, future))
        self._queued_images += len(images_NHWC)
        if trace:
            self._traces[future] = trace
        self._start()
        return future

    def _start(self) -> None:
        if self._is_starting or not self._queue:
            return
        # Without a replica one call waits for the first that comes up.
        if self._calls and self._calls >= self._num_replicas():
            return
        # The task takes its batch when it runs, so what the event loop reads before is in it too.
        self._is_starting = True
        self._calls += 1
        task = asyncio.get_running_loop().create_task(self._call())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take(self) -> _Batch:
        batch: _Batch = []
        size = 0
        share = self._max_batch
        if len(self._queue) > 1:
            # This call, which is counted already, and those that could start now share what waits.
            num_free = max(1, self._num_replicas() - self._calls + 1)
            share = min(share, math.ceil(self._queued_images / num_free))
        while self._queue:
            images, future = self._queue[0]
            if batch and size + len(images) > share:
                break
            self._queue.popleft()
            self._queued_images -= len(images)
            if self._traces and (trace := self._traces.pop(future, None)):
                trace.mark("queue")
            if not future.cancelled():
                batch.append((images, future))
                size += len(images)
        return batch

    async def _call(self) -> None:
        batch = self._take()
        self._is_starting = False
        self._start()
        try:
            if batch:
                await self._answer(batch)
        except ReplicaLost:
            await self._answer_in_parts(batch)
        finally:
            self._calls -= 1
            self._start()

    async def _answer(self, batch: _Batch) -> None:
        try:
            images = batch[0][0] if len(batch) == 1 else np.concatenate([each[0] for each in batch])
            probabilities = await self._predict(images)
        except BaseException as error:
            if isinstance(error, ReplicaLost):
                raise
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        _give(batch, probabilities)

    async def _answer_in_parts(self, batch: _Batch) -> None:
        """Answer a batch whose replica went away, and find the request that takes replicas down."""
        # Breadth first: the halves that are harmless are answered before others are tried.
        parts = deque([(batch, WHOLE_TRIES - 1)])
        while parts:
            part, tries = parts.popleft()
            # Those whose callers have gone need no further try.
            part = [each for each in part if not each[1].done()]
            if not part:
                continue
            try:
                await self._answer(part)
            except ReplicaLost as error:
                middle = len(part) // 2
                if tries > 1:
                    parts.append((part, tries - 1))
                elif middle:
                    halves = (part[:middle], part[middle:])
                    parts += [(half, 1 if len(half) > 1 else WHOLE_TRIES) for half in halves]
                elif not part[0][1].done():
                    part[0][1].set_exception(error)


def _give(batch: _Batch, probabilities_NK: Probabilities) -> None:
    """Give each request of a batch its rows; those of NaN or infinity are an error."""
    # One sum tells of any in the batch.
    is_finite = math.isfinite(np.add.reduce(probabilities_NK, None))
    start = 0
    for images, future in batch:
        stop = start + len(images)
        if not future.done():
            rows = probabilities_NK[start:stop]
            if is_finite or np.isfinite(rows).all():
                future.set_result(rows)
            else:
                future.set_exception(NotFinite("the version answered NaN or infinity"))
        start = stop
