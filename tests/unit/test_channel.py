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
from lib.serving.batcher import ReplicaLost
from lib.serving.channel import (
    Channel,
    Channels,
    ChannelServer,
    Images,
    Probabilities,
    channel_folder,
    serve_channel,
)
from tests.strangers import run_as_stranger

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
    server.close()


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
            with pytest.raises(ServingError, match="this batch: ValueError: broken"):
                await channel.call(images(2))
            assert (await channel.call(images(1))).shape == (1, 3)

    run(scenario)


def test_a_cause_may_come_in_parts_and_behind_other_answers(folder: Path) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        channel = Channel(3, tells_cause=True)
        cause = "Zerfall: ü".encode()
        sent = (1).to_bytes(4, "little") + np.ones(3, np.float32).tobytes()
        sent += bytes(4) + len(cause).to_bytes(4, "little") + cause
        waiting = [loop.create_future(), loop.create_future(), loop.create_future()]
        channel._waiting.extend(waiting)
        for byte in sent * 2:
            channel.data_received(bytes([byte]))
            if waiting[2].done():
                break
        assert waiting[0].result().tolist() == waiting[2].result().tolist() == [[1, 1, 1]]
        with pytest.raises(ServingError, match="Zerfall: ü$"):
            waiting[1].result()

    run(scenario)


def test_gateways_and_versions_of_older_code_understand_each_other(folder: Path) -> None:
    def predict(images_NHWC: Images) -> Probabilities:
        if len(images_NHWC) == 2:
            raise ValueError("broken")
        return first_pixels(images_NHWC)

    async def scenario() -> None:
        server = await serve_channel(folder, "shapes-v1", "replica", predict, SHAPE)
        channels = Channels(folder, "shapes-v1", 3)
        await channels.refresh()
        # One channel a replica, though it has a socket for each format.
        assert list(channels._open) == ["replica.v2.sock"]
        channels.close()
        # As a version of older code, and as a gateway of older code sees a new one.
        server.paths[0].unlink()
        await channels.refresh()
        with pytest.raises(ServingError, match="see its log"):
            await picked(channels).call(images(2))
        assert (await picked(channels).call(images(1))).shape == (1, 3)
        channels.close()
        server.close()

    run(scenario)


def test_a_replica_that_dies_fails_its_calls_at_once_and_leaves_no_socket(folder: Path) -> None:
    async def scenario() -> None:
        async with connected(folder) as (server, channels):
            channel = picked(channels)
            calls = [asyncio.ensure_future(channel.call(images(1))) for _ in range(3)]
            assert channel.transport is not None
            # As a killed process does: the other end is closed, the file is left behind.
            channel.transport.abort()
            server.close()
            for each in server.servers:
                await each.wait_closed()
            for call in calls:
                with pytest.raises(ReplicaLost):
                    await call
            assert channels.pick() is None
            assert server.paths[0].exists()
            # One after the other: first the newer format's, then the older one's.
            for path in server.paths:
                await channels.refresh()
                assert channels.pick() is None
                assert not path.exists()

    run(scenario)


def test_a_replica_that_withdraws_is_not_picked_any_more(folder: Path) -> None:
    async def scenario() -> None:
        async with connected(folder) as (server, channels):
            assert channels.pick() is not None
            server.withdraw()
            await channels.refresh()
            assert channels.pick() is None

    run(scenario)


SERVER = """
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listens", flush=True)
sys.stdin.read()
"""
CLIENT = """
client = socket.socket(socket.AF_UNIX)
client.settimeout(10)
client.connect(sys.argv[1])
try:
    client.sendall((1).to_bytes(4, "little") + bytes(24))
    print(len(client.recv(100)))
except ConnectionError:
    print(0)
"""


def open_to_all(folder: Path) -> None:
    for path in (folder.parent, folder, *folder.rglob("*")):
        path.chmod(0o777)


def test_images_do_not_go_to_a_replica_of_another_user(folder: Path) -> None:
    place = folder / "shapes-v1"
    place.mkdir(parents=True)
    open_to_all(folder)
    stranger = run_as_stranger(SERVER, str(place / "replica.v2.sock"))
    assert stranger.stdout
    assert stranger.stdout.readline() == "listens\n"

    async def scenario() -> None:
        channels = Channels(folder, "shapes-v1", 3)
        # Whoever may write there could have put anything there.
        await channels.refresh()
        assert channels.pick() is None
        # As if the folder had always been closed: then the other end itself is looked at.
        for path in (folder, place):
            path.chmod(0o700)
        await channels.refresh()
        assert channels.pick() is None
        for path in (folder, place):
            path.chmod(0o777)

    run(scenario)
    stranger.communicate("", timeout=10)


def test_a_folder_of_another_user_or_a_link_is_not_used(folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with connected(tmp_path / "real"):
            folder.symlink_to(tmp_path / "real")
            channels = Channels(folder, "shapes-v1", 3)
            await channels.refresh()
            assert channels.pick() is None
            with pytest.raises(ServingError, match="remove it"):
                await serve_channel(folder, "shapes-v1", "replica", first_pixels, SHAPE)
            folder.unlink()

    run(scenario)


def test_a_replica_answers_no_other_user(folder: Path) -> None:
    async def scenario() -> None:
        server = await serve_channel(folder, "shapes-v1", "replica", first_pixels, SHAPE)
        open_to_all(folder)
        stranger = run_as_stranger(CLIENT, str(server.paths[0]))
        output, _ = await asyncio.to_thread(stranger.communicate, timeout=20)
        assert output == "0\n"
        server.close()

    run(scenario)


@pytest.mark.parametrize("length", [48, 49, 200])
def test_names_longer_than_a_socket_s_path_have_channels_of_their_own(
    folder: Path, length: int
) -> None:
    names = [f"{'m' * length}-v{version}" for version in (1, 2)]

    async def scenario() -> None:
        servers = [
            await serve_channel(folder, name, "replica", first_pixels, SHAPE) for name in names
        ]
        assert len({server.paths[0].parent for server in servers}) == 2
        for name in names:
            channels = Channels(folder, name, 3)
            await channels.refresh()
            assert (await picked(channels).call(images(1))).shape == (1, 3)
            channels.close()
        for server in servers:
            server.close()

    run(scenario)


def test_sockets_lie_in_the_private_folder_where_there_is_one() -> None:
    one, other = channel_folder("a:1", "/tmp/rayline-x"), channel_folder("b:1", "/tmp/rayline-x")
    assert one != other
    assert one.parent == other.parent == Path("/tmp/rayline-x")
    assert channel_folder("a:1").parent == Path(tempfile.gettempdir())


def test_where_no_replica_is_there_is_no_channel(folder: Path) -> None:
    async def scenario() -> None:
        channels = Channels(folder, "shapes-v9", 3)
        await channels.refresh()
        assert channels.pick() is None

    run(scenario)
