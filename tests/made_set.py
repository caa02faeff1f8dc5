"""A small data set of three kinds of images, written without Ray."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.data.assemble import content_digest
from lib.data.manifest import FORMAT_VERSION, SPLITS, Manifest, Preprocess, Shard, manifest_path
from lib.data.shards import row_ids, split_digest, to_parquet
from lib.storage import Storage

SHAPE = (8, 6, 1)
NAMES = ("dark", "bright", "noisy")
ROWS = {"train": 400, "val": 80, "test": 80}


def images_of(labels: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint8]:
    """Images whose brightness tells their class, no two alike."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 80, (len(labels), *SHAPE))
    return (noise + 80 * labels[:, None, None, None]).astype(np.uint8)


def made_set(storage: Storage, *, format_version: int = FORMAT_VERSION) -> Manifest:
    shards, digests, counts = [], {}, {}
    for seed, split in enumerate(SPLITS):
        labels = np.arange(ROWS[split], dtype=np.int64) % len(NAMES)
        images = images_of(labels, seed)
        for part in np.array_split(np.arange(ROWS[split]), 2):
            ids = row_ids(images[part], format_version)
            content = to_parquet(images[part], labels[part], ids)
            sha256 = hashlib.sha256(content).hexdigest()
            path = f"data/shards/{sha256[:32]}.parquet"
            storage.write(path, content)
            size = content.size
            shards.append(
                Shard(split=split, path=path, rows=len(part), sha256=sha256, size_bytes=size)
            )
        digests[split] = split_digest(row_ids(images, format_version), labels)
        counts[split] = tuple(np.bincount(labels).tolist())
    made = Manifest(
        digest=content_digest(SHAPE, NAMES, digests, format_version, None),
        source="made",
        source_digests={"made": "0" * 64},
        height=SHAPE[0],
        width=SHAPE[1],
        channels=SHAPE[2],
        class_names=NAMES,
        counts=counts,
        split_digests=digests,
        pixel_mean=(119.5 / 255,),
        pixel_std=(0.27,),
        preprocess=Preprocess(mode="L", fill=(0,)),
        shards=tuple(shards),
        seed=0,
        format_version=format_version,
    )
    storage.write_json(manifest_path(made.digest), made.to_json())
    return made
