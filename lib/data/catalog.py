"""Which data sets there are, and which was made of which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from lib.data.direct import read_shard
from lib.data.manifest import SPLITS, Manifest, Shard, manifest_path
from lib.data.readers import Images
from lib.errors import DataError
from lib.storage import Storage

_SETS = "data/sets"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One data set of the storage root."""

    manifest: Manifest
    created: datetime

    def to_json(self) -> dict[str, Any]:
        """Return what `jobs.datasets list` says of it."""
        manifest = self.manifest
        return {
            "digest": manifest.digest,
            "created": self.created.isoformat(timespec="seconds"),
            "source": manifest.source,
            "parent": manifest.parent,
            "rows": {split: manifest.rows(split) for split in SPLITS},
            "classes": manifest.num_classes,
            "shape": list(manifest.shape),
            "bytes": sum(shard.size_bytes for shard in manifest.shards),
        }


def catalog(storage: Storage) -> list[Entry]:
    """Return every data set, the newest first."""
    paths = [path for path in storage.list(_SETS) if path.endswith(".json")]
    infos = storage.infos(paths)
    entries = [
        Entry(manifest=Manifest.from_json(storage.read_json(path)), created=_time(info.mtime))
        for path, info in zip(paths, infos, strict=True)
    ]
    return sorted(entries, key=lambda entry: (entry.created, entry.manifest.digest), reverse=True)


def describe(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Return all that is known of a data set: content, statistics, ancestors and children."""
    entries = catalog(storage)
    entry = next(entry for entry in entries if entry.manifest.digest == manifest.digest)
    return {
        **entry.to_json(),
        "class_names": list(manifest.class_names),
        "counts": {split: list(counts) for split, counts in manifest.counts.items()},
        "pixel_mean": list(manifest.pixel_mean),
        "pixel_std": list(manifest.pixel_std),
        "group": manifest.group,
        "source_digests": dict(manifest.source_digests),
        "ignored": [asdict(ignored) for ignored in manifest.ignored],
        "ancestors": ancestors(manifest, [other.manifest for other in entries]),
        "children": [
            other.manifest.digest for other in entries if other.manifest.parent == manifest.digest
        ],
    }


def own_shards(storage: Storage, manifest: Manifest) -> list[Shard]:
    """Return the shards that no other data set lists."""
    others = [entry.manifest for entry in catalog(storage)]
    shared = {s.path for other in others if other.digest != manifest.digest for s in other.shards}
    return [shard for shard in dict.fromkeys(manifest.shards) if shard.path not in shared]


def remove_set(storage: Storage, manifest: Manifest) -> None:
    """Delete a data set, the shards that no other one lists, and what was derived from it.

    The manifest goes first: an interrupted call leaves no data set that looks whole.
    """
    shards = own_shards(storage, manifest)
    storage.delete(manifest_path(manifest.digest))
    for shard in shards:
        storage.delete(shard.path)
    storage.delete(f"baseline/{manifest.digest}.json")
    for path in storage.list("reference"):
        if path.startswith(f"reference/{manifest.digest}."):
            storage.delete(path)
    for path in storage.list("data/sources"):
        if storage.read_json(path)["digest"] == manifest.digest:
            storage.delete(path)


def ancestors(manifest: Manifest, known: Sequence[Manifest]) -> list[str]:
    """Return the digests of the sets that this one was made of, the nearest first.

    The last one may be a set that is no longer there.
    """
    by_digest = {other.digest: other for other in known}
    chain: list[str] = []
    parent = manifest.parent
    while parent is not None and parent not in chain:
        chain.append(parent)
        parent = by_digest[parent].parent if parent in by_digest else None
    return chain


def samples(storage: Storage, manifest: Manifest, split: str, per_class: int) -> list[Images]:
    """Return the first images of each class, (n, H, W, C) with n ≤ `per_class`, in class order.

    Reads shards only until there are enough. Raises DataError if a shard is damaged.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    found: list[list[Images]] = [[] for _ in manifest.class_names]
    wanted = [min(per_class, count) for count in manifest.counts[split]]
    for shard in manifest.shards:
        if shard.split != split:
            continue
        table = read_shard(storage, shard)
        labels = table.column("label").to_numpy()
        column = table.column("image")
        for index, images in enumerate(found):
            for row in np.flatnonzero(labels == index)[: wanted[index] - len(images)]:
                pixels = np.frombuffer(column[int(row)].as_py(), dtype=np.uint8)
                images.append(pixels.reshape(manifest.shape))
        if all(len(images) == number for images, number in zip(found, wanted, strict=True)):
            break
    empty = np.empty((0, *manifest.shape), dtype=np.uint8)
    return [np.stack(images) if images else empty for images in found]


def _time(mtime: datetime | None) -> datetime:
    return mtime.astimezone(UTC) if mtime else datetime.fromtimestamp(0, UTC)
