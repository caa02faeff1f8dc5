from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from lib.data import shards
from lib.data.readers import RawReader
from lib.data.shards import (
    Chunk,
    chunk_ranges,
    chunk_rows,
    num_tasks,
    pixel_sums,
    process_chunk,
    row_ids,
    shuffled_slices,
)
from lib.errors import DataError, StorageError
from lib.storage import Storage

SHAPE = (4, 5, 3)


@pytest.fixture
def chunk(tmp_path: Path) -> tuple[Storage, Chunk, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (50, *SHAPE), dtype=np.uint8)
    (tmp_path / "raw").write_bytes(b"head" + images.tobytes())
    labels = np.arange(50, dtype=np.int32) % 2
    targets = (np.arange(50) % 5 == 0).astype(np.uint8)
    reader = RawReader(
        name="raw", root=Storage(str(tmp_path)), path="raw", offset_bytes=4, start=0, stop=50
    )
    made = Chunk(
        index=0,
        shape=SHAPE,
        labels=labels,
        targets=targets,
        row_ids=row_ids(images),
        readers=(reader,),
    )
    return Storage(str(tmp_path / "storage")), made, images


def test_shards_hold_the_rows_of_their_split(chunk: tuple[Storage, Chunk, np.ndarray]) -> None:
    storage, made, images = chunk
    result = process_chunk(storage, made)
    assert [(shard.split, shard.rows) for shard in result.shards] == [("train", 40), ("val", 10)]
    for shard, target in zip(result.shards, (0, 1), strict=True):
        content = storage.read(shard.path)
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        assert shard.path == f"data/shards/{shard.sha256[:32]}.parquet"
        table = pq.read_table(io.BytesIO(content))
        chosen = made.targets == target
        assert b"".join(table["image"].to_pylist()) == images[chosen].tobytes()
        assert table["label"].to_pylist() == made.labels[chosen].tolist()
        assert table["row_id"].to_pylist() == [
            xxhash.xxh3_128_digest(image.tobytes()) for image in images[chosen]
        ]


def test_statistics_are_of_the_train_rows(chunk: tuple[Storage, Chunk, np.ndarray]) -> None:
    storage, made, images = chunk
    result = process_chunk(storage, made)
    train = images[made.targets == 0].astype(np.int64)
    assert result.sums.rows == len(train) == 40
    assert np.array_equal(result.sums.values_HWC, train.sum(axis=0))
    mean, square = result.sums.moments()
    assert mean == pytest.approx((train / 255).mean(axis=(0, 1, 2)))
    assert square == pytest.approx(((train / 255) ** 2).mean(axis=(0, 1, 2)))
    assert result.sums.moments() == (result.sums + pixel_sums(images[:0])).moments()


def test_sums_of_many_bright_images_do_not_overflow() -> None:
    images = np.full((9000, 40, 40, 3), 255, dtype=np.uint8)
    assert pixel_sums(images).moments() == ((1.0,) * 3, (1.0,) * 3)


def test_the_same_chunk_again_writes_nothing(chunk: tuple[Storage, Chunk, np.ndarray]) -> None:
    storage, made, _ = chunk
    first = process_chunk(storage, made)
    times = {
        shard.path: Path(storage.path(shard.path)).stat().st_mtime_ns for shard in first.shards
    }
    assert process_chunk(storage, made).shards == first.shards
    for path, time_ns in times.items():
        assert Path(storage.path(path)).stat().st_mtime_ns == time_ns


def test_a_part_of_a_reader_reads_its_rows(chunk: tuple[Storage, Chunk, np.ndarray]) -> None:
    _, made, images = chunk
    part = made.readers[0].part(10, 30).part(5, 7)
    assert np.array_equal(part.read(SHAPE), images[15:17])
    assert part.where(1) == "raw row 16"


def test_equal_images_have_equal_ids() -> None:
    images = np.zeros((3, *SHAPE), np.uint8)
    images[1, 0, 0, 0] = 1
    ids = row_ids(images)
    assert ids[0].tobytes() == ids[2].tobytes() != ids[1].tobytes()


@pytest.mark.parametrize(
    ("shape", "rows"), [((28, 28, 1), 10_699), ((224, 224, 3), 891), ((20_000, 20_000, 3), 1)]
)
def test_chunks_are_bounded_in_bytes(shape: tuple[int, int, int], rows: int) -> None:
    assert chunk_rows(shape) == rows


def test_slices_of_a_sorted_source_are_spread_over_all_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "SLICE_BYTES", 7 * 60)
    monkeypatch.setattr(shards, "chunk_rows", lambda shape: 100)
    sizes = [100, 100, 37, 100, 63]
    chunks = shuffled_slices(sizes, SHAPE)
    assert [sum(b - a for _, a, b in chunk) for chunk in chunks] == [100] * 4
    rows = [(index, row) for chunk in chunks for index, a, b in chunk for row in range(a, b)]
    assert sorted(rows) == [(index, row) for index, size in enumerate(sizes) for row in range(size)]
    for chunk in chunks:
        shares = np.bincount([index for index, a, b in chunk for _ in range(a, b)], minlength=5)
        assert np.all(shares[[0, 1, 3]] < 55), shares


def test_a_chunk_of_slices_reads_them_in_their_order(
    chunk: tuple[Storage, Chunk, np.ndarray],
) -> None:
    storage, made, images = chunk
    rows = np.r_[30:50, 0:30]
    mixed = replace(
        made,
        labels=made.labels[rows],
        targets=np.zeros(50, np.uint8),
        row_ids=made.row_ids[rows],
        readers=tuple(made.readers[0].part(*ends) for ends in ((30, 41), (41, 50), (0, 30))),
    )
    table = pq.read_table(io.BytesIO(storage.read(process_chunk(storage, mixed).shards[0].path)))
    assert b"".join(table["image"].to_pylist()) == images[rows].tobytes()
    assert table["row_id"].to_pylist() == [row.tobytes() for row in made.row_ids[rows]]


def test_a_source_that_changes_between_the_passes_stops_the_ingest(
    chunk: tuple[Storage, Chunk, np.ndarray],
) -> None:
    storage, made, _ = chunk
    row_ids = made.row_ids.copy()
    row_ids[17] ^= 1
    with pytest.raises(DataError, match="raw row 0, or a row after it, .* changed meanwhile"):
        process_chunk(storage, replace(made, row_ids=row_ids))


def test_chunks_end_where_row_groups_do() -> None:
    assert chunk_ranges(25, 10, ()) == [(0, 10), (10, 20), (20, 25)]
    # Files of 23 rows in groups of 10: no group is shared.
    ends = (10, 20, 23, 33, 43, 46)
    assert chunk_ranges(46, 10, ends) == [(0, 10), (10, 20), (20, 23), (23, 33), (33, 43), (43, 46)]
    # An end that leaves almost nothing is passed over; groups of several chunks are cut.
    assert chunk_ranges(30, 10, (1, 30)) == [(0, 10), (10, 20), (20, 30)]
    assert chunk_ranges(0, 10, ()) == []


@pytest.mark.parametrize(
    ("chunks", "mib", "cpus", "tasks"),
    [
        (1, 8, 2, 1),
        (7, 8, 2, 7),
        (72, 8, 2, 8),
        (72, 8, 64, 72),
        (654, 8, 2, 21),
        (20, 8, 0, 1),
        (72, 8, 0.5, 3),
        (72, 128, 2, 36),
    ],
)
def test_tasks_are_few_but_enough_for_all_cores(
    chunks: int, mib: int, cpus: float, tasks: int
) -> None:
    assert num_tasks(chunks, mib * 2**20, cpus) == tasks


def test_storage_that_is_a_file_is_named(chunk: tuple[Storage, Chunk, np.ndarray]) -> None:
    storage, made, _ = chunk
    Path(storage.root).write_text("not a folder")
    with pytest.raises(StorageError, match="can't be written"):
        process_chunk(storage, made)
