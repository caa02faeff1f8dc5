"""From a chunk of a source to Parquet shards: read, measure, write. Runs inside a task."""

from __future__ import annotations

import bisect
import hashlib
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lib.data.checks import ROW_ID_BYTES, Labels, RowIds
from lib.data.manifest import FORMAT_VERSION, SPLITS, Shard
from lib.data.parquet_reader import StagedReader
from lib.data.readers import Images, RawReader, Reader, Shape
from lib.data.splits import TRAIN, Targets, row_hash
from lib.data.staging import Staging
from lib.errors import DataError, RaylineError
from lib.storage import Storage

CHUNK_BYTES = 8 * 2**20
"""Raw pixels of a chunk; with small images this decides."""
MIN_CHUNK_ROWS = 1024
MAX_CHUNK_BYTES = 128 * 2**20
"""With large images this decides: a task holds a few times as much."""
_TASKS_PER_CPU = 4
"""So that a core that is slower than others takes fewer of them."""
_TASK_BYTES = 256 * 2**20
"""Raw pixels of a task: some seconds, after which progress is seen."""
_ZSTD_LEVEL = 1
SLICE_BYTES = 64 * 2**10
"""Consecutive pixels that stay together where rows are shuffled: a thousand such slices make a
window of training, and one is still worth a request to an object store."""
_SHUFFLE_SEED = 0
_READ_THREADS = 16
"""Of a chunk of many slices: an object store answers each after some hundredths of a second."""
_SUM_BYTES = 2**18
"""Pixels that are added up at a time: as floats they stay in the processor's cache."""
_SUM_ROWS = 256
"""Squares of so many bytes add up to less than 2²⁴: exact in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelSums:
    """What mean and deviation are computed from, exact: the same in whatever order rows come."""

    rows: int
    values_HWC: npt.NDArray[np.int64]
    """Sum over the rows of each pixel."""
    squares_C: npt.NDArray[np.int64]
    """Sum of the squares of all pixels of a channel."""

    def __add__(self, other: PixelSums) -> PixelSums:
        """Return the sums over both sets of rows."""
        return PixelSums(
            rows=self.rows + other.rows,
            values_HWC=self.values_HWC + other.values_HWC,
            squares_C=self.squares_C + other.squares_C,
        )

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and mean square per channel, of pixels scaled to 0–1."""
        height, width, _ = self.values_HWC.shape
        count = self.rows * height * width
        mean_C = self.values_HWC.sum(axis=(0, 1)) / (count * 255)
        square_C = self.squares_C / (count * 255**2)
        return tuple(mean_C.tolist()), tuple(square_C.tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class Unread:
    """Consecutive rows of one split of a source, of which only the labels are known."""

    index: int
    shape: Shape
    reader: Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Scanned:
    """Rows that were decoded once."""

    index: int
    row_ids: RowIds
    """(N, 16), in the order of the source."""
    pixels: RawReader | StagedReader
    """Reads them again, or any part of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Rows of one split of a source, in the order in which they are written."""

    index: int
    shape: Shape
    labels: Labels
    targets: Targets
    """Per row: index of its split in `SPLITS`."""
    row_ids: RowIds
    readers: tuple[Reader, ...]
    """Of its slices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """What the driver needs to know of a chunk; small."""

    index: int
    shards: tuple[Shard, ...]
    num_rows: int
    sums: PixelSums
    """Of the train rows."""


def chunk_rows(shape: Shape) -> int:
    """Return how many rows a chunk has at most: part of the format, since it decides the shards."""
    row_bytes = int(np.prod(shape))
    rows = max(CHUNK_BYTES // row_bytes, MIN_CHUNK_ROWS)
    return max(1, min(rows, MAX_CHUNK_BYTES // row_bytes))


def chunk_ranges(num_rows: int, most_rows: int, ends: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first row of each chunk and the one after its last.

    A chunk ends where a row group of the source does, if that leaves it a quarter of its size: each
    of the two chunks that share a row group would decode all of it.
    """
    ranges, start = [], 0
    while start < num_rows:
        stop = min(start + most_rows, num_rows)
        place = bisect.bisect_right(ends, stop)
        if stop < num_rows and place and ends[place - 1] >= start + max(1, most_rows // 4):
            stop = ends[place - 1]
        ranges.append((start, stop))
        start = stop
    return ranges


def shuffled_slices(sizes: Sequence[int], shape: Shape) -> list[list[tuple[int, int, int]]]:
    """Return the slices of each chunk that is written: (scanned chunk, first row, one after last).

    Of a source that is sorted by class, a shard of consecutive rows would hold one class, and
    training from shards would see few classes at a time. Each chunk has slices of all the source.

    Args:
        sizes: Rows of each scanned chunk.
        shape: Of an image.
    """
    step = max(1, SLICE_BYTES // int(np.prod(shape)))
    slices = [
        (index, start, min(start + step, size))
        for index, size in enumerate(sizes)
        for start in range(0, size, step)
    ]
    chunks: list[list[tuple[int, int, int]]] = [[]]
    room = most_rows = chunk_rows(shape)
    for place in np.argsort(row_hash(len(slices), _SHUFFLE_SEED)).tolist():
        index, start, stop = slices[place]
        while stop - start > room:
            chunks[-1].append((index, start, start + room))
            start += room
            chunks.append([])
            room = most_rows
        chunks[-1].append((index, start, stop))
        room -= stop - start
    return [[piece for piece in chunk if piece[2] > piece[1]] for chunk in chunks]


def num_tasks(num_chunks: int, chunk_bytes: int, num_cpus: float) -> int:
    """Return how many tasks share chunks of so many raw pixels.

    Few: Ray Data takes about as long over a task as the task over a chunk of small images.
    """
    fewest = math.ceil(num_chunks * chunk_bytes / _TASK_BYTES)
    return min(num_chunks, max(fewest, int(_TASKS_PER_CPU * num_cpus)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """A chunk that is still to be written."""

    index: int
    files: list[tuple[str, int, pa.Buffer]]
    """Split, rows and content of each shard."""
    num_rows: int
    sums: PixelSums

    def store(self, storage: Storage) -> ChunkResult:
        """Write the shards."""
        shards = tuple(store_shard(storage, split, *rest) for split, *rest in self.files)
        return ChunkResult(index=self.index, shards=shards, num_rows=self.num_rows, sums=self.sums)


def process_chunk(storage: Storage, chunk: Chunk) -> ChunkResult:
    """Read a chunk, measure it, and write a shard for each split that it has rows of."""
    return _measure(chunk).store(storage)


def _measure(chunk: Chunk) -> _Measured:
    images = _read_all(chunk.readers, chunk.shape)
    if not np.array_equal(row_ids(images), chunk.row_ids):
        raise DataError(
            f"{chunk.readers[0].where(0)}, or a row after it, has other pixels than when it was "
            "read first: the source was changed meanwhile; run the same command again"
        )
    files = []
    sums = pixel_sums(images[:0])
    for target in np.unique(chunk.targets):
        chosen = chunk.targets == target
        # One split is the usual case of test: no copy then.
        pixels = images if chosen.all() else images[chosen]
        content = to_parquet(pixels, chunk.labels[chosen], chunk.row_ids[chosen])
        files.append((SPLITS[target], len(pixels), content))
        if target == TRAIN:
            sums = pixel_sums(pixels)
    return _Measured(index=chunk.index, files=files, num_rows=len(images), sums=sums)


def _read_all(readers: Sequence[Reader], shape: Shape) -> Images:
    if len(readers) == 1:
        return readers[0].read(shape)
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return np.concatenate(list(pool.map(lambda reader: reader.read(shape), readers)))


class ChunkScanner:
    """The Ray Data callable of the first pass: rows of the source in, their ids out.

    What had to be decoded is staged as raw pixels, so that the second pass reads it in any order.
    Errors travel as values, as those of `ShardWriter` do.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Scan the chunks of a task."""
        try:
            for item in batch.column("item"):
                yield _row(self._scan(pickle.loads(item.as_py())))
        except RaylineError as error:
            yield _row(error)

    def _scan(self, chunk: Unread) -> Scanned:
        images = chunk.reader.read(chunk.shape)
        pixels = chunk.reader
        if not isinstance(pixels, RawReader | StagedReader):
            content = np.ascontiguousarray(images).reshape(-1).data
            path = self._staging.add(f"pixels-{chunk.index}", [content], images.nbytes)
            pixels = RawReader(
                name=chunk.reader.where(0),
                root=self._staging.storage,
                path=path,
                offset_bytes=0,
                start=0,
                stop=len(images),
            )
        return Scanned(index=chunk.index, row_ids=row_ids(images), pixels=pixels)


class ShardWriter:
    """The Ray Data callable of the second pass: chunks in, their results out.

    A chunk is written while the next one is read: a core does not wait for the disk. An error that
    the user can act on travels as a value: the message arrives as it is, without Ray's retries and
    nested tracebacks.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Process the chunks of a task."""
        with ThreadPoolExecutor(1) as writer:
            writing: Future[ChunkResult] | None = None
            try:
                for item in batch.column("item"):
                    measured = _measure(pickle.loads(item.as_py()))
                    if writing is not None:
                        yield _row(writing.result())
                    writing = writer.submit(measured.store, self._storage)
                if writing is not None:
                    yield _row(writing.result())
            except RaylineError as error:
                yield _row(error)


def _row(content: Scanned | ChunkResult | RaylineError) -> pa.Table:
    # As bytes: Arrow has no column type for objects.
    return pa.table({"item": pa.array([pickle.dumps(content)], type=pa.binary())})


def row_ids(images: Images, format_version: int = FORMAT_VERSION) -> RowIds:
    """Return a hash of every image's pixels, (N, 16): the same image, the same id.

    XXH3-128 tells images apart, but not from one that someone made to have the same id. What a
    shard holds is told by its SHA-256.
    """
    rows = np.ascontiguousarray(images).reshape(-1, int(np.prod(images.shape[1:])))
    # A tenth of the time of BLAKE2b, which took a quarter of an ingest of small images.
    digest: Callable[[Any], bytes] = xxhash.xxh3_128_digest if format_version > 1 else _blake2b
    return np.frombuffer(b"".join(map(digest, rows)), np.uint8).reshape(-1, ROW_ID_BYTES)


def _blake2b(row: Any) -> bytes:
    return hashlib.blake2b(row, digest_size=ROW_ID_BYTES).digest()


def to_parquet(images: Images, labels: Labels, ids: RowIds) -> pa.Buffer:
    """Serialise rows; the same rows give the same bytes."""
    table = pa.table(
        {
            "image": _fixed_size_binary(images.reshape(len(images), -1)),
            "label": pa.array(labels, type=pa.int32()),
            "row_id": _fixed_size_binary(ids),
        }
    )
    shape = ",".join(str(side) for side in images.shape[1:])
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({"rayline.shape": shape}),
        sink,
        row_group_size=len(images),
        # An id is as good as random.
        compression={"image": "zstd", "label": "zstd", "row_id": "none"},
        compression_level={"image": _ZSTD_LEVEL, "label": _ZSTD_LEVEL},
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def split_digest(ids: RowIds, labels: npt.NDArray[np.integer[Any]]) -> str:
    """Return a digest over a split's rows in order."""
    digest = hashlib.sha256(np.ascontiguousarray(ids).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i4").data)
    return digest.hexdigest()[:32]


def _fixed_size_binary(rows: npt.NDArray[np.uint8]) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(rows))
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1]), rows.shape[0], [None, buffer]
    )


def store_shard(storage: Storage, split: str, rows: int, content: pa.Buffer) -> Shard:
    """Write a shard under the name of its content, unless it is there."""
    sha256 = hashlib.sha256(content).hexdigest()
    path = f"data/shards/{sha256[:32]}.parquet"
    # Named by content: a shard that is there is this one, of this ingest or an interrupted one.
    if not storage.exists(path):
        storage.write(path, content)
    return Shard(split=split, path=path, rows=rows, sha256=sha256, size_bytes=content.size)


def pixel_sums(images: Images) -> PixelSums:
    """Return the sums over all images, (N, H, W, C)."""
    shape = images.shape[1:]
    rows_ND = images.reshape(len(images), int(np.prod(shape)))
    values_D, squares_D = np.zeros((2, rows_ND.shape[1]))
    step = max(1, min(_SUM_ROWS, _SUM_BYTES // rows_ND.shape[1]))
    for start in range(0, len(rows_ND), step):
        # Sums as products with ones: twice as fast as NumPy's, which convert value by value.
        part_ND = rows_ND[start : start + step].astype(np.float32)
        ones_N = np.ones(len(part_ND), dtype=np.float32)
        values_D += ones_N @ part_ND
        squares_D += ones_N @ np.multiply(part_ND, part_ND, out=part_ND)
    return PixelSums(
        rows=len(images),
        values_HWC=values_D.astype(np.int64).reshape(shape),
        squares_C=squares_D.astype(np.int64).reshape(-1, shape[2]).sum(axis=0),
    )
