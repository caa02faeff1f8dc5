"""Ingest: the bundled MNIST into a fresh storage root, against plain pyarrow."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.ingest import ingest
from lib.data.manifest import SPLITS
from lib.data.shards import chunk_rows
from lib.storage import Storage
from tests.bench.parts import ROOT, local_ray
from tests.bench.report import BenchError, Options, Report, Table, ratio, say, spread, turns

_MNIST = ROOT / "lib" / "data" / "mnist"
_MIN_ROUNDS = 5
"""One takes a second or two: more rounds than elsewhere cost nothing."""


def run(options: Options) -> Report:
    rounds = max(options.rounds, _MIN_ROUNDS)
    with local_ray(options.temp / "ray-i") as startup_s:
        say(f"ingest: Ray is up after {startup_s:.1f} s; {rounds} rounds of both")
        num_images, first_s = _rayline(options.temp)
        _plain(options.temp)
        seconds: dict[str, list[float]] = {"rayline": [], "pyarrow": []}
        for turn, name in turns(list(seconds), rounds):
            rows, taken_s = (_rayline if name == "rayline" else _plain)(options.temp)
            if rows != num_images:
                raise BenchError(f"{name} wrote {rows} images, rayline wrote {num_images} before")
            seconds[name].append(taken_s)
            say(f"ingest: round {turn + 1}: {name} {rows / taken_s:,.0f} images/s")
    speed = {name: [num_images / s for s in taken] for name, taken in seconds.items()}
    table = Table(
        title=f"{num_images:,} images of MNIST to Parquet (n = {rounds})",
        columns=("", "images/s: median (min–max)", "seconds", "rayline ÷ this"),
        rows=[
            (
                label,
                spread(speed[name]),
                f"{statistics.median(seconds[name]):.2f}",
                ratio(speed["rayline"], speed[name]),
            )
            for name, label in (
                ("rayline", "rayline ingest (Ray Data, 2 CPUs)"),
                ("pyarrow", "plain pyarrow, one process"),
            )
        ],
    )
    return Report(
        title="Ingest",
        tables=[table],
        notes=[
            f"Not in the table: start of Ray {startup_s:.1f} s; the first ingest after it, which "
            f"also starts Ray's workers, {first_s:.1f} s.",
            "Both unpack and parse IDX, write zstd level 1 Parquet in shards of "
            f"{chunk_rows((28, 28, 1)):,} rows, and hash each shard. Rayline also validates, gives "
            "every row an id, looks for duplicates between train and test, splits off validation, "
            "computes pixel statistics, syncs every file to disk and publishes a manifest.",
        ],
        data={
            "num_images": num_images,
            "startup_s": startup_s,
            "first_s": first_s,
            "seconds": seconds,
        },
    )


def _rayline(temp: Path) -> tuple[int, float]:
    folder = temp / "ingest"
    started = time.perf_counter()
    manifest = ingest(Storage(str(folder)), "mnist")
    taken_s = time.perf_counter() - started
    shutil.rmtree(folder)
    return sum(manifest.rows(split) for split in SPLITS), taken_s


def _plain(temp: Path) -> tuple[int, float]:
    folder = temp / "plain"
    started = time.perf_counter()
    folder.mkdir()
    rows = sum(_plain_split(folder, prefix) for prefix in ("train", "t10k"))
    taken_s = time.perf_counter() - started
    written = sum(pq.read_metadata(file).num_rows for file in folder.iterdir())
    shutil.rmtree(folder)
    if written != rows:
        raise BenchError(f"plain pyarrow wrote {written} of {rows} rows")
    return rows, taken_s


def _plain_split(folder: Path, prefix: str) -> int:
    """Do what a short script would: one split of IDX files to hashed Parquet files."""
    content = gzip.decompress((_MNIST / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    rows, height, width = np.frombuffer(content, ">u4", count=3, offset=4).tolist()
    images = np.frombuffer(content, np.uint8, offset=16).reshape(rows, height * width)
    content = gzip.decompress((_MNIST / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    labels = np.frombuffer(content, np.uint8, offset=8).astype(np.int32)
    step = chunk_rows((height, width, 1))
    for start in range(0, rows, step):
        pixels = images[start : start + step]
        buffer = pa.py_buffer(np.ascontiguousarray(pixels))
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(height * width), len(pixels), [None, buffer]
        )
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.table({"image": column, "label": labels[start : start + step]}),
            sink,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=False,
        )
        shard = sink.getvalue()
        name = hashlib.sha256(shard).hexdigest()[:32]
        (folder / f"{name}.parquet").write_bytes(shard)
    return rows
