"""Ingest: a source becomes Parquet shards and, last, a manifest.

The source is read once. A first pass hashes every row and stages what it had to decode. Then it is
settled where each row goes, and a second pass writes the rows, those of train shuffled.

Shards are named by content and the manifest is published in one step. So an ingest that is
interrupted leaves nothing but shards that the next one uses, and a reader sees a whole data set
or none.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from lib.cli import progress
from lib.data.assemble import (
    Assigned,
    IngestConfig,
    RowOrder,
    assign,
    build_manifest,
    check_classes,
    check_leaks,
)
from lib.data.checks import ROW_ID_BYTES, RowIds
from lib.data.execution import quiet_ray_data
from lib.data.manifest import FORMAT_VERSION, SPLITS, Ignored, Manifest, manifest_path
from lib.data.parquet_source import ParquetSource
from lib.data.readers import Shape
from lib.data.shards import (
    Chunk,
    ChunkResult,
    ChunkScanner,
    Scanned,
    ShardWriter,
    Unread,
    chunk_ranges,
    chunk_rows,
    num_tasks,
    shuffled_slices,
)
from lib.data.sources import Opened, Source, find_source
from lib.data.staging import Staging, check_free_space
from lib.errors import ConfigError, RaylineError
from lib.storage import Storage

__all__ = ["IngestConfig", "Ingested", "ingest", "ingest_source", "missing_shards"]

_READ_VERSION = 2
"""Raised when sources are read differently, so that they are read again."""
_BEST_COMPRESSION = 20
"""Free space is asked for as if images shrank so much: a disk that surely is too small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """A data set and what it took."""

    manifest: Manifest
    reused: bool
    """Whether it was there already."""
    ignored: tuple[Ignored, ...]
    """What lies in the source and is not used, also where the data set was there already."""
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Images of all splits per second."""
        return sum(self.manifest.rows(split) for split in SPLITS) / self.seconds


def ingest(
    storage: Storage, source_spec: str, *, seed: int = 0, val_fraction: float = 0.1
) -> Manifest:
    """Ingest `mnist`, a folder or `torchvision:NAME`; return the manifest of the data set."""
    config = IngestConfig(seed=seed, val_fraction=val_fraction)
    return ingest_source(storage, source_spec, config).manifest


def ingest_source(
    storage: Storage, source_spec: str, config: IngestConfig, *, cache_dir: Path | None = None
) -> Ingested:
    """Ingest a source, or find that it was ingested already. Ray must be initialised.

    Raises DataError naming file and row if a check fails, StorageError if the disk is full.
    """
    started_s = time.monotonic()
    source = find_source(source_spec, cache_dir=cache_dir)
    if config.group is not None:
        if not isinstance(source, ParquetSource):
            raise ConfigError(
                f"source {source_spec!r} has no columns, so none called {config.group!r}: rows can "
                "be grouped in Parquet files only; write the groups into a column of some, or lay "
                "the pictures out in train, val and test folders yourself"
            )
        source = replace(source, group=config.group)
    for ignored in source.ignored:
        progress("ingest", f"ignored: {ignored.count} ({ignored.example}): {ignored.reason}")
    key_path = f"data/sources/{_source_key(source, config)}.json"
    known = _known(storage, key_path)
    if known is not None:
        progress("ingest", f"data set {known.digest[:12]} is there already, made of {known.source}")
        return Ingested(
            manifest=known,
            reused=True,
            ignored=source.ignored,
            seconds=time.monotonic() - started_s,
        )
    progress("ingest", f"reading {source.name} ({len(source.digests)} files or folders hashed)")
    with Staging(storage) as staging:
        opened = source.open(staging)
        if opened.grey_range:
            low, high = opened.grey_range
            progress("ingest", f"16-bit pictures: their values {low}–{high} become 0–255")
        check_classes(opened, config)
        num_bytes = int(np.prod(opened.shape)) * sum(rows.labels.size for rows in opened.splits)
        check_free_space(storage, num_bytes // _BEST_COMPRESSION)
        scanned, ids = _scan(staging, opened)
        assigned = assign(opened, ids, config)
        check_leaks(assigned, ids, config)
        chunks, order = _chunks(opened, assigned, scanned)
        results = _write(storage, chunks, opened.shape)
    built = build_manifest(source, opened, assigned, results, ids, order, config)
    manifest, reused = _publish(storage, built)
    storage.write_json(key_path, {"digest": manifest.digest})
    verb = "is there already" if reused else "published"
    progress("ingest", f"data set {manifest.digest[:12]} {verb}")
    return Ingested(
        manifest=manifest,
        reused=reused,
        ignored=source.ignored,
        seconds=time.monotonic() - started_s,
    )


def _source_key(source: Source, config: IngestConfig) -> str:
    content = {
        "digests": dict(source.digests),
        "config": asdict(config),
        "format_version": FORMAT_VERSION,
        "read_version": _READ_VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _known(storage: Storage, key_path: str) -> Manifest | None:
    if not storage.exists(key_path):
        return None
    path = manifest_path(storage.read_json(key_path)["digest"])
    if not storage.exists(path):
        return None
    manifest = Manifest.from_json(storage.read_json(path))
    return manifest if not missing_shards(storage, manifest) else None


def missing_shards(storage: Storage, manifest: Manifest) -> list[str]:
    """Return the shards that are not there, or not of their size."""
    infos = storage.infos([shard.path for shard in manifest.shards])
    return [
        shard.path
        for shard, info in zip(manifest.shards, infos, strict=True)
        if not info.is_file or info.size != shard.size_bytes
    ]


def _scan(staging: Staging, opened: Opened) -> tuple[list[Scanned], RowIds]:
    """Read every row once; return where it is to be read again, and all row ids in one array."""
    step = chunk_rows(opened.shape)
    unread = [
        Unread(index=index, shape=opened.shape, reader=rows.reader.part(start, stop))
        for index, (rows, (start, stop)) in enumerate(
            (rows, ends)
            for rows in opened.splits
            for ends in chunk_ranges(rows.labels.size, step, rows.ends)
        )
    ]
    num_rows = sum(rows.labels.size for rows in opened.splits)
    ids = np.empty((num_rows, ROW_ID_BYTES), dtype=np.uint8)
    scanned: dict[int, Scanned] = {}
    done_rows = 0
    for result in _run(unread, ChunkScanner(staging), opened.shape):
        scanned[result.index] = result
        done_rows += len(result.row_ids)
        progress("ingest", f"{done_rows:,} of {num_rows:,} images read")
    start = 0
    for index in range(len(unread)):
        found = scanned[index].row_ids
        # Held once only: with many rows they are most of what this process holds.
        ids[start : start + len(found)] = found
        start += len(found)
        scanned[index] = replace(scanned[index], row_ids=ids[start - len(found) : start])
    return [scanned[index] for index in range(len(unread))], ids


def _chunks(
    opened: Opened, assigned: Sequence[Assigned], scanned: Sequence[Scanned]
) -> tuple[list[Chunk], RowOrder]:
    """Return what is written, and the order of all rows in it, counted through the splits."""
    starts = np.cumsum([0] + [len(part.row_ids) for part in scanned])
    labels = np.concatenate([part.rows.labels for part in assigned])
    targets = np.concatenate([part.targets for part in assigned])
    chunks: list[Chunk] = []
    order, first, row = [], 0, 0
    for part in assigned:
        row += part.targets.size
        last = int(np.searchsorted(starts, row))
        sizes = [len(found.row_ids) for found in scanned[first:last]]
        # Only training is by shard: the others stay in the order that earlier data sets have.
        slices = (
            shuffled_slices(sizes, opened.shape)
            if part.rows.split == "train"
            else [[(index, 0, size)] for index, size in enumerate(sizes)]
        )
        for pieces in slices:
            rows = np.concatenate(
                [np.arange(a, b) + starts[first + index] for index, a, b in pieces]
            )
            chunk = Chunk(
                index=len(chunks),
                shape=opened.shape,
                labels=labels[rows],
                targets=targets[rows],
                row_ids=np.concatenate([scanned[first + i].row_ids[a:b] for i, a, b in pieces]),
                readers=tuple(scanned[first + i].pixels.part(a, b) for i, a, b in pieces),
            )
            chunks.append(chunk)
            order.append(rows)
        first = last
    return chunks, np.concatenate(order)


def _write(storage: Storage, chunks: Sequence[Chunk], shape: Shape) -> list[ChunkResult]:
    """Write the shards; return the results of the chunks in order."""
    num_rows = sum(chunk.labels.size for chunk in chunks)
    results: dict[int, ChunkResult] = {}
    done_rows = 0
    for result in _run(chunks, ShardWriter(storage), shape):
        results[result.index] = result
        done_rows += result.num_rows
        progress(
            "ingest",
            f"{done_rows:,} of {num_rows:,} images, {len(results)} of {len(chunks)} chunks",
        )
    return [results[index] for index in range(len(chunks))]


def _run(items: Sequence[Any], callable_: Any, shape: Shape) -> Iterator[Any]:
    """Run the items of a pass through Ray Data; raise the first error that a task met."""
    quiet_ray_data()
    chunk_bytes = chunk_rows(shape) * int(np.prod(shape))
    tasks = num_tasks(len(items), chunk_bytes, ray.cluster_resources().get("CPU", 0))
    # As bytes: Arrow has no column type for objects.
    dataset = ray.data.from_items(
        [{"item": pickle.dumps(item)} for item in items], override_num_blocks=tasks
    )
    # A batch is all of a task.
    results = dataset.map_batches(callable_, batch_size=None, batch_format="pyarrow")
    for row in results.iter_rows():
        result = pickle.loads(row["item"])
        if isinstance(result, RaylineError):
            raise result
        yield result


def _publish(storage: Storage, built: Manifest) -> tuple[Manifest, bool]:
    """Publish, unless this content is there: then return what is there, repaired if needed."""
    path = manifest_path(built.digest)
    if storage.create_json(path, built.to_json()):
        return built, False
    existing = Manifest.from_json(storage.read_json(path))
    if not missing_shards(storage, existing):
        return existing, True
    storage.write_json(path, built.to_json())
    return built, False
