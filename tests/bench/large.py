"""A set of millions of images: time, memory, and plain pyarrow on the same files.

python -m tests.bench large --rows 7000000
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil

from lib.data.ingest import ingest
from lib.data.manifest import SPLITS, Manifest
from lib.data.stream import EpochStream
from lib.storage import Storage
from tests.bench import large_files
from tests.bench.parts import local_ray
from tests.bench.report import BenchError, Options, Report, Table, figure, ratio, say

_SHARES = (0.25, 0.5, 1.0)
"""Of the rows: three sizes tell whether time grows with them."""
_BATCH = 128
_EVERY_S = 1.0
_READ_ROUNDS = 3
_MIB = 2**20


@dataclass(kw_only=True, slots=True)
class _Memory:
    """MiB that this process and all below it hold, each shared page once."""

    base: float = 0.0
    peak: float = 0.0

    @property
    def over_base(self) -> float:
        return self.peak - self.base


@dataclass(kw_only=True, slots=True)
class _Size:
    """What one size of the set gave."""

    rows: int
    ingest_s: float
    plain_ingest_s: float
    ingest_mib: float
    read_mib: float
    read: list[float] = field(default_factory=list)
    """Images/s of an epoch, by round."""
    plain_read: list[float] = field(default_factory=list)

    @property
    def ingest_ratio(self) -> float:
        return self.plain_ingest_s / self.ingest_s


def run(options: Options) -> Report:
    folder = options.temp / "large"
    say(f"large: writing {options.rows:,} images")
    large_files.make_source(folder / "source", options.rows)
    with local_ray(options.temp / "ray-l"):
        # Starts Ray's workers, which then belong to the base.
        _warm_up(folder)
        base = _held_mib()
        sizes = [_measure(folder, share, base) for share in _SHARES]
    return _report(options, sizes, base)


def _warm_up(folder: Path) -> None:
    few = large_files.subset(folder / "source", folder / "few", 200_000)
    ingest(Storage(str(folder / "warm")), str(few))
    shutil.rmtree(folder / "warm")
    shutil.rmtree(few)


def _measure(folder: Path, share: float, base: float) -> _Size:
    total = large_files.num_rows(folder / "source")
    source = large_files.subset(folder / "source", folder / "part", round(total * share))
    storage = Storage(str(folder / "storage"))
    plain_rows, plain_s = large_files.plain_ingest(source, folder / "plain")
    with _watched(base) as memory:
        start = perf_counter()
        manifest = ingest(storage, str(source))
        ingest_s = perf_counter() - start
    rows = sum(manifest.rows(split) for split in SPLITS)
    if rows != plain_rows:
        raise BenchError(f"rayline wrote {rows} images, plain pyarrow {plain_rows}")
    say(f"large: {rows:,} images ingested in {ingest_s:.0f} s, by plain pyarrow in {plain_s:.0f} s")
    found = _Size(
        rows=rows,
        ingest_s=ingest_s,
        plain_ingest_s=plain_s,
        ingest_mib=memory.over_base,
        read_mib=0.0,
    )
    gc.collect()
    with _watched(_held_mib()) as memory:
        for epoch in range(_READ_ROUNDS):
            found.read.append(_read(storage, manifest, epoch))
    found.read_mib = memory.over_base
    found.plain_read = [_plain_read(storage, manifest) for _ in range(_READ_ROUNDS)]
    say(f"large: an epoch at {statistics.median(found.read):,.0f} images/s")
    shutil.rmtree(folder / "storage")
    shutil.rmtree(source)
    return found


def _read(storage: Storage, manifest: Manifest, epoch: int) -> float:
    """Read one epoch of train as a trial does; return images/s."""
    stream = EpochStream(storage=storage, manifest=manifest, split="train", batch_size=_BATCH)
    counts = np.zeros(manifest.num_classes, dtype=np.int64)
    start = perf_counter()
    for batch in stream.epoch(epoch):
        counts += np.bincount(batch.labels_N, minlength=len(counts))
    taken_s = perf_counter() - start
    if counts.tolist() != list(manifest.counts["train"]):
        raise BenchError(f"an epoch had {counts.tolist()} images by class")
    return manifest.rows("train") / taken_s


def _plain_read(storage: Storage, manifest: Manifest) -> float:
    files = [storage.path(shard.path) for shard in manifest.shards if shard.split == "train"]
    start = perf_counter()
    rows = sum(len(labels) for _, labels in large_files.plain_read(files))
    return rows / (perf_counter() - start)


@contextlib.contextmanager
def _watched(base: float) -> Iterator[_Memory]:
    memory, stop = _Memory(base=base, peak=base), threading.Event()

    def watch() -> None:
        while not stop.wait(_EVERY_S):
            memory.peak = max(memory.peak, _held_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        memory.peak = max(memory.peak, _held_mib())
        stop.set()
        watcher.join()


def _held_mib() -> float:
    """Return the proportional set size of this process and all below it, in MiB."""
    here = psutil.Process()
    held = 0
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            held += process.memory_full_info().pss
    return held / _MIB


def _report(options: Options, sizes: list[_Size], base: float) -> Report:
    first, last = sizes[0], sizes[-1]
    exponent = math.log(last.ingest_s / first.ingest_s) / math.log(last.rows / first.rows)
    rows = [
        (
            f"{size.rows:,}",
            figure(size.ingest_s, 1),
            figure(size.rows / size.ingest_s),
            f"{size.ingest_ratio:.2f}×",
            figure(size.ingest_mib),
            figure(statistics.median(size.read)),
            ratio(size.read, size.plain_read),
            figure(size.read_mib),
        )
        for size in sizes
    ]
    columns = ("images", "ingest s", "images/s", "÷ pyarrow", "MiB over base")
    return Report(
        title="A large set",
        tables=[
            Table(
                title="Ingest of 28×28 Parquet files, then epochs of its train split",
                columns=(*columns, "epoch images/s", "÷ pyarrow", "MiB over base"),
                rows=rows,
            )
        ],
        notes=[
            f"Time of an ingest grows with the {exponent:.2f}th power of its rows.",
            f"Memory is the proportional set size of this process, Ray and its workers; before "
            f"the first ingest {base:,.0f} MiB.",
            "Plain pyarrow reads and writes the same files in shards of the same size with all "
            "its threads, without checks, ids, digests, split or statistics; reading, it neither "
            "checks nor shuffles.",
        ],
        data={
            "exponent": exponent,
            "base_mib": base,
            "sizes": [
                {name: getattr(size, name) for name in _Size.__dataclass_fields__} for size in sizes
            ],
        },
    )
