from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.data.manifest import Manifest, Preprocess
from lib.data.readers import RawReader
from lib.data.shards import Chunk, process_chunk, row_ids
from lib.data.splits import row_hash
from lib.data.stream import EpochStream
from lib.errors import DataError
from lib.storage import Storage

SHAPE = (4, 5, 1)
ROWS, SHARD_ROWS = 230, 20


@pytest.fixture
def data(tmp_path: Path) -> tuple[Storage, Manifest, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (ROWS, *SHAPE), dtype=np.uint8)
    (tmp_path / "raw").write_bytes(images.tobytes())
    storage = Storage(str(tmp_path / "storage"))
    shards = []
    for start in range(0, ROWS, SHARD_ROWS):
        stop = min(start + SHARD_ROWS, ROWS)
        reader = RawReader(
            name="raw",
            root=Storage(str(tmp_path)),
            path="raw",
            offset_bytes=0,
            start=start,
            stop=stop,
        )
        labels = np.arange(start, stop, dtype=np.int32)
        targets = np.zeros(stop - start, dtype=np.uint8)
        chunk = Chunk(
            index=0,
            shape=SHAPE,
            labels=labels,
            targets=targets,
            row_ids=row_ids(images[start:stop]),
            readers=(reader,),
        )
        shards += process_chunk(storage, chunk).shards
    manifest = Manifest(
        digest="0" * 32,
        source="raw",
        source_digests={},
        height=4,
        width=5,
        channels=1,
        class_names=tuple(str(row) for row in range(ROWS)),
        counts={"train": (1,) * ROWS},
        split_digests={},
        pixel_mean=(0.5,),
        pixel_std=(0.2,),
        preprocess=Preprocess(mode="L", fill=(0,)),
        shards=tuple(shards),
        seed=0,
    )
    return storage, manifest, images


def stream(data: tuple[Storage, Manifest, np.ndarray], **changes: int) -> EpochStream:
    # Three shards a window.
    options = {"batch_size": 32, "window_bytes": 3 * SHARD_ROWS * 20, **changes}
    return EpochStream(storage=data[0], manifest=data[1], split="train", **options)


def order(made: EpochStream, epoch: int) -> list[int]:
    return [row for batch in made.epoch(epoch) for row in batch.labels_N.tolist()]


@pytest.mark.parametrize("batch_size", [7, 32, 500])
def test_an_epoch_has_every_row_once_with_its_label(
    data: tuple[Storage, Manifest, np.ndarray], batch_size: int
) -> None:
    batches = list(stream(data, batch_size=batch_size).epoch(0))
    assert [len(batch.labels_N) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    labels = np.concatenate([batch.labels_N for batch in batches])
    assert sorted(labels.tolist()) == list(range(ROWS))
    images = np.concatenate([batch.images_NHWC for batch in batches])
    assert np.array_equal(images, data[2][labels])


def test_the_order_depends_on_seed_and_epoch_alone(
    data: tuple[Storage, Manifest, np.ndarray],
) -> None:
    first = stream(data)
    orders = [order(first, epoch) for epoch in (0, 1)] + [order(stream(data, seed=1), 0)]
    assert len({tuple(rows) for rows in [*orders, range(ROWS)]}) == 4
    # Started again at epoch 1, with other threads.
    assert order(stream(data, num_threads=1), 1) == orders[1]


def test_the_order_is_that_of_the_rows_hashes(data: tuple[Storage, Manifest, np.ndarray]) -> None:
    # Models are rebuilt bit by bit from this order.
    shards = np.argsort(row_hash(len(data[1].shards), 3))
    rows = [row for shard in shards for row in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS)]
    rows = [row for row in rows if row < ROWS]
    seed = 3 ^ int(data[1].shards[shards[0]].sha256[:8], 16)
    wanted = np.empty(ROWS, dtype=np.int64)
    wanted[np.argsort(row_hash(ROWS, seed))] = rows
    assert order(stream(data, window_bytes=2**20), 3) == wanted.tolist()


def test_rows_of_several_shards_share_a_batch(data: tuple[Storage, Manifest, np.ndarray]) -> None:
    batch = next(stream(data).epoch(0))
    assert len(set((batch.labels_N // SHARD_ROWS).tolist())) == 3


def test_two_windows_are_held_at_most(
    data: tuple[Storage, Manifest, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, started = stream(data, batch_size=20), []
    read = EpochStream._read
    monkeypatch.setattr(
        EpochStream, "_read", lambda *args: started.append(len(args[1])) or read(*args)
    )
    given = 0
    for batch in made.epoch(0):
        given += len(batch.labels_N)
        assert len(started) <= (given - 1) // (3 * SHARD_ROWS) + 2
    assert len(started) == 4


def test_memory_of_windows_is_used_again_once_no_batch_holds_it(
    data: tuple[Storage, Manifest, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    empty = np.empty

    def counted(*args: Any, dtype: Any) -> np.ndarray:
        made.append(np.dtype(dtype).itemsize)
        return empty(*args, dtype=dtype)

    monkeypatch.setattr("lib.data.stream.np.empty", counted)
    # Twelve windows of a shard each.
    for _ in stream(data, batch_size=7, window_bytes=1).epoch(0):
        pass
    assert made.count(20) <= 3
    made.clear()
    held = list(stream(data, batch_size=7, window_bytes=1).epoch(0))
    assert made.count(20) == 12
    labels = np.concatenate([batch.labels_N for batch in held])
    assert np.array_equal(np.concatenate([b.images_NHWC for b in held]), data[2][labels])


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("place", [100, -20])
def test_a_damaged_shard_is_named(
    data: tuple[Storage, Manifest, np.ndarray], epoch: int, place: int
) -> None:
    storage, manifest, _ = data
    shard = manifest.shards[5]
    content = bytearray(storage.read(shard.path))
    content[place] ^= 1
    storage.write(shard.path, bytes(content))
    with pytest.raises(DataError, match=rf"{shard.path} .*damaged"):
        list(stream(data).epoch(epoch))
    with pytest.raises(DataError, match="no split 'dev'"):
        next(EpochStream(storage=storage, manifest=manifest, split="dev", batch_size=2).epoch(0))
