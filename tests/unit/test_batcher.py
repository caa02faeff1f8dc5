"""Micro-batches: nothing waits when idle, batches grow under load, errors and bounds hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from lib.serving.batcher import Batcher, QueueFull, Unavailable
from lib.serving.router import Images, Probabilities, with_retries


def images(*values: int) -> Images:
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


class Model:
    """Answers each image with its own value; holds calls until released."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def predict(self, images_NHWC: Images) -> Probabilities:
        self.batches.append(len(images_NHWC))
        await self.gate.wait()
        return images_NHWC.reshape(len(images_NHWC), 1).astype(np.float32)


def test_an_idle_version_is_called_at_once_and_a_busy_one_gets_what_came_meanwhile() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict)
        first = asyncio.create_task(batcher.submit(images(0)))
        await until(lambda: model.batches == [1])
        later = [asyncio.create_task(batcher.submit(images(n, n + 1))) for n in range(1, 20)]
        await asyncio.sleep(0)
        model.gate.set()
        answers = await asyncio.gather(first, *later)
        assert model.batches == [1, 38]
        assert answers[0].tolist() == [[0]]
        assert [answer.tolist() for answer in answers[1:]] == [[[n], [n + 1]] for n in range(1, 20)]

    asyncio.run(scenario())


def test_batches_stay_within_their_bound_and_a_larger_request_goes_alone() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict, max_batch=4)
        tasks = [asyncio.create_task(batcher.submit(images(*range(n)))) for n in (1, 3, 2, 6, 1)]
        await asyncio.sleep(0)
        model.gate.set()
        answers = await asyncio.gather(*tasks)
        assert model.batches == [4, 2, 6, 1]
        assert [len(answer) for answer in answers] == [1, 3, 2, 6, 1]

    asyncio.run(scenario())


async def in_flight(batcher: Batcher) -> asyncio.Task[Probabilities]:
    """Submit image 0 and return once its batch is on its way."""
    task = asyncio.create_task(batcher.submit(images(0)))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


def test_a_full_queue_refuses_at_once_and_those_admitted_are_answered() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict, max_queued=3)
        admitted = [await in_flight(batcher)]
        admitted += [asyncio.create_task(batcher.submit(images(n))) for n in range(1, 4)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.submit(images(9))
        model.gate.set()
        assert [float(answer[0, 0]) for answer in await asyncio.gather(*admitted)] == [0, 1, 2, 3]

    asyncio.run(scenario())


def test_an_error_reaches_its_own_batch_only() -> None:
    async def scenario() -> None:
        calls = 0

        async def predict(images_NHWC: Images) -> Probabilities:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            if calls == 1:
                raise ValueError("broken")
            return images_NHWC.reshape(-1, 1).astype(np.float32)

        batcher = Batcher(predict)
        first = asyncio.create_task(batcher.submit(images(1)))
        await asyncio.sleep(0)
        second = asyncio.create_task(batcher.submit(images(2)))
        with pytest.raises(ValueError, match="broken"):
            await first
        assert (await second).tolist() == [[2]]

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_its_batch_and_the_others_are_answered() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict)
        tasks = [await in_flight(batcher)]
        tasks += [asyncio.create_task(batcher.submit(images(n))) for n in range(1, 4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        model.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[2], asyncio.CancelledError)
        assert model.batches == [1, 2]
        assert [float(answers[n][0, 0]) for n in (0, 1, 3)] == [0, 1, 3]
        await batcher.wait_idle()

    asyncio.run(scenario())


def test_waiting_for_idle_ends_only_when_all_is_answered() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict)
        requests = [asyncio.create_task(batcher.submit(images(n))) for n in range(3)]
        await asyncio.sleep(0)
        waiting = asyncio.create_task(batcher.wait_idle())
        with batcher.held():
            model.gate.set()
            await asyncio.gather(*requests)
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(scenario())


class ReplicaDied(Exception):
    pass


def test_a_call_that_lost_its_replica_is_repeated_until_it_is_answered() -> None:
    async def scenario() -> None:
        calls = 0

        async def predict(images_NHWC: Images) -> Probabilities:
            nonlocal calls
            calls += 1
            if calls < 4:
                raise ReplicaDied
            return np.ones((1, 1), np.float32)

        call = with_retries(predict, (ReplicaDied,), deadline_s=30, first_pause_s=0.001)
        assert (await call(images(1))).tolist() == [[1]]
        assert calls == 4

    asyncio.run(scenario())


def test_after_the_deadline_a_lost_replica_is_unavailable_and_other_errors_come_at_once() -> None:
    async def scenario() -> None:
        async def dies(images_NHWC: Images) -> Probabilities:
            raise ReplicaDied

        async def fails(images_NHWC: Images) -> Probabilities:
            raise ValueError("not a replica's death")

        with pytest.raises(Unavailable):
            await with_retries(dies, (ReplicaDied,), deadline_s=0.02)(images(1))
        with pytest.raises(ValueError, match="not a replica"):
            await with_retries(fails, (ReplicaDied,), deadline_s=30)(images(1))

    asyncio.run(scenario())
