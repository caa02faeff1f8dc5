"""Micro-batches that adapt by themselves: what arrives during a call is the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from lib.serving.tracing import Trace

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Predict = Callable[[Images], Awaitable[Probabilities]]


class QueueFull(Exception):
    """More images are waiting than the bound allows."""


class Unavailable(Exception):
    """No replica of the version answered before the deadline."""


class Batcher:
    """Joins the requests for one version into batches, with at most `max_calls` in flight.

    An idle version is called at once, so nothing waits for a timer; under load a batch holds what
    came in during the call before it, or in the same turn of the event loop. A further call starts
    beside one in flight when a full batch is waiting.
    """

    def __init__(
        self, predict: Predict, *, max_batch: int = 128, max_queued: int = 2048, max_calls: int = 1
    ) -> None:
        self._predict = predict
        self._max_batch = max_batch
        self._max_queued = max_queued
        self._free_calls = max_calls
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
        """Return the probabilities of these images, which stay together in one batch.

        A trace gets its mark `queue` when they leave the queue.

        Raises QueueFull at the bound, and whatever the call raised to all of its batch.
        """
        if self._queued_images + len(images_NHWC) > self._max_queued:
            raise QueueFull
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._queue.append((images_NHWC, future))
        self._queued_images += len(images_NHWC)
        if trace:
            self._traces[future] = trace
        self._start()
        return await future

    def _start(self) -> None:
        if self._is_starting or not self._free_calls or not self._queue:
            return
        # A second call at once pays only if it is a full one; else a larger batch is cheaper.
        if self._calls and self._queued_images < self._max_batch:
            return
        # The task takes its batch when it runs, so what the event loop reads before is in it too.
        self._is_starting = True
        self._calls += 1
        self._free_calls -= 1
        task = asyncio.get_running_loop().create_task(self._call())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take(self) -> list[tuple[Images, asyncio.Future[Probabilities]]]:
        batch: list[tuple[Images, asyncio.Future[Probabilities]]] = []
        size = 0
        while self._queue:
            images, future = self._queue[0]
            if batch and size + len(images) > self._max_batch:
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
        finally:
            self._calls -= 1
            self._free_calls += 1
            self._start()

    async def _answer(self, batch: list[tuple[Images, asyncio.Future[Probabilities]]]) -> None:
        try:
            images = batch[0][0] if len(batch) == 1 else np.concatenate([item[0] for item in batch])
            probabilities = await self._predict(images)
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        start = 0
        for images, future in batch:
            stop = start + len(images)
            if not future.done():
                future.set_result(probabilities[start:stop])
            start = stop
