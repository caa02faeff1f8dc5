"""From a data set's shards to arrays, through Ray Data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from lib.data.checks import ROW_ID_BYTES
from lib.data.execution import quiet_ray_data
from lib.data.manifest import Manifest, Shard
from lib.data.shards import split_digest
from lib.errors import DataError, StorageError
from lib.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split in memory."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]


def read_splits(storage: Storage, manifest: Manifest, splits: Sequence[str]) -> dict[str, Split]:
    """Read splits into memory, rows in shard order. Ray must be initialised.

    Raises DataError if a shard is missing or damaged, or the rows are not those of the manifest.
    """
    shards = [shard for split in splits for shard in _shards(manifest, split)]
    sizes = [manifest.rows(split) for split in splits]
    total = sum(sizes)
    if sum(shard.rows for shard in shards) != total:
        raise _damaged(storage, manifest, f"its manifest counts {total} rows, its shards others")
    images = np.empty((total, int(np.prod(manifest.shape))), dtype=np.uint8)
    labels = np.empty(total, dtype=np.int64)
    ids = np.empty((total, ROW_ID_BYTES), dtype=np.uint8)
    row = 0
    for block in _blocks(storage, manifest, shards):
        stop = row + block.num_rows
        for name, out in (("image", images), ("row_id", ids)):
            _copy_rows(block.column(name), out[row:stop])
        labels[row:stop] = block.column("label").to_numpy()
        row = stop
    result = {}
    starts = np.cumsum([0, *sizes])
    for split, start, stop in zip(splits, starts, starts[1:], strict=False):
        if split_digest(ids[start:stop], labels[start:stop]) != manifest.split_digests[split]:
            raise _damaged(storage, manifest, f"the rows of {split} are not those of its manifest")
        result[split] = Split(
            images_NHWC=images[start:stop].reshape(-1, *manifest.shape),
            labels_N=labels[start:stop],
        )
    return result


def open_shards(storage: Storage, shards: Sequence[Shard]) -> ray.data.Dataset:
    """Return shards as a data set with the columns image, label, row_id, in this order.

    Not `ray.data.read_parquet`: its planning alone takes ten times as long as this read of a
    small set, and it doesn't see a changed pixel. A block with the one column `error` stands for
    a shard that can't be read.
    """
    quiet_ray_data()
    items = [{"path": shard.path, "rows": shard.rows, "sha256": shard.sha256} for shard in shards]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardReader(storage),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        # Reading is short and mostly input: asking for a whole CPU, it would wait for ever where
        # replicas reserve a part of each.
        num_cpus=0,
        # Without a bound Ray starts a process a shard, which costs seconds each.
        concurrency=max(1, min(len(items), int(ray.cluster_resources().get("CPU", 1)))),
    )
    dataset.context.execution_options.preserve_order = True
    return dataset


class ShardReader:
    """The Ray Data callable: names of shards in, their rows out, checked against their digest."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Read the shards of a batch."""
        try:
            return pa.concat_tables([self._read(**shard) for shard in batch.to_pylist()])
        except (DataError, StorageError) as error:
            return pa.table({"error": [str(error)]})

    def _read(self, path: str, rows: int, sha256: str) -> pa.Table:
        content = self._storage.read_buffer(path)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path} is damaged: its SHA-256 is not the manifest's")
        table = pq.read_table(pa.BufferReader(content))
        if table.num_rows != rows:
            raise DataError(f"{path} has {table.num_rows} rows, the manifest says {rows}")
        return table.replace_schema_metadata(None)


def check_shards(storage: Storage, manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise DataError naming the first shard that is missing or of another size."""
    infos = storage.infos([shard.path for shard in shards])
    for shard, info in zip(shards, infos, strict=True):
        if not info.is_file:
            raise _damaged(storage, manifest, f"{shard.path} is missing")
        if info.size != shard.size_bytes:
            raise _damaged(
                storage,
                manifest,
                f"{shard.path} has {info.size} bytes instead of {shard.size_bytes}",
            )


def _blocks(storage: Storage, manifest: Manifest, shards: Sequence[Shard]) -> Iterator[pa.Table]:
    check_shards(storage, manifest, shards)
    dataset = open_shards(storage, shards)
    batches: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for block in batches:
        if "error" in block.column_names:
            raise _damaged(storage, manifest, block.column("error")[0].as_py())
        yield block


def _shards(manifest: Manifest, split: str) -> list[Shard]:
    found = [shard for shard in manifest.shards if shard.split == split]
    if not found:
        raise DataError(
            f"data set {manifest.digest[:12]} has no split {split!r}; "
            f"it has {', '.join(manifest.counts)}"
        )
    return found


def _copy_rows(column: pa.ChunkedArray, out: npt.NDArray[np.uint8]) -> None:
    """Copy a fixed-size binary column into rows of bytes: the only copy there is."""
    row, width = 0, out.shape[1]
    for chunk in column.chunks:
        if chunk.type.byte_width != width:
            raise pa.ArrowInvalid(f"rows of {chunk.type.byte_width} bytes instead of {width}")
        values = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
        start = chunk.offset * width
        out[row : row + len(chunk)] = values[start : start + len(chunk) * width].reshape(-1, width)
        row += len(chunk)


def _damaged(storage: Storage, manifest: Manifest, what: str) -> DataError:
    return DataError(
        f"data set {manifest.digest[:12]} at {storage.uri}: {what}; delete the damaged file if "
        f"there is one and run jobs.ingest again with its source, {manifest.source}"
    )
