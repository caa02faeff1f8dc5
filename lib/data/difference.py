"""What rows came and went between two data sets, told by their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.checks import ROW_ID_BYTES
from lib.data.manifest import LIVE, SPLITS, Manifest
from lib.data.readers import Images
from lib.storage import Storage

_ALL = (*SPLITS, LIVE)
"""A set that was extended has rows in all of them."""
_KEY = np.dtype([("head", ">u8"), ("tail", ">u8")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """All rows of a data set but their pixels; the same pixels twice are one row."""

    keys: npt.NDArray[Any]
    """(N,) ids of the pixels, sorted."""
    splits: npt.NDArray[np.uint8]
    """(N,) index into all splits, the held-out live requests last."""
    labels: npt.NDArray[np.int64]
    shards: npt.NDArray[np.int64]
    """(N,) index into the manifest's shards."""
    rows: npt.NDArray[np.int64]
    """(N,) row of the shard."""
    num_rows: int
    """With doubles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """From data set `a` to data set `b`."""

    content: dict[str, Any]
    """As JSON: what came, went, moved to another split, and got another label, by class."""
    came: npt.NDArray[np.int64]
    """Rows of `b` that `a` has not, as indices into its `Rows`."""
    went: npt.NDArray[np.int64]
    """Rows of `a` that `b` has not."""


def read_rows(storage: Storage, manifest: Manifest) -> Rows:
    """Read ids and labels of all splits; pixels stay where they are."""
    parts = []
    for index, shard in enumerate(manifest.shards):
        content = pa.BufferReader(storage.read_buffer(shard.path))
        table = pq.read_table(content, columns=["row_id", "label"]).combine_chunks()
        ids = table.column("row_id").chunk(0)
        start = ids.offset * ROW_ID_BYTES
        raw = ids.buffers()[1][start : start + len(ids) * ROW_ID_BYTES]
        parts.append(
            (
                np.frombuffer(raw, dtype=_KEY),
                np.full(len(ids), _ALL.index(shard.split), dtype=np.uint8),
                table.column("label").to_numpy().astype(np.int64),
                np.full(len(ids), index),
                np.arange(len(ids)),
            )
        )
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    keys, splits, labels, shards, rows = columns
    unique, first = np.unique(keys, return_index=True)
    return Rows(
        keys=unique,
        splits=splits[first],
        labels=labels[first],
        shards=shards[first],
        rows=rows[first],
        num_rows=len(keys),
    )


def difference(a: Rows, b: Rows, class_names: tuple[str, ...]) -> Difference:
    """Compare the rows of two data sets whose classes have the same names."""
    _, in_a, in_b = np.intersect1d(a.keys, b.keys, assume_unique=True, return_indices=True)
    went = np.setdiff1d(np.arange(len(a.keys)), in_a, assume_unique=True)
    came = np.setdiff1d(np.arange(len(b.keys)), in_b, assume_unique=True)
    moved = a.splits[in_a] != b.splits[in_b]
    relabelled = a.labels[in_a] != b.labels[in_b]
    return Difference(
        content={
            "same": int((~moved & ~relabelled).sum()),
            "came": _by_split(b, came, class_names),
            "went": _by_split(a, went, class_names),
            "moved": _changes(a.splits[in_a][moved], b.splits[in_b][moved], _ALL),
            "relabelled": _changes(
                a.labels[in_a][relabelled], b.labels[in_b][relabelled], class_names
            ),
        },
        came=came,
        went=went,
    )


def images_of(
    storage: Storage, manifest: Manifest, rows: Rows, chosen: npt.NDArray[np.int64]
) -> Images:
    """Return the pixels of some rows, (N, H, W, C); each shard is read once."""
    images = np.empty((len(chosen), *manifest.shape), dtype=np.uint8)
    for index in np.unique(rows.shards[chosen]):
        shard = manifest.shards[index]
        content = pa.BufferReader(storage.read_buffer(shard.path))
        column = pq.read_table(content, columns=["image"]).column(0)
        for place in np.flatnonzero(rows.shards[chosen] == index):
            pixels = column[int(rows.rows[chosen[place]])].as_py()
            images[place] = np.frombuffer(pixels, dtype=np.uint8).reshape(manifest.shape)
    return images


def _by_split(
    rows: Rows, chosen: npt.NDArray[np.int64], class_names: tuple[str, ...]
) -> dict[str, dict[str, int]]:
    found = {}
    for index, split in enumerate(_ALL):
        labels = rows.labels[chosen][rows.splits[chosen] == index]
        counts = np.bincount(labels, minlength=len(class_names))
        if labels.size:
            found[split] = {
                name: int(count) for name, count in zip(class_names, counts, strict=True) if count
            }
    return found


def _changes(
    before: npt.NDArray[Any], after: npt.NDArray[Any], names: tuple[str, ...]
) -> dict[str, int]:
    pairs, counts = np.unique(np.stack([before, after]), axis=1, return_counts=True)
    return {
        f"{names[int(old)]} → {names[int(new)]}": int(count)
        for (old, new), count in zip(pairs.T, counts, strict=True)
    }
