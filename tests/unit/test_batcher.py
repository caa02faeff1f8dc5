"""Micro-batches: nothing waits when idle, batches grow under load, errors and bounds hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from lib.serving.batcher import Batcher, NotFinite, QueueFull, ReplicaLost, Unavailable
from lib.serving.router import MAX_DEATHS, Images, Probabilities, with_retries


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


def test_batches_stay_within_their_bound_and_a_larger_request_is_split() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict, max_batch=4)
        tasks = [asyncio.create_task(batcher.submit(images(*range(n)))) for n in (1, 3, 2, 6, 1)]
        await asyncio.sleep(0)
        model.gate.set()
        answers = await asyncio.gather(*tasks)
        assert model.batches == [4, 2, 4, 3]
        assert [len(answer) for answer in answers] == [1, 3, 2, 6, 1]
        assert answers[3].ravel().tolist() == list(range(6))

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


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing else is to be done."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now_s = max(self.now_s, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def images_a_second(num_replicas: int, *, num_callers: int, images_a_request: int) -> float:
    """Simulate replicas that take 2 ms an image and answer one call after the other."""
    replicas = [asyncio.Lock() for _ in range(num_replicas)]
    waiting = [0] * num_replicas
    answered = 0

    async def predict(images_NHWC: Images) -> Probabilities:
        replica = waiting.index(min(waiting))
        waiting[replica] += 1
        async with replicas[replica]:
            await asyncio.sleep(0.002 * len(images_NHWC))
        waiting[replica] -= 1
        return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)

    async def scenario() -> None:
        batcher = Batcher(predict, num_replicas=lambda: num_replicas)

        async def caller() -> None:
            nonlocal answered
            while True:
                answer = await batcher.submit(images(*range(images_a_request)))
                answered += len(answer)

        callers = [asyncio.create_task(caller()) for _ in range(num_callers)]
        await asyncio.sleep(20)
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(scenario())
    return answered / 20


@pytest.mark.parametrize("num_callers", [8, 128])
@pytest.mark.parametrize("images_a_request", [1, 4])
def test_a_slow_model_answers_more_with_more_replicas(
    num_callers: int, images_a_request: int
) -> None:
    one, two, four = (
        images_a_second(n, num_callers=num_callers, images_a_request=images_a_request)
        for n in (1, 2, 4)
    )
    assert one == pytest.approx(500, rel=0.1)
    assert two >= 1.8 * one
    assert four >= 3.4 * one


def test_a_request_that_takes_replicas_down_is_found_and_its_neighbours_are_answered() -> None:
    async def scenario() -> None:
        sizes = []

        async def predict(images_NHWC: Images) -> Probabilities:
            sizes.append(len(images_NHWC))
            await asyncio.sleep(0)
            if 5 in images_NHWC:
                raise ReplicaLost("killed")
            return images_NHWC.reshape(-1, 1).astype(np.float32)

        batcher = Batcher(predict)
        tasks = [asyncio.create_task(batcher.submit(images(n))) for n in range(8)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[5], ReplicaLost)
        assert [answer[0, 0] for n, answer in enumerate(answers) if n != 5] == [0, 1, 2, 3, 4, 6, 7]  # type: ignore[call-overload,index]
        # Whole twice, then halves once each, and what is alone twice.
        assert sizes == [8, 8, 4, 4, 2, 2, 1, 1, 1]

    asyncio.run(scenario())


def test_a_replica_that_was_only_taken_away_costs_one_more_call() -> None:
    async def scenario() -> None:
        sizes = []

        async def predict(images_NHWC: Images) -> Probabilities:
            sizes.append(len(images_NHWC))
            if len(sizes) == 1:
                raise ReplicaLost("scaled down")
            return images_NHWC.reshape(-1, 1).astype(np.float32)

        batcher = Batcher(predict)
        await asyncio.gather(*(batcher.submit(images(n)) for n in range(8)))
        assert sizes == [8, 8]

    asyncio.run(scenario())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_no_number_is_an_error_of_its_own_request(bad: float) -> None:
    async def scenario() -> None:
        async def predict(images_NHWC: Images) -> Probabilities:
            values = images_NHWC.reshape(-1, 1).astype(np.float32)
            values[values == 2] = bad
            return values

        batcher = Batcher(predict)
        tasks = [batcher.submit(images(n, n)) for n in range(4)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(answer, NotFinite) for answer in answers] == [False, False, True, False]

    asyncio.run(scenario())


def test_a_queue_that_is_dropped_refuses_what_waits_and_answers_what_is_in_flight() -> None:
    async def scenario() -> None:
        model = Model()
        model.gate.clear()
        batcher = Batcher(model.predict)
        first = await in_flight(batcher)
        waiting = asyncio.create_task(batcher.submit(images(1)))
        await asyncio.sleep(0)
        batcher.drop_queue()
        with pytest.raises(QueueFull):
            await waiting
        model.gate.set()
        assert (await first).tolist() == [[0]]
        await batcher.wait_idle()

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
        # As often as that it is no chance any more.
        with pytest.raises(ReplicaLost, match=f"{MAX_DEATHS} replicas"):
            await with_retries(dies, (), (ReplicaDied,), deadline_s=30, first_pause_s=0.001)(
                images(1)
            )
        with pytest.raises(ValueError, match="not a replica"):
            await with_retries(fails, (ReplicaDied,), deadline_s=30)(images(1))

    asyncio.run(scenario())
