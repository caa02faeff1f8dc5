"""Calls between a gateway and a replica over a socket of the node."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import uvloop

from lib.errors import ServingError
from lib.serving.channel import (
    Channel,
    ChannelLost,
    Channels,
    ChannelServer,
    Images,
    Probabilities,
    serve_channel,
)

SHAPE = (4, 6, 1)


@pytest.fixture
def folder() -> Iterator[Path]:
    # Paths of sockets are limited to 107 bytes: pytest's own folders are too long.
    with tempfile.TemporaryDirectory(prefix="rl-ch-") as name:
        yield Path(name) / "channels"


def first_pixels(images_NHWC: Images) -> Probabilities:
    return images_NHWC.reshape(len(images_NHWC), -1)[:, :3].astype(np.float32)


def images(count: int) -> Images:
    made = np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    made.setflags(write=False)
    return made


@asynccontextmanager
async def connected(
    folder: Path, predict: Callable[[Images], Probabilities] = first_pixels
) -> AsyncIterator[tuple[ChannelServer, Channels]]:
    server = await serve_channel(folder, "shapes-v1", "replica", predict, SHAPE)
    channels = Channels(folder, "shapes-v1", 3)
    await channels.refresh()
    yield server, channels
    channels.close()
    server.server.close()


def picked(channels: Channels) -> Channel:
    channel = channels.pick()
    assert channel is not None
    return channel


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """On both event loops: Ray's workers have uvloop where it is installed."""
    for runner in (asyncio.run, uvloop.run):
        runner(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type]


def test_every_call_gets_its_own_answer_also_many_at_once_and_large_ones(folder: Path) -> None:
    async def scenario() -> None:
        async with connected(folder) as (_, channels):
            channel = picked(channels)
            batches = [images(count) for count in (1, 128, 3, 5000, 2)]
            answers = await asyncio.gather(*(channel.call(batch) for batch in batches))
            for batch, answer in zip(batches, answers, strict=True):
                assert np.array_equal(answer, first_pixels(batch))
            assert channel.in_flight == 0

    run(scenario)


def test_a_batch_that_fails_fails_alone(folder: Path) -> None:
    def predict(images_NHWC: Images) -> Probabilities:
        if len(images_NHWC) == 2:
            raise ValueError("broken")
        return first_pixels(images_NHWC)

    async def scenario() -> None:
        async with connected(folder, predict) as (_, channels):
            channel = picked(channels)
            with pytest.raises(ServingError, match="see its log"):
                await channel.call(images(2))
            assert (await channel.call(images(1))).shape == (1, 3)

    run(scenario)


def test_a_replica_that_dies_fails_its_calls_at_once_and_leaves_no_socket(folder: Path) -> None:
    async def scenario() -> None:
        async with connected(folder) as (server, channels):
            channel = picked(channels)
            calls = [asyncio.ensure_future(channel.call(images(1))) for _ in range(3)]
            assert channel.transport is not None
            # As a killed process does: the other end is closed, the file is left behind.
            channel.transport.abort()
            server.server.close()
            await server.server.wait_closed()
            for call in calls:
                with pytest.raises(ChannelLost):
                    await call
            assert channels.pick() is None
            assert server.path.exists()
            await channels.refresh()
            assert channels.pick() is None
            assert not server.path.exists()

    run(scenario)


def test_a_replica_that_withdraws_is_not_picked_any_more(folder: Path) -> None:
    async def scenario() -> None:
        async with connected(folder) as (server, channels):
            assert channels.pick() is not None
            server.withdraw()
            await channels.refresh()
            assert channels.pick() is None

    run(scenario)


def test_where_no_replica_is_there_is_no_channel(folder: Path) -> None:
    async def scenario() -> None:
        channels = Channels(folder, "shapes-v9", 3)
        await channels.refresh()
        assert channels.pick() is None

    run(scenario)
