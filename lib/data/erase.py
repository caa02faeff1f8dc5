"""Erase rows from data sets: each set that has them is replaced by one without them."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lib.data.assemble import content_digest, deviation
from lib.data.catalog import catalog, remove_set
from lib.data.checks import ROW_ID_BYTES, Labels, RowIds
from lib.data.direct import byte_rows, read_shard
from lib.data.manifest import SPLITS, Manifest, Shard, manifest_path, replacement_path
from lib.data.shards import PixelSums, pixel_sums, split_digest, store_shard, to_parquet
from lib.errors import DataError
from lib.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """Where the rows are."""

    manifests: tuple[Manifest, ...]
    """All data sets that hold one of them, the oldest first."""
    kept: Mapping[str, npt.NDArray[np.bool_]] = field(repr=False)
    """Path of a shard that holds one → which of its rows stay."""

    def rows(self, manifest: Manifest) -> int:
        """Return how many different rows a data set loses."""
        paths = {shard.path for shard in manifest.shards} & set(self.kept)
        return sum(int((~self.kept[path]).sum()) for path in paths)


def find_rows(storage: Storage, ids: Collection[bytes]) -> Hits:
    """Look for rows, by their ids, in all data sets; every shard is read once."""
    if not ids:
        return Hits(manifests=(), kept={})
    manifests = [entry.manifest for entry in reversed(catalog(storage))]
    wanted = np.array([np.frombuffer(row, np.uint8) for row in ids], np.uint8)
    keys = _keys(wanted.reshape(-1, ROW_ID_BYTES))
    kept = {}
    for path, shard in {s.path: s for manifest in manifests for s in manifest.shards}.items():
        column = read_shard(storage, shard, ["row_id"]).column("row_id")
        is_kept = ~np.isin(_keys(byte_rows(column, ROW_ID_BYTES)), keys)
        if not is_kept.all():
            kept[path] = is_kept
    hit = tuple(m for m in manifests if any(shard.path in kept for shard in m.shards))
    for manifest in hit:
        _check_rest(manifest, kept)
    return Hits(manifests=hit, kept=kept)


def erase_rows(storage: Storage, hits: Hits) -> dict[str, str]:
    """Replace the data sets that hold the rows; return the digest of each with its successor's.

    Interrupted, it can be run again: a set goes when its successor is published.
    """
    shards = {
        shard.path: _rest(storage, manifest, shard, hits.kept[shard.path])
        for manifest in hits.manifests
        for shard in manifest.shards
        if shard.path in hits.kept
    }
    replaced: dict[str, str] = {}
    for manifest in hits.manifests:
        new = _without(storage, manifest, shards)
        storage.write_json(manifest_path(new.digest), new.to_json())
        record = {"digest": new.digest, "rows": hits.rows(manifest), "time_s": time.time()}
        storage.write_json(replacement_path(manifest.digest), record)
        replaced[manifest.digest] = new.digest
    for entry in catalog(storage):
        other, parent = entry.manifest, entry.manifest.parent
        if parent in replaced and other.digest not in replaced:
            adopted = replace(other, parent=replaced[parent])
            storage.write_json(manifest_path(other.digest), adopted.to_json())
    for manifest in hits.manifests:
        remove_set(storage, manifest)
    return replaced


def _keys(ids: RowIds) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(ids).view(np.dtype((np.void, ROW_ID_BYTES))).ravel()


def _check_rest(manifest: Manifest, kept: Mapping[str, npt.NDArray[np.bool_]]) -> None:
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        if not any(kept[s.path].any() if s.path in kept else s.rows for s in shards):
            raise DataError(
                f"data set {manifest.digest[:12]} would have no rows of {split} left; delete it "
                f"with `python -m jobs.datasets delete {manifest.digest[:12]}`, then erase again"
            )


def _rest(
    storage: Storage, manifest: Manifest, shard: Shard, kept: npt.NDArray[np.bool_]
) -> Shard | None:
    if not kept.any():
        return None
    table = read_shard(storage, shard)
    images = byte_rows(table.column("image"), int(np.prod(manifest.shape)))[kept]
    labels: Labels = table.column("label").to_numpy()[kept]
    ids = byte_rows(table.column("row_id"), ROW_ID_BYTES)[kept]
    content = to_parquet(images.reshape(-1, *manifest.shape), labels, ids)
    return store_shard(storage, shard.split, len(ids), content)


def _without(
    storage: Storage, manifest: Manifest, replaced: Mapping[str, Shard | None]
) -> Manifest:
    """Return the manifest of the rows that stay."""
    listed = [(shard.split, replaced.get(shard.path, shard)) for shard in manifest.shards]
    # Another set may list the same file as another split.
    shards = tuple(replace(shard, split=split) for split, shard in listed if shard is not None)
    columns = {}
    sums: dict[str, PixelSums] = {}
    for shard in dict.fromkeys(shards):
        table = read_shard(storage, shard)
        ids = byte_rows(table.column("row_id"), ROW_ID_BYTES)
        columns[shard.path] = (ids, table.column("label").to_numpy().astype(np.int32))
        if shard.split == "train":
            images = byte_rows(table.column("image"), int(np.prod(manifest.shape)))
            sums[shard.path] = pixel_sums(images.reshape(-1, *manifest.shape))
    split_digests, counts = {}, {}
    for split in dict.fromkeys(shard.split for shard in shards):
        read = [columns[shard.path] for shard in shards if shard.split == split]
        labels = np.concatenate([labels for _, labels in read])
        split_digests[split] = split_digest(np.concatenate([ids for ids, _ in read]), labels)
        counts[split] = tuple(np.bincount(labels, minlength=manifest.num_classes).tolist())
    train = [sums[shard.path] for shard in shards if shard.split == "train"]
    mean, square = functools.reduce(operator.add, train).moments()
    live = [replaced.get(path, path) for path in manifest.live_shards]
    return replace(
        manifest,
        digest=content_digest(
            manifest.shape,
            manifest.class_names,
            split_digests,
            manifest.format_version,
            manifest.preprocess.grey_range,
        ),
        counts=counts,
        split_digests=split_digests,
        pixel_mean=mean,
        pixel_std=deviation(mean, square),
        shards=shards,
        live_shards=tuple(
            path.path if isinstance(path, Shard) else path for path in live if path is not None
        ),
    )
