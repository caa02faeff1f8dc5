"""Ingest: a source becomes Parquet shards and, last, a manifest.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import ray
import ray.data

from lib.cli import progress
from lib.data.assemble import (
    Assigned,
    IngestConfig,
    assign,
    build_manifest,
    check_leaks,
)
from lib.data.checks import ROW_ID_BYTES, RowIds
from lib.data.execution import quiet_ray_data
from lib.data.manifest import FORMAT_VERSION, SPLITS, Ignored, Manifest, manifest_path
from lib.data.shards import Chunk, ChunkResult, ShardWriter, chunk_ranges, chunk_rows, num_tasks
from lib.data.sources import Opened, Source, find_source
from lib.data.staging import Staging, check_free_space
from lib.errors import RaylineError
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
        assigned = assign(opened, config)
        results, ids = _process(storage, _chunks(opened, assigned))
    with ThreadPoolExecutor(1) as beside:
        # Both are NumPy's and a hash's work for millions of rows, which leave Python's lock alone.
        building = beside.submit(build_manifest, source, opened, assigned, results, ids, config)
        check_leaks(assigned, ids, config)
        built = building.result()
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


def _chunks(opened: Opened, assigned: Sequence[Assigned]) -> list[Chunk]:
    step = chunk_rows(opened.shape)
    ranges = [
        (part, start, stop)
        for part in assigned
        for start, stop in chunk_ranges(part.targets.size, step, part.rows.ends)
    ]
    return [
        Chunk(
            index=index,
            shape=opened.shape,
            labels=part.rows.labels[start:stop],
            targets=part.targets[start:stop],
            reader=part.rows.reader.part(start, stop),
        )
        for index, (part, start, stop) in enumerate(ranges)
    ]


def _process(storage: Storage, chunks: Sequence[Chunk]) -> tuple[list[ChunkResult], RowIds]:
    """Run the chunks through Ray Data; raise the first error that a task met.

    Returns their results in order, and the ids of all rows in one array.
    """
    num_rows = sum(chunk.labels.size for chunk in chunks)
    check_free_space(storage, num_rows * int(np.prod(chunks[0].shape)) // _BEST_COMPRESSION)
    starts = np.cumsum([0] + [chunk.labels.size for chunk in chunks])
    ids = np.empty((num_rows, ROW_ID_BYTES), dtype=np.uint8)
    results: dict[int, ChunkResult] = {}
    done_rows = 0
    for result in _run(storage, chunks):
        if isinstance(result, RaylineError):
            raise result
        start = starts[result.index]
        ids[start : start + len(result.row_ids)] = result.row_ids
        done_rows += len(result.row_ids)
        # Held once only: with many rows they are most of what this process holds.
        results[result.index] = replace(result, row_ids=ids[:0])
        progress(
            "ingest",
            f"{done_rows:,} of {num_rows:,} images, {len(results)} of {len(chunks)} chunks",
        )
    return [results[index] for index in range(len(chunks))], ids


def _run(storage: Storage, chunks: Sequence[Chunk]) -> Iterator[ChunkResult | RaylineError]:
    quiet_ray_data()
    # As bytes: Arrow has no column type for objects.
    items = [{"item": pickle.dumps(chunk)} for chunk in chunks]
    shape = chunks[0].shape
    chunk_bytes = chunk_rows(shape) * int(np.prod(shape))
    tasks = num_tasks(len(items), chunk_bytes, ray.cluster_resources().get("CPU", 0))
    dataset = ray.data.from_items(items, override_num_blocks=tasks)
    write = ShardWriter(storage)
    # A batch is all of a task.
    results = dataset.map_batches(write, batch_size=None, batch_format="pyarrow")
    for row in results.iter_rows():
        yield pickle.loads(row["item"])


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
