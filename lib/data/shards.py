"""From a chunk of a source to Parquet shards: read, measure, write. Runs inside a task."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lib.data.checks import ROW_ID_BYTES, Labels, RowIds
from lib.data.manifest import SPLITS, Shard
from lib.data.readers import Images, Reader, Shape
from lib.data.splits import TRAIN, Targets
from lib.errors import RaylineError
from lib.storage import Storage

CHUNK_BYTES = 8 * 2**20
"""Raw pixels of a chunk; with small images this decides."""
MIN_CHUNK_ROWS = 1024
MAX_CHUNK_BYTES = 128 * 2**20
"""With large images this decides: a task holds a few times as much."""
_ZSTD_LEVEL = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive rows of one split of a source."""

    index: int
    shape: Shape
    labels: Labels
    targets: Targets
    """Per row: index of its split in `SPLITS`."""
    reader: Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkResult:
    """What the driver needs to know of a chunk; small."""

    index: int
    shards: tuple[Shard, ...]
    row_ids: RowIds
    """(N, 16), in the order of the source."""
    histogram: npt.NDArray[np.int64]
    """(C, 256): how often each pixel value is there, in the train rows."""
    border_sum: npt.NDArray[np.int64]
    """Per channel, over the border pixels of the train rows."""
    border_count: int


def chunk_rows(shape: Shape) -> int:
    """Return how many rows a chunk has: part of the format, since it decides the shards."""
    row_bytes = int(np.prod(shape))
    rows = max(CHUNK_BYTES // row_bytes, MIN_CHUNK_ROWS)
    return max(1, min(rows, MAX_CHUNK_BYTES // row_bytes))


def process_chunk(storage: Storage, chunk: Chunk) -> ChunkResult:
    """Read a chunk, write a shard for each split that it has rows of, and measure it."""
    images = chunk.reader.read(chunk.shape)
    ids = row_ids(images)
    shards = []
    for target in np.unique(chunk.targets):
        chosen = chunk.targets == target
        # One split is the usual case of test: no copy then.
        pixels = images if chosen.all() else images[chosen]
        content = to_parquet(pixels, chunk.labels[chosen], ids[chosen])
        shards.append(store_shard(storage, SPLITS[target], len(pixels), content))
    train = images[chunk.targets == TRAIN]
    border = _border_mask(chunk.shape)
    border_pixels = train[:, border]
    return ChunkResult(
        index=chunk.index,
        shards=tuple(shards),
        row_ids=ids,
        histogram=_histogram(train),
        border_sum=border_pixels.sum(axis=(0, 1), dtype=np.int64),
        border_count=border_pixels.shape[0] * border_pixels.shape[1],
    )


class ShardWriter:
    """The Ray Data callable: a chunk in, its result out.

    An error that the user can act on travels as a value: the message arrives as it is, without
    Ray's retries and nested tracebacks.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process one chunk."""
        try:
            result = process_chunk(self._storage, pickle.loads(row["item"]))
        except RaylineError as error:
            return {"item": pickle.dumps(error)}
        return {"item": pickle.dumps(result)}


def row_ids(images: Images) -> RowIds:
    """Return the BLAKE2b-128 of every image's pixels, (N, 16): the same image, the same id."""
    blake2b = hashlib.blake2b
    rows = np.ascontiguousarray(images).reshape(len(images), int(np.prod(images.shape[1:])))
    digests = b"".join([blake2b(row.data, digest_size=ROW_ID_BYTES).digest() for row in rows])
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, ROW_ID_BYTES)


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
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
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


def _histogram(images: Images) -> npt.NDArray[np.int64]:
    return np.stack([count_values(images[..., channel]) for channel in range(images.shape[3])])


def count_values(values: Images) -> npt.NDArray[np.int64]:
    """Return how often each value is there, (256,).

    Pillow counts four neighbours in four tables: five times as fast as `bincount` where most
    pixels are background, since adding to the same place again has to wait for the last time.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    whole = flat.size - flat.size % 4
    counts = np.bincount(flat[whole:], minlength=256)
    if whole:
        four = Image.frombuffer("RGBA", (whole // 4, 1), flat[:whole], "raw", "RGBA", 0, 1)
        counts += np.array(four.histogram(), dtype=np.int64).reshape(4, 256).sum(axis=0)
    return counts


def _border_mask(shape: Shape) -> npt.NDArray[np.bool_]:
    border = np.ones(shape[:2], dtype=np.bool_)
    border[1:-1, 1:-1] = False
    return border
