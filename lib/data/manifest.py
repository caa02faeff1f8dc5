"""The manifest of a data set: all that training and serving know about its images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lib.errors import DataError
from lib.storage import Storage

_log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
LIVE = "live"
"""Split of a data set that was extended: labelled live requests that nothing is trained on."""


FORMAT_VERSIONS = (1, 2)
"""Of data sets that can be read. Row ids are BLAKE2b-128 in the first, XXH3-128 in the second."""
FORMAT_VERSION = 2
"""Of data sets that are made now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """How an uploaded picture becomes an array of the data set's shape."""

    mode: str
    """Pillow mode: `L` for one channel, `RGB` for three."""
    fill: tuple[int, ...]
    """Per channel, 0–255: the colour put beside a picture of another aspect ratio."""
    grey_range: tuple[int, int] | None = None
    """Values of 16-bit grey pictures that become 0 and 255; None: all 16 bits, 0 and 65535."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Preprocess:
        """Rebuild from JSON."""
        grey_range = content.get("grey_range")
        return cls(
            mode=content["mode"],
            fill=tuple(content["fill"]),
            grey_range=(grey_range[0], grey_range[1]) if grey_range else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ignored:
    """Files or folders of a source that are no part of the data set, all for one reason."""

    reason: str
    count: int
    example: str
    """The first of them, relative to the source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One Parquet file: columns image (fixed-size binary, H·W·C bytes), label, row_id."""

    split: str
    path: str
    """Relative to the storage root; named by content."""
    rows: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a data set is. Published last, so a reader sees a whole data set or none."""

    digest: str
    """Names the data set: 32 hex digits over content, shape, classes and splits."""
    source: str
    source_digests: Mapping[str, str]
    """Source file, or folder of pictures, → SHA-256."""
    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    """Split → rows per class, in the order of `class_names`."""
    split_digests: Mapping[str, str]
    """Split → digest over its row ids and labels in order; readers check against it."""
    pixel_mean: tuple[float, ...]
    """Per channel over the train split, pixels scaled to 0–1."""
    pixel_std: tuple[float, ...]
    preprocess: Preprocess
    shards: tuple[Shard, ...]
    seed: int
    """Seed of the validation split (and of test, where the source has none)."""
    group: str | None = None
    """Column of the source whose values were each kept in one split."""
    format_version: int = FORMAT_VERSION
    parent: str | None = None
    """Digest of the data set that this one extends."""
    live_shards: tuple[str, ...] = ()
    """Paths of the train and val shards, of all generations, whose rows were live requests."""
    ignored: tuple[Ignored, ...] = ()
    """What lay in the source and was not used. No part of the digest, which names the content."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels of one image."""
        return (self.height, self.width, self.channels)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def rows(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(self.counts[split])

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Rebuild a manifest from its JSON; raise DataError if it is of another format."""
        if content.get("format_version") not in FORMAT_VERSIONS:
            raise DataError(
                f"manifest format {content.get('format_version')!r} is unknown; ingest again"
            )
        fields = dict(content)
        fields["class_names"] = tuple(fields["class_names"])
        fields["counts"] = {split: tuple(counts) for split, counts in fields["counts"].items()}
        fields["pixel_mean"] = tuple(fields["pixel_mean"])
        fields["pixel_std"] = tuple(fields["pixel_std"])
        fields["preprocess"] = Preprocess.from_json(fields["preprocess"])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        fields["live_shards"] = tuple(fields.get("live_shards", ()))
        fields["ignored"] = tuple(Ignored(**ignored) for ignored in fields.get("ignored", ()))
        return cls(**fields)


def manifest_path(digest: str) -> str:
    """Return where a data set's manifest is, relative to the storage root."""
    return f"data/sets/{digest}.json"


def replacement_path(digest: str) -> str:
    """Return where the successor is recorded of a data set of which rows were erased."""
    return f"data/erased/{digest}.json"


def load_manifest(storage: Storage, digest: str) -> Manifest:
    """Read a data set's manifest; a unique prefix of the digest is enough.

    Of a data set that was replaced when rows were erased, return that without them, and log so.
    """
    # One that was ingested again is itself again.
    while (
        digest
        and not storage.exists(manifest_path(digest))
        and storage.exists(replacement_path(digest))
    ):
        successor = storage.read_json(replacement_path(digest))["digest"]
        _log.warning(
            "rows were erased from data set %s; %s, the rest, stands for it",
            digest[:12],
            successor[:12],
        )
        digest = successor
    if storage.exists(manifest_path(digest)):
        return Manifest.from_json(storage.read_json(manifest_path(digest)))
    known = [path.rsplit("/", 1)[1].removesuffix(".json") for path in storage.list("data/sets")]
    matches = [name for name in known if name.startswith(digest)] if digest else []
    if len(matches) != 1:
        raise DataError(
            f"{'no' if not matches else 'more than one'} data set {digest!r}; "
            f"known: {', '.join(name[:12] for name in known) or 'none, run jobs.ingest first'}"
        )
    return Manifest.from_json(storage.read_json(manifest_path(matches[0])))
