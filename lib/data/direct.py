"""Reads a data set in this process alone: pyarrow and nothing else, one shard at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.checks import ROW_ID_BYTES
from lib.data.manifest import Manifest, Shard
from lib.data.shards import split_digest
from lib.errors import DataError
from lib.storage import Storage

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def read_split(storage: Storage, manifest: Manifest, split: str) -> tuple[Images, Labels]:
    """Return a split's images (N, H, W, C) and labels in shard order.

    Raises DataError if a shard is damaged or the rows are not those of the manifest.
    """
    images = np.empty((manifest.rows(split), int(np.prod(manifest.shape))), dtype=np.uint8)
    labels = np.empty(len(images), dtype=np.int64)
    start = 0
    for table in _checked_shards(storage, manifest, split):
        stop = start + table.num_rows
        images[start:stop] = byte_rows(table.column("image"), images.shape[1])
        labels[start:stop] = table.column("label").to_numpy()
        start = stop
    return images.reshape(-1, *manifest.shape), labels


def read_some(
    storage: Storage, manifest: Manifest, split: str, rows: npt.NDArray[np.int64]
) -> tuple[Images, Labels]:
    """Return some rows of a split, given by their increasing places in shard order.

    Raises DataError if a shard is damaged.
    """
    images, labels, start = [], [], 0
    for shard in manifest.shards:
        if shard.split != split:
            continue
        first, last = np.searchsorted(rows, (start, start + shard.rows))
        if last > first:
            table = read_shard(storage, shard, ["image", "label"])
            there = rows[first:last] - start
            images.append(byte_rows(table.column("image"), int(np.prod(manifest.shape)))[there])
            labels.append(table.column("label").to_numpy()[there].astype(np.int64))
        start += shard.rows
    return np.concatenate(images).reshape(-1, *manifest.shape), np.concatenate(labels)


def check_data(storage: Storage, manifest: Manifest) -> int:
    """Read every shard and compare it with the manifest; return how many rows were checked.

    Raises DataError naming the first shard or split that is not what was recorded.
    """
    return sum(
        table.num_rows
        for split in manifest.split_digests
        for table in _checked_shards(storage, manifest, split)
    )


def read_shard(
    storage: Storage, shard: Shard, columns: list[str] | None = None, *, exact: bool = True
) -> pa.Table:
    """Return a shard's rows; raise DataError if its bytes are not those of the manifest.

    With `exact` that is told by the SHA-256 of the file, else by the checksums of its pages: that
    takes a third of the time and finds damage too, but not another file in the shard's place.
    """
    content = storage.read_buffer(shard.path)
    if exact and hashlib.sha256(content).hexdigest() != shard.sha256:
        raise _damaged(storage, shard, "its SHA-256 is not the manifest's")
    try:
        # Not `pq.read_table`, which plans a scan first: that takes half as long as the read itself.
        # No threads: readers of many shards have a thread for each.
        table = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=not exact).read(
            columns=columns, use_threads=False
        )
    except (OSError, pa.ArrowException) as error:
        raise _damaged(storage, shard, str(error)) from error
    if table.num_rows != shard.rows:
        raise DataError(f"{shard.path} has {table.num_rows} rows, the manifest says {shard.rows}")
    return table


def _damaged(storage: Storage, shard: Shard, why: str) -> DataError:
    return DataError(
        f"{shard.path} at {storage.uri} is damaged: {why}; "
        "delete it and run jobs.ingest again with the source"
    )


def _checked_shards(storage: Storage, manifest: Manifest, split: str) -> Iterator[pa.Table]:
    """Yield a split's shards; the last step compares the digest of all its rows."""
    ids, labels = [], []
    for shard in manifest.shards:
        if shard.split != split:
            continue
        table = read_shard(storage, shard)
        ids.append(byte_rows(table.column("row_id"), ROW_ID_BYTES))
        labels.append(table.column("label").to_numpy())
        yield table
    found = split_digest(np.concatenate(ids), np.concatenate(labels)) if ids else None
    if found != manifest.split_digests[split]:
        raise DataError(
            f"data set {manifest.digest[:12]} at {storage.uri}: the rows of {split} are not those "
            f"of its manifest; run jobs.ingest again with its source, {manifest.source}"
        )


def byte_rows(column: pa.ChunkedArray, width: int) -> Images:
    """Return a fixed-size binary column as rows of bytes."""
    # One chunk is the usual case of a shard: combining it would copy it.
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    start = values.offset * width
    content = np.frombuffer(values.buffers()[1], dtype=np.uint8)
    return content[start : start + len(values) * width].reshape(-1, width)
