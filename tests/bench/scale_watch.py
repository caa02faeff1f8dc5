"""What the prediction log, the monitor, manifests and the leaderboard cost as they fill."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from lib.data.manifest import Manifest, Preprocess, Shard, load_manifest, manifest_path
from lib.registry.gaps import Scores, judge_all
from lib.registry.leaderboard import Entry, ranked
from lib.storage import Storage
from lib.watch import predictions, view
from lib.watch.rows import QUALITY_COLUMNS, quality_rows
from lib.watch.segments import Segments, by_span
from tests.bench.scale_cost import MS, Cost, seconds

ROWS = (2_000, 20_000, 200_000)
WRITERS = (1, 10, 100)
SHARDS = (10, 100, 1_000)
VERSIONS = (10, 100, 1_000)
_MODEL, _CLASSES = "digits", 10
_HOUR_US = 3600 * 10**6
_START_US = 1_700_000_100 * 10**6


def costs(folder: Path) -> list[Cost]:
    """Measure what grows with logged rows, gateways, shards and versions."""
    return [*_log(folder), _writers(folder), *_registry(folder)]


def _rows(num: int, seed: int = 0) -> pa.Table:
    """Return an hour of answers of two versions, images left out."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(_CLASSES, 0.2), num).astype(np.float32)
    columns = {
        "time_us": _START_US + np.sort(rng.integers(0, _HOUR_US, num)),
        "request_id": [f"r{seed}-{n}" for n in range(num)],
        "index": np.zeros(num, np.int32),
        "version": rng.integers(1, 3, num).astype(np.int32),
        "shadow": np.zeros(num, bool),
        "caller": [""] * num,
        "latency_ms": np.ones(num, np.float32),
        "predicted": probabilities.argmax(axis=1).astype(np.int32),
        "probabilities": list(probabilities),
        "status": np.full(num, 200, np.int32),
        "image": pa.nulls(num, pa.binary()),
        "features": pa.nulls(num, pa.list_(pa.float32())),
    }
    return pa.table(columns, schema=predictions.SCHEMA)


def _write(storage: Storage, rows: pa.Table) -> float:
    """Write rows as a gateway does, in flushes; return the seconds."""
    segments = Segments(
        storage, predictions.predictions_root(_MODEL), max_rows=4096, dictionary=["version"]
    )
    start_s = time.perf_counter()
    for span in by_span(rows):
        for first in range(0, span.num_rows, 1024):
            segments.append(span.slice(first, 1024))
    return time.perf_counter() - start_s


def _look(storage: Storage) -> None:
    """Look at the quality of an hour, as the monitor does."""
    end_us = _START_US + _HOUR_US
    rows = quality_rows(
        predictions.joined(
            storage, _MODEL, start_us=_START_US, end_us=end_us, columns=QUALITY_COLUMNS
        )
    )
    view.quality_view(rows, _CLASSES)
    view.history_view(rows, _CLASSES, [], start_us=_START_US, end_us=end_us)


def _log(folder: Path) -> list[Cost]:
    written_us, look_ms, files, kb = [], [], [], []
    for num in ROWS:
        storage = Storage(str(folder / f"rows-{num}"))
        written_us.append(1e6 * _write(storage, _rows(num)) / num)
        paths = storage.list(predictions.predictions_root(_MODEL), recursive=True)
        files.append(float(len(paths)))
        kb.append(sum(Path(storage.path(path)).stat().st_size for path in paths) / num)
        look_ms.append(MS * seconds(lambda s=storage: _look(s), rounds=3))
    return [
        Cost(what="writing a row of the log, without images", by="rows an hour", unit="µs",
             sizes=ROWS, values=written_us, bound=200),
        Cost(what="files of the log", by="rows an hour", unit="files an hour", sizes=ROWS,
             values=files, bound=10_000),
        Cost(what="a row of the log, without images", by="rows an hour", unit="bytes", sizes=ROWS,
             values=kb, bound=500),
        Cost(what="a look of the monitor at an hour", by="rows an hour", unit="ms", sizes=ROWS,
             values=look_ms, bound=30_000,
             then="a shorter lookback of the monitor, or a look at a sample of the rows"),
    ]  # fmt: skip


def _writers(folder: Path) -> Cost:
    values = []
    for num in WRITERS:
        storage = Storage(str(folder / f"writers-{num}"))
        for writer in range(num):
            _write(storage, _rows(240, seed=writer))
        values.append(MS * seconds(lambda s=storage: _look(s), rounds=3))
    return Cost(what="a look of the monitor, 240 rows of each", by="gateways", unit="ms",
                sizes=WRITERS, values=values, bound=30_000,
                then="twelve files an hour of each gateway: on an object store read more of them "
                "at once (`READERS`)")  # fmt: skip


def _registry(folder: Path) -> list[Cost]:
    storage = Storage(str(folder / "sets"))
    manifest_ms = []
    for num in SHARDS:
        manifest = _manifest(num)
        storage.write_json(manifest_path(manifest.digest), manifest.to_json())
        digest = manifest.digest
        manifest_ms.append(MS * seconds(lambda d=digest: load_manifest(storage, d), repeat=3))
    ranked_ms, judged_ms = [], []
    for num in VERSIONS:
        rng = np.random.default_rng(0)
        accuracies = 0.9 + 0.1 * rng.random((num, 2))
        entries = [
            Entry(version=n + 1, run_id=f"{n:032x}", val_accuracy=float(val),
                  test_accuracy=float(test), data_digest="d" * 32, git_commit=None,
                  git_dirty=False, created_ms=n)
            for n, (val, test) in enumerate(accuracies)
        ]  # fmt: skip
        scores = {
            n + 1: Scores(val_accuracy=float(val), test_accuracy=float(test))
            for n, (val, test) in enumerate(accuracies)
        }
        ranked_ms.append(MS * seconds(lambda e=entries: ranked(e), repeat=3))
        judged_ms.append(
            MS * seconds(lambda s=scores: judge_all(s, val_rows=6_000, test_rows=10_000), rounds=1)
        )
    return [
        Cost(what="reading a manifest", by="shards", unit="ms", sizes=SHARDS, values=manifest_ms,
             bound=1_000, then="larger shards"),
        Cost(what="ranking the leaderboard", by="versions", unit="ms", sizes=VERSIONS,
             values=ranked_ms, bound=1_000),
        Cost(what="judging all versions' gaps", by="versions", unit="ms", sizes=VERSIONS,
             values=judged_ms, bound=5_000,
             then="each version is compared with all before: `jobs.models gc` removes those that "
             "nothing refers to"),
    ]  # fmt: skip


def _manifest(num_shards: int) -> Manifest:
    return Manifest(
        digest=f"{num_shards:032x}", source="bench", source_digests={}, height=28, width=28,
        channels=1, class_names=tuple("0123456789"),
        counts={"train": (100,) * 10, "val": (10,) * 10, "test": (10,) * 10},
        split_digests={}, pixel_mean=(0.1,), pixel_std=(0.3,),
        preprocess=Preprocess(mode="L", fill=(0,)),
        shards=tuple(
            Shard(split="train", path=f"data/shards/{n:064x}.parquet", rows=1000,
                  sha256=f"{n:064x}", size_bytes=10**6)
            for n in range(num_shards)
        ),
        seed=0,
    )  # fmt: skip
