"""The files of a large set of 28×28 images, and what plain pyarrow does with them."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from lib.data.shards import chunk_rows
from tests.bench.parts import ROOT

_MNIST = ROOT / "lib" / "data" / "mnist"
FILE_ROWS = 100_000
"""Rows of one source file."""
_SHIFTS = 11
_PARQUET = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "write_statistics": False,
}


def make_source(folder: Path, rows: int, *, num_processes: int = 2) -> None:
    """Write train and test files (one in seven) of shifted MNIST digits, no two alike."""
    num_test = rows // 7
    jobs = []
    for split, split_rows in (("train", rows - num_test), ("test", num_test)):
        (folder / split).mkdir(parents=True)
        jobs += [
            (
                folder / split / f"{start // FILE_ROWS:04d}.parquet",
                split,
                start,
                min(FILE_ROWS, split_rows - start),
            )
            for start in range(0, split_rows, FILE_ROWS)
        ]
    # Spawned: Ray's threads in this process do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        pool.starmap(_write_file, jobs, chunksize=1)


def _write_file(path: Path, split: str, start: int, rows: int) -> None:
    """Write rows `start` … of all shifts of all digits; a shift of −5 … 5 pixels each way."""
    pa.set_cpu_count(1)
    images, labels = _digits({"train": "train", "test": "t10k"}[split])
    numbers = np.arange(start, start + rows)
    # Ten thousand digits have 1.2 million shifts, sixty thousand have 7.3 million.
    digit, shift = numbers % len(labels), numbers // len(labels)
    if shift.max(initial=0) >= _SHIFTS**2:
        raise ValueError(f"row {start + rows}: more rows than shifts of {split}")
    pixels = np.empty((rows, 28, 28), dtype=np.uint8)
    for value in np.unique(shift):
        chosen = shift == value
        by = (int(value) // _SHIFTS - 5, int(value) % _SHIFTS - 5)
        pixels[chosen] = np.roll(images[digit[chosen]], by, axis=(1, 2))
    _write(path, pixels.reshape(rows, -1), labels[digit])


def _digits(prefix: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    content = gzip.decompress((_MNIST / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28)
    content = gzip.decompress((_MNIST / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    return images, np.frombuffer(content, np.uint8, offset=8).astype(np.int32)


def _write(path: Path, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int32]) -> None:
    image = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(784), len(pixels), [None, pa.py_buffer(pixels)]
    )
    table = pa.table({"image": image, "label": labels})
    pq.write_table(table, path, row_group_size=chunk_rows((28, 28, 1)), **_PARQUET)


def num_rows(folder: Path) -> int:
    """Return the rows of all Parquet files below a folder."""
    return sum(pq.read_metadata(file).num_rows for file in folder.rglob("*.parquet"))


def subset(source: Path, folder: Path, wanted_rows: int) -> Path:
    """Link the first files of each split, about `wanted_rows` in all; return the folder."""
    share = wanted_rows / num_rows(source)
    for split in ("train", "test"):
        files = sorted((source / split).iterdir())
        (folder / split).mkdir(parents=True)
        for file in files[: max(1, round(len(files) * share))]:
            os.link(file, folder / split / file.name)
    return folder


def plain_ingest(source: Path, folder: Path) -> tuple[int, float]:
    """Let pyarrow alone, with its own threads, write the source as shards and sync them."""
    started = time.perf_counter()
    step = chunk_rows((28, 28, 1))
    for split in ("train", "test"):
        pads.write_dataset(
            pads.dataset(source / split),
            folder / split,
            format="parquet",
            file_options=pads.ParquetFileFormat().make_write_options(**_PARQUET),
            max_rows_per_file=step,
            max_rows_per_group=step,
            min_rows_per_group=step,
        )
    for file in folder.rglob("*.parquet"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    taken_s = time.perf_counter() - started
    rows = num_rows(folder)
    shutil.rmtree(folder)
    return rows, taken_s


def plain_read(files: list[str]) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Yield images and labels of Parquet files in their order, as pyarrow's scanner reads them."""
    scanner = pads.dataset(files).scanner(
        columns=["image", "label"], batch_size=chunk_rows((28, 28, 1))
    )
    for batch in scanner.to_batches():
        pixels = np.frombuffer(batch.column(0).buffers()[1], dtype=np.uint8)
        start = batch.column(0).offset * 784
        images = pixels[start : start + batch.num_rows * 784].reshape(-1, 784)
        yield images, batch.column(1).to_numpy()
