"""Data sets in a storage, written without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from lib.data.assemble import content_digest
from lib.data.loader import Split
from lib.data.manifest import FORMAT_VERSION, SPLITS, Manifest, Preprocess, Shard, manifest_path
from lib.data.shards import row_ids, split_digest, to_parquet
from lib.storage import Storage


def write_set(
    storage: Storage,
    splits: Mapping[str, Split],
    class_names: tuple[str, ...],
    *,
    parent: str | None = None,
    group: str | None = None,
) -> Manifest:
    """Publish a data set of two shards a split."""
    shards = []
    for split in SPLITS:
        images, labels = splits[split].images_NHWC, splits[split].labels_N
        for part in np.array_split(np.arange(len(labels)), 2):
            content = to_parquet(images[part], labels[part], row_ids(images[part]))
            sha256 = hashlib.sha256(content).hexdigest()
            path = f"data/shards/{sha256[:32]}.parquet"
            storage.write(path, content)
            shards.append(
                Shard(
                    split=split, path=path, rows=len(part), sha256=sha256, size_bytes=content.size
                )
            )
    shape = splits["train"].images_NHWC.shape[1:]
    digests = {
        split: split_digest(row_ids(found.images_NHWC), found.labels_N)
        for split, found in splits.items()
    }
    made = Manifest(
        digest=content_digest(shape, class_names, digests, FORMAT_VERSION, None),
        source="made",
        source_digests={},
        height=shape[0],
        width=shape[1],
        channels=shape[2],
        class_names=class_names,
        counts={
            split: tuple(np.bincount(found.labels_N, minlength=len(class_names)).tolist())
            for split, found in splits.items()
        },
        split_digests=digests,
        pixel_mean=(0.5,) * shape[2],
        pixel_std=(0.25,) * shape[2],
        preprocess=Preprocess(mode="L" if shape[2] == 1 else "RGB", fill=(0,) * shape[2]),
        shards=tuple(shards),
        seed=0,
        group=group,
        parent=parent,
    )
    storage.write_json(manifest_path(made.digest), made.to_json())
    return made
