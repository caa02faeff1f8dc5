"""Replicas: how the throughput of a slow version grows with them, behind one gateway's batcher.

python -m tests.bench replicas --rounds 3 --seconds 5

The replicas are processes that answer over a gateway's real channels; their model only sleeps, so
they share the cores of a small machine without slowing each other down. Serve and HTTP are left
out.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lib.serving.batcher import Batcher, Images, Probabilities
from lib.serving.channel import Channel, Channels, serve_channel
from tests.bench.report import BenchError, Options, Report, Table, figure, say, turns

_NUMBERS = (1, 2, 4)
_CALLERS = (8, 127)
"""The second is one fewer than the largest batch."""
_IMAGE_S = 0.002
_SHAPE = (28, 28, 1)
_CLASSES = 10
_APPLICATION = "slow-v1"
_START_S = 60.0


def run(options: Options) -> Report:
    rates: dict[tuple[int, int], list[float]] = {}
    for turn, name in turns([str(number) for number in _NUMBERS], options.rounds):
        number = int(name)
        folder = options.temp / f"ch{turn}-{number}"
        with _replicas(folder, number):
            for callers in _CALLERS:
                say(f"replicas: {number}, {callers} callers")
                rate = asyncio.run(_images_a_second(folder, number, callers, options.seconds))
                rates.setdefault((number, callers), []).append(rate)
    medians = {key: statistics.median(found) for key, found in rates.items()}
    return Report(
        title="Replicas of a slow version",
        tables=[
            Table(
                title=f"A model of {1000 * _IMAGE_S:g} ms an image, one image a request",
                columns=("replicas", "callers", "images/s", "of one replica's"),
                rows=[
                    (
                        str(number),
                        str(callers),
                        figure(medians[number, callers]),
                        f"{medians[number, callers] / medians[1, callers]:.2f}x",
                    )
                    for callers in _CALLERS
                    for number in _NUMBERS
                ],
            )
        ],
        notes=[f"Medians of {options.rounds} rounds of {options.seconds:g} s."],
        data={f"{number}/{callers}": found for (number, callers), found in rates.items()},
    )


@contextmanager
def _replicas(folder: Path, number: int) -> Iterator[None]:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_serve, args=(folder, n), daemon=True) for n in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(folder: Path, number: int) -> None:
    answer = np.full((1, _CLASSES), 1 / _CLASSES, np.float32)

    def predict(images_NHWC: Images) -> Probabilities:
        time.sleep(_IMAGE_S * len(images_NHWC))
        return answer.repeat(len(images_NHWC), axis=0)

    async def main() -> None:
        server = await serve_channel(folder, _APPLICATION, f"r{number}", predict, _SHAPE)
        await asyncio.Event().wait()
        server.close()

    asyncio.run(main())


async def _images_a_second(folder: Path, number: int, callers: int, seconds: float) -> float:
    channels = Channels(folder, _APPLICATION, _CLASSES)
    end = time.monotonic() + _START_S
    while channels.num_open < number:
        if time.monotonic() > end:
            raise BenchError(f"only {channels.num_open} of {number} replicas came up")
        await asyncio.sleep(0.05)
        await channels.refresh()

    async def predict(images_NHWC: Images) -> Probabilities:
        channel: Channel | None = channels.pick()
        if channel is None:
            raise BenchError("the replicas have gone")
        return await channel.call(images_NHWC)

    batcher = Batcher(predict, num_replicas=lambda: channels.num_open)
    image = np.zeros((1, *_SHAPE), np.uint8)
    answered = 0

    async def ask() -> None:
        nonlocal answered
        while True:
            await batcher.submit(image)
            answered += 1

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(ask()) for _ in range(callers)]
    await asyncio.sleep(1)
    before, begun = answered, time.monotonic()
    await asyncio.sleep(seconds)
    rate = (answered - before) / (time.monotonic() - begun)
    for task in tasks:
        task.cancel()
    failures = [
        error
        for error in await asyncio.gather(*tasks, return_exceptions=True)
        if not isinstance(error, asyncio.CancelledError)
    ]
    await batcher.wait_idle()
    channels.close()
    if failures:
        raise BenchError(f"requests failed: {failures[0]!r}")
    return rate
