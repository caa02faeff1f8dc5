"""A few test images of a data set, for people who have no picture at hand."""

from __future__ import annotations

import base64
import io
from dataclasses import asdict, dataclass

import pyarrow.parquet as pq
from PIL import Image

from lib.data.manifest import Manifest, load_manifest
from lib.errors import DataError, StorageError
from lib.storage import Storage

MAX_SAMPLES = 10
_MAX_ROWS = 2000
"""Looked through for an image of every class."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of the test split."""

    label: str
    png: str
    """Base64."""


def read_samples(storage: Storage, data_digest: str) -> list[dict[str, str]]:
    """Return one image of each of the first classes; none if the data set is no longer there."""
    try:
        manifest = load_manifest(storage, data_digest)
        pixels = _one_a_class(storage, manifest)
    except (DataError, StorageError, OSError):
        return []
    return [
        asdict(Sample(manifest.class_names[label], _png(manifest, pixels[label])))
        for label in sorted(pixels)
    ]


def _one_a_class(storage: Storage, manifest: Manifest) -> dict[int, bytes]:
    wanted = min(MAX_SAMPLES, manifest.num_classes)
    found: dict[int, bytes] = {}
    seen = 0
    for shard in (shard for shard in manifest.shards if shard.split == "test"):
        with storage.filesystem.open_input_file(storage.path(shard.path)) as stream:
            file = pq.ParquetFile(stream)
            for batch in file.iter_batches(batch_size=100, columns=["image", "label"]):
                labels = batch.column("label").to_pylist()
                for image, label in zip(batch.column("image"), labels, strict=True):
                    if label < wanted and label not in found:
                        found[label] = image.as_py()
                seen += len(labels)
                if len(found) == wanted or seen >= _MAX_ROWS:
                    return found
    return found


def _png(manifest: Manifest, pixels: bytes) -> str:
    size = (manifest.width, manifest.height)
    buffer = io.BytesIO()
    Image.frombytes(manifest.preprocess.mode, size, pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
