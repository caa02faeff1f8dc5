"""A child of a data set: all that the parent has, and labelled images that came as live requests.

An image's part follows from its pixels alone (its row id is a hash): so one that is held out is
held out in every later generation, and two requests with the same image are never on both sides.
Test stays the parent's, so versions can be compared on it. A few hundred live rows beside tens of
thousands would hardly be learned from: their shards are listed several times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import numpy.typing as npt

from lib.data.assemble import content_digest, deviation
from lib.data.checks import ROW_ID_BYTES, Labels, RowIds, find_duplicates
from lib.data.direct import byte_rows, read_shard
from lib.data.manifest import LIVE, SPLITS, Manifest, Shard, manifest_path
from lib.data.readers import Images
from lib.data.shards import (
    chunk_rows,
    pixel_sums,
    row_ids,
    split_digest,
    store_shard,
    to_parquet,
)
from lib.data.splits import id_keys
from lib.errors import DataError, TooFewError
from lib.storage import Storage

LIVE_SOURCE = "live requests"
"""Name of the labelled rows among a child's source digests."""
_SUFFIX = "+live"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Images that were asked about, with the labels that they were given afterwards."""

    images_NHWC: Images
    labels_N: Labels
    num_unfit: int = 0
    """Labelled requests that are left out: their image is not of the model's shape."""

    @property
    def digest(self) -> str:
        """A digest of the rows, whatever their order."""
        ids, order = _sorted(row_ids(self.images_NHWC))
        return split_digest(ids, self.labels_N[order])


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendConfig:
    """What decides a child beside its parent and the rows."""

    min_rows: int = 60
    """New images, without which there is nothing to learn or to judge by."""
    live_fraction: float = 0.3
    """Held out for the gate."""
    val_fraction: float = 0.1
    share: float = 0.25
    """New live rows in train and val, as a share of the rows that were ingested; earlier live
    rows together get as much once more."""
    max_repeats: int = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (self.live_fraction > 0 and self.val_fraction > 0):
            raise ValueError("live_fraction and val_fraction must be positive")
        if self.live_fraction + self.val_fraction >= 1:
            raise ValueError("live_fraction + val_fraction must be below 1, or train gets nothing")
        if self.min_rows < 1 or self.max_repeats < 1 or self.share <= 0:
            raise ValueError("min_rows, max_repeats and share must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """A child and what became of the rows."""

    manifest: Manifest
    rows: Mapping[str, int]
    """New images by split, each counted once."""
    num_known: int
    """Images that the parent has already."""
    num_repeated: int
    """Requests with an image that another request has with the same label."""
    num_contradicting: int
    """Requests with an image that another request has with another label: none of them is used."""
    num_unfit: int

    def summary(self) -> dict[str, object]:
        """Return what a step keeps, as JSON types."""
        content = {name: value for name, value in asdict(self).items() if name != "manifest"}
        return {"digest": self.manifest.digest, **content}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    images: Images
    labels: Labels
    ids: RowIds

    def take(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> _Rows:
        return _Rows(images=self.images[rows], labels=self.labels[rows], ids=self.ids[rows])


def extend(
    storage: Storage, parent: Manifest, found: LabelledImages, config: ExtendConfig
) -> Extension:
    """Publish a child of `parent` with the labelled images, and return it.

    The same rows give the same child, in whatever order they come. Raises TooFewError if there are
    too few that are new, DataError if a label is none of the parent's classes.
    """
    _check(parent, found)
    settled, num_repeated, num_contradicting = _settle(found, parent.format_version)
    columns = {
        shard.path: _columns(storage, shard) for shard in parent.shards if shard.split != LIVE
    }
    known_ids = np.concatenate([ids for ids, _ in columns.values()])
    both = np.concatenate([known_ids, settled.ids])
    is_new = np.arange(len(both)) >= len(known_ids)
    known = np.zeros(len(settled.ids), dtype=np.bool_)
    known[[row - len(known_ids) for row, _ in find_duplicates(both, is_new)]] = True
    new = settled.take(~known)
    parts = {split: new.take(rows) for split, rows in _parts(new.ids, config).items()}
    rows = {split: len(part.ids) for split, part in parts.items()}
    extension = Extension(
        manifest=parent,
        rows=rows,
        num_known=int(known.sum()),
        num_repeated=num_repeated,
        num_contradicting=num_contradicting,
        num_unfit=found.num_unfit,
    )
    _check_enough(extension, len(found.labels_N), config)
    shards: dict[str, list[Shard]] = {}
    for split, part in parts.items():
        shards[split] = _write(storage, split, part, parent.shape)
        columns |= {shard.path: _columns(storage, shard) for shard in shards[split]}
    listed, repeats = _listed(parent, shards, config)
    manifest = _manifest(parent, listed, columns, parts["train"].images, repeats, found.digest)
    manifest = replace(
        manifest,
        live_shards=tuple(
            dict.fromkeys([*parent.live_shards, *(s.path for s in shards["train"] + shards["val"])])
        ),
    )
    if not storage.create_json(manifest_path(manifest.digest), manifest.to_json()):
        # Of an interrupted or an earlier call: named by content, so it is this one.
        manifest = Manifest.from_json(storage.read_json(manifest_path(manifest.digest)))
    return replace(extension, manifest=manifest)


def _check(parent: Manifest, found: LabelledImages) -> None:
    shape, labels = found.images_NHWC.shape[1:], found.labels_N
    if len(labels) and shape != parent.shape:
        raise DataError(
            f"live images are {shape}, data set {parent.digest[:12]} has {parent.shape}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= parent.num_classes))
    if wrong.size:
        raise DataError(
            f"{wrong.size} live requests have labels such as {labels[wrong[0]]}, data set "
            f"{parent.digest[:12]} has {parent.num_classes} classes, 0–{parent.num_classes - 1}"
        )


def _check_enough(extension: Extension, num_labelled: int, config: ExtendConfig) -> None:
    rows = extension.rows
    if sum(rows.values()) >= config.min_rows and all(rows.values()):
        return
    raise TooFewError(
        f"{sum(rows.values())} new labelled live images ({rows['train']} to train on, "
        f"{rows['val']} to validate, {rows[LIVE]} held out); at least {config.min_rows} are "
        f"needed. Of {num_labelled} labelled requests with an image {extension.num_known} are in "
        f"the data set already, {extension.num_repeated} repeat one another, "
        f"{extension.num_contradicting} contradict one another; {extension.num_unfit} more have "
        "another shape. Send labels to POST /feedback, or let a larger share of images be logged"
    )


def _settle(found: LabelledImages, format_version: int) -> tuple[_Rows, int, int]:
    """Return every image once, in the order of ids, without those whose labels contradict."""
    ids, order = _sorted(row_ids(found.images_NHWC, format_version))
    rows = _Rows(images=found.images_NHWC[order], labels=found.labels_N[order], ids=ids)
    if not len(ids):
        return rows, 0, 0
    starts = np.flatnonzero(np.r_[True, (ids[1:] != ids[:-1]).any(axis=1)])
    counts = np.diff(np.r_[starts, len(ids)])
    lowest = np.minimum.reduceat(rows.labels, starts)
    agree = lowest == np.maximum.reduceat(rows.labels, starts)
    num_repeated = int((counts[agree] - 1).sum())
    return rows.take(starts[agree]), num_repeated, int(counts[~agree].sum())


def _sorted(ids: RowIds) -> tuple[RowIds, npt.NDArray[np.int64]]:
    order = np.lexsort(ids.T[::-1])
    return ids[order], order


def _parts(ids: RowIds, config: ExtendConfig) -> dict[str, npt.NDArray[np.bool_]]:
    draws = id_keys(ids) / 2.0**64
    is_live = draws < config.live_fraction
    is_val = ~is_live & (draws < config.live_fraction + config.val_fraction)
    return {"train": ~is_live & ~is_val, "val": is_val, LIVE: is_live}


def _columns(storage: Storage, shard: Shard) -> tuple[RowIds, Labels]:
    table = read_shard(storage, shard, ["row_id", "label"])
    ids = byte_rows(table.column("row_id"), ROW_ID_BYTES)
    return ids, table.column("label").to_numpy().astype(np.int32)


def _write(storage: Storage, split: str, rows: _Rows, shape: tuple[int, int, int]) -> list[Shard]:
    step = chunk_rows(shape)
    shards = []
    for start in range(0, len(rows.ids), step):
        part = rows.take(np.arange(start, min(start + step, len(rows.ids))))
        content = to_parquet(part.images, part.labels, part.ids)
        shards.append(store_shard(storage, split, len(part.ids), content))
    return shards


def _listed(
    parent: Manifest, new: Mapping[str, Sequence[Shard]], config: ExtendConfig
) -> tuple[tuple[Shard, ...], int]:
    """Return all shards, those of live rows as often as needed, and how often new train ones."""
    listed: list[Shard] = []
    train_repeats = 1
    for split in SPLITS:
        there = {shard.path: shard for shard in parent.shards if shard.split == split}
        own = [shard for shard in there.values() if shard.path not in parent.live_shards]
        earlier = [shard for shard in there.values() if shard.path in parent.live_shards]
        wanted = config.share * sum(shard.rows for shard in own)
        listed += own
        listed += earlier * _repeats(earlier, wanted, config)
        repeats = _repeats(new.get(split, ()), wanted, config)
        listed += list(new.get(split, ())) * repeats
        train_repeats = repeats if split == "train" else train_repeats
    return (*listed, *new[LIVE]), train_repeats


def _repeats(shards: Sequence[Shard], wanted_rows: float, config: ExtendConfig) -> int:
    rows = sum(shard.rows for shard in shards)
    return max(1, min(config.max_repeats, round(wanted_rows / rows))) if rows else 1


def _manifest(
    parent: Manifest,
    shards: tuple[Shard, ...],
    columns: Mapping[str, tuple[RowIds, Labels]],
    new_images: Images,
    repeats: int,
    rows_digest: str,
) -> Manifest:
    split_digests, counts = {}, {}
    for split in (*SPLITS, LIVE):
        read = [columns[shard.path] for shard in shards if shard.split == split]
        labels = np.concatenate([labels for _, labels in read])
        split_digests[split] = split_digest(np.concatenate([ids for ids, _ in read]), labels)
        counts[split] = tuple(np.bincount(labels, minlength=parent.num_classes).tolist())
    mean, std = _statistics(parent, new_images, repeats)
    earlier = parent.source_digests.get(LIVE_SOURCE, "")
    source = parent.source.removesuffix(_SUFFIX) + _SUFFIX
    return replace(
        parent,
        digest=content_digest(
            parent.shape,
            parent.class_names,
            split_digests,
            parent.format_version,
            parent.preprocess.grey_range,
        ),
        source=source,
        source_digests={
            **parent.source_digests,
            LIVE_SOURCE: hashlib.sha256(f"{earlier}{rows_digest}".encode()).hexdigest(),
        },
        counts=counts,
        split_digests=split_digests,
        pixel_mean=mean,
        pixel_std=std,
        shards=shards,
        parent=parent.digest,
    )


def _statistics(
    parent: Manifest, images: Images, repeats: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the parent's mean and deviation per channel with the new train rows mixed in."""
    weight = len(images) * repeats
    total = parent.rows("train") + weight
    share = weight / total
    mean_C, square_C = (np.array(moment) for moment in pixel_sums(images).moments())
    old_mean_C, old_std_C = np.array(parent.pixel_mean), np.array(parent.pixel_std)
    mixed_C = (1 - share) * old_mean_C + share * mean_C
    mixed_square_C = (1 - share) * (old_std_C**2 + old_mean_C**2) + share * square_C
    return tuple(mixed_C.tolist()), deviation(mixed_C.tolist(), mixed_square_C.tolist())
